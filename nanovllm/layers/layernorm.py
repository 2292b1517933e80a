import torch
from torch import nn

from nanovllm.layers.parameter import make_parameter
from nanovllm.utils.parallel import TensorParallel


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467): x [T, size] -> [T, size].

    Args:
        tp: ranks each of which has a summand of x. The norm is that of the sum, which takes the place of x.
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None = None, tp: TensorParallel | None = None):
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(size, dtype=dtype)
        self.tp = tp or TensorParallel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(x, (self.weight, self.eps))

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, float] | None]:
        """x and the norm that is left for a product to do along; none is where x is summed up first."""
        return (x, (self.weight, self.eps)) if self.tp.is_summed(x) else (self(x), None)
