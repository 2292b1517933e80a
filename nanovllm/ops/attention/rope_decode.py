"""Fused RoPE, cache write and decode attention: one kernel from the QKV projection to the output projection.

It computes what rope_store.py and decode_attention.py do, for small batches, where the latency of each kernel counts.
Each program norms and rotates the queries of its KV head itself. The new key and value never come from the cache: the
sequence's last split holds them in registers, attends to them and stores them for later steps. If there are other
splits, it does nothing else. With a cache in FP8, it attends to the quantized key and value, as later steps will.

So the kernel reads nothing from the cache that the same step writes. A program can load its first tile of K and V
before it waits for the projection (programmatic dependent launch), as gemv.py does with weights.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.attention.fp8_cache import pack_scales, quantize_heads, query_operand
from nanovllm.ops.attention.online_softmax import attend_tile, empty_partials, init_softmax, store_or_merge
from nanovllm.ops.attention.paged_cache import (
    LOG2E,
    MIN_DOT,
    PagedKV,
    PagedRows,
    attention_constants,
    load_tile,
    offsets_in_block,
    tile_blocks,
)
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.ops.triton_utils import launch_dependents, launch_options, sm_count, tl, triton, wait_for_inputs


class RopeDecodeConfig(NamedTuple):
    """Settings of the kernel.

    Attributes:
        tile: tokens per loop iteration.
        num_warps, num_stages: warps and pipeline stages.
        num_splits: most splits of a sequence.
    """

    tile: int
    num_warps: int
    num_stages: int
    num_splits: int


def default_rope_decode_config(
    batch: int, kv_heads: int, head_dim: int, itemsize: int, sm_count: int
) -> RopeDecodeConfig:
    """Return settings whose first tile of K and V takes 64 registers per thread, so that four programs fit on an SM."""
    max_splits = max(1, 4 * sm_count // max(batch * kv_heads, 1))
    head_bytes = triton.next_power_of_2(head_dim) * itemsize
    tile = max(MIN_DOT, min(64, 64 * 256 // head_bytes))
    return RopeDecodeConfig(tile, num_warps=4, num_stages=2, num_splits=min(64, 1 << max_splits.bit_length() - 1))


@triton.jit
def _rotated(x, partner, weight, partner_weight, cos, sin, eps, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Norm and rotate heads [R, dims]; `partner` holds each head's other half. Rounds where rope_store.py rounds."""
    dtype = x.dtype
    x = x.to(tl.float32)
    partner = partner.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x = ((x * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)
        partner = (partner * scale).to(weight.dtype).to(tl.float32) * partner_weight.to(tl.float32)
        partner = partner.to(dtype).to(tl.float32)
    return (x * cos + partner * sin).to(dtype)


@triton.jit(do_not_specialize=["slots_ptr", "context_lens_ptr", "num_splits"])
def _rope_decode_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    query_scale_ptr,
    k_cache_ptr,
    v_cache_ptr,
    scales_ptr,
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
    GROUP_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    seq = tl.program_id(1)
    split = tl.program_id(2)
    # The new token's position. Tiles hold the tokens before it.
    position = tl.load(context_lens_ptr + seq) - 1
    start_tile = 0
    if WINDOW:
        start_tile = tl.maximum(position + 1 - WINDOW, 0) // TILE
    # A window of 1 hides all tokens before the new one.
    end_tile = start_tile if WINDOW == 1 else tl.cdiv(position, TILE)
    num_tiles = end_tile - start_tile
    split_tiles = tl.maximum(tl.cdiv(num_tiles, tl.maximum(num_splits - 1, 1)), 1)
    num_used = tl.minimum(tl.cdiv(num_tiles, split_tiles) + 1, num_splits)
    if split >= num_used:
        return  # no need to wait for inputs: another program of the sequence does
    launch_dependents(PDL)
    first_tile = start_tile + split * split_tiles
    last_tile = tl.minimum(first_tile + split_tiles, end_tile)

    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, HEAD_PAD)
    tokens = tl.arange(0, TILE)
    is_dim = (dims < HEAD_DIM)[None, :]
    table_ptr = tables_ptr + tl.load(slots_ptr + seq).to(tl.int64) * table_stride
    in_block = offsets_in_block(kv_head * HEAD_DIM + dims, BLOCK_SIZE, TILE, TOKEN_STRIDE)
    last_block = position // BLOCK_SIZE
    blocks = tile_blocks(table_ptr, first_tile, last_block, BLOCK_SIZE, TILE)
    seen = first_tile * TILE + tokens < position
    if WINDOW:
        seen &= first_tile * TILE + tokens > position - WINDOW
    cache = (k_cache_ptr, v_cache_ptr, scales_ptr)
    first = load_tile(cache, blocks, first_tile, kv_head, in_block, seen, HEAD_DIM, KV_HEADS, BLOCK_SIZE, TILE)
    blocks = tile_blocks(table_ptr, first_tile + 1, last_block, BLOCK_SIZE, TILE)
    new_block = tl.load(table_ptr + last_block).to(tl.int64)
    new_index = new_block * BLOCK_SIZE + position % BLOCK_SIZE

    # One matrix [GROUP_PAD, dims]: the group's query heads and, below them, the new key.
    heads = tl.arange(0, GROUP_PAD)
    is_head = (heads < GROUP)[:, None]
    is_key = (heads == GROUP)[:, None] & is_dim
    mask = (heads <= GROUP)[:, None] & is_dim
    columns = dims[None, :] + tl.zeros([GROUP_PAD, 1], tl.int32)
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
    q_ptrs = qkv_ptr + seq.to(tl.int64) * qkv_stride + q_heads * HEAD_DIM

    wait_for_inputs(PDL)
    x = tl.load(q_ptrs + columns, mask=mask, other=0.0)
    partner = tl.load(q_ptrs + partners, mask=mask, other=0.0)
    new_v = tl.load(q_ptrs + TOKEN_STRIDE + columns, mask=is_key, other=0.0)
    q = _rotated(x, partner, weight, partner_weight, cos, sin, eps, HEAD_DIM, NORM)
    if query_scale_ptr is not None:
        query_scale = tl.load(query_scale_ptr + position).to(q.dtype).to(tl.float32)
        q = tl.where(is_head, (q.to(tl.float32) * query_scale).to(q.dtype), q)

    softmax = init_softmax(GROUP_PAD, HEAD_PAD)
    # The same matrix serves as a tile of keys, all but the new one masked.
    new_k = q
    new_scales = tl.zeros([GROUP_PAD], tl.int32)
    if scales_ptr is not None:
        new_k, k_scale = quantize_heads(q)
        new_v, v_scale = quantize_heads(new_v)
        new_scales = pack_scales(k_scale, v_scale)
        q = query_operand(q, scales_ptr)
    if split == num_used - 1:
        new_offsets = new_index * TOKEN_STRIDE + kv_head * HEAD_DIM + columns
        tl.store(k_cache_ptr + new_offsets, new_k, mask=is_key)
        tl.store(v_cache_ptr + new_offsets, new_v, mask=is_key)
        if scales_ptr is not None:
            word_index = (new_block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
            words_ptr = scales_ptr.to(tl.pointer_type(tl.int32)) + word_index
            tl.store(words_ptr + 0 * heads, new_scales, mask=heads == GROUP)
        softmax = attend_tile(softmax, q, (new_k, new_v, new_scales), heads == GROUP, scale_log2e)
    if first_tile < end_tile:
        softmax = attend_tile(softmax, q, first, seen, scale_log2e)
    for tile in tl.range(first_tile + 1, last_tile):
        next_blocks = tile_blocks(table_ptr, tile + 1, last_block, BLOCK_SIZE, TILE)
        seen = tile * TILE + tokens < position
        if WINDOW:
            seen &= tile * TILE + tokens > position - WINDOW
        loaded = load_tile(cache, blocks, tile, kv_head, in_block, seen, HEAD_DIM, KV_HEADS, BLOCK_SIZE, TILE)
        softmax = attend_tile(softmax, q, loaded, seen, scale_log2e)
        blocks = next_blocks

    partials = (partial_ptr, lse_ptr, counter_ptr, num_splits)
    group = seq * KV_HEADS + kv_head
    store_or_merge(out_ptr, partials, softmax, group, split, num_used, num_used, GROUP, HEAD_DIM)


def rope_decode_triton(
    qkv: torch.Tensor,
    transform: QKTransform,
    kv: PagedKV,
    rows: PagedRows,
    scale: float,
    *,
    counters: torch.Tensor | None = None,
    config: RopeDecodeConfig | None = None,
) -> torch.Tensor:
    """Compute `rope_decode_torch` with a Triton kernel; correct for any batch, meant for small ones.

    The kernel reads rows and the caches before it waits for its inputs (see `wait_for_inputs`).

    Args:
        qkv, transform, kv, rows, scale: as in `rope_decode_torch`.
        counters: as in `decode_attention_triton`.
        config: `default_rope_decode_config` if None.
    """
    batch = len(qkv)
    heads = transform.num_heads
    kv_heads = kv.kv_heads
    out = torch.empty((batch, heads, kv.head_dim), dtype=qkv.dtype, device=qkv.device)
    kv.check_queries(out)
    if batch == 0:
        return out
    if config is None:
        config = default_rope_decode_config(batch, kv_heads, kv.head_dim, qkv.element_size(), sm_count(qkv.device))
    partial, lse = (out, out) if config.num_splits == 1 else empty_partials(out, config.num_splits)
    if counters is None:
        counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device=qkv.device)
    _rope_decode_kernel[(kv_heads, batch, config.num_splits)](
        qkv,
        transform.q_weight,
        transform.k_weight,
        transform.cos_sin,
        transform.query_scale,
        kv.k_cache,
        kv.v_cache,
        kv.scales,
        rows.block_tables,
        rows.slots,
        rows.context_lens,
        out,
        partial,
        lse,
        counters,
        scale * LOG2E,
        transform.eps,
        qkv.stride(0),
        rows.block_tables.stride(0),
        config.num_splits,
        GROUP_PAD=max(MIN_DOT, triton.next_power_of_2(heads // kv_heads + 1)),
        TILE=config.tile,
        WINDOW=kv.window,
        NORM=transform.q_weight is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **attention_constants(heads, kv),
        **launch_options(qkv.device),
    )
    return out
