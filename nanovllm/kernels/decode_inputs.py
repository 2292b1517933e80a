"""What the decode rows of a step are, from the slots' state on the device."""

import torch

from nanovllm.kernels._triton import tl, triton


@triton.jit
def _decode_inputs_kernel(
    slots_ptr,
    last_ptr,
    length_ptr,
    tables_ptr,
    ids_ptr,
    pos_ptr,
    map_ptr,
    lens_ptr,
    batch,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < batch
    slots = tl.load(slots_ptr + rows, mask=mask, other=0).to(tl.int64)
    position = tl.load(length_ptr + slots, mask=mask, other=0)
    block = tl.load(tables_ptr + slots * table_stride + position // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
    tl.store(ids_ptr + rows, tl.load(last_ptr + slots, mask=mask, other=0), mask=mask)
    tl.store(pos_ptr + rows, position.to(tl.int64), mask=mask)
    tl.store(map_ptr + rows, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=mask)
    tl.store(lens_ptr + rows, position + 1, mask=mask)


def decode_inputs_triton(slots, last_token, length, block_tables, block_size: int):
    """`decode_inputs` as a Triton kernel."""
    batch = len(slots)
    ids, positions, places = torch.empty((3, batch), dtype=torch.int64, device=slots.device).unbind(0)
    lens = torch.empty(batch, dtype=torch.int32, device=slots.device)
    if batch:
        _decode_inputs_kernel[(triton.cdiv(batch, 128),)](
            slots,
            last_token,
            length,
            block_tables,
            ids,
            positions,
            places,
            lens,
            batch,
            block_tables.stride(0),
            BLOCK_SIZE=block_size,
            BLOCK=128,
            num_warps=4,
        )
    return ids, positions, places, lens


def decode_inputs_torch(slots, last_token, length, block_tables, block_size: int):
    """`decode_inputs` in plain torch."""
    slots = slots.to(torch.int64)
    positions = length[slots].to(torch.int64)
    blocks = block_tables[slots, positions // block_size].to(torch.int64)
    return last_token[slots], positions, blocks * block_size + positions % block_size, (positions + 1).to(torch.int32)


def decode_inputs(
    slots: torch.Tensor, last_token: torch.Tensor, length: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token that each slot computes next, and where.

    Args:
        slots: [B] int32.
        last_token: [S + 1] int64, drawn but not computed yet.
        length: [S + 1] int32, tokens computed: the last token's position.
        block_tables: [S + 1, W] int32.

    Returns:
        input_ids, positions, slot_mapping: [B] int64; context_lens: [B] int32, the token itself included.
    """
    run = decode_inputs_triton if slots.is_cuda else decode_inputs_torch
    return run(slots, last_token, length, block_tables, block_size)
