"""Attention of one query token per row over a paged KV cache (decode).

Flash-decoding (Dao et al., 2023) with grouped queries: all query heads of a KV head form one tile, so each element of K
and V is read from memory once. A row's context is split over programs, whose partial results a second kernel merges:

    grid (kv_heads, B, num_splits)   tokens [s * chunk, (s + 1) * chunk) of a row -> partial output, log-sum-exp
    grid (H, B)                      partials weighted by exp(lse - max lse) -> output

`num_splits` is a launch constant, an upper bound. How many of them a row uses follows from its context length on the
device, so a captured graph is valid for any lengths. A row of one split is written by the first kernel. The kernels are
compiled once for all batch sizes and split counts.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import HAVE_TRITON, tl, triton

LOG2E = 1.4426950408889634
MIN_DOT = 16  # smallest side of a tensor-core tile
MERGE_CHUNK = 16  # partials the merge kernel holds at once
MAX_SPLITS = 128


class DecodeConfig(NamedTuple):
    """How a decode kernel is built: tokens per step of its loop, warps, pipeline stages."""

    tile: int
    num_warps: int
    num_stages: int


def default_decode_config(group: int, head_dim: int, itemsize: int) -> DecodeConfig:
    """The tile for `group` query heads per KV head.

    Small tiles with few warps leave room for several programs on an SM, which hides the latency that one program's loop
    exposes. Larger groups do more arithmetic for each byte and want more warps. The stages in flight of a program take
    tile * head_dim * itemsize bytes of shared memory for K and again for V, so wide heads get a smaller tile.
    """
    tile, num_warps, num_stages = (32, 2, 4) if group <= 2 else (64, 4, 3)
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    return DecodeConfig(max(MIN_DOT, min(tile, tile * 256 // row_bytes)), num_warps, num_stages)


def default_num_splits(batch: int, kv_heads: int, sm_count: int) -> int:
    """Splits of the longest row: a power of two that gives each SM 16 to 32 programs.

    Many small programs even out rows of different lengths. More than 64 splits are worth their partial results only
    where the SMs would otherwise idle.
    """
    programs = max(batch * kv_heads, 1)
    wanted = triton.next_power_of_2(triton.cdiv(16 * sm_count, programs))
    return min(wanted, 64 if 64 * programs >= 2 * sm_count else MAX_SPLITS)


@lru_cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; a CPU, where only the interpreter runs, counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _split_tiles(context_len, num_splits, TILE: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """Tiles of each split of a row; both kernels must agree on it."""
    num_tiles = tl.cdiv(context_len, TILE)
    return tl.maximum(tl.cdiv(num_tiles, num_splits), tl.cdiv(MIN_SPLIT, TILE))


@triton.jit
def tile_blocks(table_ptr, tile, last_block, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Physical blocks of a tile: one id where a block holds whole tiles, else one for each of its tokens.

    Blocks past `last_block`, which the context does not reach, repeat it: they may not be in the table.
    """
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table_ptr + tl.minimum(tile // (BLOCK_SIZE // TILE), last_block))
    else:
        tokens = tile * TILE + tl.arange(0, TILE)
        return tl.load(table_ptr + tl.minimum(tokens // BLOCK_SIZE, last_block))


@triton.jit
def offsets_in_block(in_token, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TOKEN_STRIDE: tl.constexpr):
    """The part of a tile's addresses [TILE, dims] that no block id changes, worked out once per program."""
    tokens = tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        return tokens[:, None] * TOKEN_STRIDE + in_token[None, :]
    else:
        return (tokens % BLOCK_SIZE)[:, None] * TOKEN_STRIDE + in_token[None, :]


@triton.jit
def tile_pointers(
    cache_ptr, blocks, tile, in_block, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TOKEN_STRIDE: tl.constexpr
):
    """Addresses [TILE, dims] of a tile whose block ids are `blocks`."""
    starts = blocks.to(tl.int64) * (BLOCK_SIZE * TOKEN_STRIDE)  # past 2^31 in large caches
    if BLOCK_SIZE % TILE == 0:
        return cache_ptr + (starts + (tile % (BLOCK_SIZE // TILE)) * (TILE * TOKEN_STRIDE)) + in_block
    else:
        return cache_ptr + starts[:, None] + in_block


# What varies from step to step, the alignment of slices included, is not worth a recompilation.
@triton.jit(do_not_specialize=["slots_ptr", "context_lens_ptr", "num_splits"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    slots_ptr,
    context_lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2e,
    q_row_stride,
    q_head_stride,
    table_stride,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # KV heads vary fastest: programs that run together read neighbouring memory.
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    context_len = tl.load(context_lens_ptr + row)
    split_tiles = _split_tiles(context_len, num_splits, TILE, MIN_SPLIT)
    first_tile = split * split_tiles
    if first_tile * TILE >= context_len:
        return
    last_tile = tl.minimum(first_tile + split_tiles, tl.cdiv(context_len, TILE))

    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    heads = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, HEAD_PAD)
    tokens = tl.arange(0, TILE)
    out_mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = row.to(tl.int64) * q_row_stride + (kv_head * GROUP + heads) * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=out_mask, other=0.0)

    in_block = offsets_in_block(kv_head * HEAD_DIM + dims, BLOCK_SIZE, TILE, TOKEN_STRIDE)
    table_ptr = tables_ptr + tl.load(slots_ptr + row).to(tl.int64) * table_stride
    last_block = (context_len - 1) // BLOCK_SIZE

    running_max = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    running_sum = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    # The next tile's block ids are loaded one step ahead, so that K and V loads never wait for them.
    blocks = tile_blocks(table_ptr, first_tile, last_block, BLOCK_SIZE, TILE)
    for tile in tl.range(first_tile, last_tile):
        next_blocks = tile_blocks(table_ptr, tile + 1, last_block, BLOCK_SIZE, TILE)
        # Masked V rows must be zero, not just weigh zero: memory past the context may hold NaN.
        seen = tile * TILE + tokens < context_len
        kv_mask = seen[:, None] & (dims < HEAD_DIM)[None, :]
        k_ptrs = tile_pointers(k_ptr, blocks, tile, in_block, BLOCK_SIZE, TILE, TOKEN_STRIDE)
        v_ptrs = tile_pointers(v_ptr, blocks, tile, in_block, BLOCK_SIZE, TILE, TOKEN_STRIDE)
        k = tl.load(k_ptrs, mask=kv_mask, other=0.0)
        v = tl.load(v_ptrs, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2e
        scores = tl.where(seen[None, :], scores, float("-inf"))
        # Each tile of a split that runs holds a token of the context: the maximum is finite from the first tile on.
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        decay = tl.exp2(running_max - new_max)
        p = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        running_max = new_max
        blocks = next_blocks

    acc = acc / running_sum[:, None]
    out_rows = row.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + heads
    if split_tiles * TILE >= context_len:
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :], out, mask=out_mask)
    else:
        parts = out_rows * num_splits + split
        tl.store(partial_ptr + parts[:, None] * HEAD_DIM + dims[None, :], acc, mask=out_mask)
        tl.store(lse_ptr + parts, running_max + tl.log2(running_sum), mask=heads < GROUP)


@triton.jit(do_not_specialize=["context_lens_ptr", "num_splits"])
def _merge_kernel(
    context_lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    num_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1)
    context_len = tl.load(context_lens_ptr + row)
    split_tiles = _split_tiles(context_len, num_splits, TILE, MIN_SPLIT)
    used = tl.cdiv(context_len, split_tiles * TILE)
    if used <= 1:
        return

    dims = tl.arange(0, HEAD_PAD)
    out_row = row.to(tl.int64) * HEADS + head
    first_part = out_row * num_splits
    all_splits = tl.arange(0, MAX_SPLITS)
    lse = tl.load(lse_ptr + first_part + all_splits, mask=all_splits < used, other=float("-inf"))
    max_lse = tl.max(lse, 0)  # finite: used splits are not empty
    total = tl.sum(tl.exp2(lse - max_lse), 0)
    acc = tl.zeros([HEAD_PAD], tl.float32)
    for start in tl.range(0, used, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        parts = first_part + splits
        weights = tl.exp2(tl.load(lse_ptr + parts, mask=splits < used, other=float("-inf")) - max_lse)
        mask = (splits < used)[:, None] & (dims < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + parts[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        acc += tl.sum(partial * weights[:, None], 0)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row * HEAD_DIM + dims, out, mask=dims < HEAD_DIM)


def decode_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    num_splits: int | None = None,
    *,
    tile: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    min_split: int = 64,
) -> torch.Tensor:
    """`decode_attention` as Triton kernels. What is None is picked by `default_num_splits` and `default_decode_config`.

    Args:
        num_splits: most splits of a row, at most MAX_SPLITS.
        tile: cache tokens per loop step, a power of two of at least 16.
        min_split: fewest tokens of a split but a row's last.

    Raises:
        ValueError: a size out of range or no power of two where one is needed, or heads that do not divide.
        ImportError: Triton is not installed.
    """
    if not HAVE_TRITON:
        raise ImportError("decode_attention_triton needs triton, which is not installed; use decode_attention_torch")
    batch, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    check_attention_inputs(q, k_cache, v_cache)
    group = heads // kv_heads
    config = default_decode_config(group, head_dim, q.element_size())
    tile = tile or config.tile
    num_splits = num_splits or default_num_splits(batch, kv_heads, sm_count(q.device))
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits={num_splits} must be between 1 and {MAX_SPLITS}")
    for name, value, least in (("tile", tile, MIN_DOT), ("block_size", block_size, 1)):
        if value < least or value & (value - 1):
            raise ValueError(f"{name}={value} must be a power of two of at least {least}")
    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    partial = lse = out  # not touched when there is one split
    if num_splits > 1:
        partial = torch.empty((batch, heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch, heads, num_splits), dtype=torch.float32, device=q.device)
    head_pad = max(MIN_DOT, triton.next_power_of_2(head_dim))
    _decode_kernel[(kv_heads, batch, num_splits)](
        q,
        k_cache,
        v_cache,
        block_tables,
        slots,
        context_lens,
        out,
        partial,
        lse,
        scale * LOG2E,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        num_splits,
        GROUP=group,
        GROUP_PAD=max(MIN_DOT, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size,
        TILE=tile,
        MIN_SPLIT=min_split,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=num_warps or config.num_warps,
        num_stages=num_stages or config.num_stages,
    )
    if num_splits > 1:
        _merge_kernel[(heads, batch)](
            context_lens,
            out,
            partial,
            lse,
            num_splits,
            HEADS=heads,
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad,
            TILE=tile,
            MAX_SPLITS=MAX_SPLITS,
            MIN_SPLIT=min_split,
            CHUNK=MERGE_CHUNK,
            num_warps=2,
        )
    return out


def check_attention_inputs(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise ValueError unless queries [N, H, Dh] fit two equal, contiguous caches [num_blocks, block_size, K, Dh]."""
    if k_cache.shape != v_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must be contiguous and of one shape"
        )
    if q.shape[1] % k_cache.shape[2] or q.shape[2] != k_cache.shape[3] or q.stride(2) != 1:
        raise ValueError(
            f"q of shape {tuple(q.shape)} and strides {q.stride()} does not fit a cache of {k_cache.shape[2]} KV heads "
            f"of size {k_cache.shape[3]}: the KV heads must divide the heads and each head be contiguous"
        )


class GatherPlan(NamedTuple):
    """Where the KV of decode rows lies: the host's part of `attend_gathered`, done once for all layers.

    Attributes:
        indices: [B * K * L] int64, for each row, KV head and position the place in the cache seen as [tokens * K, Dh].
        mask: [B, 1, 1, L], 0 where a position is in the row's context, else -inf; None if all rows have length L.
    """

    indices: torch.Tensor
    mask: torch.Tensor | None


def plan_gather(
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    block_size: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> GatherPlan:
    """The plan for rows of block_tables[slots] that see `context_lens` tokens each. Synchronises with the device."""
    lens = context_lens.to(torch.int64)[:, None]  # [B, 1]
    positions = torch.arange(int(context_lens.max()), device=slots.device)[None]  # [1, L]
    seen = positions < lens
    # Past its context a row repeats its last token: what the cache holds there may be NaN, which no weight of 0 hides.
    positions = torch.minimum(positions, lens - 1)  # [B, L]
    blocks = block_tables[slots.to(torch.int64)[:, None], positions // block_size].to(torch.int64)
    tokens = blocks * block_size + positions % block_size
    heads = torch.arange(kv_heads, device=slots.device)
    indices = (tokens[:, None, :] * kv_heads + heads[None, :, None]).view(-1)  # [B, K, L]
    if bool(seen.all()):
        return GatherPlan(indices, None)
    mask = torch.zeros(seen.shape, dtype=dtype, device=slots.device).masked_fill_(~seen, float("-inf"))
    return GatherPlan(indices, mask[:, None, None, :])


def attend_gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of q [B, H, Dh] over gathered k and v [B, K, L, Dh] -> [B, H, Dh].

    The query heads of a KV head take the place of query positions, so K and V are not repeated for them.
    """
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


def decode_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`decode_attention` in plain torch, by a gather of each row's KV. Synchronises with the device."""
    check_attention_inputs(q, k_cache, v_cache)
    if len(q) == 0:
        return torch.empty_like(q)
    _, block_size, kv_heads, head_dim = k_cache.shape
    plan = plan_gather(block_tables, slots, context_lens, block_size, kv_heads, q.dtype)
    shape = (len(q), kv_heads, -1, head_dim)
    k = k_cache.view(-1, head_dim).index_select(0, plan.indices).view(shape)
    v = v_cache.view(-1, head_dim).index_select(0, plan.indices).view(shape)
    return attend_gathered(q, k, v, plan.mask, scale)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Attention of one query per row over the row's pages; the query's own K and V are in the cache already.

    Args:
        q: [B, H, Dh], heads contiguous.
        k_cache, v_cache: [num_blocks, block_size, K, Dh], contiguous; H is a multiple of K.
        block_tables: [S, W] int32, physical block ids of each slot.
        slots: [B] int32, the slot of each row.
        context_lens: [B] int32, tokens each row sees, at least 1.
        scale: factor of the logits, positive.
        num_splits: most splits of a row on a GPU (see `decode_attention_triton`); the result does not depend on it.

    Returns:
        [B, H, Dh] in q's dtype.
    """
    if q.is_cuda:
        return decode_attention_triton(q, k_cache, v_cache, block_tables, slots, context_lens, scale, num_splits)
    return decode_attention_torch(q, k_cache, v_cache, block_tables, slots, context_lens, scale)
