"""Products with a weight, in the layout that is fastest where they run."""

import torch
import torch.nn.functional as F


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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], plain or packed, bias [N] -> x W^T + b [T, N]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """residual [T, N] += x W^T + b, in place; on a GPU the sum is part of the product."""
    if bias is not None or not x.is_cuda:
        return residual.add_(linear(x, weight, bias))
    return torch.addmm(residual, x, weight.t(), out=residual)
