"""Norm and rotate queries and keys, and store K and V in the cache, in one kernel between projection and attention."""

import torch

from nanovllm.ops.attention.fp8_cache import fp8_scale, quantize_heads, to_fp8
from nanovllm.ops.attention.paged_cache import PagedKV
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.ops.norm_rope.reference import qk_norm_rope_store_torch
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs


@triton.jit(do_not_specialize=["positions_ptr"])  # its alignment varies with the number of tokens
def _rope_store_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    query_scale_ptr,
    positions_ptr,
    slot_mapping_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    scales_ptr,
    qkv_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    cache_slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    heads = tl.arange(0, HEADS_PAD)[:, None]
    dims = tl.arange(0, HALF)[None, :]
    in_half = dims < HEAD_DIM // 2
    mask = (heads < HEADS + KV_HEADS) & in_half
    source = qkv_ptr + token * qkv_stride + heads * HEAD_DIM + dims
    a = tl.load(source, mask=mask, other=0.0)
    b = tl.load(source + HEAD_DIM // 2, mask=mask, other=0.0)
    dtype = a.dtype
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
        is_query = heads < HEADS
        q_a = tl.load(q_weight_ptr + dims, mask=in_half, other=0.0)
        k_a = tl.load(k_weight_ptr + dims, mask=in_half, other=0.0)
        q_b = tl.load(q_weight_ptr + HEAD_DIM // 2 + dims, mask=in_half, other=0.0)
        k_b = tl.load(k_weight_ptr + HEAD_DIM // 2 + dims, mask=in_half, other=0.0)
        weight_a = tl.where(is_query, q_a.to(tl.float32), k_a.to(tl.float32))
        weight_b = tl.where(is_query, q_b.to(tl.float32), k_b.to(tl.float32))
        # Round where `rms_norm` rounds.
        a = ((a * scale).to(q_a.dtype).to(tl.float32) * weight_a).to(dtype).to(tl.float32)
        b = ((b * scale).to(q_a.dtype).to(tl.float32) * weight_b).to(dtype).to(tl.float32)
    cos = tl.load(cos_sin_ptr + position * HEAD_DIM + dims, mask=in_half, other=0.0)
    sin = tl.load(cos_sin_ptr + position * HEAD_DIM + HEAD_DIM // 2 + dims, mask=in_half, other=0.0)
    first = (a * cos - b * sin).to(dtype)
    second = (b * cos + a * sin).to(dtype)
    q_out = q_ptr + token * HEADS * HEAD_DIM + heads * HEAD_DIM + dims
    k_out = k_cache_ptr + cache_slot * KV_HEADS * HEAD_DIM + (heads - HEADS) * HEAD_DIM + dims
    q_mask = mask & (heads < HEADS)
    if query_scale_ptr is not None:
        scale = tl.load(query_scale_ptr + position).to(dtype).to(tl.float32)
        first = tl.where(heads < HEADS, (first.to(tl.float32) * scale).to(dtype), first)
        second = tl.where(heads < HEADS, (second.to(tl.float32) * scale).to(dtype), second)
    k_mask = mask & (heads >= HEADS)
    tl.store(q_out, first, mask=q_mask)
    tl.store(q_out + HEAD_DIM // 2, second, mask=q_mask)
    v_ptr = qkv_ptr + token * qkv_stride + (HEADS + KV_HEADS) * HEAD_DIM
    v_out = v_cache_ptr + cache_slot * KV_HEADS * HEAD_DIM
    if scales_ptr is None:
        tl.store(k_out, first, mask=k_mask)
        tl.store(k_out + HEAD_DIM // 2, second, mask=k_mask)
        flat = tl.arange(0, V_PAD)
        v_mask = flat < KV_HEADS * HEAD_DIM
        v = tl.load(v_ptr + flat, mask=v_mask, other=0.0)
        tl.store(v_out + flat, v, mask=v_mask)
    else:
        magnitude = tl.maximum(tl.max(tl.abs(first.to(tl.float32)), 1), tl.max(tl.abs(second.to(tl.float32)), 1))
        k_scale = fp8_scale(magnitude)[:, None]
        tl.store(k_out, to_fp8(first, k_scale), mask=k_mask)
        tl.store(k_out + HEAD_DIM // 2, to_fp8(second, k_scale), mask=k_mask)
        kv_heads = tl.arange(0, triton.next_power_of_2(KV_HEADS))
        kv_dims = tl.arange(0, 2 * HALF)
        v_offsets = kv_heads[:, None] * HEAD_DIM + kv_dims[None, :]
        v_mask = (kv_heads < KV_HEADS)[:, None] & (kv_dims < HEAD_DIM)[None, :]
        v, v_scale = quantize_heads(tl.load(v_ptr + v_offsets, mask=v_mask, other=0.0))
        tl.store(v_out + v_offsets, v, mask=v_mask)
        in_block = cache_slot % BLOCK_SIZE
        k_scale_ptr = scales_ptr + 2 * (cache_slot // BLOCK_SIZE * (KV_HEADS * BLOCK_SIZE) + in_block)
        is_key = (heads >= HEADS) & (heads < HEADS + KV_HEADS)
        tl.store(k_scale_ptr + (heads - HEADS) * (2 * BLOCK_SIZE), k_scale, mask=is_key)
        tl.store(k_scale_ptr + 1 + kv_heads * (2 * BLOCK_SIZE), v_scale, mask=kv_heads < KV_HEADS)


def qk_norm_rope_store_triton(
    qkv: torch.Tensor,
    transform: QKTransform,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv: PagedKV,
) -> torch.Tensor:
    """Compute `qk_norm_rope_store` with a Triton kernel, one program per token."""
    num_heads = transform.num_heads
    kv_heads = kv.kv_heads
    head_dim = kv.head_dim
    q = torch.empty((len(qkv), num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if len(qkv):
        _rope_store_kernel[(len(qkv),)](
            qkv,
            transform.q_weight,
            transform.k_weight,
            transform.cos_sin,
            transform.query_scale,
            positions,
            slot_mapping,
            q,
            kv.k_cache,
            kv.v_cache,
            kv.scales,
            qkv.stride(0),
            transform.eps,
            HEADS=num_heads,
            KV_HEADS=kv_heads,
            HEADS_PAD=triton.next_power_of_2(num_heads + kv_heads),
            V_PAD=triton.next_power_of_2(kv_heads * head_dim),
            HEAD_DIM=head_dim,
            HALF=triton.next_power_of_2(head_dim // 2),
            BLOCK_SIZE=kv.block_size,
            NORM=transform.q_weight is not None,
            num_warps=4,
            **launch_options(qkv.device),
        )
    return q


def qk_norm_rope_store(
    qkv: torch.Tensor,
    transform: QKTransform,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv: PagedKV,
) -> torch.Tensor:
    """Apply `transform` to the query and key heads, and store K and V.

    Args:
        qkv: [T, (H + 2 K) Dh], the values of a token contiguous.
        positions: [T] int64.
        slot_mapping: [T] int64, each token's index in the cache seen as [num_blocks * block_size, K, Dh].
        kv: the layer's caches; the tokens' keys and values are written.

    Returns:
        The queries, [T, H, Dh], a new tensor.
    """
    run = qk_norm_rope_store_triton if qkv.is_cuda else qk_norm_rope_store_torch
    return run(qkv, transform, positions, slot_mapping, kv)
