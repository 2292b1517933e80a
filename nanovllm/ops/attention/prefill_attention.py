"""Prefill attention: causal attention of many query tokens per sequence over a paged KV cache.

Sequences of any lengths are packed together. FlashAttention-2 (Dao, 2023) with grouped queries: a query tile of
BLOCK_M rows holds BLOCK_Q = BLOCK_M // group tokens times the query heads of one KV head. So short sequences fill a
tile, and the masked diagonal is narrow.

The grid depends on shapes alone, so that it can be captured. Sequence s owns the query tiles from
cu_seqlens[s] // BLOCK_Q + s on, which gives each sequence at least the tiles it needs. A program finds its sequence by
bisection, and exits if its tile is past the sequence's end.

K and V are loaded through pointers. Where a cache block holds whole tiles, Hopper and later GPUs load them by the
tensor memory accelerator (TMA), which needs neither registers nor instructions for addresses.
"""

from typing import Any, NamedTuple

import torch

from nanovllm.arithmetic import is_power_of_2
from nanovllm.ops.attention.fp8_cache import key_scales, query_operand, value_scales
from nanovllm.ops.attention.online_softmax import init_softmax
from nanovllm.ops.attention.paged_cache import (
    LOG2E,
    MIN_DOT,
    PagedKV,
    PagedRows,
    attention_constants,
    check_power_of_2,
    load_scales,
    offsets_in_block,
    tile_blocks,
    tile_pointers,
)
from nanovllm.ops.triton_utils import TensorDescriptor, is_hopper_or_newer, sm_count, tl, triton

_MAX_GRID = 65_535  # programs in the second dimension of a grid


class PrefillConfig(NamedTuple):
    """Compile-time settings of the prefill kernel.

    Attributes:
        block_m: rows of a query tile (tokens x heads of a group), a power of two of at least 16 and the group size.
        block_n: tokens of a K and V tile, a power of two of at least 16.
        num_warps, num_stages: warps and pipeline stages.
        maxnreg: most registers per thread, so that more programs fit on an SM; None leaves it to the compiler.
        tma: load K and V by TMA where `supports_tma` allows it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    tma: bool = False


def default_prefill_config(head_dim: int, itemsize: int, num_queries: int = 0, sm_count: int = 1) -> PrefillConfig:
    """Return the settings that `python -m benchmarks.tune prefill` chose on an H100.

    Hopper's tensor cores need 64 query rows per four warps. Tiles of 128 rows read K and V from the L2 cache half as
    often. With TMA and at most 128 registers per thread, two such programs fit on an SM. They pay off if
    `num_queries` (tokens x heads) keeps all SMs busy. Wide heads halve block_n, so that the stages fit in shared
    memory and the accumulators in registers. float32 runs without tensor cores, in small tiles.
    """
    if itemsize > 2:
        return PrefillConfig(32, 32, 4, 2)
    if head_dim == 128 and num_queries >= 4 * sm_count * 128:
        return PrefillConfig(128, 64, 8, 2, maxnreg=128, tma=True)
    return PrefillConfig(64, 64 if head_dim <= 128 else 32, 4, 3)


@triton.jit
def _find_sequence(cu_seqlens_ptr, pid, batch, BLOCK_Q: tl.constexpr):
    """Return the last sequence whose first query tile is at or before tile `pid`."""
    base = tl.load(cu_seqlens_ptr)
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(cu_seqlens_ptr + middle) - base) // BLOCK_Q + middle <= pid:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def load_box(
    descriptor, block, tile, shift, column, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Load K or V [BLOCK_N, HEAD_DIM] of a tile moved back by `shift` tokens; zero before the start of its block."""
    row = (tile % (BLOCK_SIZE // BLOCK_N)) * BLOCK_N - shift
    return descriptor.load([block, row, column]).reshape(BLOCK_N, HEAD_DIM)


@triton.jit
def attend_tiles(
    softmax, q_tile, cache, first_tile, last_tile, MASKED, WINDOW, HEAD_DIM, TOKEN_STRIDE, BLOCK_SIZE, BLOCK_N, TMA
):
    """Add the K and V tiles [first_tile, last_tile) to the softmax state.

    Args:
        q_tile: queries, their positions, and the factor of their scores (base 2).
        cache: K and V (descriptors from `cache_descriptor` if TMA, else pointers), a pointer to their scales (None
            unless they are in FP8), the sequence's block table and length, the KV head.
        MASKED: hide later positions, tokens past the context and, if WINDOW is not 0, tokens before the window.
    """
    running_max, running_sum, acc = softmax
    q, q_positions, scale_log2e = q_tile
    k_cache, v_cache, scales_ptr, table_ptr, context_len, kv_head = cache
    HEAD_PAD: tl.constexpr = acc.shape[1]
    KV_HEADS: tl.constexpr = TOKEN_STRIDE // HEAD_DIM
    tokens = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_PAD)
    column = kv_head * HEAD_DIM
    in_block = offsets_in_block(column + dims, BLOCK_SIZE, BLOCK_N, TOKEN_STRIDE)
    last_block = (context_len - 1) // BLOCK_SIZE
    # Load the next tile's block ids one iteration early, so that K and V loads never wait for them.
    blocks = tile_blocks(table_ptr, first_tile, last_block, BLOCK_SIZE, BLOCK_N)
    for tile in tl.range(first_tile, last_tile):
        next_blocks = tile_blocks(table_ptr, tile + 1, last_block, BLOCK_SIZE, BLOCK_N)
        start = tile * BLOCK_N
        positions = start + tokens
        shift = 0
        if TMA:
            # Memory past the context may hold NaN: move the last tile back, so that it ends where the context ends.
            shift = tl.maximum(start + BLOCK_N - context_len, 0) if MASKED else 0
            positions -= shift
            k = load_box(k_cache, blocks, tile, shift, column, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
            v = load_box(v_cache, blocks, tile, shift, column, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
        else:
            k_ptrs = tile_pointers(k_cache, blocks, tile, in_block, BLOCK_SIZE, BLOCK_N, TOKEN_STRIDE)
            v_ptrs = tile_pointers(v_cache, blocks, tile, in_block, BLOCK_SIZE, BLOCK_N, TOKEN_STRIDE)
            mask = (dims < HEAD_DIM)[None, :]
            if MASKED:
                mask = (positions < context_len)[:, None] & mask
            k = tl.load(k_ptrs, mask=mask, other=0.0)
            v = tl.load(v_ptrs, mask=mask, other=0.0)
        if scales_ptr is not None:
            listed = (positions >= start) & (positions < context_len)
            scales = load_scales(scales_ptr, blocks, tile, shift, kv_head, listed, KV_HEADS, BLOCK_SIZE, BLOCK_N)
            # There are more scores and weights than numbers in K and V, so the scales multiply these.
            k = k.to(q.dtype) * key_scales(scales).to(q.dtype)[:, None]
            v = v.to(q.dtype) * value_scales(scales).to(q.dtype)[:, None]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = q_positions[:, None] >= positions[None, :]
            if WINDOW:
                seen &= q_positions[:, None] - positions[None, :] < WINDOW
            if TMA:
                seen &= (positions >= start)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        # Finite: every query sees position 0, which is in the very first tile. With a window, it starts finite.
        new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2e)
        decay = tl.exp2(running_max - new_max)
        p = tl.exp2(scores * scale_log2e - new_max[:, None])
        running_sum = running_sum * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        running_max = new_max
        blocks = next_blocks
    return running_max, running_sum, acc


# Alignments of slices and a count that varies from step to step must not cause a recompilation.
@triton.jit(do_not_specialize=["slots_ptr", "cu_seqlens_ptr", "context_lens_ptr", "batch"])
def _prefill_kernel(
    q_ptr,
    k_cache,
    v_cache,
    scales_ptr,
    tables_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    out_ptr,
    scale_log2e,
    batch,
    q_token_stride,
    q_head_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    # KV heads vary fastest and tiles run from the last to the first: a sequence's longest tiles start first, and its
    # programs share K and V in the L2 cache.
    kv_head = tl.program_id(0)
    pid = tl.num_programs(1) * tl.num_programs(2) - 1 - tl.program_id(2) * tl.num_programs(1) - tl.program_id(1)
    seq = _find_sequence(cu_seqlens_ptr, pid, batch, BLOCK_Q)
    base = tl.load(cu_seqlens_ptr)
    q_start = tl.load(cu_seqlens_ptr + seq) - base
    q_len = tl.load(cu_seqlens_ptr + seq + 1) - base - q_start
    first_query = (pid - (q_start // BLOCK_Q + seq)) * BLOCK_Q
    if first_query >= q_len:
        return

    # Row m is token m // GROUP and head m % GROUP of this KV head; rows past BLOCK_Q * GROUP are unused.
    m = tl.arange(0, BLOCK_M)
    queries = first_query + m // GROUP
    heads = kv_head * GROUP + m % GROUP
    dims = tl.arange(0, HEAD_PAD)
    mask = ((m < BLOCK_Q * GROUP) & (queries < q_len))[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (q_start + queries).to(tl.int64)
    q_rows = tokens * q_token_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=mask, other=0.0)
    q = query_operand(q, scales_ptr)

    context_len = tl.load(context_lens_ptr + seq)
    first_position = context_len - q_len + first_query
    q_positions = context_len - q_len + queries
    table_ptr = tables_ptr + tl.load(slots_ptr + seq).to(tl.int64) * table_stride
    full_tiles = (first_position + 1) // BLOCK_N  # all queries of the tile see these tiles completely
    end = tl.minimum(first_position + BLOCK_Q, context_len)
    num_tiles = tl.cdiv(end, BLOCK_N)
    full_start = 0
    if WINDOW:
        q_positions = tl.minimum(q_positions, end - 1)  # rows past the end must see a token as well
    q_tile = (q, q_positions, scale_log2e)
    cache = (k_cache, v_cache, scales_ptr, table_ptr, context_len, kv_head)
    if WINDOW:
        # The window hides the tiles before `start_tile` from all queries, and tokens of the next ones from some.
        start_tile = tl.maximum(first_position + 1 - WINDOW, 0) // BLOCK_N
        full_start = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N), num_tiles)
        full_tiles = tl.maximum(full_tiles, full_start)
        softmax = attend_tiles(
            init_softmax(BLOCK_M, HEAD_PAD, -1e38),
            q_tile,
            cache,
            start_tile,
            full_start,
            True,
            WINDOW,
            HEAD_DIM,
            TOKEN_STRIDE,
            BLOCK_SIZE,
            BLOCK_N,
            TMA,
        )
    else:
        softmax = init_softmax(BLOCK_M, HEAD_PAD)
    softmax = attend_tiles(
        softmax, q_tile, cache, full_start, full_tiles, False, 0, HEAD_DIM, TOKEN_STRIDE, BLOCK_SIZE, BLOCK_N, TMA
    )
    _, running_sum, acc = attend_tiles(
        softmax, q_tile, cache, full_tiles, num_tiles, True, WINDOW, HEAD_DIM, TOKEN_STRIDE, BLOCK_SIZE, BLOCK_N, TMA
    )
    out = (acc / running_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_rows = (tokens * (KV_HEADS * GROUP) + heads) * HEAD_DIM
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], out, mask=mask)


def supports_tma(kv: PagedKV, block_n: int) -> bool:
    """Return whether TMA can load tiles of `block_n` tokens of the caches.

    A tile must lie in one block. A head must be as wide as its padded tile, because the next head follows directly.
    """
    device = kv.k_cache.device
    fits = kv.block_size % block_n == 0 and kv.head_dim >= MIN_DOT and is_power_of_2(kv.head_dim)
    # On a CPU, kernels are interpreted, or compiled for another machine.
    able = device.type == "cpu" or is_hopper_or_newer(device)
    return fits and able and all(cache.data_ptr() % 16 == 0 for cache in (kv.k_cache, kv.v_cache))


def cache_descriptor(cache: torch.Tensor, block_n: int) -> Any:
    """Return the TMA descriptor that `attend_tiles` reads: boxes of `block_n` tokens of one head in one block."""
    num_blocks, block_size, kv_heads, head_dim = cache.shape
    width = kv_heads * head_dim
    return TensorDescriptor(
        cache, [num_blocks, block_size, width], [block_size * width, width, 1], [1, block_n, head_dim]
    )


def prefill_attention_triton(
    q: torch.Tensor,
    kv: PagedKV,
    rows: PagedRows,
    cu_seqlens_q: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Compute `prefill_attention_torch` with a Triton kernel that does not synchronize with the device.

    Args:
        q, kv, rows, cu_seqlens_q, scale: as in `prefill_attention_torch`.
        out: [T, H, Dh] contiguous, receives the result; a new tensor if None.
        config: `default_prefill_config` if None.

    Raises:
        ValueError: a tile is too small or not a power of two, or q does not fit the caches.
    """
    kv.check_queries(q)
    num_tokens, heads, _ = q.shape
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    if config is None:
        config = _config_for(q, kv)
    batch = len(rows)
    group = heads // kv.kv_heads
    check_power_of_2("block_m", config.block_m, max(MIN_DOT, group))
    check_power_of_2("block_n", config.block_n, MIN_DOT)
    tma = config.tma and supports_tma(kv, config.block_n)
    num_tiles = num_tokens // (config.block_m // group) + batch
    num_parts = triton.cdiv(num_tiles, _MAX_GRID)
    _prefill_kernel[(kv.kv_heads, triton.cdiv(num_tiles, num_parts), num_parts)](
        q,
        cache_descriptor(kv.k_cache, config.block_n) if tma else kv.k_cache,
        cache_descriptor(kv.v_cache, config.block_n) if tma else kv.v_cache,
        kv.scales,
        rows.block_tables,
        rows.slots,
        cu_seqlens_q,
        rows.context_lens,
        out,
        scale * LOG2E,
        batch,
        q.stride(0),
        q.stride(1),
        rows.block_tables.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        WINDOW=kv.window,
        TMA=tma,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        **attention_constants(heads, kv),
    )
    return out


def _config_for(q: torch.Tensor, kv: PagedKV) -> PrefillConfig:
    num_tokens, heads, head_dim = q.shape
    config = default_prefill_config(head_dim, q.element_size(), num_tokens * heads, sm_count(q.device))
    if config.tma and not supports_tma(kv, config.block_n):
        # Without TMA the large tile leaves no registers for addresses.
        config = default_prefill_config(head_dim, q.element_size())
    return config._replace(block_m=max(config.block_m, triton.next_power_of_2(heads // kv.kv_heads)))
