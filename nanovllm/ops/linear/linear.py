"""Products with a weight: with what comes before and after, and in the way that is fastest where they run."""

import torch
import torch.nn.functional as F

from nanovllm.ops.comm.collectives import PeerMemory
from nanovllm.ops.linear.gemm import MAX_TOKENS as MAX_GEMM_TOKENS
from nanovllm.ops.linear.gemm import gemm_triton, is_gemm
from nanovllm.ops.linear.gemv import gemv_triton, is_gemv
from nanovllm.ops.linear.silu_mul import silu_mul
from nanovllm.ops.linear.swiglu import is_swiglu, swiglu_triton
from nanovllm.ops.norm_rope.rms_norm import rms_norm

NORM_ROWS = 512  # of a product that a norm adds to the residual stream: more might leave the L2 cache meanwhile


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `pack` knows a better layout for `weight` [N, K]: on CPUs with oneDNN, for the dtypes it computes in."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """An opaque copy of `weight` in oneDNN's blocked layout; `to_dense()` gives the plain one back.

    A plain weight is brought into that layout in every product, which on a CPU takes as long as a product of up to
    about 30 rows itself.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] -> x W^T + b [T, N].

    Args:
        weight: [N, K], plain or packed; [2 N, K], gate and up, if `gated`.
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
    if weight.is_mkldnn:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        y = F.linear(x, weight, bias)
    return silu_mul(y) if gated else y


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual [T, N] += x W^T + b, in place; on a GPU the sum is part of the product."""
    if is_gemv(x, weight):
        return gemv_triton(x, weight, bias, residual=residual)
    if is_gemm(x, weight):
        return gemm_triton(x, weight, bias, residual=residual, counters=counters)
    if bias is not None or not x.is_cuda:
        return residual.add_(linear(x, weight, bias))
    return torch.addmm(residual, x, weight.t(), out=residual)


def adds_well(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether of up to NORM_ROWS rows `linear_add` is the way to add a product to the residual stream.

    The other way is the norm that comes after it: cuBLAS has better kernels for products that add nothing.
    """
    return not x.is_cuda or is_gemv(x, weight) or is_gemm(x, weight)


def likes_bias(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product without bias may be faster with one of zeros.

    It has cuBLASLt choose the kernel, where torch asks cuBLAS for products without. On an H100 (cuBLAS 13.0), x [T, K]
    with K of 6,144 and 12,288, weight [4096, K], us:

        T               72    96   128   160   192   224   256
        6,144:   none 22.4  26.2  22.8  29.3  27.4  30.7  28.9
                zeros 22.7  22.7  23.3  23.8  25.1  26.8  29.3
        12,288:  none 43.8  45.1  40.9  48.6  43.9  54.0  53.8
                zeros 41.2  40.8  41.5  42.8  44.5  49.6  50.3

    Of six weights with K of 2,048 or 4,096, zeros took up to 1.4 us more for five, and were no steady gain for the
    sixth, [3072, 4096]: 3 and 4 us less with T of 160 and 224, 1 us more with 128 and 192.
    """
    return x.is_cuda and MAX_GEMM_TOKENS < len(x) <= NORM_ROWS and weight.shape[1] > 4096


def can_sum(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, peers: PeerMemory | None) -> bool:
    """Whether `linear_sum` takes these."""
    return peers is not None and is_gemv(x, weight) and peers.fits_all_reduce(residual)


def linear_sum(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, peers: PeerMemory
) -> torch.Tensor:
    """residual [T, N] += x W^T, summed over the ranks, + b, in place and in one launch."""
    return gemv_triton(x, weight, bias, residual=residual, peers=peers)
