import torch
from torch import nn

from nanovllm.layers.parameter import make_parameter
from nanovllm.layers.residual import Residual
from nanovllm.ops.norm_rope.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467): x [T, size], or a residual stream of that size -> [T, size]."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(size, dtype=dtype)

    def forward(self, x: torch.Tensor | Residual) -> torch.Tensor:
        norm = self.weight, self.eps
        return x.sum(norm) if isinstance(x, Residual) else rms_norm(x, *norm)

    def split(self, x: torch.Tensor | Residual) -> tuple[torch.Tensor, tuple[torch.Tensor, float] | None]:
        """x and the norm that is left for a product to do along; none where x is summed up first."""
        if isinstance(x, Residual):
            if x.delta is not None:
                return self(x), None
            x = x.x
        return x, (self.weight, self.eps)
