"""The MLP of a dense layer, and of a shared expert."""

import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import GateUpParallelLinear, PendingGemm, RowParallelLinear
from nanovllm.layers.residual import Normed, Residual


class MLP(nn.Module):
    """down(silu(gate x) * up x) (SwiGLU), split over the ranks by the inner size."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        super().__init__()
        self.gate_up_proj = GateUpParallelLinear(hidden_size, intermediate_size, bias, dtype=dtype, tp=tp)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, dtype=dtype, tp=tp)

    def forward(self, x: Normed | Residual) -> PendingGemm:
        return self.down_proj(self.gate_up_proj(x))
