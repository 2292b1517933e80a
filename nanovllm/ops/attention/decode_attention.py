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

from nanovllm.ops.attention.decode_plan import WORDS_CONFIG, DecodeConfig, DecodePlan, default_decode_config
from nanovllm.ops.attention.fp8_cache import query_operand
from nanovllm.ops.attention.fp8_decode import MIN_HEADS, MIN_TOKENS, attend_fp8
from nanovllm.ops.attention.online_softmax import attend_tile, empty_partials, init_softmax, store_or_merge
from nanovllm.ops.attention.paged_cache import (
    LOG2E,
    MIN_DOT,
    PagedKV,
    PagedRows,
    attention_constants,
    check_power_of_2,
    load_tile,
    offsets_in_block,
    tile_blocks,
)
from nanovllm.ops.triton_utils import launch_options, shared_memory_bytes, sm_count, tl, triton, wait_for_inputs


# Values and alignments that vary from step to step must not cause a recompilation.
@triton.jit(do_not_specialize=["slots_ptr", "context_lens_ptr", "prefix_ptr", "split_stride"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scales_ptr,
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
    WARPS: tl.constexpr,
    WINDOW: tl.constexpr,
    PREFIX: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    # KV heads vary fastest, so that programs running together read neighboring memory.
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
    if WINDOW:
        start_tile = tl.maximum(context_len - WINDOW, 0) // TILE
    if PREFIX:
        start_tile = tl.load(prefix_ptr + 2 * seq) // TILE
        prefix_splits = tl.load(prefix_ptr + 2 * seq + 1)
    end_tile = tl.cdiv(context_len, TILE)
    split_tiles = tl.cdiv(end_tile - start_tile, num_own)
    first_tile = start_tile + own_split * split_tiles
    if first_tile >= end_tile:
        return  # the shared prefix left fewer tiles than planned
    last_tile = tl.minimum(first_tile + split_tiles, end_tile)

    cache = (k_ptr, v_ptr, scales_ptr)
    heads = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, HEAD_PAD)
    tokens = tl.arange(0, TILE)
    q_offsets = seq.to(tl.int64) * q_seq_stride + (kv_head * GROUP + heads) * q_head_stride
    q_mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    table_ptr = tables_ptr + tl.load(slots_ptr + seq).to(tl.int64) * table_stride
    last_block = (context_len - 1) // BLOCK_SIZE
    if WORDS:
        wait_for_inputs(PDL)
        q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=q_mask, other=0.0)
        table = (table_ptr, context_len, last_block)
        tiles = (first_tile, last_tile)
        softmax = attend_fp8(
            q, cache, table, tiles, kv_head, scale_log2e, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WARPS, WINDOW
        )
    else:
        in_block = offsets_in_block(kv_head * HEAD_DIM + dims, BLOCK_SIZE, TILE, KV_HEADS * HEAD_DIM)
        # Load the next tile's block ids one iteration early, so that K and V loads never wait for them.
        blocks = tile_blocks(table_ptr, first_tile, last_block, BLOCK_SIZE, TILE)
        wait_for_inputs(PDL)
        q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=q_mask, other=0.0)
        q = query_operand(q, scales_ptr)
        softmax = init_softmax(GROUP_PAD, HEAD_PAD)
        for tile in tl.range(first_tile, last_tile):
            next_blocks = tile_blocks(table_ptr, tile + 1, last_block, BLOCK_SIZE, TILE)
            # Masked V must be zero, a weight of zero is not enough: memory past the context may hold NaN.
            seen = tile * TILE + tokens < context_len
            if WINDOW:
                seen &= tile * TILE + tokens >= context_len - WINDOW
            loaded = load_tile(cache, blocks, tile, kv_head, in_block, seen, HEAD_DIM, KV_HEADS, BLOCK_SIZE, TILE)
            softmax = attend_tile(softmax, q, loaded, seen, scale_log2e)
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
    kv: PagedKV,
    rows: PagedRows,
    scale: float,
    *,
    plan: DecodePlan,
    out: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    prefix: PrefixPartials | None = None,
) -> torch.Tensor:
    """Compute `decode_attention_torch` with a Triton kernel that does not synchronize with the device.

    The kernel reads q and the caches after it waits for its inputs, everything else before (see `wait_for_inputs`).

    Args:
        q, kv, rows, scale: as in `decode_attention_torch`.
        plan: made for `rows` and the KV heads of `kv`. If `kv` has a window, the plan is for contexts of at most that.
        out: [B, H, Dh] contiguous, receives the result; a new tensor if None.
        counters: at least B * K int32 zeros, zero again afterwards; new ones if None. Launches that may overlap need
            separate counters.
        prefix: from `shared_attention_triton` for the same plan; None if `kv` has a window.

    Raises:
        ValueError: the tile is too small or not a power of two, or q does not fit the caches.
    """
    kv.check_queries(q)
    batch, heads, _ = q.shape
    words = reads_words(q, kv)
    config = _config_for(q, kv, plan, words, prefix is not None)
    cache = [kv.k_cache, kv.v_cache, kv.scales]
    min_heads = MIN_DOT
    options = {}
    if words:
        cache = [tensor.view(torch.int32) for tensor in cache if tensor is not None]
        min_heads = MIN_HEADS
        if kv.head_dim == 128:  # so that eight programs fit on an SM
            options = {"maxnreg": 128}
    out = q.new_empty(q.shape) if out is None else out
    counters = q.new_zeros(batch * kv.kv_heads, dtype=torch.int32) if counters is None else counters
    partial, lse = empty_partials(q, plan.num_splits) if prefix is None else (prefix.partial, prefix.lse)
    _decode_kernel[(kv.kv_heads, len(plan.items))](
        q,
        *cache,
        rows.block_tables,
        rows.slots,
        rows.context_lens,
        plan.items,
        rows.slots if prefix is None else prefix.sequences,
        out,
        partial,
        lse,
        counters,
        scale * LOG2E,
        q.stride(0),
        q.stride(1),
        rows.block_tables.stride(0),
        lse.shape[2],
        GROUP_PAD=max(min_heads, triton.next_power_of_2(heads // kv.kv_heads)),
        TILE=config.tile,
        WARPS=config.num_warps,
        WINDOW=kv.window,
        PREFIX=prefix is not None,
        WORDS=words,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
        **attention_constants(heads, kv),
        **launch_options(q.device),
    )
    return out


def reads_words(q: torch.Tensor, kv: PagedKV) -> bool:
    """Return whether the loop of fp8_decode.py attends. Eight of its threads load 128 numbers of a token."""
    return kv.is_fp8 and q.dtype != torch.float32 and kv.head_dim % 128 == 0


def _config_for(q: torch.Tensor, kv: PagedKV, plan: DecodePlan, words: bool, prefix: bool) -> DecodeConfig:
    if plan.config is not None:
        check_power_of_2("tile", plan.config.tile, MIN_DOT)
        if words:
            return plan.config._replace(num_warps=min(plan.config.num_warps, plan.config.tile // MIN_TOKENS))
        return plan.config
    if words:
        return WORDS_CONFIG
    return default_decode_config(
        len(q), kv.kv_heads, kv.head_dim, kv.k_cache.itemsize, sm_count(q.device), prefix, shared_memory_bytes(q.device)
    )
