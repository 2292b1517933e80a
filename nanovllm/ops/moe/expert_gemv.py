# pyright: reportPossiblyUnboundVariable=false
# Names in the kernels are bound under the same compile-time conditions under which they are read.
"""Experts for a few tokens, bound by reading the weights of the chosen experts: one GEMV per (token, expert).

Gate and up are one kernel, with the RMSNorm before and SwiGLU after; down is another, with the routing weights, the sum
over the experts, the shared expert and the residual.

Programmatic dependent launch: the first kernel needs the expert ids before it can load any weights, so it waits, and
only then lets the second one start. When the second kernel starts, the router has therefore finished, and it
may read the ids and load its weights while the first kernel still runs.

The weights may be FP8 with scales; x is not quantized.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.linear.scales import load_scales, scale_layout, scales_of_expert
from nanovllm.ops.moe.combine import add_shared_expert
from nanovllm.ops.triton_utils import launch_options, start_chain, tl, triton, wait_for_inputs

MAX_WEIGHTS = 1 << 16  # a program holds at most so many weights in registers


class ExpertGemvConfig(NamedTuple):
    """Compile-time settings of a kernel: rows of each expert's weight per program, and warps."""

    rows: int
    num_warps: int


def default_gate_up_config(itemsize: int) -> ExpertGemvConfig:
    """Return the settings for gate_up [E, 2 i, h] of such elements, the fastest on an H200 for h = 2048."""
    return ExpertGemvConfig(rows=2 if itemsize == 1 else 1, num_warps=2)


def default_down_config(width: int, layout: str) -> ExpertGemvConfig:
    """Return the settings for down [E, h, i]: 64 weights per thread, or 128 with FP8.

    Args:
        width: weights of a row of all experts of a token, each row padded.
        layout: `scale_layout` of the weight.
    """
    rows = 2 if layout in ("block", "row") else 1  # one row for the other layouts
    return ExpertGemvConfig(rows, num_warps=max(1, min(8, width // 2048)))


def fits_expert_gemv(h: int, i: int, top_k: int) -> bool:
    """Return whether the kernels can hold what a program needs of experts with these sizes in registers."""
    widths = 2 * triton.next_power_of_2(h), triton.next_power_of_2(i) * triton.next_power_of_2(top_k)
    return max(widths) <= MAX_WEIGHTS


def _padded(size: int, scale: torch.Tensor | None) -> int:
    """Return the power of two that a program loads of a row; whole blocks if the weight has scales."""
    return max(128 if scale is not None else 1, triton.next_power_of_2(size))


@triton.jit
def _gate_up_gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    norm_ptr,
    ids_ptr,
    out_ptr,
    x_stride,
    eps,
    INNER,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1)
    columns = tl.arange(0, H_PAD)
    if NORM:
        norm = tl.load(norm_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
    start_chain(PDL)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    offsets = (expert * 2 * INNER + rows)[:, None] * H + columns[None, :]
    mask = (rows < INNER)[:, None] & (columns < H)[None, :]
    gate_weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    up_weight = tl.load(weight_ptr + INNER * H + offsets, mask=mask, other=0.0)
    x = tl.load(x_ptr + (pair // TOP_K).to(tl.int64) * x_stride + columns, mask=columns < H, other=0.0).to(tl.float32)
    scale = 1.0
    if NORM:  # the token's scale is a factor of its dot products
        scale = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
        x = x * norm
    gate_x = x[None, :]
    up_x = gate_x
    scale_ptr = scales_of_expert(scale_ptr, expert, 2 * INNER, H, SCALES)
    if SCALES == "block" or SCALES == "row_block":
        first = tl.program_id(0) * ROWS
        gate_x *= load_scales(scale_ptr, first, 2 * INNER, H, H_PAD, ROWS, SCALES)
        up_x *= load_scales(scale_ptr, first + INNER, 2 * INNER, H, H_PAD, ROWS, SCALES)
    gate = tl.sum(gate_weight.to(tl.float32) * gate_x, 1) * scale
    up = tl.sum(up_weight.to(tl.float32) * up_x, 1) * scale
    if SCALES == "row":
        gate *= tl.load(scale_ptr + rows, mask=rows < INNER, other=0.0)
        up *= tl.load(scale_ptr + INNER + rows, mask=rows < INNER, other=0.0)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + pair.to(tl.int64) * INNER + rows, y.to(out_ptr.dtype.element_ty), mask=rows < INNER)


@triton.jit
def _down_gemv_kernel(
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    ids_ptr,
    routing_ptr,
    residual_ptr,
    shared_ptr,
    gate_ptr,
    out_ptr,
    gate_stride,
    H,
    INNER: tl.constexpr,
    INNER_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    ADD: tl.constexpr,
    SHARED: tl.constexpr,
    GATE: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    ranks = tl.arange(0, K_PAD)
    columns = tl.arange(0, INNER_PAD)
    pairs = token * TOP_K + ranks
    # The router wrote the ids. Read them from the L2 cache: this program may have started before it finished.
    experts = tl.load(ids_ptr + pairs, mask=ranks < TOP_K, other=0, cache_modifier=".cg").to(tl.int64)
    offsets = (experts * H)[:, None, None] + rows[None, :, None]
    offsets = offsets * INNER + columns[None, None, :]
    mask = (ranks < TOP_K)[:, None, None] & (rows < H)[None, :, None] & (columns < INNER)[None, None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    if SCALES == "block" or SCALES == "row_block":  # factors of the hidden values
        tl.static_assert(SCALES == "block" or ROWS == 1)
        PADDED: tl.constexpr = INNER_PAD // 128
        HEIGHT: tl.constexpr = 128 if SCALES == "block" else 1
        blocks = tl.arange(0, PADDED)
        scale_ptrs = scales_of_expert(scale_ptr, experts, H, INNER, SCALES)
        scale_ptrs += tl.program_id(0) * ROWS // HEIGHT * tl.cdiv(INNER, 128)
        scale_ptrs = scale_ptrs[:, None] + blocks[None, :]
        scale_mask = (ranks < TOP_K)[:, None] & (blocks * 128 < INNER)[None, :]
        scales = tl.load(scale_ptrs, mask=scale_mask, other=0.0)
        weight_scale = tl.reshape(tl.broadcast_to(scales[:, :, None], [K_PAD, PADDED, 128]), [K_PAD, INNER_PAD])
    if SCALES == "row":  # factors of the dot products
        scale_ptrs = scales_of_expert(scale_ptr, experts, H, INNER, SCALES)[:, None] + rows[None, :]
        weight_scale = tl.load(scale_ptrs, mask=(ranks < TOP_K)[:, None] & (rows < H)[None, :], other=0.0)
    wait_for_inputs(PDL)
    offsets = token * H + rows
    mask = rows < H
    if ADD:  # loads while the dot products are summed
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    routing = tl.load(routing_ptr + pairs, mask=ranks < TOP_K, other=0.0).to(tl.float32)
    hidden_mask = (ranks < TOP_K)[:, None] & (columns < INNER)[None, :]
    hidden = tl.load(hidden_ptr + pairs[:, None] * INNER + columns[None, :], mask=hidden_mask, other=0.0).to(tl.float32)
    if SCALES == "block" or SCALES == "row_block":
        hidden *= weight_scale
    products = tl.sum(weight.to(tl.float32) * hidden[:, None, :], 2)
    if SCALES == "row":
        products *= weight_scale
    total = tl.sum(products * routing[:, None], 0)
    if SHARED:
        total = add_shared_expert(total, shared_ptr, gate_ptr, gate_stride, offsets, token, mask, GATE)
    if ADD:
        total += residual
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


def gate_up_gemv_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    ids: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    config: ExpertGemvConfig | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return silu(gate x) * up x [T top_k, I] of each pair (token, expert), with sums in float32, rounded once.

    Args:
        x, gate_up, ids, norm: as in `experts`.
        config: `default_gate_up_config` if None.
        scale: contiguous scales [E, ...] of an FP8 weight; see `scale_layout`.
    """
    h = x.shape[1]
    i = gate_up.shape[1] // 2
    config = config or default_gate_up_config(gate_up.itemsize)
    hidden = torch.empty((ids.numel(), i), dtype=x.dtype, device=x.device)
    norm_weight, eps = (gate_up, 0.0) if norm is None else norm
    _gate_up_gemv_kernel[(triton.cdiv(i, config.rows), ids.numel())](
        x,
        gate_up,
        hidden if scale is None else scale,
        norm_weight,
        ids,
        hidden,
        x.stride(0),
        eps,
        i,
        H=h,
        H_PAD=_padded(h, scale),
        TOP_K=ids.shape[1],
        ROWS=config.rows,
        SCALES=scale_layout(gate_up, scale),
        NORM=norm is not None,
        num_warps=config.num_warps,
        **launch_options(x.device),
    )
    return hidden


def down_gemv_triton(
    hidden: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    residual: torch.Tensor | None = None,
    shared: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    config: ExpertGemvConfig | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted sum over the experts [T, H] for `hidden` [T top_k, I], in float32, rounded once.

    Launch it directly after `gate_up_gemv_triton`: it reads the ids before that kernel has finished.

    Args:
        down, ids, weights, residual, shared: as in `experts`.
        config: `default_down_config` if None.
        scale: as in `gate_up_gemv_triton`.
    """
    (num_tokens, top_k), (_, h, i) = ids.shape, down.shape
    layout = scale_layout(down, scale)
    inner_pad = _padded(i, scale)
    config = config or default_down_config(inner_pad * triton.next_power_of_2(top_k), layout)
    out = torch.empty((num_tokens, h), dtype=hidden.dtype, device=hidden.device) if residual is None else residual
    output, gate = shared or (None, None)
    _down_gemv_kernel[(triton.cdiv(h, config.rows), num_tokens)](
        hidden,
        down,
        out if scale is None else scale,
        ids,
        weights,
        out,
        hidden if output is None else output,
        hidden if gate is None else gate,
        out,
        1 if gate is None else gate.stride(0),
        h,
        INNER=i,
        INNER_PAD=inner_pad,
        TOP_K=top_k,
        K_PAD=triton.next_power_of_2(top_k),
        ROWS=config.rows,
        SCALES=layout,
        ADD=residual is not None,
        SHARED=output is not None,
        GATE=gate is not None,
        num_warps=config.num_warps,
        **launch_options(hidden.device),
    )
    return out
