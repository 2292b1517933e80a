"""The experts of a layer with FP8 weights."""

import torch

from nanovllm.ops.fp8.quantize import quantize_triton
from nanovllm.ops.moe.alignment import align_triton
from nanovllm.ops.moe.combine import combine_triton
from nanovllm.ops.moe.dispatch import FP8_TILINGS, Tiling, tiling_of
from nanovllm.ops.moe.expert_gemv import down_gemv_triton, gate_up_gemv_triton
from nanovllm.ops.moe.experts import Shared, is_expert_gemv
from nanovllm.ops.moe.grouped_gemm import grouped_down_triton, grouped_gate_up_triton


def experts_fp8(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
    shared: Shared | None = None,
) -> torch.Tensor:
    """Compute `experts` on a GPU, with FP8 weights.

    The GEMV for a few tokens reads x as it is. The grouped GEMM quantizes its inputs.

    Args:
        gate_up, down: e4m3.
        gate_up_scale, down_scale: float32 scales [E, ...], see `scale_layout`.
        x, ids, weights, norm, residual, shared: as in `experts`.
    """
    if not len(x):
        return torch.empty_like(x) if residual is None else residual
    if is_expert_gemv(x, down, ids.shape[1]):
        hidden = gate_up_gemv_triton(x, gate_up, ids, norm, scale=gate_up_scale)
        return down_gemv_triton(hidden, down, ids, weights, residual, shared, scale=down_scale)
    tiling = tiling_of(ids.numel(), len(down), FP8_TILINGS)
    pairs = expert_pairs_fp8(x, (gate_up, gate_up_scale), (down, down_scale), ids, weights, norm=norm, tiling=tiling)
    return combine_triton(pairs, residual, shared)


def expert_pairs_fp8(
    x: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    norm: tuple[torch.Tensor, float] | None,
    tiling: Tiling,
) -> torch.Tensor:
    """Return weight * down(silu(gate x) * up x) [T, top_k, H] of each pair with grouped GEMMs.

    Args:
        gate_up, down: weights and scales.
    """
    tiles = align_triton(ids, len(down[0]), tiling.block_m)
    rows = quantize_triton(x, norm)
    hidden = grouped_gate_up_triton(rows, gate_up[0], tiles, ids.shape[1], tiling.gate_up, scale=gate_up[1])
    return grouped_down_triton(hidden, down[0], tiles, weights, tiling.down, scale=down[1], dtype=x.dtype)
