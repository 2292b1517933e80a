"""All that happens between the projection of q, k, v and that of the output, in one kernel: for few decode rows.

It is what rope_store.py and then decode_attention.py do, for steps in which the time of a kernel is latency. Each
program norms and rotates the queries of its KV head itself. The new key and value never come from the cache: the row's
last split holds them in registers, attends to them, and stores them for later steps. It does nothing else where there
are other splits.

So nothing in the cache that is read here is written in the same step, and a program can read its first tile of K and V
before it waits for the projection (programmatic dependent launch), as gemv.py reads weights.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.attention.decode_attention import (
    LOG2E,
    MIN_DOT,
    attend_tile,
    attention_constants,
    check_attention_inputs,
    decode_attention_torch,
    empty_softmax,
    load_tile,
    new_partials,
    offsets_in_block,
    store_or_merge,
    tile_blocks,
)
from nanovllm.ops.norm_rope.rope_store import QKTransform, qk_norm_rope_store_torch
from nanovllm.ops.triton_utils import launch_dependents, launch_options, sm_count, tl, triton, wait_for_inputs


class RopeDecodeConfig(NamedTuple):
    """How a kernel is built: tokens per step of its loop, warps, pipeline stages; and most parts of a row."""

    tile: int
    num_warps: int
    num_stages: int
    num_splits: int


def default_rope_decode_config(
    batch: int, kv_heads: int, head_dim: int, itemsize: int, sm_count: int
) -> RopeDecodeConfig:
    """A program's first tile of K and V waits in registers: 64 of each thread's for both. Four programs fit an SM."""
    most = max(1, 4 * sm_count // max(batch * kv_heads, 1))
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    tile = max(MIN_DOT, min(64, 64 * 256 // row_bytes))
    return RopeDecodeConfig(tile, num_warps=4, num_stages=2, num_splits=min(64, 1 << most.bit_length() - 1))


@triton.jit
def _rotated(x, partner, weight, partner_weight, cos, sin, eps, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Heads [R, dims] normed and rotated; a head's partner is its other half. Rounded where rope_store.py rounds."""
    dtype = x.dtype
    x = x.to(tl.float32)
    partner = partner.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x = ((x * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)
        partner = (partner * scale).to(dtype).to(tl.float32) * partner_weight.to(tl.float32)
        partner = partner.to(dtype).to(tl.float32)
    return (x * cos + partner * sin).to(dtype)


@triton.jit(do_not_specialize=["slots_ptr", "context_lens_ptr", "num_splits"])
def _rope_decode_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    slots_ptr,
    context_lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    counter_ptr,
    scale_log2e,
    eps,
    qkv_stride,
    table_stride,
    num_splits,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(context_lens_ptr + row) - 1  # of the new token; the tiles are those before it
    num_tiles = tl.cdiv(position, TILE)
    split_tiles = tl.maximum(tl.cdiv(num_tiles, tl.maximum(num_splits - 1, 1)), 1)
    num_parts = tl.minimum(tl.cdiv(num_tiles, split_tiles) + 1, num_splits)
    if split >= num_parts:
        return  # without a wait: another program of the row waits
    launch_dependents(PDL)
    first_tile = split * split_tiles
    last_tile = tl.minimum(first_tile + split_tiles, num_tiles)

    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, HEAD_PAD)
    tokens = tl.arange(0, TILE)
    is_dim = (dims < HEAD_DIM)[None, :]
    table_ptr = tables_ptr + tl.load(slots_ptr + row).to(tl.int64) * table_stride
    in_block = offsets_in_block(kv_head * HEAD_DIM + dims, BLOCK_SIZE, TILE, TOKEN_STRIDE)
    last_block = position // BLOCK_SIZE
    blocks = tile_blocks(table_ptr, first_tile, last_block, BLOCK_SIZE, TILE)
    seen = first_tile * TILE + tokens < position
    kv_mask = seen[:, None] & is_dim
    first_k, first_v = load_tile(
        k_cache_ptr, v_cache_ptr, blocks, first_tile, in_block, kv_mask, BLOCK_SIZE, TILE, TOKEN_STRIDE
    )
    blocks = tile_blocks(table_ptr, first_tile + 1, last_block, BLOCK_SIZE, TILE)
    new_place = tl.load(table_ptr + last_block).to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE

    # One matrix [ROWS, dims] of the group's query heads and, below them, the new key.
    heads = tl.arange(0, ROWS)
    is_head = (heads < GROUP)[:, None]
    is_key = (heads == GROUP)[:, None] & is_dim
    mask = (heads <= GROUP)[:, None] & is_dim
    columns = dims[None, :] + tl.zeros([ROWS, 1], tl.int32)
    partners = tl.where(columns < HALF, columns + HALF, columns - HALF)
    angles_ptr = cos_sin_ptr + position.to(tl.int64) * HEAD_DIM
    cos = tl.load(angles_ptr + columns % HALF, mask=mask, other=0.0)
    sin = tl.load(angles_ptr + columns % HALF + HALF, mask=mask, other=0.0)
    sin = tl.where(columns < HALF, -sin, sin)
    weight = cos
    partner_weight = cos
    if NORM:
        weight_ptr = tl.where(is_head, q_weight_ptr, k_weight_ptr)
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
        partner_weight = tl.load(weight_ptr + partners, mask=mask, other=0.0)
    q_heads = tl.where(is_head, kv_head * GROUP + heads[:, None], KV_HEADS * GROUP + kv_head)
    q_ptrs = qkv_ptr + row.to(tl.int64) * qkv_stride + q_heads * HEAD_DIM

    wait_for_inputs(PDL)
    x = tl.load(q_ptrs + columns, mask=mask, other=0.0)
    partner = tl.load(q_ptrs + partners, mask=mask, other=0.0)
    new_v = tl.load(q_ptrs + TOKEN_STRIDE + columns, mask=is_key, other=0.0)
    q = _rotated(x, partner, weight, partner_weight, cos, sin, eps, HEAD_DIM, NORM)

    softmax = empty_softmax(ROWS, HEAD_PAD)
    if split == num_parts - 1:
        new_offsets = new_place * TOKEN_STRIDE + kv_head * HEAD_DIM + columns
        tl.store(k_cache_ptr + new_offsets, q, mask=is_key)
        tl.store(v_cache_ptr + new_offsets, new_v, mask=is_key)
        # The matrix is a tile of keys, too, of which one counts.
        softmax = attend_tile(softmax, q, q, new_v, heads == GROUP, scale_log2e)
    if first_tile < num_tiles:
        softmax = attend_tile(softmax, q, first_k, first_v, seen, scale_log2e)
    for tile in tl.range(first_tile + 1, last_tile):
        next_blocks = tile_blocks(table_ptr, tile + 1, last_block, BLOCK_SIZE, TILE)
        seen = tile * TILE + tokens < position
        kv_mask = seen[:, None] & is_dim
        k, v = load_tile(k_cache_ptr, v_cache_ptr, blocks, tile, in_block, kv_mask, BLOCK_SIZE, TILE, TOKEN_STRIDE)
        softmax = attend_tile(softmax, q, k, v, seen, scale_log2e)
        blocks = next_blocks

    parts = (partial_ptr, lse_ptr, counter_ptr, num_splits)
    place = row * KV_HEADS + kv_head
    store_or_merge(out_ptr, parts, softmax, place, split, num_parts, num_parts, GROUP, HEAD_DIM)


def rope_decode_triton(
    qkv, transform, k_cache, v_cache, block_tables, slots, context_lens, scale, *, counters=None, config=None
) -> torch.Tensor:
    """`rope_decode_torch` as a Triton kernel, for any number of rows but meant for few.

    The slots, tables, context lengths and the cache up to the new tokens are read before the kernel waits for its
    inputs (see `wait_for_inputs`).

    Args:
        counters: as in `decode_attention_triton`.
        config: a RopeDecodeConfig; `default_rope_decode_config` if None.
    """
    num_heads, cos_sin, q_weight, k_weight, eps = transform
    batch, kv_heads, head_dim = len(qkv), *k_cache.shape[2:]
    out = torch.empty((batch, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    check_attention_inputs(out, k_cache, v_cache)
    if batch == 0:
        return out
    sizes = batch, kv_heads, head_dim, qkv.element_size(), sm_count(qkv.device)
    tile, num_warps, num_stages, num_splits = config or default_rope_decode_config(*sizes)
    partial, lse = (out, out) if num_splits == 1 else new_partials(out, num_splits)
    if counters is None:
        counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device=qkv.device)
    weights, cache = (q_weight, k_weight, cos_sin), (k_cache, v_cache, block_tables, slots, context_lens)
    tensors = qkv, *weights, *cache, out, partial, lse, counters
    _rope_decode_kernel[(kv_heads, batch, num_splits)](
        *tensors,
        scale * LOG2E,
        eps,
        qkv.stride(0),
        block_tables.stride(0),
        num_splits,
        ROWS=max(MIN_DOT, triton.next_power_of_2(num_heads // kv_heads + 1)),
        TILE=tile,
        NORM=q_weight is not None,
        num_warps=num_warps,
        num_stages=num_stages,
        **attention_constants(out, k_cache),
        **launch_options(qkv.device),
    )
    return out


def rope_decode_torch(
    qkv: torch.Tensor,
    transform: QKTransform,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`qk_norm_rope_store`, then decode attention, of rows whose position is the last of their context.

    Args:
        qkv: [B, (H + 2 K) Dh], rows contiguous.
        k_cache, v_cache: as in `decode_attention_torch`; the rows' new keys and values are written.
        block_tables, slots, context_lens, scale: as there; a row's new token is part of its context.

    Returns:
        [B, H, Dh] in qkv's dtype.
    """
    positions = context_lens.to(torch.int64) - 1
    block_size = k_cache.shape[1]
    blocks = block_tables[slots.to(torch.int64), positions // block_size].to(torch.int64)
    places = blocks * block_size + positions % block_size
    q = qk_norm_rope_store_torch(qkv, transform, positions, places, k_cache, v_cache)
    return decode_attention_torch(q, k_cache, v_cache, block_tables, slots, context_lens, scale)
