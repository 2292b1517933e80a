"""Plain data between the engine and the model runner. No torch here.

The scheduler describes a step as a `Batch`; every rank receives it. The runner returns a `StepOutput`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nanovllm.outputs import TokenLogprobs
from nanovllm.sampling_params import SamplingParams


class Row(NamedTuple):
    """One sequence's part of a step. Decoding, chunked prefill and prompt logprobs are all this.

    Args:
        slot: the sequence's slot in the batch state on the device.
        start: position of the row's first token.
        token_ids: the tokens to compute; None is the slot's last sampled token, which the device holds.
        yields_token: whether the row's last token is the sequence's last, so that its logits give the next token. The
            device samples for every row; what it samples for the others is discarded.
        scored_ids: prompt tokens whose logprobs are wanted.
        first_scored: index in the row of the token whose logits score the first of `scored_ids`. The tokens after it
            score the others.
    """

    slot: int
    start: int
    token_ids: list[int] | None
    yields_token: bool
    scored_ids: Sequence[int] = ()
    first_scored: int = 0

    @property
    def num_tokens(self) -> int:
        return 1 if self.token_ids is None else len(self.token_ids)


@dataclass(slots=True)
class Admission:
    """A slot's new sequence: all that the sampler must know about it.

    Args:
        min_length: while the sequence, prompt included, is shorter, `stop_ids` cannot be sampled.
        is_filtered: whether batches bring masks for the slot.
        prompt_ids, output_ids: the tokens so far, only if the request has penalties.
    """

    slot: int
    params: SamplingParams
    seed: int
    min_length: int
    stop_ids: tuple[int, ...]
    is_filtered: bool = False
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """The rows of one step, and what has changed since the last one.

    Args:
        rows: decode rows (`token_ids` is None) first.
        num_decode: number of decode rows.
        admissions: slots that have a new sequence.
        new_blocks: (slot, index in its block table, block id).
        masks: (slot, the tokens that it may sample from now on: [ceil(V / 32)] int32, bit i % 32 of word i // 32 is
            token i).
        logprob_rows: {k: indices of the rows that want logprobs of the sampled token and the k most likely ones}. k is
            rounded up to a power of two. Each group is computed apart, so a row that wants the whole vocabulary costs
            the others neither time nor memory.
        scored_rows: the same for the rows that have `scored_ids`.
        state_loads: (snapshot's state slot, slot): recurrent state to copy before the step.
        state_saves: (slot, snapshot's state slot): recurrent state to copy after the step.
        wants_processed_logprobs: whether some of `logprob_rows` want the distribution that is sampled from. The flags
            of their slots say which.
    """

    rows: list[Row] = field(default_factory=list)
    num_decode: int = 0
    admissions: list[Admission] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)
    masks: list[tuple[int, np.ndarray]] = field(default_factory=list)
    logprob_rows: dict[int, list[int]] = field(default_factory=dict)
    scored_rows: dict[int, list[int]] = field(default_factory=dict)
    state_loads: list[tuple[int, int]] = field(default_factory=list)
    state_saves: list[tuple[int, int]] = field(default_factory=list)
    wants_processed_logprobs: bool = False

    @property
    def slots(self) -> list[int]:
        return [row.slot for row in self.rows]

    @property
    def prefill_rows(self) -> list[Row]:
        return self.rows[self.num_decode :]

    @property
    def num_tokens(self) -> int:
        return self.num_decode + sum(row.num_tokens for row in self.prefill_rows)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether a row has `scored_ids`. Then the step keeps all hidden states, and runs without a graph."""
        return bool(self.scored_rows)


@dataclass(slots=True)
class StepOutput:
    """The results of a step.

    Args:
        token_ids: each row's new tokens: one if the row is sampled, else none. A step that verifies drafts (not
            implemented) would yield several. These are tuples, which the garbage collector visits only once.
        logprobs: those of each entry of the batch's `logprob_rows`.
        prompt_logprobs: those of the `scored_ids` of each entry of the batch's `scored_rows`, concatenated.
    """

    token_ids: list[tuple[int, ...]]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
