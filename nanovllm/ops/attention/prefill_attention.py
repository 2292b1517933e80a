"""Causal attention of many query tokens per row over a paged KV cache (prefill), rows of any lengths packed together.

FlashAttention-2 (Dao, 2023) with grouped queries: an M tile holds BLOCK_Q = BLOCK_M // group tokens times the query
heads of one KV head, so short rows fill a tile and the diagonal is narrow.

The grid follows from shapes alone, so that it can be captured: row r owns the query tiles from cu[r] // BLOCK_Q + r on,
which leaves each row at least the tiles it needs. A program finds its row by bisection and leaves if its tile is past
the row's end.

K and V are loaded by pointers, or, where a block of the cache holds whole tiles, by the tensor memory accelerator (TMA)
of Hopper and later, which takes neither registers nor instructions for addresses.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nanovllm.ops.attention.decode_attention import (
    LOG2E,
    MIN_DOT,
    attention_constants,
    cache_places,
    check_attention_inputs,
    check_power_of_2,
    empty_softmax,
    gather,
    offsets_in_block,
    tile_blocks,
    tile_pointers,
)
from nanovllm.ops.triton_utils import TensorDescriptor, is_hopper_or_newer, sm_count, tl, triton


class PrefillConfig(NamedTuple):
    """How a prefill kernel is built.

    Attributes:
        block_m: query rows (tokens x heads of a group) of a tile, a power of two of at least 16 and the group.
        block_n: cache tokens of a tile, a power of two of at least 16.
        num_warps, num_stages: warps, pipeline stages.
        maxnreg: most registers of a thread, so that more programs fit on an SM; None for as many as the compiler likes.
        tma: load K and V by TMA, where `serves_tma`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    tma: bool = False


def default_prefill_config(head_dim: int, itemsize: int, num_queries: int = 0, sm_count: int = 1) -> PrefillConfig:
    """What `python -m benchmarks.tune prefill` chose on an H100, for rows of any length.

    Hopper's matrix units want 64 query rows for each four warps. Tiles of 128 rows read K and V from the L2 cache half
    as often; with TMA and at most 128 registers a thread, two such programs fit on an SM. They pay where there are
    `num_queries` (tokens x heads) for all SMs. Wide heads halve the cache tile, which keeps the stages in shared memory
    and the accumulators in registers. float32 is computed without tensor cores, in small tiles.
    """
    if itemsize > 2:
        return PrefillConfig(32, 32, 4, 2)
    if head_dim == 128 and num_queries >= 4 * sm_count * 128:
        return PrefillConfig(128, 64, 8, 2, maxnreg=128, tma=True)
    return PrefillConfig(64, 64 if head_dim <= 128 else 32, 4, 3)


@triton.jit
def _find_row(cu_seqlens_ptr, pid, num_rows, BLOCK_Q: tl.constexpr):
    """The last row whose first tile is at or before tile `pid`."""
    base = tl.load(cu_seqlens_ptr)
    low = 0
    high = num_rows
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
    """K or V [BLOCK_N, HEAD_DIM] of the tile, or of as many tokens that lie `shift` before; zero before the block."""
    row = (tile % (BLOCK_SIZE // BLOCK_N)) * BLOCK_N - shift
    return descriptor.load([block, row, column]).reshape(BLOCK_N, HEAD_DIM)


@triton.jit
def attend_tiles(
    softmax, q_tile, cache, first_tile, last_tile, MASKED, HEAD_DIM, TOKEN_STRIDE, BLOCK_SIZE, BLOCK_N, TMA
):
    """`softmax` with the tiles [first_tile, last_tile) of the cache.

    q_tile: queries, their positions, and the factor of their scores (base 2).
    cache: K and V, descriptors (see `cache_descriptor`) if TMA, else pointers; a row's block table and length; KV head.
    MASKED: by causality and context end.
    """
    running_max, running_sum, acc = softmax
    q, q_positions, scale_log2e = q_tile
    k_cache, v_cache, table_ptr, context_len, kv_head = cache
    HEAD_PAD: tl.constexpr = acc.shape[1]
    tokens = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_PAD)
    column = kv_head * HEAD_DIM
    in_block = offsets_in_block(column + dims, BLOCK_SIZE, BLOCK_N, TOKEN_STRIDE)
    last_block = (context_len - 1) // BLOCK_SIZE
    # The next tile's block ids are loaded one step ahead, so that K and V loads never wait for them.
    blocks = tile_blocks(table_ptr, first_tile, last_block, BLOCK_SIZE, BLOCK_N)
    for tile in tl.range(first_tile, last_tile):
        next_blocks = tile_blocks(table_ptr, tile + 1, last_block, BLOCK_SIZE, BLOCK_N)
        start = tile * BLOCK_N
        positions = start + tokens
        if TMA:
            # Memory past the context may hold NaN: its last tile is moved back so that it ends where the context does.
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
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = q_positions[:, None] >= positions[None, :]
            if TMA:
                seen &= (positions >= start)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        # The first tile of all holds position 0, which every query sees: the maximum is finite from there on.
        new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2e)
        decay = tl.exp2(running_max - new_max)
        p = tl.exp2(scores * scale_log2e - new_max[:, None])
        running_sum = running_sum * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        running_max = new_max
        blocks = next_blocks
    return running_max, running_sum, acc


# Slices, and a count that varies by step, are not worth a recompilation.
@triton.jit(do_not_specialize=["slots_ptr", "cu_seqlens_ptr", "context_lens_ptr", "num_rows"])
def _prefill_kernel(
    q_ptr,
    k_cache,
    v_cache,
    tables_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    out_ptr,
    scale_log2e,
    num_rows,
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
    TMA: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    # KV heads vary fastest and tiles run from the last: a row's longest go first, its programs share K and V in L2.
    kv_head = tl.program_id(0)
    pid = tl.num_programs(1) - 1 - tl.program_id(1)
    row = _find_row(cu_seqlens_ptr, pid, num_rows, BLOCK_Q)
    base = tl.load(cu_seqlens_ptr)
    q_start = tl.load(cu_seqlens_ptr + row) - base
    q_len = tl.load(cu_seqlens_ptr + row + 1) - base - q_start
    first_query = (pid - (q_start // BLOCK_Q + row)) * BLOCK_Q
    if first_query >= q_len:
        return

    # Index m is token m // GROUP and head m % GROUP of this KV head; those past BLOCK_Q * GROUP are unused.
    m = tl.arange(0, BLOCK_M)
    queries = first_query + m // GROUP
    heads = kv_head * GROUP + m % GROUP
    dims = tl.arange(0, HEAD_PAD)
    mask = ((m < BLOCK_Q * GROUP) & (queries < q_len))[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (q_start + queries).to(tl.int64)
    q_rows = tokens * q_token_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=mask, other=0.0)

    context_len = tl.load(context_lens_ptr + row)
    first_position = context_len - q_len + first_query
    q_positions = context_len - q_len + queries
    table_ptr = tables_ptr + tl.load(slots_ptr + row).to(tl.int64) * table_stride
    full_tiles = (first_position + 1) // BLOCK_N  # every query of the tile sees all of these
    num_tiles = tl.cdiv(tl.minimum(first_position + BLOCK_Q, context_len), BLOCK_N)
    q_tile, cache = (q, q_positions, scale_log2e), (k_cache, v_cache, table_ptr, context_len, kv_head)
    softmax = empty_softmax(BLOCK_M, HEAD_PAD)
    softmax = attend_tiles(
        softmax, q_tile, cache, 0, full_tiles, False, HEAD_DIM, TOKEN_STRIDE, BLOCK_SIZE, BLOCK_N, TMA
    )
    _, running_sum, acc = attend_tiles(
        softmax, q_tile, cache, full_tiles, num_tiles, True, HEAD_DIM, TOKEN_STRIDE, BLOCK_SIZE, BLOCK_N, TMA
    )
    out = (acc / running_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_rows = (tokens * (KV_HEADS * GROUP) + heads) * HEAD_DIM
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], out, mask=mask)


def serves_tma(k_cache: torch.Tensor, block_n: int) -> bool:
    """Whether tiles of `block_n` tokens of the cache [num_blocks, block_size, K, Dh] can be loaded by TMA.

    A tile must lie in one block, and a head be as wide as a tile, for what is beside it is another's.
    """
    block_size, head_dim = k_cache.shape[1], k_cache.shape[3]
    fits = block_size % block_n == 0 and head_dim >= MIN_DOT and head_dim & (head_dim - 1) == 0
    # On the CPU, kernels are interpreted, or compiled for another.
    able = k_cache.device.type == "cpu" or is_hopper_or_newer(k_cache.device)
    return fits and able and k_cache.data_ptr() % 16 == 0


def cache_descriptor(cache: torch.Tensor, block_n: int) -> Any:
    """The cache as `attend_tiles` reads it by TMA: boxes of `block_n` tokens of one head in one block."""
    num_blocks, block_size, kv_heads, head_dim = cache.shape
    width = kv_heads * head_dim
    return TensorDescriptor(
        cache, [num_blocks, block_size, width], [block_size * width, width, 1], [1, block_n, head_dim]
    )


def prefill_attention_triton(
    q, k_cache, v_cache, block_tables, slots, cu_seqlens_q, context_lens, scale, *, out=None, config=None
) -> torch.Tensor:
    """`prefill_attention_torch` as a Triton kernel, which does not wait for the device.

    Args:
        out: [T, H, Dh] contiguous, where the result goes; a new tensor if None.
        config: a PrefillConfig; `default_prefill_config` if None.

    Raises:
        ValueError: a size that is no power of two, or heads that do not divide.
        ImportError: Triton is not installed.
    """
    num_tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    check_attention_inputs(q, k_cache, v_cache)
    num_rows, group = len(slots), heads // kv_heads
    out = torch.empty((num_tokens, heads, head_dim), dtype=q.dtype, device=q.device) if out is None else out
    if num_tokens == 0:
        return out
    if config is None:
        kind = head_dim, q.element_size()
        config = default_prefill_config(*kind, num_tokens * heads, sm_count(q.device))
        if config.tma and not (serves_tma(k_cache, config.block_n) and serves_tma(v_cache, config.block_n)):
            config = default_prefill_config(*kind)  # addresses don't fit in the large tile's registers
        config = config._replace(block_m=max(config.block_m, triton.next_power_of_2(group)))
    block_m, block_n, num_warps, num_stages, maxnreg, tma = config
    check_power_of_2("block_m", block_m, max(MIN_DOT, group))
    check_power_of_2("block_n", block_n, MIN_DOT)
    tma = tma and serves_tma(k_cache, block_n) and serves_tma(v_cache, block_n)
    num_tiles = num_tokens // (block_m // group) + num_rows
    caches = (cache_descriptor(cache, block_n) if tma else cache for cache in (k_cache, v_cache))
    rows = block_tables, slots, cu_seqlens_q, context_lens
    strides = q.stride(0), q.stride(1), block_tables.stride(0)
    _prefill_kernel[(kv_heads, num_tiles)](
        q,
        *caches,
        *rows,
        out,
        scale * LOG2E,
        num_rows,
        *strides,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        TMA=tma,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg,
        **attention_constants(q, k_cache),
    )
    return out


class PrefillGatherPlan(NamedTuple):
    """What `attend_sequence` needs to know of a prefill row, worked out once for all layers.

    Attributes:
        start, end: the row's tokens in the packed queries.
        indices: [K, L], the row's `cache_places`.
        mask: [end - start, L], 0 where a query sees a position, else -inf; None if the row has no cached prefix, for
            which plain causality will do.
    """

    start: int
    end: int
    indices: torch.Tensor
    mask: torch.Tensor | None


def plan_prefill_gather(
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_size: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> list[PrefillGatherPlan]:
    """The plans of the rows that have tokens. Synchronises with the device."""
    bounds = (cu_seqlens_q - cu_seqlens_q[0]).tolist()
    device = slots.device
    plans = []
    for slot, start, end, length in zip(slots.tolist(), bounds, bounds[1:], context_lens.tolist(), strict=False):
        if start == end:
            continue
        positions = torch.arange(length, device=device)
        indices = cache_places(block_tables, slot, positions, block_size, kv_heads)
        mask = None
        if length > end - start:
            hidden = positions > positions[start - end :, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        plans.append(PrefillGatherPlan(start, end, indices, mask))
    return plans


def attend_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Causal attention of one row's q [N, H, Dh] over gathered k and v [K, L, Dh] -> [N, H, Dh]."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[0],
    )
    return out[0].transpose(0, 1)


def prefill_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of each row's newest tokens over the row's pages, which hold these tokens' K and V already.

    Row by row; synchronises with the device. Query i of a row of n queries is at position context_len - n + i and sees
    positions up to its own.

    Args:
        q: [T, H, Dh], the rows' tokens one after the other, heads contiguous.
        k_cache, v_cache, block_tables, scale: as in `decode_attention_torch`.
        slots: [P] int32, the slot of each row.
        cu_seqlens_q: [P + 1] int32, where each row starts and the last one ends, q[0] being at the first of them; empty
            rows are fine.
        context_lens: [P] int32, tokens each row holds, its queries included.

    Returns:
        [T, H, Dh] in q's dtype.
    """
    check_attention_inputs(q, k_cache, v_cache)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for row in plan_prefill_gather(block_tables, slots, cu_seqlens_q, context_lens, *k_cache.shape[1:3], q.dtype):
        k, v = gather(k_cache, row.indices), gather(v_cache, row.indices)
        out[row.start : row.end] = attend_sequence(q[row.start : row.end], k, v, row.mask, scale)
    return out
