"""Linear layers with FP8 weights on a GPU.

The table in ops/dispatch.py chooses the kernel, as for plain weights. GEMV and GEMM read the activations as they are,
because reading the weight is their limit. For more tokens, `scaled_gemm_triton` takes the place of the library: the
kernel before it quantizes the activations.
"""

import torch

from nanovllm.ops.comm.peer_memory import PeerMemory
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.fp8.quantize import quantize_triton
from nanovllm.ops.fp8.scaled_gemm import scaled_gemm_triton
from nanovllm.ops.linear.gemm import gemm_triton, is_gemm
from nanovllm.ops.linear.gemv import gemv_triton, is_gemv
from nanovllm.ops.linear.linear import choose_adder
from nanovllm.ops.norm_rope.rms_norm import rms_norm


def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    counters: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T + b [T, N] for x [T, K] in 16 bits.

    Args:
        weight, scale: e4m3 [N, K], or gate and up [2 N, K] if `gated`, and its scales, see `scale_layout`. Both
            contiguous; TMA needs rows of whole 16 bytes.
        bias, norm, gated, counters: as in `linear`.
        residual: [T, N] contiguous; the result is added to it in place, and it is returned.
    """
    if is_gemv(x, weight):
        return gemv_triton(x, weight, bias, norm=norm, gated=gated, residual=residual, scale=scale)
    if is_gemm(x, weight):
        if norm is not None:
            norm_weight, eps = norm
            x = rms_norm(x, norm_weight, eps)
        return gemm_triton(x, weight, bias, gated=gated, residual=residual, counters=counters, scale=scale)
    rows, options = quantize_triton(x, norm), {"gated": gated, "residual": residual, "counters": counters}
    return scaled_gemm_triton(rows, weight, scale, bias, dtype=x.dtype, **options)


def linear_add_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute residual [T, N] += x W^T + b in place; the GEMM itself adds."""
    return linear_fp8(x, weight, scale, bias, residual=residual, counters=counters)


def linear_all_reduce_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    peers: PeerMemory | None,
) -> torch.Tensor:
    """Compute residual [T, N] += all_reduce(x W^T) + b in place with one kernel, for ALL_REDUCE_GEMV."""
    return gemv_triton(x, weight, bias, residual=residual, peers=peers, scale=scale)


def choose_adder_fp8(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, ranks: int, peers: PeerMemory | None
) -> Adder:
    """Choose the operation that adds x W^T to the residual stream [T, N].

    On one rank it is the GEMM for any number of tokens. The norm after it then quantizes its output.
    """
    return Adder.LINEAR if ranks == 1 else choose_adder(x, weight, residual, ranks, peers)
