"""A step on the device: from the batch state to sampled tokens and their logprobs."""

from collections.abc import Collection
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.attention.base import AttentionBackend, Context
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.residual import Residual
from nanovllm.layers.state import StatefulLayer
from nanovllm.messages import Batch
from nanovllm.models.decoder import Decoder
from nanovllm.ops.attention.paged_cache import PagedRows
from nanovllm.ops.attention.shared_prefix import SharedPrefixPlan
from nanovllm.ops.inputs.step_inputs import step_inputs
from nanovllm.ops.inputs.step_rows import StepInputs, StepRows
from nanovllm.ops.sampling.logprobs import LogprobTensors, process_logits, top_logprobs
from nanovllm.ops.sampling.sampling import advance_slots, sample
from nanovllm.ops.state.rows import StateRows
from nanovllm.runner.batch_state import BatchState
from nanovllm.runner.state_pool import StatePool
from nanovllm.utils.context import set_context

LOGPROB_ROWS = 64  # rows whose logprobs are computed at once, which bounds the memory for them


class StepTensors(NamedTuple):
    """The results of a step on the device.

    Args:
        tokens: [R] int64, sampled for each row.
        rank_rows: the rows that this rank samples; a graph's padding rows count.
        logits: [M, V] of the M `rank_rows`. After a graph's replay they are valid until the next replay.
        hidden: the last hidden states of all tokens, before their norm; None unless the step keeps them.
    """

    tokens: torch.Tensor
    rank_rows: slice
    logits: torch.Tensor
    hidden: Residual | None


class Forward:
    """Runs steps of one model on one batch state.

    Args:
        model: whose layers have their state bound.
        state: the slots.
        backend: attends.
        pool: the state of the layers.
        counters: int32 zeros for kernels that split their work, which set them back to 0.
    """

    def __init__(
        self, model: Decoder, state: BatchState, backend: AttentionBackend, pool: StatePool, counters: torch.Tensor
    ):
        self.model = model
        self.state = state
        self.backend = backend
        self.pool = pool
        self.counters = counters
        self.tp: TensorParallel = model.tp

    def run(self, batch: Batch) -> StepTensors:
        """Run a batch kernel by kernel, without a graph."""
        to_device = self.state.staging.to_device
        prefill_rows = batch.prefill_rows
        if not prefill_rows:
            # The device knows the rest of decode rows.
            slots = to_device(np.array(batch.slots, dtype=np.int32))
            return self.step(StepRows(slots), batch.num_decode)
        num_rows = len(batch.rows)
        num_tokens = batch.num_tokens
        packed = to_device(self.state.pack(batch, num_rows, num_tokens))
        return self.step(
            StepRows.split(packed, num_rows, num_tokens),
            batch.num_decode,
            max_seqlen_q=max(row.num_tokens for row in prefill_rows),
            max_context_len=max(row.start + row.num_tokens for row in prefill_rows),
            keep_hidden=batch.wants_prompt_logprobs,
        )

    def mixed_step(self, packed: torch.Tensor, num_rows: int, num_tokens: int, max_context_len: int) -> StepTensors:
        """Run one step whose rows may have any lengths, for a CUDA graph.

        The kernels and their grids do not depend on the content of `packed`.

        Args:
            packed: `BatchState.pack` of a batch, on the device.
            max_context_len: longest context of a row, or more.
        """
        rows = StepRows.split(packed, num_rows, num_tokens)
        return self.step(rows, 0, max_seqlen_q=num_tokens, max_context_len=max_context_len)

    def step(
        self,
        rows: StepRows,
        num_decode: int,
        max_seqlen_q: int = 0,
        max_context_len: int = 0,
        shared: SharedPrefixPlan | None = None,
        keep_hidden: bool = False,
    ) -> StepTensors:
        """Run one step from device tensors alone, so that a CUDA graph can capture it.

        Args:
            rows: the rows of the step, tensors on the device.
            num_decode: how many of the first rows attend as decode rows: `Batch.num_decode`, or 0 in a mixed graph.
            max_seqlen_q: most tokens of a row that does not attend as a decode row, or more.
            max_context_len: longest context of such a row, or more.
            shared: the prefixes that decode rows share, if they are attended once for all.
            keep_hidden: return the hidden states of all tokens.
        """
        state = self.state
        slots = rows.slots
        inputs = step_inputs(
            rows,
            state.last_token,
            state.length,
            state.block_tables,
            state.block_size,
            state.scratch_slot,
            state.sampling,
        )
        context = Context(
            backend=self.backend,
            kv_kinds=self.pool.kv_kinds,
            num_decode=num_decode,
            rows=PagedRows(state.block_tables, slots, inputs.context_lens),
            slot_mapping=inputs.slot_mapping,
            cu_seqlens_q=None if num_decode == len(slots) else rows.cu_seqlens[num_decode:],
            max_seqlen_q=max_seqlen_q,
            max_context_len=max_context_len,
            shared=shared,
            last_indices=None if keep_hidden else inputs.last_indices,
            state_rows=plan_state_rows(self.pool.slot_classes, rows, inputs, num_decode),
            counters=self.counters,
        )
        self.backend.prepare(context)
        with set_context(context):
            # One hidden state for each row's last token, or for all tokens if they are kept.
            hidden = self.model(inputs.input_ids, inputs.positions)
            last_hidden = hidden
            if keep_hidden:
                hidden.complete()  # now for all tokens: `_scored_logprobs` reads few at a time
                last_hidden = hidden[inputs.last_indices]
            logits = self.model.compute_logits(last_hidden)
        rank_rows = self.tp.rows(len(slots))
        tokens = self._sample(logits, rank_rows, slots, inputs.context_lens)
        return StepTensors(tokens, rank_rows, logits, hidden if keep_hidden else None)

    def _sample(
        self, logits: torch.Tensor, rank_rows: slice, slots: torch.Tensor, context_lens: torch.Tensor
    ) -> torch.Tensor:
        """Sample this rank's rows, exchange the tokens with the other ranks, and advance the slots."""
        state = self.state
        progress = state.last_token, state.length, state.scratch_slot
        if self.tp.size == 1:
            return sample(logits, slots, context_lens, state.sampling, progress)
        tokens = torch.zeros(len(slots), dtype=torch.int64, device=slots.device)
        tokens[rank_rows] = sample(logits, slots[rank_rows], context_lens[rank_rows], state.sampling)
        self.tp.all_gather_rows(tokens)
        advance_slots(tokens, slots, context_lens, *progress)
        return tokens

    # -- logprobs ----------------------------------------------------------------------------------------------------

    def logprobs(self, batch: Batch, result: StepTensors) -> list[LogprobTensors]:
        """Return the logprobs of the tokens sampled in the rows of each entry of `logprob_rows`."""
        return [self._sampled_logprobs(batch, result, k, rows) for k, rows in batch.logprob_rows.items()]

    def _sampled_logprobs(self, batch: Batch, result: StepTensors, k: int, rows: list[int]) -> LogprobTensors:
        """Return the logprobs of the tokens sampled in these rows of the batch, and of the k most likely tokens."""
        to_device = self.state.staging.to_device
        rank_rows = result.rank_rows
        wanted = np.array(rows, dtype=np.int64)  # indices of rows in the batch
        # This rank has only the logits of `rank_rows`. `local` are indices in `wanted`.
        is_local = (wanted >= rank_rows.start) & (wanted < rank_rows.stop)
        local = np.flatnonzero(is_local)
        tokens = result.tokens[rank_rows]
        parts = []
        # A rank without such rows joins the all-gather with empty tensors.
        for start in range(0, max(1, len(local)), LOGPROB_ROWS):
            batch_rows = wanted[local[start : start + LOGPROB_ROWS]]
            logit_rows = to_device(batch_rows - rank_rows.start)  # indices in this rank's logits and tokens
            logits = result.logits[logit_rows]
            if batch.wants_processed_logprobs:
                slots = to_device(np.array(batch.slots)[batch_rows])
                logits = process_logits(logits, slots, self.state.length[slots], self.state.sampling)
            parts.append(top_logprobs(logits, tokens[logit_rows], k))
        return self._all_gather(_concatenate(parts), local, len(wanted))

    def prompt_logprobs(self, batch: Batch, result: StepTensors) -> list[LogprobTensors]:
        """Return the logprobs of the `scored_ids` of each entry of `scored_rows`, concatenated."""
        hidden = result.hidden
        if not batch.wants_prompt_logprobs or hidden is None:  # `run` keeps it for these batches
            return []
        starts = [0, *accumulate(row.num_tokens for row in batch.rows)]
        results = []
        for k, rows in batch.scored_rows.items():
            indices: list[int] = []
            scored_ids: list[int] = []
            for i in rows:
                row = batch.rows[i]
                first = starts[i] + row.first_scored
                indices += range(first, first + len(row.scored_ids))
                scored_ids += row.scored_ids
            results.append(self._scored_logprobs(hidden, indices, scored_ids, k))
        return results

    def _scored_logprobs(self, hidden: Residual, indices: list[int], scored_ids: list[int], k: int) -> LogprobTensors:
        """Return the logprobs of `scored_ids` after the step's tokens `indices`, and of the k most likely tokens."""
        device = self.counters.device
        all_indices = torch.tensor(indices, dtype=torch.int64, device=device)
        all_ids = torch.tensor(scored_ids, dtype=torch.int64, device=device)
        parts = []
        for tokens, ids in zip(all_indices.split(LOGPROB_ROWS), all_ids.split(LOGPROB_ROWS), strict=True):
            rank_rows = self.tp.rows(len(tokens))
            result = top_logprobs(self.model.compute_logits(hidden[tokens]), ids[rank_rows], k)
            parts.append(self._all_gather(result, rank_rows, len(tokens)))
        return _concatenate(parts)

    def load_logprob_kernels(self) -> None:
        """Let torch load the kernels of `top_logprobs` now. This takes 0.3 s when they are first used."""
        weight = self.model.embed_tokens.weight
        for num_rows in (1, LOGPROB_ROWS):  # which have kernels of their own
            logits = weight.new_zeros((num_rows, self.model.config.vocab_size))
            top_logprobs(logits, torch.zeros(num_rows, dtype=torch.int64, device=weight.device), 1)

    def _all_gather(self, part: LogprobTensors, computed: slice | np.ndarray, count: int) -> LogprobTensors:
        """Return the logprobs of `count` rows. This rank has computed `part`, those of the rows `computed` [M]."""
        if self.tp.size == 1:
            return part
        indices = computed if isinstance(computed, slice) else self.state.staging.to_device(computed)
        gathered = []
        for tensor in part:
            whole = tensor.new_zeros((count, *tensor.shape[1:]))
            whole[indices] = tensor
            gathered.append(self.tp.all_gather_rows(whole))
        return LogprobTensors(*gathered)


def _concatenate(parts: list[LogprobTensors]) -> LogprobTensors:
    return LogprobTensors(*map(torch.cat, zip(*parts, strict=True)))


def plan_state_rows(
    classes: Collection[type[StatefulLayer]], rows: StepRows, inputs: StepInputs, num_decode: int
) -> dict[type, StateRows]:
    """Return the rows of a step for layers of these classes, which have recurrent state.

    The start of a padding row without tokens is arbitrary; nothing reads it.

    Args:
        num_decode: number of rows that certainly have one token.
    """
    if not classes:
        return {}
    if rows.are_decode_rows:
        return dict.fromkeys(classes, StateRows(rows.slots, inputs.positions))
    starts = inputs.context_lens - rows.cu_seqlens.diff()
    num_tokens = len(rows.token_ids)
    # A plan is for the rows of two or more tokens.
    max_prompts = max(1, min(len(rows.slots) - num_decode, num_tokens // 2))
    plans = {cls: cls.plan_prompts(rows.cu_seqlens, num_tokens, max_prompts) for cls in classes}
    return {cls: StateRows(rows.slots, starts, rows.cu_seqlens, plan) for cls, plan in plans.items()}
