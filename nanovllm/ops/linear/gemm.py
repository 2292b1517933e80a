# pyright: reportPossiblyUnboundVariable=false
# Names in the kernel are bound under the same compile-time conditions under which they are read.
"""GEMM for small batches (up to 64 tokens), bound by reading the weight: fuses activation and residual add.

A tile is [outputs, tokens], so that the weight provides the 64 rows that Hopper's tensor cores need. A program
prefetches the first columns of its weight rows before it waits for the kernel that computes x (programmatic dependent
launch): while one kernel finishes, the next one's weights are already moving to the L2 cache. Where K is split,
programs store partial sums, and the last program of a tile to finish adds them in a fixed order.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.dispatch import GEMM_MAX_OUTPUTS, Kernel, kernel_of
from nanovllm.ops.triton_utils import (
    HAVE_TRITON,
    TensorDescriptor,
    fits_large_tma_tiles,
    launch_options,
    tl,
    triton,
    wait_for_inputs,
)

# Tiles of a result whose K is split.
MAX_TILES = GEMM_MAX_OUTPUTS // 64


class GemmConfig(NamedTuple):
    """Settings of the kernel.

    Attributes:
        block_m, block_n, block_k: tokens, outputs (of gate and up each) and inputs of a tile.
        num_warps, num_stages: warps and pipeline stages.
        num_splits: splits of K, each computed by its own program.
        prefetch: most columns that a program prefetches before it waits, a multiple of 64.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    num_splits: int
    prefetch: int


def default_gemm_config(m: int, n: int, k: int, gated: bool) -> GemmConfig:
    """Return the settings that `python -m benchmarks.tune gemm` chose on an H100.

    Splits K where tiles of 64 outputs are too few to keep the memory busy; the larger the tiles, the fewer splits.

    Args:
        m, n, k: sizes of x [m, k] and weight [n, k], or [2 n, k] if gated.
    """
    block_m = max(16, triton.next_power_of_2(m))
    if gated:
        return GemmConfig(block_m, 64, 128, num_warps=4, num_stages=4, num_splits=1, prefetch=128)
    tiles = triton.cdiv(n, 64)
    splits = max(1, min(128 // tiles, k // 512, 4, 128 // block_m))
    if tiles >= 64 and k <= 4096:
        splits = 1
    prefetch = max(128, (2 << 20) // (n * splits) // 64 * 64)  # 4 MiB in total
    return GemmConfig(block_m, 64, 128, num_warps=4, num_stages=6, num_splits=splits, prefetch=prefetch)


def is_gemm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether `gemm_triton` is made for x [M, K] and `weight` of the same dtype, and TMA can load both."""
    if not HAVE_TRITON or not x.is_cuda or len(weight) > GEMM_MAX_OUTPUTS:
        return False
    if kernel_of(len(x), weight.numel()) is not Kernel.GEMM:
        return False
    addresses = x.data_ptr() | weight.data_ptr() | 2 * x.stride(0) | 2 * x.shape[1]
    plain = x.ndim == 2 and x.stride(1) == 1 and weight.is_contiguous()
    aligned = weight.itemsize == 2 and not addresses % 16
    return plain and aligned and fits_large_tma_tiles(x.device)


@triton.jit
def prefetch_rows(weight_ptr, first_row, first_column, N, K, columns, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Prefetch `columns` columns of ROWS rows of a weight with N rows into the L2 cache, one line per thread."""
    LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    lines = tl.cdiv(columns, LINE)
    for i in range(0, ROWS * lines, THREADS):
        line = i + tl.arange(0, THREADS)
        rows = tl.minimum(first_row + line // lines, N - 1)
        column = first_column + line % lines * LINE
        addresses = (weight_ptr + rows.to(tl.int64) * K + column).to(tl.int64)
        code: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(code, "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def reduce_splits(tile, partial_ptr, counter_ptr, index, split, num_splits):
    """Store one split's sum of the tile with this index. The last split returns the total and True.

    The order of addition is fixed, so that results do not depend on which split is last.
    """
    SIZE: tl.constexpr = tile.shape[0] * tile.shape[1]
    counter_ptr += index
    within = tl.arange(0, tile.shape[0])[:, None] * tile.shape[1] + tl.arange(0, tile.shape[1])[None, :]
    partial_ptrs = partial_ptr + index.to(tl.int64) * num_splits * SIZE + within
    tl.store(partial_ptrs + split * SIZE, tile)
    tl.debug_barrier()  # this program's stores must come before its count
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_splits - 1
    if is_last:
        tl.store(counter_ptr, 0)  # ready for the next launch
        tile = tl.load(partial_ptrs)
        for other in tl.range(1, num_splits):
            tile += tl.load(partial_ptrs + other * SIZE)
    return tile, is_last


@triton.jit(do_not_specialize=["M", "num_splits", "prefetch"])
def _gemm_kernel(
    x,
    weight,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    K,
    num_splits,
    prefetch,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SPLIT: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N
    ms = tl.arange(0, BLOCK_M)
    ns = n + tl.arange(0, BLOCK_N)
    offsets = ms[:, None] * N + ns[None, :]
    mask = (ms < M)[:, None] & (ns < N)[None, :]
    first = 0
    last = tl.cdiv(K, BLOCK_K)
    if SPLIT:
        first = last * tl.program_id(1) // num_splits
        last = last * (tl.program_id(1) + 1) // num_splits
    if PDL:
        columns = tl.minimum(prefetch, tl.minimum(last * BLOCK_K, K) - first * BLOCK_K)
        prefetch_rows(weight_ptr, n, first * BLOCK_K, N, K, columns, BLOCK_N, THREADS)
        if GATED:
            prefetch_rows(weight_ptr, N + n, first * BLOCK_K, 2 * N, K, columns, BLOCK_N, THREADS)
    wait_for_inputs(PDL)
    if ADD:  # loads while the GEMM runs
        residual = tl.load(out_ptr + offsets, mask=mask, other=0.0)
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(first * BLOCK_K, last * BLOCK_K, BLOCK_K):
        x_tile = tl.trans(x.load([0, k]))
        y = tl.dot(weight.load([n, k]), x_tile, y, input_precision="ieee")
        if GATED:
            up = tl.dot(weight.load([N + n, k]), x_tile, up, input_precision="ieee")
    if SPLIT:
        y, is_last = reduce_splits(y, partial_ptr, counter_ptr, tl.program_id(0), tl.program_id(1), num_splits)
        mask = (ms < tl.where(is_last, M, 0))[:, None] & (ns < N)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + ns, mask=ns < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias_ptr + N + ns, mask=ns < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        y = y / (1 + tl.exp(-y)) * up
    y = tl.trans(y)
    if ADD:
        y += residual.to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


def gemm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Return x W^T of x [M, K] for a small batch, with sums in float32, rounded once.

    Args:
        x: the stride between tokens is a multiple of 16 bytes.
        weight, bias, gated: as in `linear`; the weight is plain and contiguous.
        residual: [M, N] contiguous; the result is added to it in place.
        counters: int32 zeros, one per tile of the result (at most MAX_TILES), zero again afterwards. Launches that may
            overlap need separate counters. Without counters, K is not split.
        config: `default_gemm_config` if None. `block_m` must be at least M; K is not split if `gated`.
    """
    (m, k), n = x.shape, len(weight) // (2 if gated else 1)
    config = config or default_gemm_config(m, n, k, gated)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device) if residual is None else residual
    num_tiles = triton.cdiv(n, config.block_n)
    num_splits = 1 if gated or counters is None else config.num_splits
    partial = out
    if num_splits > 1:
        partial_size = num_tiles * num_splits * config.block_n * config.block_m
        partial = torch.empty(partial_size, dtype=torch.float32, device=x.device)
    _gemm_kernel[(num_tiles, num_splits)](
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [config.block_m, config.block_k]),
        TensorDescriptor(weight, list(weight.shape), [k, 1], [config.block_n, config.block_k]),
        weight,
        weight if bias is None else bias,
        out,
        partial,
        out if counters is None else counters,
        m,
        n,
        k,
        num_splits,
        config.prefetch,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GATED=gated,
        BIAS=bias is not None,
        ADD=residual is not None,
        SPLIT=num_splits > 1,
        THREADS=32 * config.num_warps,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )
    return out
