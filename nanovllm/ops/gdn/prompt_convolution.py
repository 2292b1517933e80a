"""First kernel of Gated DeltaNet of prompt rows: convolution, SiLU, norms of q and k; see prompt.py."""

import torch

from nanovllm.ops.gdn.elementwise import l2_scale, silu
from nanovllm.ops.gdn.inputs import CHUNK, CONV_WIDTH, GdnInputs, GdnState, GdnWeights
from nanovllm.ops.gdn.plan import PromptPlan
from nanovllm.ops.gdn.prompt_tiles import ChunkTiles, GdnPromptConfig
from nanovllm.ops.state.rows import StateRows
from nanovllm.ops.triton_utils import launch_dependents, launch_options, tl, triton, wait_for_inputs


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
    is_token = tl.broadcast_to(rows < length, [tokens.shape[0], channels.shape[0]])
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
        wait_for_inputs(PDL)  # perhaps no program has work
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


def convolve_triton(
    tiles: ChunkTiles,
    inputs: GdnInputs,
    weights: GdnWeights,
    state: GdnState,
    rows: StateRows,
    plan: PromptPlan,
    out: torch.Tensor,
    config: GdnPromptConfig,
) -> None:
    """Write `q`, `k` and `v` of each chunk. Write zeros to `out` for padding tokens."""
    qkv = inputs.qkv
    num_chunks, k_heads, _, k_dim = tiles.k.shape
    _, heads, _, v_dim = tiles.v.shape
    _gdn_convolution_kernel[(2 * k_heads + heads, num_chunks)](
        qkv,
        weights.conv,
        state.conv,
        tiles.q,
        tiles.k,
        tiles.v,
        out,
        rows.slots,
        rows.starts,
        rows.cu_seqlens,
        plan.chunk_rows,
        plan.chunk_tokens,
        len(qkv),
        qkv.stride(0),
        K_HEADS=k_heads,
        V_HEADS=heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        CHUNK=CHUNK,
        WIDTH=CONV_WIDTH,
        num_warps=config.convolution_warps,
        **launch_options(out.device),
    )
