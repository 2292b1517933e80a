"""Step inputs and embedding in plain torch: the references of the kernels in this folder, and what a CPU runs."""

import torch

from nanovllm.ops.inputs.step_rows import StepInputs, StepRows
from nanovllm.ops.sampling.state import HAS_PENALTIES, MAX_COUNT, SamplingState


def embedding_torch(ids: torch.Tensor, weight: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Compute `embedding`."""
    local = ids - start
    outside = (local < 0) | (local >= len(weight))
    return weight[local.masked_fill(outside, 0)].masked_fill_(outside[:, None], 0)


def step_inputs_torch(
    rows: StepRows,
    last_token: torch.Tensor,
    length: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    scratch_slot: int,
    sampling: SamplingState,
) -> StepInputs:
    """Compute `step_inputs`."""
    if rows.are_decode_rows:
        slots = rows.slots.to(torch.int64)
        _count(slots, last_token, sampling)
        starts = length[slots]
        positions = starts.to(torch.int64)
        mapping = _slot_mapping(block_tables, slots, positions, block_size)
        return StepInputs(last_token[slots], positions, mapping, starts + 1, None)
    resumes = rows.starts < 0  # rows that start with their slot's last token
    _count(rows.slots[resumes].to(torch.int64), last_token, sampling)
    starts = torch.where(resumes, length[rows.slots], rows.starts)
    context_lens = (starts + rows.cu_seqlens.diff()).clamp(min=1)

    token_rows = rows.token_rows.to(torch.int64)
    slots = rows.slots[token_rows].to(torch.int64)
    index = torch.arange(len(token_rows), dtype=torch.int32, device=token_rows.device)
    positions = starts[token_rows] + index - rows.cu_seqlens[token_rows]
    positions = positions.masked_fill(slots == scratch_slot, 0).to(torch.int64)
    token_ids = torch.where(rows.token_ids < 0, last_token[slots], rows.token_ids)
    mapping = _slot_mapping(block_tables, slots, positions, block_size)
    last_indices = (rows.cu_seqlens[1:] - 1).clamp(min=0).to(torch.int64)
    return StepInputs(token_ids, positions, mapping, context_lens, last_indices)


def _count(slots: torch.Tensor, last_token: torch.Tensor, sampling: SamplingState) -> None:
    """Count the last token of each of the slots [R] int64 that has penalties."""
    has_penalties = sampling.flags[slots] & HAS_PENALTIES != 0
    if has_penalties.any():
        slots = slots[has_penalties]
        seen = sampling.counts[slots, last_token[slots]]
        sampling.counts[slots, last_token[slots]] = torch.where(seen < 2 * MAX_COUNT, seen + 2, seen)


def _slot_mapping(
    block_tables: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return the index of each token in the flattened cache: [T] int64."""
    blocks = block_tables[slots, positions // block_size].to(torch.int64)
    return blocks * block_size + positions % block_size
