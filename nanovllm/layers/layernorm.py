import torch
from torch import nn

from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.layers.parameter import make_parameter


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467): x [T, size] -> [T, size]."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(size, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
