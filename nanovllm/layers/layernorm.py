import torch
from torch import nn

from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm
from nanovllm.layers.parameter import make_parameter


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467), fused with the residual sum before it: x [T, size].

    `norm(x)` gives the norm of x; `norm(x, residual)` gives the norm of x + residual, and the sum.
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(size, dtype=dtype)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)
