"""Second kernel of Gated DeltaNet of prompt rows: what the tokens of a chunk do to each other; see prompt.py."""

import torch

from nanovllm.ops.gdn.elementwise import log_decay
from nanovllm.ops.gdn.inputs import CHUNK, GdnInputs, GdnWeights
from nanovllm.ops.gdn.plan import PromptPlan
from nanovllm.ops.gdn.prompt_tiles import ChunkTiles, GdnPromptConfig
from nanovllm.ops.state.rows import StateRows
from nanovllm.ops.triton_utils import launch_dependents, launch_options, tl, triton, wait_for_inputs

# Height of a diagonal block, at least a quarter of CHUNK. All blocks are inverted together, one row in each iteration.
_BLOCK = 16


@triton.jit
def _unit_lower_inverse(a, SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of I + a, where a [SIZE, SIZE] float32 is strictly lower triangular.

    The diagonal blocks are inverted exactly, all at once. With D their inverse and N = D times the blocks below them,
    I + a = D^-1 (I + N), and N^4 = 0 for up to four blocks: the inverse is (I - N) (I + N^2) D.
    """
    BLOCKS: tl.constexpr = SIZE // BLOCK
    tl.static_assert(BLOCKS <= 4)
    blocks = tl.arange(0, BLOCKS)
    inner = tl.arange(0, BLOCK)
    same = blocks[:, None, None, None] == blocks[None, None, :, None]
    same = tl.broadcast_to(same, [BLOCKS, BLOCK, BLOCKS, 1])
    diagonal = tl.sum(tl.where(same, tl.reshape(a, [BLOCKS, BLOCK, BLOCKS, BLOCK]), 0.0), 2)
    row = inner[None, :, None]
    column = inner[None, None, :]
    inverse = tl.where(tl.broadcast_to(row == column, [BLOCKS, BLOCK, BLOCK]), 1.0, 0.0)
    for index in tl.static_range(BLOCK - 1):
        pivot = tl.sum(tl.where(row == index, inverse, 0.0), 1)
        factor = tl.sum(tl.where(column == index, diagonal, 0.0), 2)
        inverse -= factor[:, :, None] * pivot[:, None, :]
    wide = tl.where(same, inverse[:, :, None, :], 0.0)
    d = tl.reshape(wide, [SIZE, SIZE])
    row_blocks = tl.arange(0, SIZE) // BLOCK
    below = tl.where(row_blocks[:, None] > row_blocks[None, :], a, 0.0)
    n = tl.dot(d, below, input_precision=PRECISION)
    y = tl.dot(tl.dot(n, n, input_precision=PRECISION), d, d, input_precision=PRECISION)
    return y - tl.dot(n, y, input_precision=PRECISION)


@triton.jit(do_not_specialize=["cu_ptr", "chunk_rows_ptr", "chunk_tokens_ptr"])
def _gdn_chunk_kernel(
    q_ptr,
    k_ptr,
    b_ptr,
    a_ptr,
    a_log_ptr,
    dt_bias_ptr,
    solved_ptr,
    scores_ptr,
    g_ptr,
    cu_ptr,
    chunk_rows_ptr,
    chunk_tokens_ptr,
    b_stride,
    a_stride,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    MERGE: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    row = tl.load(chunk_rows_ptr + chunk)
    token = tl.load(chunk_tokens_ptr + chunk)
    if row < 0:
        wait_for_inputs(PDL)  # perhaps no program has work
        return
    launch_dependents(PDL)
    index = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_DIM)
    k_tile = (chunk * K_HEADS + head // (V_HEADS // K_HEADS)) * (CHUNK * K_DIM) + index[:, None] * K_DIM + keys[None, :]
    tokens = token + index
    is_token = tokens < tl.load(cu_ptr + row + 1)
    tokens = tokens.to(tl.int64)
    a_log = tl.load(a_log_ptr + head).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)

    wait_for_inputs(PDL)
    b = tl.load(b_ptr + tokens * b_stride + head, mask=is_token, other=0.0)
    a = tl.load(a_ptr + tokens * a_stride + head, mask=is_token, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + k_tile)
    q = tl.load(q_ptr + k_tile)
    beta = tl.where(is_token, tl.sigmoid(b.to(tl.float32)).to(b.dtype).to(tl.float32), 0.0)
    g = tl.cumsum(tl.where(is_token, log_decay(a, a_log, dt_bias), 0.0), 0)
    tile = chunk * V_HEADS + head
    tl.store(g_ptr + tile * CHUNK + index, g)
    seen = index[:, None] >= index[None, :]
    decay = tl.exp(tl.where(seen, g[:, None] - g[None, :], float("-inf")))
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    square = tile * (CHUNK * CHUNK) + index[:, None] * CHUNK + index[None, :]
    scores = tl.dot(q, tl.trans(k), input_precision=DOT) * decay
    tl.store(scores_ptr + square, scores.to(dtype))
    system = tl.dot(k, tl.trans(k), input_precision=DOT) * decay * beta[:, None]
    system = tl.where(index[:, None] > index[None, :], system, 0.0)
    solved = _unit_lower_inverse(system, CHUNK, BLOCK, MERGE) * beta[None, :]
    tl.store(solved_ptr + square, solved.to(dtype))


def solve_chunks_triton(
    tiles: ChunkTiles,
    inputs: GdnInputs,
    weights: GdnWeights,
    rows: StateRows,
    plan: PromptPlan,
    config: GdnPromptConfig,
) -> None:
    """Write the terms within each chunk: `solved`, `scores` and `g`."""
    num_chunks, k_heads, _, k_dim = tiles.k.shape
    heads = tiles.v.shape[1]
    exact = tiles.k.dtype == torch.float32
    _gdn_chunk_kernel[(heads, num_chunks)](
        tiles.q,
        tiles.k,
        inputs.b,
        inputs.a,
        weights.a_log,
        weights.dt_bias,
        tiles.solved,
        tiles.scores,
        tiles.g,
        rows.cu_seqlens,
        plan.chunk_rows,
        plan.chunk_tokens,
        inputs.b.stride(0),
        inputs.a.stride(0),
        K_HEADS=k_heads,
        V_HEADS=heads,
        K_DIM=k_dim,
        CHUNK=CHUNK,
        BLOCK=_BLOCK,
        DOT="ieee" if exact else "tf32",
        MERGE="ieee" if exact else config.merge_precision,
        num_warps=config.chunk_warps,
        **launch_options(inputs.qkv.device),
    )
