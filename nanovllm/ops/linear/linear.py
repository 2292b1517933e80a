"""Linear layers, fused with what comes before and after them where the table in dispatch.py has a kernel for that."""

import torch
import torch.nn.functional as F

from nanovllm.ops.comm.peer_memory import PeerMemory
from nanovllm.ops.dispatch import ZERO_BIAS_COLUMNS, Adder, Kernel, regime_of
from nanovllm.ops.linear.gemm import gemm_triton, is_gemm
from nanovllm.ops.linear.gemv import gemv_triton, is_gemv
from nanovllm.ops.linear.silu_mul import silu_mul
from nanovllm.ops.linear.swiglu import is_swiglu, swiglu_triton
from nanovllm.ops.norm_rope.rms_norm import rms_norm


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T + b [T, N] for x [T, K].

    Args:
        weight: [N, K]; [2 N, K], gate and up, if `gated`.
        bias: one number for each row of the weight.
        norm: weight [K] and epsilon of an RMSNorm of x that comes first.
        gated: the result is silu(gate) * up (SwiGLU, arXiv:2002.05202).
        counters: as in `gemm_triton`.
    """
    if is_gemv(x, weight):
        return gemv_triton(x, weight, bias, norm, gated)
    if norm is not None:
        x = rms_norm(x, *norm)
    if is_gemm(x, weight):
        return gemm_triton(x, weight, bias, gated, counters=counters)
    if gated and bias is None and is_swiglu(x, weight):
        return swiglu_triton(x, weight)
    y = F.linear(x, weight, bias)
    return silu_mul(y) if gated else y


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute residual [T, N] += x W^T + b in place; on a GPU the GEMM itself adds."""
    if is_gemv(x, weight):
        return gemv_triton(x, weight, bias, residual=residual)
    if is_gemm(x, weight):
        return gemm_triton(x, weight, bias, residual=residual, counters=counters)
    if bias is not None or not x.is_cuda:
        return residual.add_(linear(x, weight, bias))
    return torch.addmm(residual, x, weight.t(), out=residual)


def choose_adder(
    x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor, ranks: int, peers: PeerMemory | None
) -> Adder:
    """Choose what adds x W^T to the residual stream [T, N]: what the table says, if the operands allow it.

    Args:
        weight: None if it is in a format that only a library's GEMM reads.
    """
    regime = regime_of(len(x))
    if ranks == 1:
        if not x.is_cuda:
            return Adder.GEMM
        fits = weight is not None and (is_gemv(x, weight) or is_gemm(x, weight))
        return regime.adder if fits or regime.kernel is Kernel.LIBRARY else Adder.NEXT_NORM
    if regime.ranks_adder is Adder.ALL_REDUCE_GEMV:
        fits = weight is not None and is_gemv(x, weight) and peers is not None and peers.fits_all_reduce(residual)
        return Adder.ALL_REDUCE_GEMV if fits else Adder.NEXT_NORM
    if regime.ranks_adder is Adder.SLICED_GEMM:
        overlapped = None if weight is None or peers is None else peers.overlapped
        return Adder.SLICED_GEMM if overlapped is not None and overlapped.fits(residual) else Adder.GEMM
    return regime.ranks_adder


def wants_zero_bias(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GEMM without bias may be faster with a bias of zeros, when the next norm adds its output.

    Then torch asks cuBLASLt for the GEMM instead of cuBLAS. docs/benchmarks.md has the figures.
    """
    regime = regime_of(len(x))
    by_library = x.is_cuda and regime.kernel is Kernel.LIBRARY and regime.adder is Adder.NEXT_NORM
    return by_library and weight.shape[1] > ZERO_BIAS_COLUMNS


def linear_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, peers: PeerMemory | None
) -> torch.Tensor:
    """Compute residual [T, N] += all_reduce(x W^T) + b, in place and in one launch, for ALL_REDUCE_GEMV."""
    return gemv_triton(x, weight, bias, residual=residual, peers=peers)
