# pyright: reportPossiblyUnboundVariable=false
# Names in the kernel are bound under the same compile-time conditions under which they are read.
"""GEMM of FP8 activations and FP8 weights for many tokens.

A tensor core sums 128 inputs of a tile without scales. The program then multiplies this partial sum with the scales of
its tokens and of its block of the weight, and adds it to the total in float32. This also bounds the error of Hopper's
tensor cores, whose own FP8 sums have about 14 bits.

Persistent programs take output tiles round-robin, a few token tiles wide, so that programs running at the same time
share tokens and weights in the L2 cache. TMA loads the operands; the output is stored without it, because a tile in
shared memory would leave less room for operands. A tile may have two blocks of outputs: gate and up of
SwiGLU, or neighbours. Where K is split, the last program of a tile to finish adds the partial sums in a fixed order.
"""

from typing import NamedTuple

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.fp8.quantize import QuantizedRows
from nanovllm.ops.linear.gemm import reduce_splits
from nanovllm.ops.linear.scales import block_scale_ptrs, scale_layout
from nanovllm.ops.triton_utils import TensorDescriptor, launch_options, sm_count, tl, triton, wait_for_inputs

BLOCK_K = 128  # columns of a weight's block, and of a token's group
GROUP_TILES = 8  # token tiles that programs go through together


class ScaledGemmConfig(NamedTuple):
    """Settings of the kernel.

    Attributes:
        block_m: tokens of a tile.
        block_n: outputs of each of a tile's blocks, which must divide 128.
        is_wide: whether a tile has two blocks of outputs. With SwiGLU it always has.
        num_warps, num_stages: warps and pipeline stages.
        programs: programs per SM.
        num_splits: splits of K, each computed by its own program.
        rescale: keep the sum in the unit of the current scales, and let the tensor cores add to it. Not for scales of
            row blocks.
    """

    block_m: int
    block_n: int
    is_wide: bool
    num_warps: int
    num_stages: int
    programs: int = 1
    num_splits: int = 1
    rescale: bool = False


def default_scaled_gemm_config(m: int, n: int, k: int, gated: bool, num_sms: int) -> ScaledGemmConfig:
    """Return the settings that `python -m benchmarks.tune_fp8 many` chose on an H200.

    Args:
        m, n, k: sizes of x [m, k] and weight [n, k], or [2 n, k] if gated.
    """
    if gated:
        return ScaledGemmConfig(64 if m <= 64 else 128, 64, True, num_warps=8, num_stages=4)
    block_m = 64 if m <= 64 else 128
    tiles = ceil_div(m, block_m) * ceil_div(n, 128)
    splits = max(1, min(4, num_sms // tiles, k // 1024))
    return ScaledGemmConfig(block_m, 128, False, num_warps=8, num_stages=4, num_splits=splits)


@triton.jit
def _accumulate(total, x, weight, scale, ratio, RESCALE: tl.constexpr):
    """Add x [BLOCK_M, 128] times weight [BLOCK_N, 128] transposed, times the scale, to the total."""
    if RESCALE:
        return tl.dot(x, weight.T, total * ratio)
    else:
        return total + tl.dot(x, weight.T) * scale


@triton.jit
def _load_scales(x_scale_ptrs, x_scale_stride, weight_scale_ptrs, block, SCALES: tl.constexpr):
    """Return the scale of a partial sum over this block of columns: [BLOCK_M, 1], or [BLOCK_M, BLOCK_N]."""
    scale = tl.load(x_scale_ptrs + block * x_scale_stride)[:, None]
    if SCALES == "block":
        scale *= tl.load(weight_scale_ptrs + block)
    if SCALES == "row_block":
        scale = scale * tl.load(weight_scale_ptrs + block)[None, :]
    return scale


@triton.jit
def _row_scale(weight_scale_ptr, rows, N):
    """Return the scales of these rows of a weight that has one for each row."""
    return tl.load(weight_scale_ptr + tl.minimum(rows, N - 1))[None, :]


@triton.jit
def _store(tile, out_ptr, m, n, M, N, ADD: tl.constexpr):
    """Store a tile at row m and column n of the output [M, N], or add it there."""
    rows = m + tl.arange(0, tile.shape[0])
    columns = n + tl.arange(0, tile.shape[1])
    pointers = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    if ADD:
        tile += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, tile.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "num_splits", "x_scale_stride"])
def _scaled_gemm_kernel(
    x_desc,
    x_scale_ptr,
    weight_desc,
    weight_scale_ptr,
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
    WIDE: tl.constexpr,
    GATED: tl.constexpr,
    SCALES: tl.constexpr,
    RESCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 * BLOCK_N if WIDE and not GATED else BLOCK_N
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, WIDTH)
    blocks = tl.cdiv(K, BLOCK_K)
    second = N if GATED else BLOCK_N  # from the first block of outputs to the second one
    num_rows = 2 * N if GATED else N
    wait_for_inputs(PDL)
    for item in range(tl.program_id(0), tiles_m * tiles_n * num_splits, tl.num_programs(0)):
        tile, split = item // num_splits, item % num_splits
        start = tile // (GROUP * tiles_n) * GROUP
        height = min(GROUP, tiles_m - start)
        within = tile % (GROUP * tiles_n)
        m = (start + within % height) * BLOCK_M
        n = within // height * WIDTH
        first, last = 0, blocks
        if SPLIT:
            first, last = blocks * split // num_splits, blocks * (split + 1) // num_splits
        x_scale_ptrs = x_scale_ptr + tl.minimum(m + tl.arange(0, BLOCK_M), M - 1)
        scale_ptrs = block_scale_ptrs(weight_scale_ptr, n, num_rows, K, BLOCK_N, SCALES)
        # What only wide tiles use is not computed for others.
        up_row = tl.minimum(n + second, num_rows - 1)
        up_scale_ptrs = block_scale_ptrs(weight_scale_ptr, up_row, num_rows, K, BLOCK_N, SCALES)
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scale = _load_scales(x_scale_ptrs, x_scale_stride, scale_ptrs, first, SCALES)
        up_scale = _load_scales(x_scale_ptrs, x_scale_stride, up_scale_ptrs, first, SCALES)
        ratio = scale
        up_ratio = up_scale
        for block in range(first, last):
            k = block * BLOCK_K
            x = x_desc.load([m, k])
            next_block = tl.minimum(block + 1, last - 1)
            following = _load_scales(x_scale_ptrs, x_scale_stride, scale_ptrs, next_block, SCALES)
            y = _accumulate(y, x, weight_desc.load([n, k]), scale, ratio, RESCALE)
            ratio = scale / following
            scale = following
            if WIDE:
                following = _load_scales(x_scale_ptrs, x_scale_stride, up_scale_ptrs, next_block, SCALES)
                up = _accumulate(up, x, weight_desc.load([n + second, k]), up_scale, up_ratio, RESCALE)
                up_ratio = up_scale / following
                up_scale = following
        if RESCALE:
            y *= scale
            up *= up_scale
        is_last = True
        if SPLIT:
            y, is_last = reduce_splits(y, partial_ptr, counter_ptr, tile, split, num_splits)
        if is_last:
            columns = n + tl.arange(0, BLOCK_N)
            if SCALES == "row":
                y *= _row_scale(weight_scale_ptr, columns, num_rows)
                if WIDE:
                    up *= _row_scale(weight_scale_ptr, columns + second, num_rows)
            if BIAS:
                y += tl.load(bias_ptr + columns, mask=columns < num_rows, other=0.0).to(tl.float32)[None, :]
                if WIDE:
                    columns += second
                    up += tl.load(bias_ptr + columns, mask=columns < num_rows, other=0.0).to(tl.float32)[None, :]
            if GATED:
                y = y / (1 + tl.exp(-y)) * up
            _store(y, out_ptr, m, n, M, N, ADD)
            if WIDE and not GATED:
                _store(up, out_ptr, m, n + BLOCK_N, M, N, ADD)


def scaled_gemm_triton(
    x: QuantizedRows,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    counters: torch.Tensor | None = None,
    config: ScaledGemmConfig | None = None,
) -> torch.Tensor:
    """Return x W^T + b [T, N], with sums in float32, rounded once.

    Args:
        weight, scale: e4m3 [N, K] and its scales, see `scale_layout`; both contiguous, rows of whole 16 bytes.
        bias, gated: as in `linear`.
        residual: [T, N] contiguous; the result is added to it in place.
        dtype: of the result, if there is no residual.
        counters: as in `gemm_triton`.
        config: `default_scaled_gemm_config` if None.
    """
    (m, k), n = x.values.shape, len(weight) // (2 if gated else 1)
    config = config or default_scaled_gemm_config(m, n, k, gated, sm_count(weight.device))
    out = torch.empty((m, n), dtype=dtype, device=weight.device) if residual is None else residual
    is_wide = gated or config.is_wide
    num_tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n * (2 if is_wide and not gated else 1))
    num_splits = 1 if counters is None or is_wide else config.num_splits
    partial = out
    if num_splits > 1:
        partial_size = num_tiles * num_splits * config.block_m * config.block_n
        partial = torch.empty(partial_size, dtype=torch.float32, device=weight.device)
    _scaled_gemm_kernel[(min(num_tiles * num_splits, config.programs * sm_count(weight.device)),)](
        TensorDescriptor.from_tensor(x.values, [config.block_m, BLOCK_K]),
        x.scales,
        TensorDescriptor.from_tensor(weight, [config.block_n, BLOCK_K]),
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
        WIDE=is_wide,
        GATED=gated,
        SCALES=scale_layout(weight, scale),
        RESCALE=config.rescale,
        BIAS=bias is not None,
        ADD=residual is not None,
        SPLIT=num_splits > 1,
        GROUP=GROUP_TILES,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(weight.device),
    )
    return out
