"""Linear layers with FP8 weights on a GPU. A table in ops/dispatch.py chooses the kernel."""

from functools import lru_cache

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.comm.peer_memory import PeerMemory
from nanovllm.ops.dispatch import Adder, Fp8Kernel, regime_of
from nanovllm.ops.fp8.quantize import LazySwiglu, quantize_triton
from nanovllm.ops.fp8.scaled_gemm import scaled_gemm_triton
from nanovllm.ops.linear.gemv import gemv_triton
from nanovllm.ops.linear.linear import choose_adder
from nanovllm.ops.linear.scales import scale_layout
from nanovllm.ops.linear.silu_mul import silu_mul


@lru_cache
def has_block_scaled_mm(device: torch.device) -> bool:
    """Return whether torch has a GEMM with scales for blocks on `device`: cuBLAS 12.9 on Hopper."""
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return version >= (12, 9) and torch.cuda.get_device_capability(device) == (9, 0)


# cuBLAS computes tiles of 128 x 128 and does not split K. With fewer tiles than this, for at most 256 tokens, so many
# SMs are idle that the kernel that splits K is faster. docs/benchmarks.md has the figures.
MIN_LIBRARY_TILES = 80


def uses_scaled_mm(
    x: torch.Tensor | LazySwiglu, weight: torch.Tensor, scale: torch.Tensor, gated: bool = False
) -> bool:
    """Return whether torch's GEMM multiplies x with `weight`.

    It needs bfloat16, and rows of whole 16 bytes, of values and of scales.
    """
    dtype = x.gate_up.dtype if isinstance(x, LazySwiglu) else x.dtype
    if regime_of(len(x)).fp8_kernel is not Fp8Kernel.LIBRARY or dtype != torch.bfloat16:
        return False
    num_tiles = ceil_div(len(x), 128) * ceil_div(len(weight), 128)
    if not gated and len(x) <= 256 and num_tiles < MIN_LIBRARY_TILES:
        return False
    if not weight.is_cuda or len(weight) % 16 or weight.shape[1] % 16:
        return False
    layout = scale_layout(weight, scale)
    return layout == "row" or (layout == "block" and scale.shape[1] % 4 == 0 and has_block_scaled_mm(weight.device))


def _scaled_mm(
    x: torch.Tensor | LazySwiglu,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    norm: tuple[torch.Tensor, float] | None,
) -> torch.Tensor:
    """Return x W^T + b [T, N] by torch's GEMM. The kernel before it quantizes x."""
    by_row = scale_layout(weight, scale) == "row"
    rows = quantize_triton(x, norm, by_token=by_row, multiple=4)  # whole 16 bytes of scales
    # Fast accumulation leaves sums with the 14 bits of Hopper's tensor cores. Scales for blocks do not allow it.
    options = {"out_dtype": rows.dtype, "use_fast_accum": by_row}
    y = torch.ops.aten._scaled_mm(rows.values, weight.t(), rows.scales, scale.t(), **options)[: len(x)]
    return y if bias is None else y.add_(bias)


def linear_fp8(
    x: torch.Tensor | LazySwiglu,
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
    if regime_of(len(x)).fp8_kernel is Fp8Kernel.GEMV and isinstance(x, torch.Tensor):
        return gemv_triton(x, weight, bias, norm=norm, gated=gated, residual=residual, scale=scale)
    if not uses_scaled_mm(x, weight, scale, gated):
        rows = quantize_triton(x, norm)
        return scaled_gemm_triton(rows, weight, scale, bias, gated=gated, residual=residual, counters=counters)
    y = _scaled_mm(x, weight, scale, bias, norm=norm)
    y = silu_mul(y) if gated else y
    return y if residual is None else residual.add_(y)


def gate_up_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor | LazySwiglu:
    """Compute `linear_fp8` with SwiGLU. After torch's GEMM, leave SwiGLU to the kernel that quantizes the result."""
    if uses_scaled_mm(x, weight, scale, gated=True):
        return LazySwiglu(_scaled_mm(x, weight, scale, bias, norm=norm))
    return linear_fp8(x, weight, scale, bias, norm=norm, gated=True, counters=counters)


def linear_add_fp8(
    x: torch.Tensor | LazySwiglu,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute residual [T, N] += x W^T + b in place."""
    linear_fp8(x, weight, scale, bias, residual=residual, counters=counters)
    return residual


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
    x: torch.Tensor | LazySwiglu,
    weight: torch.Tensor,
    residual: torch.Tensor,
    ranks: int,
    peers: PeerMemory | None,
) -> Adder:
    """Choose the operation that adds x W^T to the residual stream [T, N].

    On one rank the linear layer always adds, because the norm after it can then quantize.
    """
    if ranks == 1:
        return Adder.LINEAR
    regime = regime_of(len(x))
    if regime.ranks_adder is Adder.ALL_REDUCE_GEMV:
        is_gemv = regime.fp8_kernel is Fp8Kernel.GEMV
        fits = is_gemv and peers is not None and peers.fits_all_reduce(residual)
        return Adder.ALL_REDUCE_GEMV if fits else Adder.NEXT_NORM
    return choose_adder(residual, weight, residual, ranks, peers)
