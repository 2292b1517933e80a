"""Attention of one query token per row over a paged KV cache (decode).

Flash-decoding (Dao et al., 2023) with grouped queries: all query heads of a KV head form one tile, so each element of K
and V is read from memory once. A plan says which parts of which rows there are (see decode_plan.py):

    grid (kv_heads, parts)    a part of a row -> output; or, of several, partial output and log-sum-exp: the program of
                              a row that finishes last merges them, weighted by exp(lse - max lse)

What rows have in common can be attended to before, for many rows at once (see shared_prefix.py): such a row begins
where that ended, and merges those partials too.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nanovllm.ops.attention.decode_plan import MANY_PROGRAMS_PER_SM, default_split_policy, plan_decode_triton
from nanovllm.ops.triton_utils import (
    HOPPER_SHARED_MEMORY,
    launch_options,
    shared_memory,
    sm_count,
    tl,
    triton,
    wait_for_inputs,
)

LOG2E = 1.4426950408889634
MIN_DOT = 16  # smallest side of a tensor-core tile


class DecodeConfig(NamedTuple):
    """How a decode kernel is built: tokens per step of its loop, warps, pipeline stages."""

    tile: int
    num_warps: int
    num_stages: int


def default_decode_config(
    batch: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    sm_count: int,
    shared: bool = False,
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> DecodeConfig:
    """What sweeps chose on an H100 and an H200; for `shared`, bench.py's prefix workload did.

    A program takes (stages - 1) * tile * head_dim * itemsize bytes of shared memory for K and again for V, so wide
    heads get a smaller tile, as do devices with less of it. Of many programs two or three share a multiprocessor. One
    of fewer has it to itself, and must have more on its way from memory; the fewer they are, the more.
    """
    programs = batch * kv_heads
    tile, num_warps, num_stages = 128, 4, 3
    if 2 * programs >= 5 * sm_count:
        tile, num_stages = 64, 3 if programs >= MANY_PROGRAMS_PER_SM * sm_count else 4
    if shared:
        tile, num_warps, num_stages = 32, 2, 3
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    tile = min(tile, tile * 256 // row_bytes)
    most = (shared_memory - (16 << 10)) // (2 * row_bytes)  # tokens there is room for, with 16 KiB for all else
    num_stages = num_stages if (num_stages - 1) * tile <= most else 3
    while (num_stages - 1) * tile > most:
        tile //= 2
    return DecodeConfig(max(MIN_DOT, tile), num_warps, num_stages)


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


@triton.jit
def load_tile(
    k_ptr, v_ptr, blocks, tile, in_block, mask, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TOKEN_STRIDE: tl.constexpr
):
    """K and V [TILE, dims] of a tile whose block ids are `blocks`, zeros where the mask is not."""
    k_ptrs = tile_pointers(k_ptr, blocks, tile, in_block, BLOCK_SIZE, TILE, TOKEN_STRIDE)
    v_ptrs = tile_pointers(v_ptr, blocks, tile, in_block, BLOCK_SIZE, TILE, TOKEN_STRIDE)
    return tl.load(k_ptrs, mask=mask, other=0.0), tl.load(v_ptrs, mask=mask, other=0.0)


@triton.jit
def empty_softmax(ROWS: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Of no tokens yet: each row's largest score (base 2), sum of weights, and sum of weighted values."""
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    return largest, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, HEAD_PAD], tl.float32)


@triton.jit
def attend_tile(softmax, q, k, v, seen, scale_log2e):
    """`softmax` with the tokens of a tile that are `seen`, of which there must be one by now."""
    running_max, running_sum, acc = softmax
    # "ieee" keeps float32 from being rounded to TF32; narrower types are multiplied exactly anyway.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    decay = tl.exp2(running_max - new_max)
    p = tl.exp2(scores - new_max[:, None])
    running_sum = running_sum * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_max, running_sum, acc


@triton.jit
def _merge_parts(
    out_ptr, partial_ptr, lse_ptr, first_head, num_parts, part_stride, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """out[first_head + i] = that head's partials, weighted by exp(lse - max lse); `first_head` counts over rows."""
    GROUP_POW2: tl.constexpr = triton.next_power_of_2(GROUP)
    CHUNK: tl.constexpr = 32 // GROUP_POW2 if GROUP_POW2 < 32 else 1  # parts at once, which registers must hold
    heads = tl.arange(0, GROUP_POW2)
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    is_head = heads < GROUP
    first_part = (first_head + heads).to(tl.int64) * part_stride
    running_max = tl.full([GROUP_POW2], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_POW2], tl.float32)
    acc = tl.zeros([GROUP_POW2, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for start in tl.range(0, num_parts, CHUNK):
        parts = start + tl.arange(0, CHUNK)
        mask = is_head[:, None] & (parts < num_parts)[None, :]
        place = first_part[:, None] + parts[None, :]
        lse = tl.load(lse_ptr + place, mask=mask, other=float("-inf"))
        mask = mask[:, :, None] & (dims < HEAD_DIM)[None, None, :]
        partial = tl.load(partial_ptr + place[:, :, None] * HEAD_DIM + dims[None, None, :], mask=mask, other=0.0)
        # Finite: a chunk has a part, and parts are not empty.
        new_max = tl.where(is_head, tl.maximum(running_max, tl.max(lse, 1)), 0.0)
        decay = tl.exp2(running_max - new_max)
        weights = tl.exp2(lse - new_max[:, None])
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.sum(partial * weights[:, :, None], 1)
        running_max = new_max
    out = (acc / tl.maximum(total, 1e-30)[:, None]).to(out_ptr.dtype.element_ty)  # total is 0 where there is no head
    out_rows = (first_head + heads).to(tl.int64)[:, None] * HEAD_DIM
    tl.store(out_ptr + out_rows + dims[None, :], out, mask=is_head[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def store_or_merge(out_ptr, parts, softmax, place, part, num_own, num_parts, GROUP, HEAD_DIM):
    """The end of a program for row * KV_HEADS + kv_head = `place`: the result if there is no other part, else its part.

    Of the `num_own` programs of a place, the last one to come here merges all `num_parts` parts.
    """
    partial_ptr, lse_ptr, counter_ptr, part_stride = parts
    running_max, running_sum, acc = softmax
    heads = tl.arange(0, acc.shape[0])
    dims = tl.arange(0, acc.shape[1])
    first_head = place * GROUP
    out_rows = (first_head + heads).to(tl.int64)
    mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    acc = acc / running_sum[:, None]
    if num_parts == 1:
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :], out, mask=mask)
    else:
        places = out_rows * part_stride + part
        tl.store(partial_ptr + places[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(lse_ptr + places, running_max + tl.log2(running_sum), mask=heads < GROUP)
        tl.debug_barrier()  # all of this program's stores come before its count
        counter_ptr += place
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_own - 1:
            tl.store(counter_ptr, 0)  # for the next launch
            _merge_parts(out_ptr, partial_ptr, lse_ptr, first_head, num_parts, part_stride, GROUP, HEAD_DIM)


# What varies from step to step, the alignment of slices included, is not worth a recompilation.
@triton.jit(do_not_specialize=["slots_ptr", "context_lens_ptr", "shared_ptr", "part_stride"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    slots_ptr,
    context_lens_ptr,
    plan_ptr,
    shared_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    counter_ptr,
    scale_log2e,
    q_row_stride,
    q_head_stride,
    table_stride,
    part_stride,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    # KV heads vary fastest: programs that run together read neighbouring memory.
    kv_head = tl.program_id(0)
    plan_ptr += 3 * tl.program_id(1)
    row = tl.load(plan_ptr)
    if row < 0:
        return  # without a wait: there are other programs, and they wait
    own_part = tl.load(plan_ptr + 1)
    own_parts = tl.load(plan_ptr + 2)
    context_len = tl.load(context_lens_ptr + row)
    start_tile = 0
    shared_parts = 0
    if SHARED:
        start_tile = tl.load(shared_ptr + 2 * row) // TILE
        shared_parts = tl.load(shared_ptr + 2 * row + 1)
    end_tile = tl.cdiv(context_len, TILE)
    part_tiles = tl.cdiv(end_tile - start_tile, own_parts)
    first_tile = start_tile + own_part * part_tiles
    if first_tile >= end_tile:
        return  # as its tiles are fewer than was planned for
    last_tile = tl.minimum(first_tile + part_tiles, end_tile)

    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_PAD)
    tokens = tl.arange(0, TILE)
    q_rows = row.to(tl.int64) * q_row_stride + (kv_head * GROUP + heads) * q_head_stride
    q_mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    in_block = offsets_in_block(kv_head * HEAD_DIM + dims, BLOCK_SIZE, TILE, TOKEN_STRIDE)
    table_ptr = tables_ptr + tl.load(slots_ptr + row).to(tl.int64) * table_stride
    last_block = (context_len - 1) // BLOCK_SIZE
    # The next tile's block ids are loaded one step ahead, so that K and V loads never wait for them.
    blocks = tile_blocks(table_ptr, first_tile, last_block, BLOCK_SIZE, TILE)

    wait_for_inputs(PDL)
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0)
    softmax = empty_softmax(ROWS, HEAD_PAD)
    for tile in tl.range(first_tile, last_tile):
        next_blocks = tile_blocks(table_ptr, tile + 1, last_block, BLOCK_SIZE, TILE)
        # Masked V rows must be zero, not just weigh zero: memory past the context may hold NaN.
        seen = tile * TILE + tokens < context_len
        kv_mask = seen[:, None] & (dims < HEAD_DIM)[None, :]
        k, v = load_tile(k_ptr, v_ptr, blocks, tile, in_block, kv_mask, BLOCK_SIZE, TILE, TOKEN_STRIDE)
        softmax = attend_tile(softmax, q, k, v, seen, scale_log2e)
        blocks = next_blocks

    num_own = tl.cdiv(end_tile - start_tile, part_tiles)
    num_parts = num_own + shared_parts
    parts = (partial_ptr, lse_ptr, counter_ptr, part_stride)
    place, part = row * KV_HEADS + kv_head, shared_parts + own_part
    store_or_merge(out_ptr, parts, softmax, place, part, num_own, num_parts, GROUP, HEAD_DIM)


def decode_attention_triton(
    q,
    k_cache,
    v_cache,
    block_tables,
    slots,
    context_lens,
    scale,
    *,
    out=None,
    counters=None,
    plan=None,
    shared=None,
    config=None,
) -> torch.Tensor:
    """`decode_attention_torch` as a Triton kernel, which does not wait for the device.

    All but q and the caches is read before the kernel waits for its inputs (see `wait_for_inputs`).

    Args:
        out: [B, H, Dh] contiguous, where the result goes; a new tensor if None.
        counters: at least B * K int32 zeros, and zeros again afterwards; new ones if None. Launches that may overlap
            must not have the same.
        plan: a DecodePlan of these rows; one with `default_split_policy` if None.
        shared: SharedPrefixPartials over what rows have in common, by `shared_attention_triton` for that plan; or None.
        config: a DecodeConfig; `default_decode_config` if None.

    Raises:
        ValueError: a size is too small or no power of two where one is needed, or heads do not divide.
        ImportError: Triton is not installed.
    """
    batch, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    check_attention_inputs(q, k_cache, v_cache)
    sizes = batch, kv_heads, head_dim, q.element_size(), sm_count(q.device), shared is not None
    tile, num_warps, num_stages = config or default_decode_config(*sizes, shared_memory(q.device))
    check_power_of_2("tile", tile, MIN_DOT)
    check_power_of_2("block_size", block_size, 1)
    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device) if out is None else out
    if batch == 0:
        return out
    options = launch_options(q.device)
    if plan is None:  # which must then be written before this begins
        options = {"PDL": False}
        plan = plan_decode_triton(context_lens, kv_heads, default_split_policy(batch, kv_heads, sm_count(q.device)))
    if shared is not None:
        partial, lse = shared.partial, shared.lse
    else:
        partial, lse = new_partials(q, plan.num_splits)
    if counters is None:
        counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device=q.device)
    rows = slots, context_lens, plan.items, slots if shared is None else shared.rows
    tensors = q, k_cache, v_cache, block_tables, *rows, out, partial, lse, counters
    strides = q.stride(0), q.stride(1), block_tables.stride(0)
    _decode_kernel[(kv_heads, len(plan.items))](
        *tensors,
        scale * LOG2E,
        *strides,
        lse.shape[2],
        ROWS=max(MIN_DOT, triton.next_power_of_2(heads // kv_heads)),
        TILE=tile,
        SHARED=shared is not None,
        num_warps=num_warps,
        num_stages=num_stages,
        **attention_constants(q, k_cache),
        **options,
    )
    return out


def attention_constants(q: torch.Tensor, k_cache: torch.Tensor) -> dict[str, Any]:
    """What is compiled into an attention kernel for q [N, H, Dh] and a cache [num_blocks, block_size, K, Dh]."""
    _, block_size, kv_heads, head_dim = k_cache.shape
    return {
        "GROUP": q.shape[1] // kv_heads,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": max(MIN_DOT, triton.next_power_of_2(head_dim)),
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
    }


def check_power_of_2(name: str, value: int, least: int) -> None:
    """Raise ValueError unless `value` is a power of two of at least `least`."""
    if value < least or value & (value - 1):
        raise ValueError(f"{name}={value} must be a power of two of at least {least}")


def new_partials(q: torch.Tensor, num_parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for partial results of q [B, H, Dh]: outputs [B, H, P, Dh] and log-sum-exps (base 2) [B, H, P], float32."""
    batch, heads, head_dim = q.shape
    partial = torch.empty((batch, heads, num_parts, head_dim), dtype=torch.float32, device=q.device)
    return partial, torch.empty((batch, heads, num_parts), dtype=torch.float32, device=q.device)


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


def cache_places(
    block_tables: torch.Tensor, slots: torch.Tensor | int, positions: torch.Tensor, block_size: int, kv_heads: int
) -> torch.Tensor:
    """Where `gather` finds positions [..., L] of slots [..., 1]: [..., K, L] int64."""
    blocks = block_tables[slots, positions // block_size].to(torch.int64)
    tokens = blocks * block_size + positions % block_size
    return tokens[..., None, :] * kv_heads + torch.arange(kv_heads, device=positions.device)[:, None]


class DecodeGatherPlan(NamedTuple):
    """Where the KV of decode rows lies: the host's part of `attend_gathered`, done once for all layers.

    Attributes:
        indices: [B, K, L], the rows' `cache_places`.
        mask: [B, 1, 1, L], 0 where a position is in the row's context, else -inf; None if all rows have length L.
    """

    indices: torch.Tensor
    mask: torch.Tensor | None


def plan_decode_gather(
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    block_size: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> DecodeGatherPlan:
    """The plan for rows of block_tables[slots] that see `context_lens` tokens each. Synchronises with the device."""
    lens = context_lens.to(torch.int64)[:, None]  # [B, 1]
    positions = torch.arange(int(context_lens.max()), device=slots.device)[None]  # [1, L]
    seen = positions < lens
    # Past its context a row repeats its last token: what the cache holds there may be NaN, which no weight of 0 hides.
    positions = torch.minimum(positions, lens - 1)  # [B, L]
    indices = cache_places(block_tables, slots.to(torch.int64)[:, None], positions, block_size, kv_heads)
    if bool(seen.all()):
        return DecodeGatherPlan(indices, None)
    mask = torch.zeros(seen.shape, dtype=dtype, device=slots.device).masked_fill_(~seen, float("-inf"))
    return DecodeGatherPlan(indices, mask[:, None, None, :])


def gather(cache: torch.Tensor, indices: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[*indices.shape, Dh], the places `indices` of the cache seen as [tokens * K, Dh]; `out` is room for them."""
    rows = torch.index_select(cache.view(-1, cache.shape[-1]), 0, indices.view(-1), out=out)
    return rows.view(*indices.shape, -1)


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
    """Attention of one query per row over the row's pages; the query's own K and V are in the cache already.

    By a gather of each row's KV. Synchronises with the device.

    Args:
        q: [B, H, Dh], heads contiguous.
        k_cache, v_cache: [num_blocks, block_size, K, Dh], contiguous; H is a multiple of K.
        block_tables: [S, W] int32, physical block ids of each slot.
        slots: [B] int32, the slot of each row.
        context_lens: [B] int32, tokens each row sees, at least 1.
        scale: factor of the logits, positive.

    Returns:
        [B, H, Dh] in q's dtype.
    """
    check_attention_inputs(q, k_cache, v_cache)
    if len(q) == 0:
        return torch.empty_like(q)
    plan = plan_decode_gather(block_tables, slots, context_lens, *k_cache.shape[1:3], q.dtype)
    return attend_gathered(q, gather(k_cache, plan.indices), gather(v_cache, plan.indices), plan.mask, scale)
