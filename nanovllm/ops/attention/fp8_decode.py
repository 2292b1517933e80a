"""The loop of decode attention over keys and values in FP8: no barriers, and no shared memory for them.

FP8 halves the bytes, so the other costs of a tile become the limit: a conversion,
a second pass through shared memory, and barriers between warps. Here, each warp attends to its own tokens with its own
softmax, the warps' results are merged once at the end, and a thread loads exactly the numbers that it passes to the
tensor cores.

A tensor core expects certain rows and columns of its operands in each thread of a warp (PTX ISA, mma.m16n8k16). Thread
4 * g + t of 32 has the rows g and g + 8. Of each 16 columns it has four, COLUMNS of them in a row from COLUMNS * t on.
Both operands may permute their columns in the same way, because a product is a sum over the columns. So a thread can
load 16 bytes of a key, and these are its columns. In the other product a token is a column and a dimension
is a row: a thread loads 16 dimensions of the value of each of its tokens, as rows.

Triton gives each thread 16 bytes of the last dimension of a loaded tensor, and then threads, warps and registers of the
other one, in this order. So tiles are loaded as [row, 16 words] for keys and [row, 4 words] for values, where `row`
counts what the comments in `_load_words` name, fastest first. A tile is in words of four numbers, because Triton keeps
each byte of a tensor that survives a loop iteration in a register of its own.

If Triton chooses other threads, results stay right, but numbers move between threads again; test_compile.py notices it.
"""

from nanovllm.ops.attention.fp8_cache import key_scales, value_scales
from nanovllm.ops.triton_utils import INTERPRETED, TRITON_VERSION, kernel_constant, tl, triton

# Columns in a row that Triton gives a thread of these operands: four before 3.8, two since.
COLUMNS = kernel_constant(2 if TRITON_VERSION >= (3, 8) else 4)
# A tensor-core tile has so many rows, tokens of a warp's part of a tile, and so many columns, heads of the queries.
MIN_TOKENS = 16
MIN_HEADS = 8


@triton.jit
def widen_words(words):
    """Return the four e4m3 numbers of each word as float16, in a new last dimension of size 4."""
    if INTERPRETED:
        numbers = (tl.expand_dims(words, -1) >> (8 * tl.arange(0, 4))) & 255
        return numbers.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        code: tl.constexpr = """{
            .reg .b16 low, high;
            .reg .b32 x, y;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 x, low;
            cvt.rn.f16x2.e4m3x2 y, high;
            mov.b32 {$0, $1}, x;
            mov.b32 {$2, $3}, y;
        }"""
        a, b, c, d = tl.inline_asm_elementwise(
            code,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
        return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _locate(table_ptr, tile, tokens, end, last_block, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Return the block ids of a tile's `tokens`, their indices in these blocks, and whether they are before `end`."""
    positions = tile * TILE + tokens
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table_ptr + tl.minimum(tile // (BLOCK_SIZE // TILE), last_block))
    else:
        block = tl.load(table_ptr + tl.minimum(positions // BLOCK_SIZE, last_block))
    return block.to(tl.int64), positions % BLOCK_SIZE, positions < end


@triton.jit
def _load_words(
    cache,
    table,
    tile,
    kv_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Load words of K and V in the order that the top of this file explains, and the words of their scales [TILE].

    Warp w attends to the tokens from w * TILE / WARPS on. Tokens that are not before the end are zero.
    """
    k_ptr, v_ptr, scales_ptr = cache
    table_ptr, end, last_block = table
    TOKENS: tl.constexpr = TILE // WARPS
    WORDS: tl.constexpr = HEAD_DIM // 4
    row = tl.arange(0, TILE * WORDS // 16)  # g, warp, part, token / 8
    group = row // (8 * WARPS)
    tokens = row // 8 % WARPS * TOKENS + group // (WORDS // 16) * 8 + row % 8
    block, in_block, valid = _locate(table_ptr, tile, tokens, end, last_block, BLOCK_SIZE, TILE)
    words = ((block * BLOCK_SIZE + in_block) * KV_HEADS + kv_head) * WORDS + group % (WORDS // 16) * 16
    k = tl.load(k_ptr + words[:, None] + tl.arange(0, 16)[None, :], mask=valid[:, None], other=0)

    row = tl.arange(0, TILE * WORDS // 4)  # t, g, warp, part, token / 4
    group = row // (32 * WARPS)
    within = group // (WORDS // 32)
    tokens = row // 32 % WARPS * TOKENS
    tokens += within // COLUMNS * (4 * COLUMNS) + row % 4 * COLUMNS + within % COLUMNS
    block, in_block, valid = _locate(table_ptr, tile, tokens, end, last_block, BLOCK_SIZE, TILE)
    words = ((block * BLOCK_SIZE + in_block) * KV_HEADS + kv_head) * WORDS + group % (WORDS // 32) * 32
    words += row // 4 % 8 * 4
    v = tl.load(v_ptr + words[:, None] + tl.arange(0, 4)[None, :], mask=valid[:, None], other=0)

    block, in_block, valid = _locate(table_ptr, tile, tl.arange(0, TILE), end, last_block, BLOCK_SIZE, TILE)
    scales = tl.load(scales_ptr + (block * KV_HEADS + kv_head) * BLOCK_SIZE + in_block, mask=valid, other=0)
    return k, v, scales


@triton.jit
def _attend_words(
    softmax, q, words, seen, scale_log2e, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr
):
    """Add a tile to the state of each warp; see `attend_tile`.

    Args:
        softmax: the largest score [WARPS, heads], weights [WARPS, tokens, heads] and weighted values
            [WARPS, dims, heads]. Weights are summed at the end.
        q: [WARPS, dims, heads] float16, dims in the order of the keys' columns.
        seen: [WARPS, tokens].
    """
    running_max, weights, acc = softmax
    k, v, scales = words
    TOKENS: tl.constexpr = TILE // WARPS
    # token / 8, part, warp, g, t, and the 16 numbers of a thread
    k = tl.reshape(widen_words(k), [TOKENS // 8, HEAD_DIM // 64, WARPS, 8, 4, 16 // COLUMNS, COLUMNS])
    k = tl.reshape(tl.permute(k, [2, 0, 3, 1, 5, 4, 6]), [WARPS, TOKENS, HEAD_DIM])
    scales = tl.reshape(scales, [WARPS, TOKENS])
    factors = key_scales(scales).to(tl.float32) * scale_log2e
    scores = tl.where(seen[:, :, None], tl.dot(k, q) * factors[:, :, None], float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, 1) - 8)  # see `attend_tile`
    # A warp may have seen no token yet.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp2(running_max - shift)
    p = tl.exp2(scores - shift[:, None, :])
    weights = weights * decay[:, None, :] + p
    p = (p * value_scales(scales).to(tl.float32)[:, :, None]).to(tl.float16)
    # token / (4 * COLUMNS), column, part, warp, g, t, number
    v = tl.reshape(widen_words(v), [TOKENS // (4 * COLUMNS), COLUMNS, HEAD_DIM // 128, WARPS, 8, 4, 16])
    v = tl.reshape(tl.permute(v, [3, 2, 6, 4, 0, 5, 1]), [WARPS, HEAD_DIM, TOKENS])
    acc = tl.dot(v, p, acc * decay[:, None, :])
    return new_max, weights, acc


@triton.jit
def _merge_warps(softmax, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr):
    """Return the softmax state of `attend_tile` for all warps together: [heads], [heads] and [heads, dims]."""
    running_max, weights, acc = softmax
    largest = tl.max(running_max, 0)
    decay = tl.exp2(running_max - largest[None, :])
    total = tl.sum(tl.sum(weights, 1) * decay, 0)
    acc = tl.sum(acc * decay[:, None, :], 0)
    # Rows are in the order of the values' words: part, number, thread.
    acc = tl.permute(tl.reshape(acc, [HEAD_DIM // 128, 16, 8, HEADS]), [3, 0, 2, 1])
    return largest, total, tl.reshape(acc, [HEADS, HEAD_DIM])


@triton.jit
def attend_fp8(
    q,
    cache,
    table,
    tiles,
    kv_head,
    scale_log2e,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WARPS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Return the softmax state of `attend_tile` after some tiles, at least one of which has a token that is seen.

    Args:
        q: queries [heads, HEAD_DIM] in 16 bits; at least MIN_HEADS heads, padding included.
        cache: pointers to K and V as words of four numbers, and to the words of their scales.
        table: pointer to the sequence's block table, its context length and its last block.
        tiles: the first tile, and the first one after the last.
    """
    HEADS: tl.constexpr = q.shape[0]
    table_ptr, context_len, last_block = table
    first_tile, last_tile = tiles
    end = tl.minimum(context_len, last_tile * TILE)
    table = table_ptr, end, last_block
    q = tl.reshape(q.to(tl.float16), [HEADS, HEAD_DIM // 64, 4, 16 // COLUMNS, COLUMNS])
    q = tl.reshape(tl.permute(q, [1, 3, 2, 4, 0]), [HEAD_DIM, HEADS])
    q = tl.broadcast_to(q[None, :, :], [WARPS, HEAD_DIM, HEADS])
    tokens = tl.reshape(tl.arange(0, TILE), [WARPS, TILE // WARPS])
    largest = tl.full([WARPS, HEADS], float("-inf"), tl.float32)
    weights = tl.zeros([WARPS, TILE // WARPS, HEADS], tl.float32)
    softmax = largest, weights, tl.zeros([WARPS, HEAD_DIM, HEADS], tl.float32)
    words = _load_words(cache, table, first_tile, kv_head, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WARPS)
    for tile in tl.range(first_tile, last_tile, num_stages=1):
        next_words = _load_words(cache, table, tile + 1, kv_head, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WARPS)
        seen = tile * TILE + tokens < end
        if WINDOW:
            seen &= tile * TILE + tokens >= context_len - WINDOW
        softmax = _attend_words(softmax, q, words, seen, scale_log2e, HEAD_DIM, TILE, WARPS)
        words = next_words
    return _merge_warps(softmax, HEAD_DIM, HEADS)
