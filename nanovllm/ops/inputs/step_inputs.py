"""What a step's tokens are and where they go, from the slots' state on the device and what little the host sends."""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from nanovllm.ops.sampling.sampling import HAS_PENALTIES, MAX_COUNT, PARAMS_STRIDE, SamplingState
from nanovllm.ops.triton_utils import tl, triton


class StepRows(NamedTuple):
    """The rows of a step as the host sends them: R sequences with T tokens in all, int32 each.

    Args:
        slots: [R].
        starts: [R], position of a row's first token; -1 is the slot's length, which the device knows.
        cu_seqlens: [R + 1], where each row's tokens begin, and where the last ones end.
        token_rows: [T], the row of each token.
        token_ids: [T]; -1 is the slot's last token, which the device knows.
    """

    slots: torch.Tensor
    starts: torch.Tensor
    cu_seqlens: torch.Tensor
    token_rows: torch.Tensor
    token_ids: torch.Tensor

    @staticmethod
    def size(num_rows: int, num_tokens: int) -> int:
        """Numbers in all five."""
        return 3 * num_rows + 1 + 2 * num_tokens

    @classmethod
    def split(cls, packed, num_rows: int, num_tokens: int) -> "StepRows":
        """Views of the five in one array or tensor that holds them one after the other."""
        ends = accumulate((0, num_rows, num_rows, num_rows + 1, num_tokens, num_tokens))
        return cls(*(packed[start:end] for start, end in pairwise(ends)))


class StepInputs(NamedTuple):
    """What the model is fed.

    Args:
        input_ids, positions, slot_mapping: [T] int64; the last is a token's place in the flattened cache.
        context_lens: [R] int32, tokens a row sees, its own included; 1 for padding rows without any.
        last_indices: [R] int64, the last token of each row; None if each row is one token.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    last_indices: torch.Tensor | None


@triton.jit
def _count(
    params_ptr, counts_ptr, slots, token_ids, is_new, vocab_size, PARAMS_STRIDE: tl.constexpr, MAX_COUNT: tl.constexpr
):
    """Count the tokens `token_ids` of `slots` whose penalties depend on it."""
    counts = is_new & (tl.load(params_ptr + slots * PARAMS_STRIDE + 7, mask=is_new, other=0) & 1 != 0)
    places = counts_ptr + slots * vocab_size + token_ids
    seen = tl.load(places, mask=counts, other=0)
    tl.store(places, tl.where(seen < 2 * MAX_COUNT, seen + 2, seen), mask=counts)


@triton.jit(
    do_not_specialize=[
        "starts_ptr",
        "cu_ptr",
        "token_rows_ptr",
        "token_ids_ptr",
        "positions_ptr",
        "last_index_ptr",
        "num_rows",
        "num_tokens",
    ]
)
def _step_inputs_kernel(
    slots_ptr,
    starts_ptr,
    cu_ptr,
    token_rows_ptr,
    token_ids_ptr,
    last_ptr,
    length_ptr,
    tables_ptr,
    ids_ptr,
    positions_ptr,
    mapping_ptr,
    lens_ptr,
    last_index_ptr,
    params_ptr,
    counts_ptr,
    num_rows,
    num_tokens,
    table_stride,
    scratch_slot,
    vocab_size,
    PARAMS_STRIDE: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # No `wait_for_inputs`: this begins a chain, whose kernels read what is written here before they wait.
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = index < num_rows
    is_token = index < num_tokens
    slots = tl.load(slots_ptr + index, mask=is_row, other=0).to(tl.int64)
    if DECODE:  # row i is token i
        positions = tl.load(length_ptr + slots, mask=is_row, other=0)
        token_ids = tl.load(last_ptr + slots, mask=is_row, other=0)
        tl.store(lens_ptr + index, positions + 1, mask=is_row)
        _count(params_ptr, counts_ptr, slots, token_ids, is_row, vocab_size, PARAMS_STRIDE, MAX_COUNT)
    else:
        starts = tl.load(starts_ptr + index, mask=is_row, other=0)
        last = tl.load(last_ptr + slots, mask=is_row, other=0)
        _count(params_ptr, counts_ptr, slots, last, is_row & (starts < 0), vocab_size, PARAMS_STRIDE, MAX_COUNT)
        starts = tl.where(starts < 0, tl.load(length_ptr + slots, mask=is_row, other=0), starts)
        begin = tl.load(cu_ptr + index, mask=is_row, other=0)
        end = tl.load(cu_ptr + index + 1, mask=is_row, other=0)
        tl.store(lens_ptr + index, tl.maximum(starts + end - begin, 1), mask=is_row)
        tl.store(last_index_ptr + index, tl.maximum(end - 1, 0).to(tl.int64), mask=is_row)

        rows = tl.load(token_rows_ptr + index, mask=is_token, other=0)
        slots = tl.load(slots_ptr + rows, mask=is_token, other=0).to(tl.int64)
        starts = tl.load(starts_ptr + rows, mask=is_token, other=0)
        starts = tl.where(starts < 0, tl.load(length_ptr + slots, mask=is_token, other=0), starts)
        positions = starts + index - tl.load(cu_ptr + rows, mask=is_token, other=0)
        token_ids = tl.load(token_ids_ptr + index, mask=is_token, other=0).to(tl.int64)
        token_ids = tl.where(token_ids < 0, tl.load(last_ptr + slots, mask=is_token, other=0), token_ids)
        positions = tl.where(slots == scratch_slot, 0, positions)  # padding may be longer than a table is wide
    blocks = tl.load(tables_ptr + slots * table_stride + positions // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
    tl.store(ids_ptr + index, token_ids, mask=is_token)
    tl.store(positions_ptr + index, positions.to(tl.int64), mask=is_token)
    tl.store(mapping_ptr + index, blocks * BLOCK_SIZE + positions % BLOCK_SIZE, mask=is_token)


def step_inputs_triton(
    rows, last_token, length, block_tables, block_size: int, scratch_slot: int, sampling: SamplingState
) -> StepInputs:
    """`step_inputs` as a Triton kernel."""
    decode = isinstance(rows, torch.Tensor)
    rows = StepRows(*[rows] * 5) if decode else rows
    num_rows, num_tokens = len(rows.slots), len(rows.token_ids)
    device = last_token.device
    ids, positions, mapping = torch.empty((3, num_tokens), dtype=torch.int64, device=device).unbind(0)
    lens = torch.empty(num_rows, dtype=torch.int32, device=device)
    last = positions if decode else torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_tokens:
        inputs, outputs = (*rows, last_token, length, block_tables), (ids, positions, mapping, lens, last)
        sizes = num_rows, num_tokens, block_tables.stride(0), scratch_slot, sampling.counts.shape[1]
        _step_inputs_kernel[(triton.cdiv(max(num_rows, num_tokens), 128),)](
            *inputs,
            *outputs,
            sampling.table,
            sampling.counts,
            *sizes,
            PARAMS_STRIDE=PARAMS_STRIDE,
            MAX_COUNT=MAX_COUNT,
            DECODE=decode,
            BLOCK_SIZE=block_size,
            BLOCK=128,
            num_warps=4,
        )
    return StepInputs(ids, positions, mapping, lens, None if decode else last)


def step_inputs_torch(
    rows, last_token, length, block_tables, block_size: int, scratch_slot: int, sampling: SamplingState
) -> StepInputs:
    """`step_inputs` in plain torch."""
    decode = isinstance(rows, torch.Tensor)
    if decode:
        index = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        known = torch.full_like(index, -1)
        rows = StepRows(rows, known, torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device), index, known)
    known = rows.starts < 0
    counted = rows.slots[known & (sampling.flags[rows.slots] & HAS_PENALTIES != 0)].to(torch.int64)
    seen = sampling.counts[counted, last_token[counted]]
    sampling.counts[counted, last_token[counted]] = torch.where(seen < 2 * MAX_COUNT, seen + 2, seen)
    starts = torch.where(known, length[rows.slots], rows.starts)
    context_lens = (starts + rows.cu_seqlens.diff()).clamp(min=1)
    of = rows.token_rows.to(torch.int64)
    slots = rows.slots[of].to(torch.int64)
    index = torch.arange(len(of), dtype=torch.int32, device=of.device)
    positions = (starts[of] + index - rows.cu_seqlens[of]).masked_fill(slots == scratch_slot, 0).to(torch.int64)
    token_ids = torch.where(rows.token_ids < 0, last_token[slots], rows.token_ids)
    blocks = block_tables[slots, positions // block_size].to(torch.int64)
    last = None if decode else (rows.cu_seqlens[1:] - 1).clamp(min=0).to(torch.int64)
    return StepInputs(token_ids, positions, blocks * block_size + positions % block_size, context_lens, last)


def step_inputs(
    rows: StepRows | torch.Tensor,
    last_token: torch.Tensor,
    length: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    scratch_slot: int,
    sampling: SamplingState,
) -> StepInputs:
    """The tokens of a step, and where they go.

    Args:
        rows: the step's rows; or only slots [B] int32, each of which computes its last token.
        last_token: [S + 1] int64, drawn but not computed yet.
        length: [S + 1] int32, tokens computed: the last token's position.
        block_tables: [S + 1, W] int32.
        scratch_slot: the slot of padding rows, whose tokens are all put at position 0.
        sampling: where the last tokens of slots with penalties are counted, as they are now part of the output.
    """
    run = step_inputs_triton if last_token.is_cuda else step_inputs_torch
    return run(rows, last_token, length, block_tables, block_size, scratch_slot, sampling)
