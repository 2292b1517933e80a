"""Linear layers with FP8 weights."""

import torch

from nanovllm.ops.fp8.reference import linear_fp8_torch


def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T + b [T, N] for x [T, K]; see `linear` for the other arguments.

    Args:
        weight, scale: [N, K] in e4m3, or gate and up [2 N, K] if `gated`, and its scales.
    """
    return linear_fp8_torch(x, weight, scale, bias, norm=norm, gated=gated)


def linear_add_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute residual [T, N] += x W^T + b in place."""
    return residual.copy_(linear_fp8_torch(x, weight, scale, bias, residual=residual))
