"""Products of some rows, bound by reading the weight: activation and residual sum are part of them.

The tile is [rows of the weight, rows of x], so that Hopper's matrix units, which want 64 rows, get the weight's. A
program asks for the first columns of its weight rows before it waits for the kernel that makes x (programmatic
dependent launch): while one kernel ends, the next one's weights are on their way to the L2 cache. Where K is split,
programs leave partial sums, which a tile's last one to finish adds up, in the same order always.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.linear.dispatch import GEMM_MAX_OUTPUTS, Kernel, regime_of
from nanovllm.ops.triton_utils import (
    HAVE_TRITON,
    TensorDescriptor,
    fits_large_tma_tiles,
    launch_options,
    tl,
    triton,
    wait_for_inputs,
)

MAX_TILES = GEMM_MAX_OUTPUTS // 64  # of a result, where K is split


class GemmConfig(NamedTuple):
    """How a kernel is built.

    Attributes:
        block_m, block_n, block_k: rows of x, rows of the weight (of gate and up each), and columns of a tile.
        num_warps, num_stages: warps, pipeline stages.
        num_splits: parts of K, each a program's.
        prefetch: most columns that a program asks for before it waits, a multiple of 64.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    num_splits: int
    prefetch: int


def default_gemm_config(m: int, n: int, k: int, gated: bool) -> GemmConfig:
    """What `python -m benchmarks.tune gemm` chose on an H100 for x [m, k], weight [n, k]; [2 n, k] if gated.

    K has parts where tiles of 64 rows are too few to keep the memory busy, the fewer the larger these are.
    """
    block_m = max(16, triton.next_power_of_2(m))
    if gated:
        return GemmConfig(block_m, 64, 128, 4, 4, 1, 128)
    tiles = triton.cdiv(n, 64)
    splits = 1 if tiles >= 64 and k <= 4096 else max(1, min(128 // tiles, k // 512, 4, 128 // block_m))
    prefetch = max(128, (2 << 20) // (n * splits) // 64 * 64)  # 4 MiB in all
    return GemmConfig(block_m, 64, 128, 4, 6, splits, prefetch)


def is_gemm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x [M, K] has as many rows as `gemm_triton` is for, and it and `weight`, of its dtype, fit TMA."""
    if not HAVE_TRITON or not x.is_cuda or len(weight) > GEMM_MAX_OUTPUTS:
        return False
    if regime_of(len(x)).kernel is not Kernel.GEMM:
        return False
    addresses = x.data_ptr() | weight.data_ptr() | 2 * x.stride(0) | 2 * x.shape[1]
    plain = x.ndim == 2 and x.stride(1) == 1 and weight.is_contiguous()
    aligned = weight.itemsize == 2 and not addresses % 16
    return plain and aligned and fits_large_tma_tiles(x.device)


@triton.jit
def _ask_for(weight_ptr, first_row, first_column, N, K, columns, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Begin to bring `columns` of ROWS of a weight's rows, of which there are N, to the L2 cache, a line a thread."""
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
def _add_parts(tile, partial_ptr, counter_ptr, part, num_splits):
    """Leave a part [BLOCK_N, BLOCK_M] of a tile's sum. Is it the last one: return the whole sum, and true."""
    SIZE: tl.constexpr = tile.shape[0] * tile.shape[1]
    within = tl.arange(0, tile.shape[0])[:, None] * tile.shape[1] + tl.arange(0, tile.shape[1])[None, :]
    partial_ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * num_splits * SIZE + within
    tl.store(partial_ptrs + part * SIZE, tile)
    tl.debug_barrier()  # all of this program's stores come before its count
    is_last = tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel") == num_splits - 1
    if is_last:
        tl.store(counter_ptr + tl.program_id(0), 0)  # for the next launch
        tile = tl.load(partial_ptrs)
        for split in tl.range(1, num_splits):
            tile += tl.load(partial_ptrs + split * SIZE)
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
    ms, ns = tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    places = ms[:, None] * N + ns[None, :]
    mask = (ms < M)[:, None] & (ns < N)[None, :]
    first, last = 0, tl.cdiv(K, BLOCK_K)
    if SPLIT:
        first, last = last * tl.program_id(1) // num_splits, last * (tl.program_id(1) + 1) // num_splits
    if PDL:
        columns = tl.minimum(prefetch, tl.minimum(last * BLOCK_K, K) - first * BLOCK_K)
        _ask_for(weight_ptr, n, first * BLOCK_K, N, K, columns, BLOCK_N, THREADS)
        if GATED:
            _ask_for(weight_ptr, N + n, first * BLOCK_K, 2 * N, K, columns, BLOCK_N, THREADS)
    wait_for_inputs(PDL)
    if ADD:  # on its way during the product
        residual = tl.load(out_ptr + places, mask=mask, other=0.0)
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(first * BLOCK_K, last * BLOCK_K, BLOCK_K):
        x_tile = tl.trans(x.load([0, k]))
        y = tl.dot(weight.load([n, k]), x_tile, y, input_precision="ieee")
        if GATED:
            up = tl.dot(weight.load([N + n, k]), x_tile, up, input_precision="ieee")
    if SPLIT:
        y, is_last = _add_parts(y, partial_ptr, counter_ptr, tl.program_id(1), num_splits)
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
    tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=mask)


def gemm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """x [M, K] -> x W^T for some rows; sums in float32, rounded once. Rows are apart by whole 16 bytes.

    Args:
        weight, bias, gated: as in `linear`; the weight is plain and contiguous.
        residual: [M, N] contiguous; the result is added to it, in place.
        counters: int32 zeros for the result's tiles, of which there are at most MAX_TILES, and zeros again afterwards;
            K is not split if None. Launches that may overlap need their own.
        config: `default_gemm_config` if None. Its `block_m` is at least M; K is not split if `gated`.
    """
    (m, k), n = x.shape, len(weight) // (2 if gated else 1)
    config = config or default_gemm_config(m, n, k, gated)
    block_m, block_n, block_k, num_warps, num_stages, num_splits, prefetch = config
    out = torch.empty((m, n), dtype=x.dtype, device=x.device) if residual is None else residual
    num_tiles, num_splits = triton.cdiv(n, block_n), 1 if gated or counters is None else num_splits
    partial = out
    if num_splits > 1:
        partial = torch.empty(num_tiles * num_splits * block_n * block_m, dtype=torch.float32, device=x.device)
    _gemm_kernel[(num_tiles, num_splits)](
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [block_m, block_k]),
        TensorDescriptor(weight, list(weight.shape), [k, 1], [block_n, block_k]),
        weight,
        weight if bias is None else bias,
        out,
        partial,
        out if counters is None else counters,
        m,
        n,
        k,
        num_splits,
        prefetch,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GATED=gated,
        BIAS=bias is not None,
        ADD=residual is not None,
        SPLIT=num_splits > 1,
        THREADS=32 * num_warps,
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(x.device),
    )
    return out
