"""One sample of a request on its way through the engine. No torch here."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

import numpy as np

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.token_filter import TokenFilter
from nanovllm.outputs import LogprobRows, own_logprob
from nanovllm.sampling_params import MAX_TOKENS, SamplingParams

# The uid of a prefix: that of its last block; for the empty prefix, the request's cache salt, or 0 without one. A salt
# is a string, so that it equals no block's uid.
PrefixUid: TypeAlias = int | str


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True)
class Placement:
    """A sequence's slot, blocks and progress on the device, from its admission until it is preempted or released.

    Only models with recurrent state use the fields about snapshots.

    Args:
        slot: the sequence's index in the batch state on the device.
        block_table: ids of its KV blocks, in the order of its tokens.
        num_computed: how many tokens are computed once all scheduled steps have run.
        is_decoding: whether the device holds the sequence's last token, so that its next row is a decode row.
        num_registered: how many of its blocks the prefix index knows.
        prefix_hash, prefix_uid: hash and uid of these blocks; see `block_manager.Block`.
        planned_snapshots: positions in its known tokens where the recurrent state must be saved, in order.
        last_snapshot: position of its newest snapshot, or of the one from which it started.
        new_snapshot: slot of its newest snapshot until the block that ends there is in the prefix index.
        snapshot_block: block that has its newest snapshot; -1 if none has.
    """

    slot: int
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_decoding: bool = False
    num_registered: int = 0
    prefix_hash: int = 0
    prefix_uid: PrefixUid = 0
    planned_snapshots: list[int] = field(default_factory=list)
    last_snapshot: int = 0
    new_snapshot: int | None = None
    snapshot_block: int = -1


@dataclass(eq=False, slots=True)
class Sequence:
    """A sample's tokens and state.

    A running sequence has a placement; so has a finished one while steps that use it are in flight.

    Args:
        prompt_ids: the prompt's tokens.
        params: the request's parameters.
        stop_ids: ids of tokens that end it: the end-of-sequence ids unless ignored, and `stop_token_ids`.
        seed, request_id: set when the request is queued.
        index: index of this sample in its request.
        max_output_len: how many tokens fit after the prompt, whatever `params.max_tokens` is.
        vocab_size: the model's vocabulary size, for logprobs of all tokens.
        token_filter: limits which tokens may be sampled; None if the request does not.
        detokenizer: makes the text of a stream, and finds stop strings; None if the request needs neither.

    Attributes:
        max_tokens: largest number of tokens to generate: `params.max_tokens`, at most `max_output_len`.
        num_logprobs, num_prompt_logprobs: how many of the most likely tokens the logprobs include; None without.
        status: whether it waits, runs or has finished.
        placement: its slot and blocks; None while it has none.
        token_ids: prompt and output, as far as the host knows them.
        found_prefix: (block id, uid) of each cached block that the last `BlockManager.find_prefix` found. Empty once it
            is admitted.
        mask: the filter's bit mask of allowed next tokens, if it depends on the output. None until it is computed, and
            again once a row samples with it.
        virtual_time: decides whose mask is computed next, see `Scheduler._compute_masks`; 0 before the first one.
        mask_error: why the sequence must end before it needs another mask, if one took too long.
        num_pending: how many tokens the steps in flight sample for it: at most `EngineCore.overlap` + 1.
        num_in_flight: how many launched steps with a row of this sequence are not collected yet.
        num_scored: how many prompt tokens have their logprobs once all scheduled steps have run.
        num_cached: how many prompt tokens the prefix cache had when it was first admitted.
        scheduled_ts: when it was first admitted, by `time.monotonic`; 0 until then.
        finish_reason, stop_reason: why it has ended; see `CompletionOutput`.
        logprobs, prompt_logprobs: those of the output and of the prompt.
        cumulative_logprob: sum of the log-probabilities of the output's tokens, if they are wanted.
    """

    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    request_id: str = ""
    index: int = 0
    max_output_len: int = MAX_TOKENS
    vocab_size: int = 0
    token_filter: TokenFilter | None = None
    detokenizer: Detokenizer | None = None
    max_tokens: int = field(init=False)
    num_logprobs: int | None = field(init=False)
    num_prompt_logprobs: int | None = field(init=False)

    status: Status = Status.WAITING
    placement: Placement | None = None
    token_ids: list[int] = field(init=False)
    found_prefix: list[tuple[int, int]] = field(default_factory=list)
    mask: np.ndarray | None = None
    virtual_time: float = 0.0
    mask_error: str | None = None
    num_pending: int = 0
    num_in_flight: int = 0
    num_scored: int = 0
    num_cached: int = 0
    scheduled_ts: float = 0.0

    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: LogprobRows = field(default_factory=LogprobRows)
    prompt_logprobs: LogprobRows = field(default_factory=lambda: LogprobRows([None]))
    cumulative_logprob: float = 0.0

    def __post_init__(self):
        params = self.params
        self.token_ids = list(self.prompt_ids)
        self.max_tokens = self.max_output_len
        if params.max_tokens is not None:
            self.max_tokens = min(params.max_tokens, self.max_output_len)
        self.num_logprobs = self.vocab_size if params.logprobs == -1 else params.logprobs
        self.num_prompt_logprobs = self.vocab_size if params.prompt_logprobs == -1 else params.prompt_logprobs

    @property
    def num_tokens(self) -> int:
        """Number of tokens, including those that are still being sampled."""
        return len(self.token_ids) + self.num_pending

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def lacks_mask(self) -> bool:
        """Whether its next token cannot be sampled yet, because its mask depends on the output and is not computed."""
        return bool(self.mask is None and self.token_filter and self.token_filter.depends_on_output)

    @property
    def num_unscored(self) -> int:
        """Number of prompt tokens whose logprobs are wanted and not scheduled yet. The first token has none.

        Only a request's first sample computes them.
        """
        if self.num_prompt_logprobs is None or self.index:
            return 0
        return len(self.prompt_ids) - 1 - self.num_scored

    def append_logprobs(self, row: bytes) -> None:
        """Add the log-probabilities of an output token: a row of `TokenLogprobs`."""
        self.logprobs.append(row)
        self.cumulative_logprob += own_logprob(row)
