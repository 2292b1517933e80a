"""Gated DeltaNet of rows of one token.

Each program owns a slice of a value head of a row. It convolves the channels that it needs, norms q and k, reads its
part of the state once, and writes it once. The bytes of the state are the limit. So the program loads the state before
it waits for the projections (programmatic dependent launch): no other kernel of the step writes it.

For few rows a slice is a whole head, so that the program can norm and gate the output as well. For many rows, smaller
slices read the state faster, because more programs run at once.

Several programs convolve the same q and k. They need no order: the convolution's state is a ring, and the new input
overwrites none of the inputs that the step reads.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.gdn.elementwise import gated_norm_tile, l2_scale, log_decay, silu
from nanovllm.ops.gdn.inputs import CONV_WIDTH, GdnInputs, GdnState, GdnWeights
from nanovllm.ops.state.rows import StateRows
from nanovllm.ops.triton_utils import launch_dependents, launch_options, tl, triton, wait_for_inputs


class GdnDecodeConfig(NamedTuple):
    """Settings of the kernel.

    Attributes:
        slices: parts of the value dimensions.
        num_warps: warps per program.
    """

    slices: int = 1
    num_warps: int = 4


MAX_WHOLE_HEADS = 128  # above this many (row, head) pairs, slices are faster


def default_decode_config(num_rows: int, heads: int, v_dim: int, state_dtype: torch.dtype) -> GdnDecodeConfig:
    """Return the settings for `num_rows` rows with value heads of `v_dim` dimensions."""
    if num_rows * heads <= MAX_WHOLE_HEADS or v_dim < 64:
        return GdnDecodeConfig()
    if state_dtype.itemsize == 2:  # two warps per slice took 1.8 times as long
        return GdnDecodeConfig(slices=v_dim // 32, num_warps=1)
    return GdnDecodeConfig(slices=2, num_warps=2)


@triton.jit
def _past_inputs(history_ptr, channels, position, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the WIDTH - 1 inputs before the current one, oldest first: [WIDTH, channels].

    The last row is zero: it is the current input's place.
    """
    positions = position - (WIDTH - 1) + tl.arange(0, WIDTH)[:, None]
    mask = tl.broadcast_to((positions >= 0) & (positions < position), [WIDTH, channels.shape[0]])
    offsets = (positions & (WIDTH - 1)) * CHANNELS + channels[None, :]
    return tl.load(history_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _convolved(x_ptr, past, weight_ptr, new_ptr, channels, is_owner, WIDTH: tl.constexpr):
    """Return SiLU of the convolution, rounded; store the current token's input if this program owns the channels.

    The sum over a tile of taps keeps each thread's part small. In the layout of the state, every thread of a warp would
    compute the same channels.
    """
    taps = tl.arange(0, WIDTH)[:, None]
    columns = tl.broadcast_to(channels[None, :], [WIDTH, channels.shape[0]])
    weight = tl.load(weight_ptr + columns * WIDTH + taps).to(tl.float32)
    is_new = tl.broadcast_to(taps == WIDTH - 1, [WIDTH, channels.shape[0]])
    new = tl.load(x_ptr + columns, mask=is_new, other=0.0)
    if is_owner:
        tl.store(new_ptr + columns, new, mask=is_new)
    x = tl.where(is_new, new, past).to(tl.float32)
    return silu(tl.sum(x * weight, 0)).to(past.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["slots_ptr", "starts_ptr", "cu_ptr"])
def _gdn_decode_kernel(
    qkv_ptr,
    z_ptr,
    b_ptr,
    a_ptr,
    conv_weight_ptr,
    a_log_ptr,
    dt_bias_ptr,
    norm_ptr,
    recurrent_ptr,
    conv_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    cu_ptr,
    qkv_stride,
    z_stride,
    b_stride,
    a_stride,
    eps,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SLICE: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    MIXED: tl.constexpr,
    PDL: tl.constexpr,
):
    SLICES: tl.constexpr = V_DIM // SLICE
    head = tl.program_id(0) // SLICES
    first_value = (tl.program_id(0) % SLICES) * SLICE
    row = tl.program_id(1)
    token = row
    if MIXED:
        token = tl.load(cu_ptr + row)
        if tl.load(cu_ptr + row + 1) - token != 1:
            wait_for_inputs(PDL)  # perhaps no program has work
            return
    launch_dependents(PDL)
    token = token.to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    position = tl.load(starts_ptr + row).to(tl.int32)

    GROUP: tl.constexpr = V_HEADS // K_HEADS
    KEYS: tl.constexpr = K_HEADS * K_DIM
    CHANNELS: tl.constexpr = 2 * KEYS + V_HEADS * V_DIM
    k_head = head // GROUP
    keys = tl.arange(0, K_DIM)
    values = first_value + tl.arange(0, SLICE)
    state_ptrs = recurrent_ptr + (slot * V_HEADS + head) * (K_DIM * V_DIM) + keys[:, None] * V_DIM + values[None, :]
    has_past = tl.full([K_DIM, SLICE], position, tl.int32) > 0
    # The state is read once in a step and written once, so that it need not stay in a cache.
    state = tl.load(state_ptrs, mask=has_past, other=0.0, cache_modifier=".cg").to(tl.float32)
    q_channels = k_head * K_DIM + keys
    k_channels = KEYS + q_channels
    v_channels = 2 * KEYS + head * V_DIM + values
    history_ptr = conv_ptr + slot * WIDTH * CHANNELS
    q_past = _past_inputs(history_ptr, q_channels, position, CHANNELS, WIDTH)
    k_past = _past_inputs(history_ptr, k_channels, position, CHANNELS, WIDTH)
    v_past = _past_inputs(history_ptr, v_channels, position, CHANNELS, WIDTH)
    a_log = tl.load(a_log_ptr + head).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)

    wait_for_inputs(PDL)
    x_ptr = qkv_ptr + token * qkv_stride
    b = tl.load(b_ptr + token * b_stride + head)
    a = tl.load(a_ptr + token * a_stride + head).to(tl.float32)
    new_ptr = history_ptr + (position & (WIDTH - 1)) * CHANNELS
    is_owner = (head % GROUP == 0) & (first_value == 0)
    q = _convolved(x_ptr, q_past, conv_weight_ptr, new_ptr, q_channels, is_owner, WIDTH)
    k = _convolved(x_ptr, k_past, conv_weight_ptr, new_ptr, k_channels, is_owner, WIDTH)
    v = _convolved(x_ptr, v_past, conv_weight_ptr, new_ptr, v_channels, True, WIDTH)
    q *= l2_scale(q, 0) * (K_DIM**-0.5)
    k *= l2_scale(k, 0)
    beta = tl.sigmoid(b.to(tl.float32)).to(b.dtype).to(tl.float32)
    decay = tl.exp(log_decay(a, a_log, dt_bias))
    # Both reads of the state are of the old one, so that they are one pass: q S' = decay * q S + (q k) * written.
    written = beta * (v - decay * tl.sum(state * k[:, None], 0))
    attended = decay * tl.sum(state * q[:, None], 0) + tl.sum(q * k, 0) * written
    state = state * decay + k[:, None] * written[None, :]
    tl.store(state_ptrs, state.to(recurrent_ptr.dtype.element_ty), cache_modifier=".cs")
    out = attended.to(out_ptr.dtype.element_ty)[None, :]
    if NORM:
        z = tl.load(z_ptr + token * z_stride + head * V_DIM + values)[None, :]
        weight = tl.load(norm_ptr + values).to(tl.float32)[None, :]
        out = gated_norm_tile(out, z, weight, eps, V_DIM, out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * V_HEADS + head) * V_DIM + values[None, :], out)


def gdn_decode_triton(
    inputs: GdnInputs,
    weights: GdnWeights,
    state: GdnState,
    rows: StateRows,
    out: torch.Tensor,
    config: GdnDecodeConfig,
    norm: bool,
) -> None:
    """Compute `gated_delta_net` of the rows of one token; other rows are left alone.

    Args:
        out: [T, HV * DV], contiguous; the tokens of these rows are written.
        norm: norm and gate the output. Only with one slice; else `gated_rms_norm_triton` must follow.
    """
    if norm and config.slices > 1:
        raise ValueError(f"norm needs one slice, got {config.slices}")
    k_heads = state.num_key_heads
    _, heads, k_dim, v_dim = state.recurrent.shape
    if not len(rows.slots):
        return
    _gdn_decode_kernel[(heads * config.slices, len(rows.slots))](
        inputs.qkv,
        inputs.z,
        inputs.b,
        inputs.a,
        weights.conv,
        weights.a_log,
        weights.dt_bias,
        weights.norm,
        state.recurrent,
        state.conv,
        out,
        rows.slots,
        rows.starts,
        rows.slots if rows.cu_seqlens is None else rows.cu_seqlens,
        inputs.qkv.stride(0),
        inputs.z.stride(0),
        inputs.b.stride(0),
        inputs.a.stride(0),
        weights.eps,
        K_HEADS=k_heads,
        V_HEADS=heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        SLICE=v_dim // config.slices,
        NORM=norm,
        WIDTH=CONV_WIDTH,
        MIXED=rows.cu_seqlens is not None,
        num_warps=config.num_warps,
        **launch_options(out.device),
    )
