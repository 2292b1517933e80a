"""Gated DeltaNet of prompt rows, in chunks of 64 tokens.

Within a chunk, with g the running sum of the decay's logarithm and S the state before the chunk:

    A      = beta_i (k_i k_j) exp(g_i - g_j)   for j < i
    solved = (I + A)^-1 diag(beta)
    W      = solved (V - exp(g) K S)                       what each token writes
    O      = exp(g) Q S + scores W                         scores_ij = (q_i k_j) exp(g_i - g_j) for j <= i
    S     <- exp(g_last) S + (exp(g_last - g) K)^T W

Three kernels do this:

1. Convolution, one program per chunk and head: convolution, SiLU, norms of q and k.
2. Chunk, one program per chunk and value head: gates, `solved` and `scores`. Nothing depends on the state, so all
   chunks run in parallel.
3. Recurrence, one program per row, value head and slice of the value dimensions: it walks over the chunks with the
   state in registers, and stores the outputs. It computes everything transposed (S^T, W^T, O^T). The result of a matmul
   is then the left operand of the next one and stays in registers.

Between the kernels, chunks are padded with zeros to whole tiles, so that loads need no masks.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.gdn.elementwise import l2_scale, log_decay, silu
from nanovllm.ops.gdn.inputs import CONV_WIDTH, GdnInputs, GdnState, GdnWeights
from nanovllm.ops.gdn.plan import CHUNK, PromptPlan
from nanovllm.ops.state.rows import StateRows
from nanovllm.ops.triton_utils import launch_dependents, launch_options, tl, triton, wait_for_inputs

# Rows of the diagonal blocks that are inverted row by row.
_BLOCK = 16


class GdnPromptConfig(NamedTuple):
    """Settings of the kernels.

    Attributes:
        convolution_warps, chunk_warps: warps per program of the first two kernels.
        slices: parts of the value dimensions in the recurrence.
        num_stages: pipeline stages of the recurrence.
        merge_precision: of the matmuls that build the inverse; see tl.dot.
    """

    convolution_warps: int = 8
    chunk_warps: int = 4
    slices: int = 2
    num_stages: int = 2
    merge_precision: str = "tf32"


class Prepared(NamedTuple):
    """Input of the recurrence: tiles of N chunks.

    Args:
        q, k: [N, HK, CHUNK, DK], normalized, q scaled.
        v: [N, HV, CHUNK, DV].
        solved, scores: [N, HV, CHUNK, CHUNK].
        g: [N, HV, CHUNK] float32, running sum within the chunk.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    solved: torch.Tensor
    scores: torch.Tensor
    g: torch.Tensor


@triton.jit
def _convolved_tile(
    x_ptr,
    x_stride,
    history_ptr,
    weight_ptr,
    channels,
    tokens,
    length,
    start,
    first_token,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return SiLU of the convolution for `tokens` of a row, [CHUNK, channels], rounded; zeros after the row's end."""
    rows = tokens[:, None]
    is_token = (rows < length) & (channels[None, :] >= 0)
    total = tl.zeros([tokens.shape[0], channels.shape[0]], tl.float32)
    for back in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + channels * WIDTH + WIDTH - 1 - back).to(tl.float32)
        before = rows - back
        x = tl.load(
            x_ptr + before.to(tl.int64) * x_stride + channels[None, :], mask=is_token & (before >= 0), other=0.0
        )
        total += x.to(tl.float32) * weight[None, :]
        if back > 0 and first_token == 0:
            position = start + before
            x = tl.load(
                history_ptr + (position & (WIDTH - 1)) * CHANNELS + channels[None, :],
                mask=is_token & (before < 0) & (position >= 0),
                other=0.0,
            )
            total += x.to(tl.float32) * weight[None, :]
    return silu(total).to(x_ptr.dtype.element_ty)


@triton.jit
def _unit_lower_inverse(a, SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of I + a, where a [SIZE, SIZE] float32 is strictly lower triangular.

    The diagonal blocks are inverted exactly, all at once. With D their inverse and N = D times the blocks below them,
    I + a = D^-1 (I + N), and N^4 = 0 for four blocks: the inverse is (I - N) (I + N^2) D.
    """
    BLOCKS: tl.constexpr = SIZE // BLOCK
    blocks = tl.arange(0, BLOCKS)
    inner = tl.arange(0, BLOCK)
    same = (blocks[:, None, None, None] == blocks[None, None, :, None]) & (inner[None, :, None, None] >= 0)
    diagonal = tl.sum(tl.where(same, tl.reshape(a, [BLOCKS, BLOCK, BLOCKS, BLOCK]), 0.0), 2)
    row = inner[None, :, None]
    column = inner[None, None, :]
    inverse = tl.where((row == column) & (blocks[:, None, None] >= 0), 1.0, 0.0)
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


@triton.jit(do_not_specialize=["slots_ptr", "starts_ptr", "cu_ptr", "chunk_rows_ptr", "chunk_tokens_ptr", "num_tokens"])
def _gdn_convolution_kernel(
    qkv_ptr,
    conv_weight_ptr,
    conv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    cu_ptr,
    chunk_rows_ptr,
    chunk_tokens_ptr,
    num_tokens,
    qkv_stride,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    row = tl.load(chunk_rows_ptr + chunk)
    token = tl.load(chunk_tokens_ptr + chunk)
    v_head = head - 2 * K_HEADS
    index = tl.arange(0, CHUNK)
    values = tl.arange(0, V_DIM)
    if row < 0:
        # Padding tokens get zeros: what is computed from them later must be finite.
        wait_for_inputs(PDL)
        if (token < num_tokens) & (v_head >= 0):
            padding = (token + index).to(tl.int64)[:, None]
            ptrs = out_ptr + (padding * V_HEADS + v_head) * V_DIM + values[None, :]
            tl.store(ptrs, tl.zeros([CHUNK, V_DIM], out_ptr.dtype.element_ty), mask=padding < num_tokens)
        return
    launch_dependents(PDL)
    KEYS: tl.constexpr = K_HEADS * K_DIM
    CHANNELS: tl.constexpr = 2 * KEYS + V_HEADS * V_DIM
    first = tl.load(cu_ptr + row)
    length = tl.load(cu_ptr + row + 1) - first
    slot = tl.load(slots_ptr + row).to(tl.int64)
    start = tl.load(starts_ptr + row).to(tl.int32)
    x_ptr = qkv_ptr + first.to(tl.int64) * qkv_stride
    history_ptr = conv_ptr + slot * WIDTH * CHANNELS
    wait_for_inputs(PDL)
    if v_head >= 0:
        v = _convolved_tile(
            x_ptr,
            qkv_stride,
            history_ptr,
            conv_weight_ptr,
            2 * KEYS + v_head * V_DIM + values,
            token - first + index,
            length,
            start,
            token - first,
            CHANNELS,
            WIDTH,
        )
        v_tile = (chunk * V_HEADS + v_head) * (CHUNK * V_DIM)
        tl.store(v_ptr + v_tile + index[:, None] * V_DIM + values[None, :], v)
    else:
        keys = tl.arange(0, K_DIM)
        x = _convolved_tile(
            x_ptr,
            qkv_stride,
            history_ptr,
            conv_weight_ptr,
            head * K_DIM + keys,
            token - first + index,
            length,
            start,
            token - first,
            CHANNELS,
            WIDTH,
        ).to(tl.float32)
        is_q = head < K_HEADS
        x *= (l2_scale(x, 1) * tl.where(is_q, K_DIM**-0.5, 1.0))[:, None]
        k_tile = (chunk * K_HEADS + head % K_HEADS) * (CHUNK * K_DIM)
        tl.store(
            tl.where(is_q, q_ptr, k_ptr) + k_tile + index[:, None] * K_DIM + keys[None, :], x.to(q_ptr.dtype.element_ty)
        )


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
        wait_for_inputs(PDL)
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


@triton.jit
def _copy_channels(source_ptrs, target_ptrs, channels, tokens):
    """Copy channels of the tokens that exist."""
    mask = (tokens >= 0)[:, None] & (channels >= 0)[None, :]
    x = tl.load(source_ptrs[:, None] + channels[None, :], mask=mask, other=0.0)
    tl.store(target_ptrs[:, None] + channels[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["slots_ptr", "starts_ptr", "cu_ptr", "rows_ptr", "first_chunks_ptr"])
def _gdn_recurrence_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    solved_ptr,
    scores_ptr,
    g_ptr,
    qkv_ptr,
    recurrent_ptr,
    conv_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    cu_ptr,
    rows_ptr,
    first_chunks_ptr,
    qkv_stride,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SLICE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    first_value = tl.program_id(1) * SLICE
    prompt = tl.program_id(2)
    row = tl.load(rows_ptr + prompt)
    if row < 0:
        wait_for_inputs(PDL)
        return
    launch_dependents(PDL)
    GROUP: tl.constexpr = V_HEADS // K_HEADS
    KEYS: tl.constexpr = K_HEADS * K_DIM
    CHANNELS: tl.constexpr = 2 * KEYS + V_HEADS * V_DIM
    k_head = head // GROUP
    first_chunk = tl.load(first_chunks_ptr + prompt).to(tl.int64)
    first = tl.load(cu_ptr + row)
    length = tl.load(cu_ptr + row + 1) - first
    slot = tl.load(slots_ptr + row).to(tl.int64)
    start = tl.load(starts_ptr + row).to(tl.int32)
    num_chunks = tl.cdiv(length, CHUNK)

    index = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_DIM)
    values = first_value + tl.arange(0, SLICE)
    state_ptrs = recurrent_ptr + (slot * V_HEADS + head) * (K_DIM * V_DIM) + keys[:, None] * V_DIM + values[None, :]
    has_past = tl.full([K_DIM, SLICE], start, tl.int32) > 0
    state = tl.trans(tl.load(state_ptrs, mask=has_past, other=0.0).to(tl.float32))

    tile = first_chunk * K_HEADS + k_head
    k_ptrs = k_ptr + tile * (CHUNK * K_DIM) + index[:, None] * K_DIM + keys[None, :]
    q_ptrs = q_ptr + tile * (CHUNK * K_DIM) + index[:, None] * K_DIM + keys[None, :]
    tile = first_chunk * V_HEADS + head
    v_ptrs = v_ptr + tile * (CHUNK * V_DIM) + index[:, None] * V_DIM + values[None, :]
    square = tile * (CHUNK * CHUNK) + index[:, None] * CHUNK + index[None, :]
    solved_ptrs = solved_ptr + square
    scores_ptrs = scores_ptr + square
    g_ptrs = g_ptr + tile * CHUNK + index
    last_ptr = g_ptr + tile * CHUNK + CHUNK - 1
    token_offsets = (first + index).to(tl.int64)[:, None]
    out_ptrs = out_ptr + (token_offsets * V_HEADS + head) * V_DIM + values[None, :]
    dtype: tl.constexpr = q_ptr.dtype.element_ty

    wait_for_inputs(PDL)
    # The gates of a chunk are loaded one iteration before they are used; there is an unused chunk after the last one.
    g = tl.load(g_ptrs)
    last = tl.load(last_ptr)
    for chunk in tl.range(0, num_chunks, num_stages=STAGES):
        is_token = (chunk * CHUNK + index < length)[:, None] & (values >= 0)[None, :]
        g_next = tl.load(g_ptrs + V_HEADS * CHUNK)
        last_next = tl.load(last_ptr + V_HEADS * CHUNK)
        k = tl.load(k_ptrs)
        q = tl.load(q_ptrs)
        v = tl.load(v_ptrs)
        solved = tl.load(solved_ptrs)
        scores = tl.load(scores_ptrs)
        decay = tl.exp(g)[None, :]
        rounded = state.to(dtype)
        predicted = tl.dot(rounded, tl.trans(k), input_precision=DOT) * decay
        attended = tl.dot(rounded, tl.trans(q), input_precision=DOT) * decay
        error = (tl.trans(v).to(tl.float32) - predicted).to(dtype)
        written = tl.dot(error, tl.trans(solved), input_precision=DOT)
        attended = tl.dot(written.to(dtype), tl.trans(scores), attended, input_precision=DOT)
        kept = (written * tl.exp(last - g)[None, :]).to(dtype)
        state = tl.dot(kept, k, state * tl.exp(last), input_precision=DOT)
        out = tl.trans(attended.to(dtype))
        tl.store(out_ptrs, out, mask=is_token)
        g = g_next
        last = last_next
        k_ptrs += K_HEADS * CHUNK * K_DIM
        q_ptrs += K_HEADS * CHUNK * K_DIM
        v_ptrs += V_HEADS * CHUNK * V_DIM
        solved_ptrs += V_HEADS * CHUNK * CHUNK
        scores_ptrs += V_HEADS * CHUNK * CHUNK
        g_ptrs += V_HEADS * CHUNK
        last_ptr += V_HEADS * CHUNK
        out_ptrs += CHUNK * V_HEADS * V_DIM
    tl.store(state_ptrs, tl.trans(state).to(recurrent_ptr.dtype.element_ty))

    # All reads of the convolution's state were in the kernel before.
    latest = length - 1 - tl.arange(0, WIDTH)
    x_ptrs = qkv_ptr + (first + latest).to(tl.int64) * qkv_stride
    ring_ptrs = conv_ptr + slot * WIDTH * CHANNELS + ((start + latest) & (WIDTH - 1)) * CHANNELS
    _copy_channels(x_ptrs, ring_ptrs, 2 * KEYS + head * V_DIM + values, latest)
    if (head % GROUP == 0) & (first_value == 0):
        _copy_channels(x_ptrs, ring_ptrs, k_head * K_DIM + keys, latest)
        _copy_channels(x_ptrs, ring_ptrs, KEYS + k_head * K_DIM + keys, latest)


def _solve_chunks_triton(
    prepared: Prepared,
    inputs: GdnInputs,
    weights: GdnWeights,
    rows: StateRows,
    plan: PromptPlan,
    config: GdnPromptConfig,
) -> None:
    """Write what the recurrence needs of each chunk's tokens among each other: `solved`, `scores` and `g`."""
    num_chunks, k_heads, _, k_dim = prepared.k.shape
    heads = prepared.v.shape[1]
    exact = prepared.k.dtype == torch.float32
    _gdn_chunk_kernel[(heads, num_chunks)](
        prepared.q,
        prepared.k,
        inputs.b,
        inputs.a,
        weights.a_log,
        weights.dt_bias,
        prepared.solved,
        prepared.scores,
        prepared.g,
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


def gdn_prepare_triton(
    inputs: GdnInputs,
    weights: GdnWeights,
    state: GdnState,
    rows: StateRows,
    plan: PromptPlan,
    out: torch.Tensor,
    config: GdnPromptConfig,
) -> Prepared:
    """Run the kernels before the recurrence. They also write zeros to `out` for padding tokens."""
    k_heads = state.check(inputs, weights)
    _, heads, k_dim, v_dim = state.recurrent.shape
    qkv = inputs.qkv
    num_chunks = len(plan.chunk_rows)

    def empty(*shape: int, dtype: torch.dtype = qkv.dtype) -> torch.Tensor:
        return torch.empty((num_chunks, *shape), dtype=dtype, device=qkv.device)

    prepared = Prepared(
        empty(k_heads, CHUNK, k_dim),
        empty(k_heads, CHUNK, k_dim),
        empty(heads, CHUNK, v_dim),
        empty(heads, CHUNK, CHUNK),
        empty(heads, CHUNK, CHUNK),
        empty(heads, CHUNK, dtype=torch.float32),
    )
    shape = dict(K_HEADS=k_heads, V_HEADS=heads, K_DIM=k_dim, CHUNK=CHUNK, **launch_options(out.device))
    _gdn_convolution_kernel[(2 * k_heads + heads, num_chunks)](
        qkv,
        weights.conv,
        state.conv,
        prepared.q,
        prepared.k,
        prepared.v,
        out,
        rows.slots,
        rows.starts,
        rows.cu_seqlens,
        plan.chunk_rows,
        plan.chunk_tokens,
        len(qkv),
        qkv.stride(0),
        V_DIM=v_dim,
        WIDTH=CONV_WIDTH,
        num_warps=config.convolution_warps,
        **shape,
    )
    _solve_chunks_triton(prepared, inputs, weights, rows, plan, config)
    return prepared


def gdn_recurrence_triton(
    prepared: Prepared,
    inputs: GdnInputs,
    weights: GdnWeights,
    state: GdnState,
    rows: StateRows,
    plan: PromptPlan,
    out: torch.Tensor,
    config: GdnPromptConfig,
) -> None:
    """Update the state and write `out`, which still needs `gated_rms_norm`."""
    k_heads = state.check(inputs, weights)
    _, heads, k_dim, v_dim = state.recurrent.shape
    size = v_dim // config.slices
    exact = out.dtype == torch.float32
    _gdn_recurrence_kernel[(heads, config.slices, len(plan.rows))](
        *prepared,
        inputs.qkv,
        state.recurrent,
        state.conv,
        out,
        rows.slots,
        rows.starts,
        rows.cu_seqlens,
        plan.rows,
        plan.first_chunks,
        inputs.qkv.stride(0),
        K_HEADS=k_heads,
        V_HEADS=heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        SLICE=size,
        WIDTH=CONV_WIDTH,
        CHUNK=CHUNK,
        DOT="ieee" if exact else "tf32",
        STAGES=1 if exact else config.num_stages,
        # One warp per 16 value dimensions: then no operand crosses warps.
        num_warps=max(4, size // 16),
        **launch_options(out.device),
    )


def gdn_prompt_triton(
    inputs: GdnInputs,
    weights: GdnWeights,
    state: GdnState,
    rows: StateRows,
    out: torch.Tensor,
    config: GdnPromptConfig | None = None,
) -> None:
    """Compute `gated_delta_net` of the rows of two or more tokens, without the norm and the gate at its end.

    Args:
        rows: the rows of the step, with a `PromptPlan`.
        out: [T, HV * DV], contiguous. The tokens of these rows are written, and zeros for padding tokens; other rows
            are undefined afterwards.
    """
    plan: PromptPlan | None = rows.plan
    if plan is None:
        raise ValueError("rows.plan must be a PromptPlan, got None")
    v_dim = state.recurrent.shape[-1]
    config = config or GdnPromptConfig(slices=2 if v_dim >= 32 else 1)  # tl.dot needs tiles of 16
    prepared = gdn_prepare_triton(inputs, weights, state, rows, plan, out, config)
    gdn_recurrence_triton(prepared, inputs, weights, state, rows, plan, out, config)
