# pyright: reportPossiblyUnboundVariable=false
# Names in the kernels are bound under the same compile-time conditions under which they are read.
"""Grouped GEMM: one GEMM per expert for the tokens that chose it, in one kernel.

gate_up reads the tokens through the sorted pairs and applies SwiGLU to its sums; its output is in sorted order. down
reads that order, multiplies with the routing weights and writes to where the pairs were before sorting.

Programs take output tiles round-robin, a few token tiles wide, so that programs running at the same time share tokens
and weights in the L2 cache. Only the device knows the number of tiles; programs without a tile exit. TMA loads
the weights.

Up to 32 tokens, a tile is [outputs, tokens], so that the weight provides the 64 rows that Hopper's tensor cores need.

FP8 weights take FP8 tokens. A tile then sums 128 inputs without scales, and multiplies this partial sum with
the scales of its tokens and of its block of the weight. gate_up quantizes its output, 128 values of a token at a time.
"""

from typing import TypeAlias

import torch

from nanovllm.ops.fp8.quantize import QuantizedRows
from nanovllm.ops.linear.scales import block_scale_ptrs, scale_layout, scales_for, scales_of_expert
from nanovllm.ops.moe.alignment import ExpertTiles
from nanovllm.ops.moe.dispatch import GroupedGemmConfig
from nanovllm.ops.triton_utils import TensorDescriptor, launch_options, sm_count, tl, triton, wait_for_inputs

GROUP_TILES = 8  # token tiles that programs go through together
Rows: TypeAlias = torch.Tensor | QuantizedRows


@triton.jit
def _tile_position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return the token tile and the output tile of the tile with this number."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(GROUP, tiles_m - first)
    within = tile % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def _dot(x, weight, total, SWAP: tl.constexpr):
    """Add x [BLOCK_M, BLOCK_K] times weight [BLOCK_N, BLOCK_K] transposed, or the transpose of that if SWAP."""
    if SWAP:
        return tl.dot(weight, x.T, total, input_precision="ieee")
    else:
        return tl.dot(x, weight.T, total, input_precision="ieee")


@triton.jit
def _add_dot(total, x, weight, x_scale_ptrs, scale_ptrs, k, SCALES: tl.constexpr, SWAP: tl.constexpr):
    """Add x [BLOCK_M, BLOCK_K] times weight [BLOCK_N, BLOCK_K] transposed, times their scales, to the total.

    Args:
        x_scale_ptrs: [BLOCK_M], the scales of the tokens for these columns.
        scale_ptrs: the scales of the weight's rows, see `block_scale_ptrs`.
        k: the first column.
    """
    if SCALES == "none":
        return _dot(x, weight, total, SWAP)
    else:
        x_axis: tl.constexpr = 0 if SWAP else 1  # along which tokens have one scale
        scale = tl.expand_dims(tl.load(x_scale_ptrs), x_axis)
        if SCALES == "block":
            scale *= tl.load(scale_ptrs + k // 128)
        if SCALES == "row_block":
            scale = scale * tl.expand_dims(tl.load(scale_ptrs + k // 128), 1 - x_axis)
        return total + _dot(x, weight, tl.zeros(total.shape, tl.float32), SWAP) * scale


@triton.jit
def _scale_rows(total, scale_ptr, row, end, SWAP: tl.constexpr):
    """Multiply the total of a tile with one scale for each row of the weight, from `row` on and before `end`."""
    axis: tl.constexpr = 1 if SWAP else 0
    rows = tl.minimum(row + tl.arange(0, total.shape[1 - axis]), end - 1)
    return total * tl.expand_dims(tl.load(scale_ptr + rows), axis)


@triton.jit
def _gate_up_tile(
    x_ptr,
    x_scale_ptr,
    weight_desc,
    scale_ptr,
    out_ptr,
    out_scale_ptr,
    order_ptr,
    x_stride,
    x_scale_stride,
    out_scale_stride,
    INNER,
    H,
    expert,
    first,
    end,
    n,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SCALES: tl.constexpr,
):
    SWAP: tl.constexpr = BLOCK_M < 64
    rows = first + tl.arange(0, BLOCK_M)
    pairs = tl.load(order_ptr + rows, mask=rows < end, other=0)  # rows past the end read token 0
    columns = tl.arange(0, BLOCK_K)
    tokens = pairs // TOP_K
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + columns[None, :]
    gate_row = expert * 2 * INNER + n
    scale_ptr = scales_of_expert(scale_ptr, expert, 2 * INNER, H, SCALES)
    scale_ptrs = block_scale_ptrs(scale_ptr, n, 2 * INNER, H, BLOCK_N, SCALES)
    up_scale_ptrs = block_scale_ptrs(scale_ptr, n + INNER, 2 * INNER, H, BLOCK_N, SCALES)
    shape: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
    gate = tl.zeros(shape, tl.float32)
    up = tl.zeros(shape, tl.float32)
    for k in range(0, H, BLOCK_K):
        x = tl.load(x_ptrs + k) if EVEN_K else tl.load(x_ptrs + k, mask=(columns < H - k)[None, :], other=0.0)
        x_scale_ptrs = x_scale_ptr + k // 128 * x_scale_stride + tokens
        gate = _add_dot(gate, x, weight_desc.load([gate_row, k]), x_scale_ptrs, scale_ptrs, k, SCALES, SWAP)
        up = _add_dot(up, x, weight_desc.load([gate_row + INNER, k]), x_scale_ptrs, up_scale_ptrs, k, SCALES, SWAP)
    if SCALES == "row":
        gate = _scale_rows(gate, scale_ptr, n, INNER, SWAP)
        up = _scale_rows(up, scale_ptr, n + INNER, 2 * INNER, SWAP)
    y = gate / (1 + tl.exp(-gate)) * up
    columns = n + tl.arange(0, BLOCK_N)
    if SCALES != "none":
        axis: tl.constexpr = 0 if SWAP else 1
        inside = columns[:, None] < INNER if SWAP else columns[None, :] < INNER
        scale = scales_for(tl.max(tl.where(inside, tl.abs(y), 0.0), axis))
        y /= tl.expand_dims(scale, axis)
        tl.store(out_scale_ptr + n // 128 * out_scale_stride + rows, scale, mask=rows < end)
    y = y.to(out_ptr.dtype.element_ty)
    if SWAP:
        y = tl.trans(y)
    mask = (rows < end)[:, None] & (columns < INNER)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * INNER + columns[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["max_tiles", "x_scale_stride", "out_scale_stride"])
def _gate_up_kernel(
    x_ptr,
    x_scale_ptr,
    weight_desc,
    scale_ptr,
    out_ptr,
    out_scale_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    x_stride,
    x_scale_stride,
    out_scale_stride,
    INNER,
    H,
    max_tiles,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    HALVE: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_n = tl.cdiv(INNER, BLOCK_N)
    wait_for_inputs(PDL)
    tiles_m = tl.load(num_tiles_ptr)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _tile_position(tile, tiles_m, tiles_n, GROUP)
        expert = tl.load(tiles_ptr + m)
        first = tl.load(tiles_ptr + max_tiles + m)
        end = tl.load(tiles_ptr + 2 * max_tiles + m)
        half: tl.constexpr = BLOCK_M // 2 if HALVE else BLOCK_M
        if HALVE and end - first <= half:
            _gate_up_tile(
                x_ptr=x_ptr,
                x_scale_ptr=x_scale_ptr,
                weight_desc=weight_desc,
                scale_ptr=scale_ptr,
                out_ptr=out_ptr,
                out_scale_ptr=out_scale_ptr,
                order_ptr=order_ptr,
                x_stride=x_stride,
                x_scale_stride=x_scale_stride,
                out_scale_stride=out_scale_stride,
                INNER=INNER,
                H=H,
                expert=expert,
                first=first,
                end=end,
                n=n * BLOCK_N,
                TOP_K=TOP_K,
                BLOCK_M=half,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                EVEN_K=EVEN_K,
                SCALES=SCALES,
            )
        else:
            _gate_up_tile(
                x_ptr=x_ptr,
                x_scale_ptr=x_scale_ptr,
                weight_desc=weight_desc,
                scale_ptr=scale_ptr,
                out_ptr=out_ptr,
                out_scale_ptr=out_scale_ptr,
                order_ptr=order_ptr,
                x_stride=x_stride,
                x_scale_stride=x_scale_stride,
                out_scale_stride=out_scale_stride,
                INNER=INNER,
                H=H,
                expert=expert,
                first=first,
                end=end,
                n=n * BLOCK_N,
                TOP_K=TOP_K,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                EVEN_K=EVEN_K,
                SCALES=SCALES,
            )


@triton.jit
def _down_tile(
    hidden_desc,
    hidden_scale_ptr,
    weight_desc,
    scale_ptr,
    out_ptr,
    order_ptr,
    routing_ptr,
    hidden_scale_stride,
    H,
    INNER,
    expert,
    first,
    end,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALES: tl.constexpr,
):
    SWAP: tl.constexpr = BLOCK_M < 64
    rows = first + tl.arange(0, BLOCK_M)
    pairs = tl.load(order_ptr + rows, mask=rows < end, other=0)
    routing = tl.load(routing_ptr + pairs).to(tl.float32)
    shape: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
    y = tl.zeros(shape, tl.float32)
    row = expert * H + n
    scale_ptr = scales_of_expert(scale_ptr, expert, H, INNER, SCALES)
    scale_ptrs = block_scale_ptrs(scale_ptr, n, H, INNER, BLOCK_N, SCALES)
    scale_rows = tl.minimum(rows, end - 1)
    for k in range(0, INNER, BLOCK_K):
        # Rows past the end belong to the next expert; they are not stored.
        hidden_scale_ptrs = hidden_scale_ptr + k // 128 * hidden_scale_stride + scale_rows
        y = _add_dot(
            y, hidden_desc.load([first, k]), weight_desc.load([row, k]), hidden_scale_ptrs, scale_ptrs, k, SCALES, SWAP
        )
    if SCALES == "row":
        y = _scale_rows(y, scale_ptr, n, H, SWAP)
    y *= routing[None, :] if SWAP else routing[:, None]
    y = y.to(out_ptr.dtype.element_ty)
    if SWAP:
        y = tl.trans(y)
    columns = n + tl.arange(0, BLOCK_N)
    mask = (rows < end)[:, None] & (columns < H)[None, :]
    tl.store(out_ptr + pairs.to(tl.int64)[:, None] * H + columns[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["max_tiles", "hidden_scale_stride"])
def _down_kernel(
    hidden_desc,
    half_desc,
    hidden_scale_ptr,
    weight_desc,
    scale_ptr,
    out_ptr,
    order_ptr,
    routing_ptr,
    tiles_ptr,
    num_tiles_ptr,
    hidden_scale_stride,
    H,
    INNER,
    max_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    HALVE: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_n = tl.cdiv(H, BLOCK_N)
    wait_for_inputs(PDL)
    tiles_m = tl.load(num_tiles_ptr)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _tile_position(tile, tiles_m, tiles_n, GROUP)
        expert = tl.load(tiles_ptr + m)
        first = tl.load(tiles_ptr + max_tiles + m)
        end = tl.load(tiles_ptr + 2 * max_tiles + m)
        half: tl.constexpr = BLOCK_M // 2 if HALVE else BLOCK_M
        if HALVE and end - first <= half:
            _down_tile(
                hidden_desc=half_desc,
                hidden_scale_ptr=hidden_scale_ptr,
                weight_desc=weight_desc,
                scale_ptr=scale_ptr,
                out_ptr=out_ptr,
                order_ptr=order_ptr,
                routing_ptr=routing_ptr,
                hidden_scale_stride=hidden_scale_stride,
                H=H,
                INNER=INNER,
                expert=expert,
                first=first,
                end=end,
                n=n * BLOCK_N,
                BLOCK_M=half,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                SCALES=SCALES,
            )
        else:
            _down_tile(
                hidden_desc=hidden_desc,
                hidden_scale_ptr=hidden_scale_ptr,
                weight_desc=weight_desc,
                scale_ptr=scale_ptr,
                out_ptr=out_ptr,
                order_ptr=order_ptr,
                routing_ptr=routing_ptr,
                hidden_scale_stride=hidden_scale_stride,
                H=H,
                INNER=INNER,
                expert=expert,
                first=first,
                end=end,
                n=n * BLOCK_N,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                SCALES=SCALES,
            )


def _num_programs(tiles: ExpertTiles, n: int, config: GroupedGemmConfig) -> int:
    bound = tiles.tiles.shape[1] * triton.cdiv(n, config.block_n)
    return min(bound, config.programs * sm_count(tiles.order.device))


def grouped_gate_up_triton(
    x: Rows,
    gate_up: torch.Tensor,
    tiles: ExpertTiles,
    top_k: int,
    config: GroupedGemmConfig,
    scale: torch.Tensor | None = None,
) -> Rows:
    """Return silu(gate x) * up x [T top_k, I] of the sorted pairs, with sums in float32, rounded once.

    Args:
        x, gate_up: as in `experts`; quantized x if the weight is FP8. Then the result is also quantized.
        top_k: experts per token.
        config: with FP8 weights, tiles have 128 outputs and inputs.
        scale: contiguous scales [E, ...] of an FP8 weight; see `scale_layout`.
    """
    (num_experts, rows, h), i = gate_up.shape, gate_up.shape[1] // 2
    num_pairs = len(tiles.order)
    values, x_scales = (x.values, x.scales) if isinstance(x, QuantizedRows) else (x, x)
    hidden = torch.empty((num_pairs, i), dtype=values.dtype, device=values.device)
    hidden_scales = x_scales
    if scale is not None:
        hidden_scales = torch.empty((triton.cdiv(i, 128), num_pairs), dtype=torch.float32, device=values.device).t()
    weight = gate_up.view(num_experts * rows, h)
    _gate_up_kernel[(_num_programs(tiles, i, config),)](
        values,
        x_scales,
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        hidden if scale is None else scale,
        hidden,
        hidden_scales,
        tiles.order,
        tiles.tiles,
        tiles.num_tiles,
        values.stride(0),
        x_scales.stride(1),
        hidden_scales.stride(1),
        i,
        h,
        tiles.tiles.shape[1],
        TOP_K=top_k,
        BLOCK_M=tiles.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_K=h % config.block_k == 0,
        SCALES=scale_layout(gate_up, scale),
        GROUP=GROUP_TILES,
        HALVE=config.halve,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(values.device),
    )
    return hidden if scale is None else QuantizedRows(hidden, hidden_scales)


def grouped_down_triton(
    hidden: Rows,
    down: torch.Tensor,
    tiles: ExpertTiles,
    weights: torch.Tensor,
    config: GroupedGemmConfig,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return weight * down(hidden) of each pair [T, top_k, H], with sums in float32, rounded once.

    Args:
        hidden: [T top_k, I] of the sorted pairs, contiguous; quantized if the weight is FP8.
        down, weights: as in `experts`.
        config, scale: as in `grouped_gate_up_triton`.
        dtype: of the result; that of `hidden` if None.
    """
    num_experts, h, i = down.shape
    values, scales = (hidden.values, hidden.scales) if isinstance(hidden, QuantizedRows) else (hidden, hidden)
    out = torch.empty((*weights.shape, h), dtype=dtype or values.dtype, device=values.device)
    weight = down.view(num_experts * h, i)
    block = [tiles.block_m, config.block_k]
    half_block = [tiles.block_m // 2, config.block_k] if config.halve else block
    _down_kernel[(_num_programs(tiles, h, config),)](
        TensorDescriptor.from_tensor(values, block),
        TensorDescriptor.from_tensor(values, half_block),
        scales,
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        out if scale is None else scale,
        out,
        tiles.order,
        weights,
        tiles.tiles,
        tiles.num_tiles,
        scales.stride(1),
        h,
        i,
        tiles.tiles.shape[1],
        BLOCK_M=tiles.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SCALES=scale_layout(down, scale),
        GROUP=GROUP_TILES,
        HALVE=config.halve,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(values.device),
    )
    return out
