"""One sample of a request on its way through the engine. No torch here."""

from dataclasses import dataclass, field
from enum import Enum, auto

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.grammars import GrammarFilter
from nanovllm.engine.token_filter import TokenFilter
from nanovllm.outputs import LogprobRows
from nanovllm.sampling_params import SamplingParams


class Status(Enum):
    WAITING = auto()  # owns nothing
    RUNNING = auto()  # owns a slot and blocks
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """A sample's tokens and how far the device is with them.

    Three counts say it all (`pending` is 0 or 1 at overlap depth 1):

        token_ids        the tokens the host knows
        pending          tokens sampled on the device that the host has yet to see
        num_computed     tokens whose KV is in the cache, counted when their step is scheduled
    """

    prompt_ids: list[int]
    params: SamplingParams
    end_ids: frozenset[int] = frozenset()  # the ids that finish it: end-of-sequence unless ignored, stop_token_ids
    seed: int = 0
    request_id: int | str = 0
    index: int = 0  # which of the request's samples
    token_filter: TokenFilter | GrammarFilter | None = None
    detokenizer: Detokenizer | None = None  # of a request that stops at strings or is streamed
    status: Status = Status.WAITING
    token_ids: list[int] = field(init=False)
    pending: int = 0
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache when it was first admitted
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: LogprobRows = field(default_factory=LogprobRows)
    prompt_logprobs: LogprobRows = field(default_factory=lambda: LogprobRows([None]))
    num_scored: int = 0  # prompt tokens whose logprobs are computed, counted when their step is scheduled

    # What it owns while running.
    slot: int = -1
    block_table: list[int] = field(default_factory=list)
    on_device: bool = False  # the slot holds the last token: the next step is a decode row
    in_flight: int = 0  # launched steps that have not been collected and hold a row of this sequence

    # How far its blocks are in the prefix index (see BlockManager.register).
    num_registered: int = 0
    prefix_hash: int = 0
    prefix_uid: int | str = 0

    def __post_init__(self):
        self.token_ids = list(self.prompt_ids)

    @property
    def waits(self) -> bool:
        """Whether its next step needs a token that the host has yet to see."""
        return bool(self.pending and self.token_filter and self.token_filter.depends_on_output)

    @property
    def num_to_score(self) -> int:
        """Prompt tokens, but for the first, whose logprobs are asked for and not yet scheduled; the first sample's."""
        if self.params.prompt_logprobs is None or self.index:
            return 0
        return len(self.prompt_ids) - 1 - self.num_scored

    @property
    def num_tokens(self) -> int:
        """All tokens there are, those the host has yet to see included."""
        return len(self.token_ids) + self.pending

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]
