import torch
from torch import nn

from nanovllm.kernels.silu_mul import silu_mul


class SiluAndMul(nn.Module):
    """The gated unit of SwiGLU (arXiv:2002.05202): x [T, 2 I] -> silu(x[:, :I]) * x[:, I:], [T, I]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu_mul(x)
