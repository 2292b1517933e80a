import numpy as np
import torch
from torch import nn

from nanovllm.layers.layer import Layer
from nanovllm.layers.linear import LazyGemm
from nanovllm.layers.residual import LazyNorm, Residual
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.weights.parameter import CheckpointTensor, check_shape, make_parameter, select


class RMSNorm(Layer):
    """RMSNorm (arXiv:1910.07467). The input decides what runs:

    - A tensor [T, size]: the norm runs now.
    - A `Residual`: returns a `LazyNorm`, whose norm the next linear layer may fuse.
    - A `LazyGemm` (post-norm layers): the GEMM, the all-reduce and the norm run now.

    Args:
        zero_centered: the checkpoint has the weight minus 1. The weight is float32, as 1 + w needs more bits than w.
        order: the order of the dimensions, if it is not that of the checkpoint.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        dtype: torch.dtype | None = None,
        zero_centered: bool = False,
        order: np.ndarray | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.order = order
        dtype = torch.float32 if zero_centered else dtype
        self.weight = make_parameter(size, dtype=dtype, weight_loader=self.weight_loader)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
        check_shape(loaded, param.shape)
        if self.order is not None:
            loaded = select(loaded, self.order)
        param.copy_(loaded.float() + 1 if self.zero_centered else loaded)

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        dummy = 0.0 if self.zero_centered else 1.0
        return {f"{prefix}.weight": CheckpointTensor(self.weight, tuple(self.weight.shape), dummy=dummy)}

    def forward(self, x: torch.Tensor | Residual | LazyGemm) -> torch.Tensor | LazyNorm:
        if isinstance(x, Residual):
            return x.normed((self.weight, self.eps))
        if isinstance(x, LazyGemm):
            return x.all_reduce((self.weight, self.eps))
        return rms_norm(x, self.weight, self.eps)
