"""The MLP of a dense layer, and of a shared expert."""

import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import GateUpParallelLinear, PendingGemm, RowParallelLinear
from nanovllm.layers.residual import Normed, Residual
from nanovllm.weights.formats import AllocateWeight, Plain


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
        allocate_weight: AllocateWeight = Plain.allocate,
    ):
        super().__init__()
        sizes = hidden_size, intermediate_size
        self.gate_up_proj = GateUpParallelLinear(*sizes, bias, dtype=dtype, tp=tp, allocate_weight=allocate_weight)
        sizes = intermediate_size, hidden_size
        self.down_proj = RowParallelLinear(*sizes, bias, dtype=dtype, tp=tp, allocate_weight=allocate_weight)

    def forward(self, x: Normed | Residual) -> PendingGemm:
        return self.down_proj(self.gate_up_proj(x))
