"""Products of very few rows, bound by reading the weight: norm, activation and residual sum are part of them.

A program reads its rows of the weight in one go into registers, before it waits for the kernel that makes its input
(programmatic dependent launch): while one product ends, the next one's weights are already on their way.

Where each rank has a summand of the result, programs send what they have to the other ranks as they end, and a few
more programs, the last ones, sum up what arrives. If each waited for the others' part of its own rows, it would keep
its registers from the next one, and too few weights would be on their way.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.comm.collectives import UNIT, PeerMemory, buffers_of, pack_words, send, sum_unit
from nanovllm.ops.linear.dispatch import Kernel, regime_of
from nanovllm.ops.triton_utils import HAVE_TRITON, launch_options, tl, triton, wait_for_inputs


class GemvConfig(NamedTuple):
    """How a kernel is built: rows of the weight for a program, warps."""

    rows: int
    num_warps: int


def default_gemv_config(n: int, k: int, gated: bool) -> GemvConfig:
    """What `python -m benchmarks.tune gemv` chose on an H100 for a weight [n, k]; [2 n, k] if gated.

    A program's rows are 16 to 64 KiB: enough on their way to hide the memory's latency, few enough for the registers.
    """
    rows = 8 if k <= 3072 else 4 if n <= k <= 4096 else 2
    return GemvConfig(rows // 2 if gated else rows, 2 if k <= 1024 else 4 if k <= 4096 else 8)


def is_gemv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x [M, K] has so few rows that `gemv_triton` is the way to multiply it with `weight`."""
    if not HAVE_TRITON or not x.is_cuda or not len(x) or weight.dtype == torch.float32:
        return False
    return regime_of(len(x)).kernel is Kernel.GEMV


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    own_ptr,
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
            pointers = own_ptr, buffers_ptr, calls_ptr, host_stop_ptr, stop_ptr
            sum_unit(out_ptr, pointers, unit, N // 2, RANK, SIZE, NUM_WORDS, UNIT)
            return
        buffers = buffers_of(buffers_ptr, SIZE)
        words = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ks = tl.arange(0, K_PAD)
    places = rows.to(tl.int64)[:, None] * K + ks[None, :]
    mask = (rows < N)[:, None] & (ks < K)[None, :]
    weight = tl.load(weight_ptr + places, mask=mask, other=0.0)
    if GATED:
        up_weight = tl.load(weight_ptr + N.to(tl.int64) * K + places, mask=mask, other=0.0)
    if NORM:
        norm = tl.load(norm_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
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
            there = m * tl.cdiv(N // 2, UNIT) * UNIT + words  # rows begin with a unit
            call = tl.load(calls_ptr + there // UNIT, mask=words < N // 2, other=0)
        if ADD:  # on its way while the product is summed up
            residual = tl.load(residual_ptr + m * N + rows, mask=rows < N, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + m * x_stride + ks, mask=ks < K, other=0.0).to(tl.float32)
        scale = 1.0
        if NORM:  # the scale of the row is a factor of the product too
            scale = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
            x = x * norm
        y = tl.sum(weight.to(tl.float32) * x[None, :], 1) * scale
        if BIAS:
            y += bias
        if GATED:
            up = tl.sum(up_weight.to(tl.float32) * x[None, :], 1) * scale
            if BIAS:
                up += up_bias
            y = y / (1 + tl.exp(-y)) * up
        if ADD:
            y += residual
        if SIZE > 1:
            low, high = tl.split(tl.reshape(y, [ROWS // 2, 2]))
            own = send(pack_words(low, high, dtype), call, there, sent, buffers, RANK, SIZE, NUM_WORDS)
            tl.store(own_ptr + there, own, mask=words < N // 2)
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
) -> torch.Tensor:
    """x [M, K] -> x W^T for a few rows; sums in float32, rounded once.

    Args:
        weight, bias, norm, gated: as in `linear`; the weight is plain and contiguous.
        residual: [M, N] contiguous; the result is added to it, in place.
        peers: x W^T is summed over the ranks, which must make the same calls in the same order; bias and residual are
            added once. For numbers of 16 bits, a result that `peers.fits_all_reduce`, and programs of two rows or more.
        config: `default_gemv_config` if None.
    """
    (m, k), n = x.shape, len(weight) // (2 if gated else 1)
    config = config or default_gemv_config(n, k, gated)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device) if residual is None else residual
    norm_weight, eps = (weight, 0.0) if norm is None else norm
    tensors = x, weight, weight if bias is None else bias, norm_weight, out, out
    programs, first = triton.cdiv(n, config.rows), True
    if peers is None:
        tensors += (out,) * 5
        constants = {"RANK": 0, "SIZE": 1, "NUM_WORDS": 0, "UNIT": 1} | launch_options(x.device)
    else:
        programs += m * triton.cdiv(n // 2, UNIT)
        first = peers.rank == 0
        pointers, constants = peers.launch_arguments()
        tensors += peers.own, *pointers
    _gemv_kernel[(programs,)](
        *tensors,
        x.stride(0),
        eps,
        n,
        M=m,
        K=k,
        K_PAD=triton.next_power_of_2(k),
        ROWS=config.rows,
        NORM=norm is not None,
        BIAS=bias is not None and first,
        GATED=gated,
        ADD=residual is not None and first,
        num_warps=config.num_warps,
        **constants,
    )
    return out
