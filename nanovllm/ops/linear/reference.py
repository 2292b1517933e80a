"""Linear layers in plain torch: the references of the kernels in this folder."""

import torch
import torch.nn.functional as F


def silu_mul_torch(x: torch.Tensor) -> torch.Tensor:
    """Compute `silu_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def sigmoid_mul_torch(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute `sigmoid_mul`."""
    return x * gate.sigmoid()


def linear_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T + b in float32 and x's dtype: the reference of `gemv_triton`, `gemm_triton` and `swiglu_triton`.

    Args:
        weight, bias, norm, gated: as in `linear`.
        residual: [T, N], is added to the result.
    """
    y = x.float()
    if norm is not None:
        norm_weight, eps = norm
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * norm_weight.float()
    y = F.linear(y, weight.float(), None if bias is None else bias.float())
    if gated:
        y = silu_mul_torch(y)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)
