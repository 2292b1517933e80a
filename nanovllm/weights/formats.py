"""Weight formats: how the weight [N, K] of a linear layer lies in memory, and the GEMMs that read it.

A format owns its parameters, what happens to them after loading, and its GEMMs. The layer owns sharding, bias and the
names in the checkpoint. To add a format (FP8 with block scales), subclass WeightFormat: allocate its parameters, each
with a `weight_loader`, and write `matmul` for any number of tokens. Override the other methods where fused kernels read
the format.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from nanovllm.ops.comm.collectives import PeerMemory
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.linear import linear as ops_linear
from nanovllm.ops.linear.silu_mul import silu_mul
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.weights.parameter import make_parameter


class WeightFormat(ABC):
    """A linear layer's weight. This base class has no fused kernels.

    Attributes:
        weight: the parameter that checkpoints load.
    """

    weight: nn.Parameter

    @abstractmethod
    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x W^T + b for x [T, K], any number of tokens."""

    def start_loading(self) -> "WeightFormat":
        """Return the format whose `weight` can be written."""
        return self

    def finish_loading(self) -> "WeightFormat":
        """Return the fastest format for the weight that is loaded now."""
        return self

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        norm: tuple[torch.Tensor, float] | None = None,
        gated: bool = False,
        counters: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return x W^T + b. See `linear` in ops/linear for the arguments."""
        y = self.matmul(x if norm is None else rms_norm(x, *norm), bias)
        return silu_mul(y) if gated else y

    def linear_add(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        counters: torch.Tensor | None = None,
        peers: PeerMemory | None = None,
    ) -> torch.Tensor:
        """Compute residual [T, N] += x W^T + b in place, with the all-reduce of x W^T for ALL_REDUCE_GEMV: `peers`."""
        return residual.add_(self.matmul(x, bias))

    def choose_adder(self, x: torch.Tensor, residual: torch.Tensor, ranks: int, peers: PeerMemory | None) -> Adder:
        """Choose what adds x W^T to the residual stream [T, N]."""
        return ops_linear.choose_adder(x, None, residual, ranks, peers)

    def wants_zero_bias(self, x: torch.Tensor) -> bool:
        """Whether `matmul` without bias may be faster with a bias of zeros."""
        return False


class Plain(WeightFormat):
    """The weight as it is in a checkpoint, for which there are kernels for every number of tokens.

    Args:
        weight: the parameter.
        is_shared: whether an embedding reads it too.
    """

    def __init__(self, weight: nn.Parameter, is_shared: bool = False):
        self.weight, self.is_shared = weight, is_shared

    @classmethod
    def allocate(
        cls, rows: int, columns: int, dtype: torch.dtype | None, weight_loader: Callable[..., None]
    ) -> "Plain":
        """Make the parameter [rows, columns] on the current default device."""
        return cls(make_parameter(rows, columns, dtype=dtype, weight_loader=weight_loader))

    def finish_loading(self) -> WeightFormat:
        return Packed(self) if Packed.supports(self.weight) else self

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops_linear.linear(x, self.weight, bias)

    def linear(self, x, bias=None, norm=None, gated=False, counters=None) -> torch.Tensor:
        return ops_linear.linear(x, self.weight, bias, norm, gated, counters)

    def linear_add(self, x, bias, residual, counters=None, peers=None) -> torch.Tensor:
        if peers is not None:
            return ops_linear.linear_all_reduce(x, self.weight, bias, residual, peers)
        return ops_linear.linear_add(x, self.weight, bias, residual, counters)

    def choose_adder(self, x: torch.Tensor, residual: torch.Tensor, ranks: int, peers: PeerMemory | None) -> Adder:
        return ops_linear.choose_adder(x, self.weight, residual, ranks, peers)

    def wants_zero_bias(self, x: torch.Tensor) -> bool:
        return ops_linear.wants_zero_bias(x, self.weight)


class Packed(WeightFormat):
    """A copy of the weight in oneDNN's blocked layout, on CPUs.

    oneDNN brings a plain weight into that layout in every GEMM, which takes as long as a GEMM of about 30 tokens. The
    plain weight is freed unless an embedding reads it.
    """

    def __init__(self, plain: Plain):
        self.plain, self.weight = plain, plain.weight
        self.packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight)
        if not plain.is_shared:
            self.weight.data = self.weight.data.new_empty(0)

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Whether oneDNN is there and computes in the weight's dtype."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32 or bfloat16

    def start_loading(self) -> WeightFormat:
        if not self.plain.is_shared:
            self.weight.data = self.packed.to_dense()
        return self.plain

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
