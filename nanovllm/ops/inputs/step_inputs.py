"""Compute the model's inputs of a step on the device, from the slots' state and the little that the host sends."""

import torch

from nanovllm.ops.inputs.reference import step_inputs_torch
from nanovllm.ops.inputs.step_rows import StepInputs, StepRows
from nanovllm.ops.sampling.fields import FLAGS, HAS_PENALTIES, MAX_COUNT, PARAMS_STRIDE
from nanovllm.ops.sampling.state import SamplingState
from nanovllm.ops.triton_utils import tl, triton


@triton.jit
def _count(params_ptr, counts_ptr, slots, token_ids, is_new, vocab_size):
    """Count the new output tokens `token_ids` of the `slots` that have penalties."""
    flags = tl.load(params_ptr + slots * PARAMS_STRIDE + FLAGS, mask=is_new, other=0)
    is_counted = is_new & (flags & HAS_PENALTIES != 0)
    count_ptrs = counts_ptr + slots * vocab_size + token_ids
    seen = tl.load(count_ptrs, mask=is_counted, other=0)
    tl.store(count_ptrs, tl.where(seen < 2 * MAX_COUNT, seen + 2, seen), mask=is_counted)


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
    DECODE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Index i is row i and token i. With DECODE, the host has sent only the slots: each row is its slot's last token.
    # Otherwise rows have any number of tokens, and -1 as a row's start or as a token's id stands for what only the
    # device knows: the slot's length, and its last token.
    #
    # A slot's last token is counted for penalties here, one step after it was sampled: in the step that computes its
    # K and V, which is also the first one whose logits it penalizes.
    #
    # No `wait_for_inputs`: this runs before the chain of dependent launches (`start_chain`), whose kernels read these
    # outputs before they wait.
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = index < num_rows
    is_token = index < num_tokens
    slots = tl.load(slots_ptr + index, mask=is_row, other=0).to(tl.int64)
    if DECODE:
        positions = tl.load(length_ptr + slots, mask=is_row, other=0)
        token_ids = tl.load(last_ptr + slots, mask=is_row, other=0)
        tl.store(lens_ptr + index, positions + 1, mask=is_row)
        _count(params_ptr, counts_ptr, slots, token_ids, is_row, vocab_size)
    else:
        # By row: the length of its context, and its last token's index.
        starts = tl.load(starts_ptr + index, mask=is_row, other=0)
        last = tl.load(last_ptr + slots, mask=is_row, other=0)
        _count(params_ptr, counts_ptr, slots, last, is_row & (starts < 0), vocab_size)
        starts = tl.where(starts < 0, tl.load(length_ptr + slots, mask=is_row, other=0), starts)
        begin = tl.load(cu_ptr + index, mask=is_row, other=0)
        end = tl.load(cu_ptr + index + 1, mask=is_row, other=0)
        tl.store(lens_ptr + index, tl.maximum(starts + end - begin, 1), mask=is_row)
        tl.store(last_index_ptr + index, tl.maximum(end - 1, 0).to(tl.int64), mask=is_row)

        # By token: its position and its id.
        rows = tl.load(token_rows_ptr + index, mask=is_token, other=0)
        slots = tl.load(slots_ptr + rows, mask=is_token, other=0).to(tl.int64)
        starts = tl.load(starts_ptr + rows, mask=is_token, other=0)
        starts = tl.where(starts < 0, tl.load(length_ptr + slots, mask=is_token, other=0), starts)
        positions = starts + index - tl.load(cu_ptr + rows, mask=is_token, other=0)
        token_ids = tl.load(token_ids_ptr + index, mask=is_token, other=0).to(tl.int64)
        token_ids = tl.where(token_ids < 0, tl.load(last_ptr + slots, mask=is_token, other=0), token_ids)
        # There may be more padding tokens than a block table holds.
        positions = tl.where(slots == scratch_slot, 0, positions)
    blocks = tl.load(tables_ptr + slots * table_stride + positions // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
    tl.store(ids_ptr + index, token_ids, mask=is_token)
    tl.store(positions_ptr + index, positions.to(tl.int64), mask=is_token)
    tl.store(mapping_ptr + index, blocks * BLOCK_SIZE + positions % BLOCK_SIZE, mask=is_token)


def step_inputs_triton(
    rows: StepRows,
    last_token: torch.Tensor,
    length: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    scratch_slot: int,
    sampling: SamplingState,
) -> StepInputs:
    """Compute `step_inputs` with a Triton kernel."""
    decode = rows.are_decode_rows
    if decode:
        rows = StepRows(*[rows.slots] * 5)  # the kernel reads the slots only, but each pointer needs a tensor
    num_rows = len(rows.slots)
    num_tokens = len(rows.token_ids)
    device = last_token.device
    ids, positions, mapping = torch.empty((3, num_tokens), dtype=torch.int64, device=device).unbind(0)
    lens = torch.empty(num_rows, dtype=torch.int32, device=device)
    last = positions if decode else torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_tokens:
        _step_inputs_kernel[(triton.cdiv(max(num_rows, num_tokens), 128),)](
            rows.slots,
            rows.starts,
            rows.cu_seqlens,
            rows.token_rows,
            rows.token_ids,
            last_token,
            length,
            block_tables,
            ids,
            positions,
            mapping,
            lens,
            last,
            sampling.table,
            sampling.counts,
            num_rows,
            num_tokens,
            block_tables.stride(0),
            scratch_slot,
            sampling.counts.shape[1],
            DECODE=decode,
            BLOCK_SIZE=block_size,
            BLOCK=128,
            num_warps=4,
        )
    return StepInputs(ids, positions, mapping, lens, None if decode else last)


def step_inputs(
    rows: StepRows,
    last_token: torch.Tensor,
    length: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    scratch_slot: int,
    sampling: SamplingState,
) -> StepInputs:
    """Return the tokens of a step, their positions and where their K and V go.

    Args:
        rows: the step's rows, tensors on the device.
        last_token: [S + 1] int64, the token that each slot has sampled last. Its K and V are not computed yet.
        length: [S + 1] int32, how many tokens of each slot are computed. This is the position of its last token.
        block_tables: [S + 1, W] int32.
        scratch_slot: the slot of padding rows; all their tokens get position 0.
        sampling: counts the last tokens of slots with penalties, because these now belong to the output.
    """
    run = step_inputs_triton if last_token.is_cuda else step_inputs_torch
    return run(rows, last_token, length, block_tables, block_size, scratch_slot, sampling)
