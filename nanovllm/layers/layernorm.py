import torch
from torch import nn

from nanovllm.layers.linear import PendingGemm
from nanovllm.layers.residual import Normed, Residual
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.weights.parameter import make_parameter


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467) of a tensor [T, size], or a lazy norm of a residual stream.

    The norm of a row-parallel layer's output runs that layer.
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(size, dtype=dtype)

    def forward(self, x: torch.Tensor | Residual | PendingGemm) -> torch.Tensor | Normed:
        if isinstance(x, Residual):
            return x.normed((self.weight, self.eps))
        if isinstance(x, PendingGemm):
            return x.all_reduce((self.weight, self.eps))
        return rms_norm(x, self.weight, self.eps)
