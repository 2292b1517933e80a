"""Decode attention: one query token per sequence over a paged KV cache.

Flash-decoding (Dao et al., 2023) with grouped queries: all query heads of a KV head form one tile, so each element of K
and V is read from memory once. A plan lists the splits of each sequence (see decode_plan.py):

    grid (kv_heads, splits)   split of a sequence -> the output; or, if the sequence has several splits, a partial
                              output and log-sum-exp, which the sequence's last program merges

A prefix that sequences share can be attended to beforehand, for many sequences at once (see shared_prefix.py). A
sequence's own splits then start after it, and the merge includes its partial results.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.attention.decode_plan import (
    MANY_PROGRAMS_PER_SM,
    DecodePlan,
    default_split_policy,
    plan_decode_triton,
)
from nanovllm.ops.attention.online_softmax import attend_tile, empty_partials, init_softmax, store_or_merge
from nanovllm.ops.attention.paged_cache import (
    LOG2E,
    MIN_DOT,
    attention_constants,
    check_attention_inputs,
    check_power_of_2,
    load_tile,
    offsets_in_block,
    tile_blocks,
)
from nanovllm.ops.triton_utils import (
    HOPPER_SHARED_MEMORY,
    launch_options,
    shared_memory_bytes,
    sm_count,
    tl,
    triton,
    wait_for_inputs,
)


class DecodeConfig(NamedTuple):
    """Compile-time settings of the decode kernel.

    Attributes:
        tile: tokens per loop iteration.
        num_warps, num_stages: warps and pipeline stages.
    """

    tile: int
    num_warps: int
    num_stages: int


def default_decode_config(
    batch: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    sm_count: int,
    prefix: bool = False,
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> DecodeConfig:
    """Return the settings that sweeps chose on an H100 and an H200; with `prefix`, the prefix workload of bench.py.

    A program needs (stages - 1) * tile * head_dim * itemsize bytes of shared memory for K and the same for V. So wide
    heads and devices with less shared memory get a smaller tile. With many programs, two or three share an SM. With
    few, each has an SM to itself and needs more loads in flight.
    """
    programs = batch * kv_heads
    tile, num_warps, num_stages = 128, 4, 3
    if 2 * programs >= 5 * sm_count:
        tile = 64
        num_stages = 3 if programs >= MANY_PROGRAMS_PER_SM * sm_count else 4
    if prefix:
        tile, num_warps, num_stages = 32, 2, 3
    head_bytes = triton.next_power_of_2(head_dim) * itemsize
    tile = min(tile, tile * 256 // head_bytes)
    max_tokens = (shared_memory - (16 << 10)) // (2 * head_bytes)  # 16 KiB are left for everything else
    num_stages = num_stages if (num_stages - 1) * tile <= max_tokens else 3
    while (num_stages - 1) * tile > max_tokens:
        tile //= 2
    return DecodeConfig(max(MIN_DOT, tile), num_warps, num_stages)


# Values and alignments that vary from step to step must not cause a recompilation.
@triton.jit(do_not_specialize=["slots_ptr", "context_lens_ptr", "prefix_ptr", "split_stride"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    slots_ptr,
    context_lens_ptr,
    plan_ptr,
    prefix_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    counter_ptr,
    scale_log2e,
    q_seq_stride,
    q_head_stride,
    table_stride,
    split_stride,
    GROUP_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PREFIX: tl.constexpr,
    PDL: tl.constexpr,
):
    # KV heads vary fastest, so that programs running together read neighbouring memory.
    kv_head = tl.program_id(0)
    plan_ptr += 3 * tl.program_id(1)
    seq = tl.load(plan_ptr)
    if seq < 0:
        return  # no need to wait for inputs: other programs do
    own_split = tl.load(plan_ptr + 1)
    num_own = tl.load(plan_ptr + 2)
    context_len = tl.load(context_lens_ptr + seq)
    start_tile = 0
    prefix_splits = 0
    if PREFIX:
        start_tile = tl.load(prefix_ptr + 2 * seq) // TILE
        prefix_splits = tl.load(prefix_ptr + 2 * seq + 1)
    end_tile = tl.cdiv(context_len, TILE)
    split_tiles = tl.cdiv(end_tile - start_tile, num_own)
    first_tile = start_tile + own_split * split_tiles
    if first_tile >= end_tile:
        return  # the shared prefix left fewer tiles than planned
    last_tile = tl.minimum(first_tile + split_tiles, end_tile)

    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    heads = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, HEAD_PAD)
    tokens = tl.arange(0, TILE)
    q_offsets = seq.to(tl.int64) * q_seq_stride + (kv_head * GROUP + heads) * q_head_stride
    q_mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    in_block = offsets_in_block(kv_head * HEAD_DIM + dims, BLOCK_SIZE, TILE, TOKEN_STRIDE)
    table_ptr = tables_ptr + tl.load(slots_ptr + seq).to(tl.int64) * table_stride
    last_block = (context_len - 1) // BLOCK_SIZE
    # Load the next tile's block ids one iteration early, so that K and V loads never wait for them.
    blocks = tile_blocks(table_ptr, first_tile, last_block, BLOCK_SIZE, TILE)

    wait_for_inputs(PDL)
    q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=q_mask, other=0.0)
    softmax = init_softmax(GROUP_PAD, HEAD_PAD)
    for tile in tl.range(first_tile, last_tile):
        next_blocks = tile_blocks(table_ptr, tile + 1, last_block, BLOCK_SIZE, TILE)
        # Masked V must be zero, a weight of zero is not enough: memory past the context may hold NaN.
        seen = tile * TILE + tokens < context_len
        kv_mask = seen[:, None] & (dims < HEAD_DIM)[None, :]
        k, v = load_tile(k_ptr, v_ptr, blocks, tile, in_block, kv_mask, BLOCK_SIZE, TILE, TOKEN_STRIDE)
        softmax = attend_tile(softmax, q, k, v, seen, scale_log2e)
        blocks = next_blocks

    num_programs = tl.cdiv(end_tile - start_tile, split_tiles)
    num_splits = num_programs + prefix_splits
    partials = (partial_ptr, lse_ptr, counter_ptr, split_stride)
    group = seq * KV_HEADS + kv_head
    split = prefix_splits + own_split
    store_or_merge(out_ptr, partials, softmax, group, split, num_programs, num_splits, GROUP, HEAD_DIM)


class PrefixPartials(NamedTuple):
    """Partial results over shared prefixes, with room for those of each sequence's own splits.

    Args:
        sequences: [B, 2] int32, the prefix tokens of each sequence and the number of their partial results.
        partial, lse: [B, H, P, Dh] and [B, H, P] float32; a sequence's prefix results come first.
    """

    sequences: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor


def decode_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    plan: DecodePlan | None = None,
    prefix: PrefixPartials | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """Compute `decode_attention_torch` with a Triton kernel that does not synchronise with the device.

    The kernel reads q and the caches after it waits for its inputs, everything else before (see `wait_for_inputs`).

    Args:
        q, k_cache, v_cache, block_tables, slots, context_lens, scale: as in `decode_attention_torch`.
        out: [B, H, Dh] contiguous, receives the result; a new tensor if None.
        counters: at least B * K int32 zeros, zero again afterwards; new ones if None. Launches that may overlap need
            separate counters.
        plan: of these sequences; made with `default_split_policy` if None.
        prefix: from `shared_attention_triton` for the same plan.
        config: `default_decode_config` if None.

    Raises:
        ValueError: a size is too small or not a power of two, or the KV heads do not divide the heads.
        ImportError: Triton is not installed.
    """
    batch, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    check_attention_inputs(q, k_cache, v_cache)
    if config is None:
        config = _config_for(q, kv_heads, prefix is not None)
    check_power_of_2("tile", config.tile, MIN_DOT)
    check_power_of_2("block_size", block_size, 1)
    if out is None:
        out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    options = launch_options(q.device)
    if plan is None:
        options = {"PDL": False}  # the kernel reads the plan, so it must not start before that is written
        plan = plan_decode_triton(context_lens, kv_heads, default_split_policy(batch, kv_heads, sm_count(q.device)))
    if counters is None:
        counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device=q.device)
    if prefix is None:
        partial, lse = empty_partials(q, plan.num_splits)
    else:
        partial, lse = prefix.partial, prefix.lse
    _decode_kernel[(kv_heads, len(plan.items))](
        q,
        k_cache,
        v_cache,
        block_tables,
        slots,
        context_lens,
        plan.items,
        slots if prefix is None else prefix.sequences,
        out,
        partial,
        lse,
        counters,
        scale * LOG2E,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        lse.shape[2],
        GROUP_PAD=max(MIN_DOT, triton.next_power_of_2(heads // kv_heads)),
        TILE=config.tile,
        PREFIX=prefix is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **attention_constants(q, k_cache),
        **options,
    )
    return out


def _config_for(q: torch.Tensor, kv_heads: int, prefix: bool) -> DecodeConfig:
    batch, _, head_dim = q.shape
    return default_decode_config(
        batch, kv_heads, head_dim, q.element_size(), sm_count(q.device), prefix, shared_memory_bytes(q.device)
    )
