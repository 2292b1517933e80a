"""Linear layers, fused with the operations before and after them if the table in dispatch.py has a kernel for that."""

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
        weight: [N, K], or gate and up [2 N, K] if `gated`.
        bias: one number for each row of the weight.
        norm: weight [K] and epsilon of an RMSNorm to apply to x first.
        gated: return silu(gate) * up (SwiGLU, arXiv:2002.05202).
        counters: as in `gemm_triton`.
    """
    if is_gemv(x, weight):
        return gemv_triton(x, weight, bias, norm=norm, gated=gated)
    if norm is not None:
        norm_weight, eps = norm
        x = rms_norm(x, norm_weight, eps)
    if is_gemm(x, weight):
        return gemm_triton(x, weight, bias, gated=gated, counters=counters)
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
    """Compute residual [T, N] += x W^T + b in place.

    The GEMM itself adds if it can: not on a CPU, and not with a bias if the library computes it.
    """
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
    """Choose the operation that adds x W^T to the residual stream [T, N].

    This is the operation in the dispatch table if the operands allow it.

    Args:
        weight: None if only a library's GEMM can read the weight's format.
    """
    if ranks == 1 and not x.is_cuda:
        return Adder.LINEAR
    regime = regime_of(len(x))
    if ranks == 1:
        has_kernel = weight is not None and (is_gemv(x, weight) or is_gemm(x, weight))
        if has_kernel or regime.kernel is Kernel.LIBRARY:
            return regime.adder
        return Adder.NEXT_NORM
    if regime.ranks_adder is Adder.ALL_REDUCE_GEMV:
        fits = weight is not None and is_gemv(x, weight) and peers is not None and peers.fits_all_reduce(residual)
        return Adder.ALL_REDUCE_GEMV if fits else Adder.NEXT_NORM
    if regime.ranks_adder is Adder.SLICED_GEMM:
        overlapped = None if weight is None or peers is None else peers.overlapped
        fits = overlapped is not None and overlapped.fits(residual)
        return Adder.SLICED_GEMM if fits else Adder.LINEAR
    return regime.ranks_adder


def wants_zero_bias(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a bias of zeros may make a GEMM faster than no bias, if the next norm adds its output.

    Torch calls cuBLASLt instead of cuBLAS if there is a bias. docs/benchmarks.md has the figures.
    """
    regime = regime_of(len(x))
    uses_library = x.is_cuda and regime.kernel is Kernel.LIBRARY and regime.adder is Adder.NEXT_NORM
    return uses_library and weight.shape[1] > ZERO_BIAS_COLUMNS


def linear_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, peers: PeerMemory | None
) -> torch.Tensor:
    """Compute residual [T, N] += all_reduce(x W^T) + b in place with one kernel, for ALL_REDUCE_GEMV."""
    return gemv_triton(x, weight, bias, residual=residual, peers=peers)
