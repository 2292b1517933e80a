"""The MLP of a dense layer, and of a shared expert."""

import torch

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.layer import Layer
from nanovllm.layers.linear import GateUpParallelLinear, LazyGemm, RowParallelLinear
from nanovllm.layers.residual import LazyNorm, Residual
from nanovllm.weights.layer_formats import PLAIN_FORMATS, LayerFormats


class MLP(Layer):
    """down(silu(gate x) * up x) (SwiGLU), split over the ranks by the inner size.

    Args:
        formats: chooses the formats of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
        formats: LayerFormats = PLAIN_FORMATS,
    ):
        super().__init__()
        self.gate_up_proj = GateUpParallelLinear(
            hidden_size,
            intermediate_size,
            bias,
            dtype=dtype,
            tp=tp,
            allocate_weight=formats.weight("gate_proj", "up_proj", "gate_up_proj"),
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias, dtype=dtype, tp=tp, allocate_weight=formats.weight("down_proj")
        )

    def forward(self, x: LazyNorm | Residual) -> LazyGemm:
        return self.down_proj(self.gate_up_proj(x))
