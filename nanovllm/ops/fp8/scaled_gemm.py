# pyright: reportPossiblyUnboundVariable=false
# Names in the kernel are bound under the same compile-time conditions under which they are read.
"""GEMM of FP8 activations and FP8 weights, fastest where reading the weight is the limit.

A tensor core sums 128 inputs of a tile without scales. The program then multiplies this partial sum with the scales of
its tokens and of its block of the weight, and adds it to the total in float32. This also bounds the error of Hopper's
tensor cores, whose own FP8 sums have about 14 bits.

Persistent programs take output tiles round-robin, a few token tiles wide, so that programs running at the same time
share tokens and weights in the L2 cache. TMA loads the operands; the output is stored without it, because a tile in
shared memory would leave less room for operands. With SwiGLU, a tile has outputs of gate and the same of up. Where K is
split, the last program of a tile to finish adds the partial sums in a fixed order.

As in ops/linear/gemm.py, a program prefetches its first weights before it waits for the kernel that computes x.
"""

from typing import NamedTuple

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.fp8.quantize import QuantizedRows
from nanovllm.ops.linear.gemm import MAX_TILES, prefetch_rows, reduce_splits
from nanovllm.ops.linear.scales import block_scale_ptrs, scale_layout
from nanovllm.ops.triton_utils import TensorDescriptor, launch_options, sm_count, tl, triton, wait_for_inputs

BLOCK_K = 128  # columns of a weight's block, and of a token's group
GROUP_TILES = 8  # token tiles that programs go through together
PREFETCH = 512  # columns that a program prefetches before it waits


class ScaledGemmConfig(NamedTuple):
    """Settings of the kernel.

    Attributes:
        block_m: tokens of a tile.
        block_n: outputs of a tile (of gate and up each), which must divide 128.
        num_warps, num_stages: warps and pipeline stages.
        programs: programs per SM.
        num_splits: splits of K, each computed by its own program. K is not split with SwiGLU.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 2
    num_splits: int = 1


def default_scaled_gemm_config(m: int, n: int, k: int, gated: bool) -> ScaledGemmConfig:
    """Return the settings that `python -m benchmarks.tune_fp8 many` chose on an H200.

    Args:
        m, n, k: sizes of x [m, k] and weight [n, k], or [2 n, k] if gated.
    """
    if gated:
        return ScaledGemmConfig(64, 64, num_warps=4, num_stages=4)
    if m > 256:
        return ScaledGemmConfig(128, 128, num_warps=4, num_stages=3)
    if m > 128 and k > 2 * n:
        return ScaledGemmConfig(128, 64, num_warps=8, num_stages=4, num_splits=2)
    if m > 128:
        return ScaledGemmConfig(128, 64, num_warps=4, num_stages=5)
    tiles = ceil_div(m, 64) * ceil_div(n, 64)
    splits = max(1, min(4, 256 // tiles, k // 1024, MAX_TILES // tiles))
    return ScaledGemmConfig(64, 64, num_warps=4, num_stages=6, num_splits=splits)


@triton.jit
def _load_weight_scale(ptrs, SCALES: tl.constexpr):
    """Load the scale of a block of the weight, or those of its rows [BLOCK_N]; 1 if they are not by block."""
    scale = 1.0
    if SCALES != "row":
        scale = tl.load(ptrs)
    return scale


@triton.jit
def _scaled_dot(x, weight, x_scale, weight_scale, SCALES: tl.constexpr):
    """Return x [BLOCK_M, 128] times weight [BLOCK_N, 128] transposed, times the scales of both."""
    if SCALES == "row_block":
        return tl.dot(x, weight.T) * x_scale[:, None] * weight_scale[None, :]
    else:
        return tl.dot(x, weight.T) * (x_scale * weight_scale)[:, None]


@triton.jit
def _finish(total, scale_ptr, bias_ptr, first, end, SCALES: tl.constexpr, BIAS: tl.constexpr):
    """Apply the scales and the bias of the weight's rows `first` to `end`."""
    rows = tl.minimum(first + tl.arange(0, total.shape[1]), end - 1)
    if SCALES == "row":
        total *= tl.load(scale_ptr + rows)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["M", "num_splits", "x_scale_stride"])
def _scaled_gemm_kernel(
    x_desc,
    x_scale_ptr,
    weight_desc,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    K,
    x_scale_stride,
    num_splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    blocks = tl.cdiv(K, BLOCK_K)
    num_rows = 2 * N if GATED else N
    if PDL:
        first_n = tl.program_id(0) // num_splits % (GROUP * tiles_n) // tl.minimum(GROUP, tiles_m) * BLOCK_N
        first_k = blocks * (tl.program_id(0) % num_splits) // num_splits * BLOCK_K
        prefetched = tl.minimum(PREFETCH, K - first_k)
        prefetch_rows(weight_ptr, first_n, first_k, num_rows, K, prefetched, BLOCK_N, THREADS)
        if GATED:
            prefetch_rows(weight_ptr, N + first_n, first_k, num_rows, K, prefetched, BLOCK_N, THREADS)
    wait_for_inputs(PDL)
    for item in range(tl.program_id(0), tiles_m * tiles_n * num_splits, tl.num_programs(0)):
        tile = item // num_splits
        split = item % num_splits
        start = tile // (GROUP * tiles_n) * GROUP
        height = min(GROUP, tiles_m - start)
        within = tile % (GROUP * tiles_n)
        m = (start + within % height) * BLOCK_M
        n = within // height * BLOCK_N
        first = 0
        last = blocks
        if SPLIT:
            first = blocks * split // num_splits
            last = blocks * (split + 1) // num_splits
        rows = m + tl.arange(0, BLOCK_M)
        x_scale_ptrs = x_scale_ptr + tl.minimum(rows, M - 1)
        scale_ptrs = block_scale_ptrs(scale_ptr, n, num_rows, K, BLOCK_N, SCALES)
        up_scale_ptrs = block_scale_ptrs(scale_ptr, N + n, num_rows, K, BLOCK_N, SCALES)
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_scale = tl.load(x_scale_ptrs + first * x_scale_stride)
        scale = _load_weight_scale(scale_ptrs + first, SCALES)
        up_scale = _load_weight_scale(up_scale_ptrs + first, SCALES)
        for block in range(first, last):
            # Load the next block's scales one iteration early. The pipeline of the dot products does not include them.
            following = tl.minimum(block + 1, last - 1)
            next_x_scale = tl.load(x_scale_ptrs + following * x_scale_stride)
            next_scale = _load_weight_scale(scale_ptrs + following, SCALES)
            next_up_scale = _load_weight_scale(up_scale_ptrs + following, SCALES)
            k = block * BLOCK_K
            x = x_desc.load([m, k])
            y += _scaled_dot(x, weight_desc.load([n, k]), x_scale, scale, SCALES)
            if GATED:
                up += _scaled_dot(x, weight_desc.load([N + n, k]), x_scale, up_scale, SCALES)
            x_scale = next_x_scale
            scale = next_scale
            up_scale = next_up_scale
        is_last = True
        if SPLIT:
            y, is_last = reduce_splits(y, partial_ptr, counter_ptr, tile, split, num_splits)
        if is_last:
            y = _finish(y, scale_ptr, bias_ptr, n, num_rows, SCALES, BIAS)
            if GATED:
                up = _finish(up, scale_ptr, bias_ptr, N + n, num_rows, SCALES, BIAS)
                y = y / (1 + tl.exp(-y)) * up
            columns = n + tl.arange(0, BLOCK_N)
            out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
            mask = (rows < M)[:, None] & (columns < N)[None, :]
            if ADD:
                y += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


def scaled_gemm_triton(
    x: QuantizedRows,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    config: ScaledGemmConfig | None = None,
) -> torch.Tensor:
    """Return x W^T + b [T, N], with sums in float32, rounded once.

    Args:
        x: has a scale for each group of 128 columns.
        weight, scale: e4m3 [N, K] and its scales, see `scale_layout`; both contiguous, rows of whole 16 bytes.
        bias, gated: as in `linear`.
        residual: [T, N] contiguous; the result is added to it in place.
        counters: as in `gemm_triton`.
        config: `default_scaled_gemm_config` if None.
    """
    (m, k), n = x.values.shape, len(weight) // (2 if gated else 1)
    config = config or default_scaled_gemm_config(m, n, k, gated)
    out = torch.empty((m, n), dtype=x.dtype, device=weight.device) if residual is None else residual
    num_tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    num_splits = 1 if counters is None or gated else config.num_splits
    partial = out
    if num_splits > 1:
        partial_size = num_tiles * num_splits * config.block_m * config.block_n
        partial = torch.empty(partial_size, dtype=torch.float32, device=weight.device)
    _scaled_gemm_kernel[(min(num_tiles * num_splits, config.programs * sm_count(weight.device)),)](
        TensorDescriptor.from_tensor(x.values, [config.block_m, BLOCK_K]),
        x.scales,
        TensorDescriptor.from_tensor(weight, [config.block_n, BLOCK_K]),
        weight,
        scale,
        out if bias is None else bias,
        out,
        partial,
        out if counters is None else counters,
        m,
        n,
        k,
        x.scales.stride(1),
        num_splits,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=BLOCK_K,
        GATED=gated,
        SCALES=scale_layout(weight, scale),
        BIAS=bias is not None,
        ADD=residual is not None,
        SPLIT=num_splits > 1,
        GROUP=GROUP_TILES,
        PREFETCH=PREFETCH,
        THREADS=32 * config.num_warps,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(weight.device),
    )
    return out
