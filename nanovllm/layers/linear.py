"""Linear layers split over the tensor-parallel ranks.

Column-parallel layers split the output features: no communication. Row-parallel layers split the input features and sum
the partial results. One after the other they need a single all-reduce (Megatron-LM, arXiv:1909.08053).
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.parameter import PackedLayer, check_shape, divide, make_parameter
from nanovllm.layers.residual import Residual
from nanovllm.ops.linear.linear import NORM_ROWS, adds_well, can_sum, likes_bias, linear, linear_add, linear_sum
from nanovllm.utils.context import get_context


@dataclass(frozen=True)
class Part:
    """Where this rank's rows of one checkpoint tensor come from and where they go."""

    total: int  # rows of the checkpoint's tensor
    start: int  # the first of them that this rank holds
    size: int  # how many it holds


class ColumnParallelLinear(PackedLayer):
    """y = x W^T + b with the rows of W split: [T, in_features] -> [T, this rank's rows].

    Args:
        in_features: size of the input, whole on every rank.
        parts: the checkpoint tensors that are merged here, by shard id and in their order.
        bias: whether there is one; it is split like the rows.
    """

    gated = False  # whether the rows are gate and up of SwiGLU

    def __init__(self, in_features: int, parts: dict[str | int, Part], bias: bool, dtype: torch.dtype | None):
        super().__init__()
        self.parts = parts
        rows = sum(part.size for part in parts.values())
        self.weight = make_parameter(rows, in_features, dtype=dtype, weight_loader=self.weight_loader)
        self.bias = make_parameter(rows, dtype=dtype, weight_loader=self.weight_loader) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: str | int) -> None:
        offset = 0
        for name, part in self.parts.items():
            if name == shard_id:
                check_shape(loaded, (part.total, *param.shape[1:]))
                param[offset : offset + part.size].copy_(loaded[part.start : part.start + part.size])
            offset += part.size

    def forward(self, x: torch.Tensor | Residual, norm: RMSNorm | None = None) -> torch.Tensor:
        """y for x, or for norm(x); a residual stream has a norm."""
        x, norm = (x, None) if norm is None else norm.split(x)
        return linear(x, self.operand, self.bias, norm, self.gated, get_context().counters)


class GateUpParallelLinear(ColumnParallelLinear):
    """The gated unit of SwiGLU (arXiv:2002.05202): silu(x G^T) * x U^T. Shard ids are 0, the gate, and 1.

    Args:
        hidden_size, intermediate_size: sizes of the input and of each projection; the ranks must divide the latter.
    """

    gated = True

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        tp = tp or TensorParallel.default()
        size = divide("intermediate_size", intermediate_size, tp)
        part = Part(intermediate_size, tp.rank * size, size)
        super().__init__(hidden_size, {0: part, 1: part}, bias, dtype)


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values in one product, split by heads. Shard ids are "q", "k", "v".

    With more ranks than KV heads each KV head is held by several ranks, those whose query heads use it.

    Attributes:
        num_heads, num_kv_heads: this rank's.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        tp = tp or TensorParallel.default()
        self.num_heads = divide("num_attention_heads", num_heads, tp)
        copies = max(1, tp.size // num_kv_heads)  # ranks that hold the same KV head
        if num_kv_heads * copies % tp.size:
            what = f"tensor_parallel_size={tp.size} does not fit the model's num_key_value_heads={num_kv_heads}"
            raise ValueError(f"{what}: one must divide the other")
        self.num_kv_heads = num_kv_heads * copies // tp.size
        size, kv_size = self.num_heads * head_dim, self.num_kv_heads * head_dim
        kv = Part(num_kv_heads * head_dim, tp.rank // copies * kv_size, kv_size)
        parts = {"q": Part(num_heads * head_dim, tp.rank * size, size), "k": kv, "v": kv}
        super().__init__(hidden_size, parts, bias, dtype)


class RowParallelLinear(PackedLayer):
    """y = residual + x W^T + b with the columns of W split: [T, this rank's inputs] -> [T, out_features] on every rank.

    The residual, contiguous and the same on every rank, may be overwritten.

    Args:
        in_features, out_features: sizes of the whole layer; `in_features` must be divisible by the ranks.
        reduce_results: False leaves sums that the product does not make to an RMSNorm: the result is a `Residual`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        reduce_results: bool = True,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        super().__init__()
        self.tp = tp or TensorParallel.default()
        self.reduce_results = reduce_results
        self.in_features = in_features
        size = divide("input size of a row-parallel layer", in_features, self.tp)
        self.weight = make_parameter(out_features, size, dtype=dtype, weight_loader=self.weight_loader)
        self.bias = make_parameter(out_features, dtype=dtype) if bias else None
        self.register_buffer("no_bias", torch.zeros(out_features, dtype=dtype), persistent=False)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
        rows, size = param.shape
        check_shape(loaded, (rows, self.in_features))
        param.copy_(loaded[:, self.tp.rank * size : (self.tp.rank + 1) * size])

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | Residual:
        y = self._add(x, residual)
        return y.sum() if self.reduce_results else y

    def _add(self, x: torch.Tensor, residual: torch.Tensor) -> Residual:
        tp, weight, counters = self.tp, self.operand, get_context().counters
        if can_sum(x, weight, residual, tp.peers):
            return Residual(linear_sum(x, weight, self.bias, residual, tp.peers), None, tp)
        if tp.overlapped is not None and tp.overlapped.fits(residual):
            for rows in tp.overlapped.slices(residual):
                self._multiply(x[rows], residual[rows])
            return Residual.of(residual, tp)
        bias = self.bias if tp.rank == 0 else None  # so that the sum over the ranks has it once
        if len(x) > NORM_ROWS or (tp.size == 1 and adds_well(x, weight)):
            if tp.rank == 0:
                return Residual.of(linear_add(x, weight, bias, residual, counters), tp)
            return Residual.of(linear(x, weight, counters=counters), tp)
        if bias is None and likes_bias(x, weight):
            bias = self.no_bias
        return Residual(residual, linear(x, weight, bias, counters=counters), tp)

    def _multiply(self, x: torch.Tensor, residual: torch.Tensor) -> None:
        """Overwrite the residual with this rank's summand."""
        if self.tp.rank == 0:
            linear_add(x, self.operand, self.bias, residual)
        else:
            torch.mm(x, self.operand.t(), out=residual)
