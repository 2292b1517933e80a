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
    decode = rows.are_decode_rows
    if decode:
        rows = _explicit(rows.slots)
    resumes = rows.starts < 0  # rows that start with their slot's last token
    counted = rows.slots[resumes & (sampling.flags[rows.slots] & HAS_PENALTIES != 0)].to(torch.int64)
    seen = sampling.counts[counted, last_token[counted]]
    sampling.counts[counted, last_token[counted]] = torch.where(seen < 2 * MAX_COUNT, seen + 2, seen)
    starts = torch.where(resumes, length[rows.slots], rows.starts)
    context_lens = (starts + rows.cu_seqlens.diff()).clamp(min=1)

    token_rows = rows.token_rows.to(torch.int64)
    slots = rows.slots[token_rows].to(torch.int64)
    index = torch.arange(len(token_rows), dtype=torch.int32, device=token_rows.device)
    positions = starts[token_rows] + index - rows.cu_seqlens[token_rows]
    positions = positions.masked_fill(slots == scratch_slot, 0).to(torch.int64)
    token_ids = torch.where(rows.token_ids < 0, last_token[slots], rows.token_ids)
    blocks = block_tables[slots, positions // block_size].to(torch.int64)
    slot_mapping = blocks * block_size + positions % block_size
    last_indices = None if decode else (rows.cu_seqlens[1:] - 1).clamp(min=0).to(torch.int64)
    return StepInputs(token_ids, positions, slot_mapping, context_lens, last_indices)


def _explicit(slots: torch.Tensor) -> StepRows:
    """Return decode rows with all fields: each row is one token, which only the device knows."""
    ends = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
    on_device = torch.full_like(slots, -1)
    return StepRows(slots, on_device, ends, ends[:-1], on_device)
