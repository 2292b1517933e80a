# pyright: reportPossiblyUnboundVariable=false
# Names in the kernel are bound under the same compile-time conditions under which they are read.
"""GEMV for 1 to 4 tokens, bound by reading the weight: fuses RMSNorm, activation, residual add and all-reduce.

A program loads its rows of the weight into registers at once, before it waits for the kernel that computes x
(programmatic dependent launch): while one GEMV finishes, the next one's weights are already loading. The weight may be
FP8 with scales; x is not quantized.

On several ranks, each program sends its results to the other ranks and ends. A few more programs at the end of the grid
wait for what the other ranks send and add it. If each program waited for the results of its own rows, it would keep its
registers meanwhile, and the next program could not load its weights.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.comm.collectives import buffers_of, pack_words, send, sum_unit
from nanovllm.ops.comm.peer_memory import UNIT, PeerMemory
from nanovllm.ops.dispatch import Kernel, kernel_of
from nanovllm.ops.linear.scales import load_scales, scale_layout
from nanovllm.ops.triton_utils import HAVE_TRITON, launch_options, tl, triton, wait_for_inputs


class GemvConfig(NamedTuple):
    """Compile-time settings of the kernel: rows of the weight per program, and warps."""

    rows: int
    num_warps: int


def default_gemv_config(n: int, k: int, gated: bool, itemsize: int = 2) -> GemvConfig:
    """Return the settings that `python -m benchmarks.tune gemv` chose on an H100, and for FP8 weights on an H200.

    A program's rows are 16 to 64 KiB: enough loads in flight to hide the memory's latency, and they fit in registers.

    Args:
        n, k: size of the weight [n, k], or [2 n, k] if gated.
        itemsize: bytes of an element of the weight.
    """
    rows = 2
    if k <= 3072:
        rows = 8
    elif n <= k <= 4096:
        rows = 4
    num_warps = 8
    if k <= 1024:
        num_warps = 2
    elif k <= 4096:
        num_warps = 4
    if itemsize == 1:
        rows = 8 if 3072 < k <= 4096 else 2 * rows
    return GemvConfig(rows // 2 if gated else rows, num_warps)


def is_gemv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether x [M, K] has so few tokens that `gemv_triton` is the fastest way to multiply it with `weight`."""
    if not HAVE_TRITON or not x.is_cuda or not len(x) or weight.dtype == torch.float32:
        return False
    return kernel_of(len(x), weight.numel()) is Kernel.GEMV


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    local_ptr,
    buffers_ptr,
    calls_ptr,
    host_stop_ptr,
    stop_ptr,
    x_stride,
    eps,
    N,
    M: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    if SIZE > 1:
        unit = tl.program_id(0) - tl.cdiv(N, ROWS)
        if unit >= 0:
            wait_for_inputs(PDL)
            pointers = local_ptr, buffers_ptr, calls_ptr, host_stop_ptr, stop_ptr
            sum_unit(out_ptr, pointers, unit, N // 2, RANK, SIZE, NUM_WORDS, UNIT)
            return
        buffers = buffers_of(buffers_ptr, SIZE)
        words = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ks = tl.arange(0, K_PAD)
    offsets = rows.to(tl.int64)[:, None] * K + ks[None, :]
    mask = (rows < N)[:, None] & (ks < K)[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    if GATED:
        up_weight = tl.load(weight_ptr + N.to(tl.int64) * K + offsets, mask=mask, other=0.0)
    if NORM:
        norm = tl.load(norm_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
    if SCALES == "block" or SCALES == "row_block":  # factors of x
        first = tl.program_id(0) * ROWS
        weight_scale = load_scales(scale_ptr, first, N, K, K_PAD, ROWS, SCALES)
        if GATED:
            up_scale = load_scales(scale_ptr, N + first, 2 * N, K, K_PAD, ROWS, SCALES)
    if SCALES == "row":  # factors of the dot products
        weight_scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
        if GATED:
            up_scale = tl.load(scale_ptr + N + rows, mask=rows < N, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptr + N + rows, mask=rows < N, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if SIZE > 1:
        stopped = tl.load(stop_ptr, volatile=True)
        sent = words < tl.where(stopped == 0, N // 2, 0)
    for m in tl.static_range(M):
        if SIZE > 1:
            index = m * tl.cdiv(N // 2, UNIT) * UNIT + words  # each token starts with a unit
            call = tl.load(calls_ptr + index // UNIT, mask=words < N // 2, other=0)
        if ADD:  # loads while the dot products are summed
            residual = tl.load(residual_ptr + m * N + rows, mask=rows < N, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + m * x_stride + ks, mask=ks < K, other=0.0).to(tl.float32)
        scale = 1.0
        if NORM:  # the token's scale is a factor of its dot products
            scale = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
            x = x * norm
        x = x[None, :]
        scaled = x
        if SCALES == "block" or SCALES == "row_block":
            scaled = x * weight_scale
        y = tl.sum(weight.to(tl.float32) * scaled, 1) * scale
        if SCALES == "row":
            y *= weight_scale
        if BIAS:
            y += bias
        if GATED:
            scaled = x
            if SCALES == "block" or SCALES == "row_block":
                scaled = x * up_scale
            up = tl.sum(up_weight.to(tl.float32) * scaled, 1) * scale
            if SCALES == "row":
                up *= up_scale
            if BIAS:
                up += up_bias
            y = y / (1 + tl.exp(-y)) * up
        if ADD:
            y += residual
        if SIZE > 1:
            low, high = tl.split(tl.reshape(y, [ROWS // 2, 2]))
            local = send(pack_words(low, high, dtype), call, index, sent, buffers, RANK, SIZE, NUM_WORDS)
            tl.store(local_ptr + index, local, mask=words < N // 2)
        else:
            tl.store(out_ptr + m * N + rows, y.to(dtype), mask=rows < N)


def gemv_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    peers: PeerMemory | None = None,
    config: GemvConfig | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T of x [M, K] for a few tokens, with sums in float32, rounded once.

    Args:
        weight, bias, norm, gated: as in `linear`; the weight is contiguous.
        residual: [M, N] contiguous; the result is added to it in place.
        peers: all-reduce x W^T over these ranks, which must make the same calls in the same order; bias and residual
            are added once. Needs 16-bit values, a result for which `peers.fits_all_reduce`, and at least two rows per
            program.
        config: `default_gemv_config` if None. With a scale for each block, `rows` divides 128.
        scale: contiguous scales of an FP8 weight; see `scale_layout`.
    """
    (m, k), n = x.shape, len(weight) // (2 if gated else 1)
    config = config or default_gemv_config(n, k, gated, weight.itemsize)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device) if residual is None else residual
    norm_weight, eps = (weight, 0.0) if norm is None else norm
    num_programs = triton.cdiv(n, config.rows)
    adds = True
    if peers is None:
        local = out
        pointers = (out, out, out, out)
        constants = {"RANK": 0, "SIZE": 1, "NUM_WORDS": 0, "UNIT": 1} | launch_options(x.device)
    else:
        local = peers.local_words
        pointers, constants = peers.launch_arguments()
        num_programs += m * triton.cdiv(n // 2, UNIT)
        adds = peers.rank == 0  # so that the sum has bias and residual once
    _gemv_kernel[(num_programs,)](
        x,
        weight,
        out if scale is None else scale,
        weight if bias is None else bias,
        norm_weight,
        out,
        out,
        local,
        *pointers,
        x.stride(0),
        eps,
        n,
        M=m,
        K=k,
        K_PAD=max(triton.next_power_of_2(k), 1 if scale is None else 128),
        ROWS=config.rows,
        SCALES=scale_layout(weight, scale),
        NORM=norm is not None,
        BIAS=bias is not None and adds,
        GATED=gated,
        ADD=residual is not None and adds,
        num_warps=config.num_warps,
        **constants,
    )
    return out
