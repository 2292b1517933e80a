"""Linear layers split over the tensor-parallel ranks.

Column-parallel layers split the output features and need no communication. Row-parallel layers split the input features
and all-reduce the partial results. A pair of them needs a single all-reduce (Megatron-LM, arXiv:1909.08053).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.residual import Norm, Normed, Residual, as_normed
from nanovllm.ops.dispatch import Adder
from nanovllm.utils.context import get_counters
from nanovllm.weights.formats import AllocateWeight, Plain, WeightFormat
from nanovllm.weights.parameter import CheckpointTensor, MergedTensor, ShardId, check_shape, make_parameter, select


class LinearLayer(nn.Module):
    """A layer whose weight has a format: loading may change it, and it owns the matmul (see weights/formats.py)."""

    format: WeightFormat
    weight: nn.Parameter

    def set_format(self, weight_format: WeightFormat) -> None:
        """Use this format, and its parameter as `weight`."""
        self.format = weight_format
        self.weight = weight_format.weight


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's rows of one checkpoint tensor.

    Args:
        name: name of the module in the checkpoint.
        total: number of rows of the whole tensor.
        start: first row of this rank.
        size: number of rows of this rank.
        order: the rows of this rank in the order of the layer, if they are not the `size` rows from `start`.
    """

    name: str
    total: int
    start: int
    size: int
    order: np.ndarray | None = None

    @classmethod
    def reordered(cls, name: str, total: int, order: np.ndarray) -> "Shard":
        """Make a shard of these rows of the whole tensor."""
        return cls(name, total=total, start=0, size=len(order), order=order)

    def take(self, loaded: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of the whole tensor."""
        if self.order is not None:
            return select(loaded, self.order)
        return loaded[self.start : self.start + self.size]


def head_rows(heads: range, head_size: int, dims: np.ndarray) -> np.ndarray:
    """Return the rows of the dimensions `dims` of each head, in a tensor with `head_size` rows per head."""
    return (np.array(heads)[:, None] * head_size + dims).ravel()


class ColumnParallelLinear(LinearLayer):
    """y = x W^T + b with the rows of W split: [T, in_features] -> [T, this rank's rows].

    Args:
        in_features: size of the input, whole on every rank.
        shards: shards of the checkpoint tensors that this layer merges, by shard id and in order.
        bias: whether the layer has a bias, which is split like the rows.
        allocate_weight: makes the format of the weight, with its parameters.

    Attributes:
        gated: whether the rows are gate and up of SwiGLU.
        may_be_merged: whether some checkpoints (Phi-3) have one tensor for all shards, with the name of this layer.
        rows: the rows of each shard in the merged weight.
    """

    gated = may_be_merged = False

    def __init__(
        self,
        in_features: int,
        shards: dict[ShardId, Shard],
        bias: bool,
        dtype: torch.dtype | None,
        allocate_weight: AllocateWeight = Plain.allocate,
    ):
        super().__init__()
        self.shards = shards
        self.rows: dict[ShardId, slice] = {}
        rows = 0
        for shard_id, shard in shards.items():
            self.rows[shard_id] = slice(rows, rows + shard.size)
            rows += shard.size
        self.set_format(allocate_weight(rows, in_features, dtype, self.weight_loader))
        self.bias = make_parameter(rows, dtype=dtype, weight_loader=self.weight_loader) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId) -> None:
        shard = self.shards[shard_id]
        check_shape(loaded, (shard.total, *param.shape[1:]))
        param[self.rows[shard_id]].copy_(shard.take(loaded))

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        parent = prefix.rpartition(".")[0]
        total = sum(shard.total for shard in self.shards.values())
        tensors = {}
        for name, param in self.named_parameters():
            start, columns = 0, param.shape[1:]
            for shard_id, shard in self.shards.items():
                merged = None
                if self.may_be_merged:
                    merged = MergedTensor(f"{prefix}.{name}", (total, *columns), slice(start, start + shard.total))
                    start += shard.total
                tensors[f"{parent}.{shard.name}.{name}"] = CheckpointTensor(
                    param, (shard.total, *columns), shard_id=shard_id, rows=self.rows[shard_id], merged=merged
                )
        return tensors

    def forward(self, x: torch.Tensor | Normed | Residual) -> torch.Tensor:
        x, norm = as_normed(x)
        return self.format.linear(x, self.bias, norm=norm, gated=self.gated, counters=get_counters())


class GateUpParallelLinear(ColumnParallelLinear):
    """The gated unit of SwiGLU (arXiv:2002.05202): silu(x G^T) * x U^T. Shard ids are 0 for gate and 1 for up.

    Args:
        hidden_size: size of the input.
        intermediate_size: output size of each projection, which the number of ranks must divide.
    """

    gated = may_be_merged = True

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
        tp = tp or TensorParallel.default()
        size = divide("intermediate_size", intermediate_size, tp)
        start = tp.rank * size
        shards: dict[ShardId, Shard] = {
            0: Shard("gate_proj", total=intermediate_size, start=start, size=size),
            1: Shard("up_proj", total=intermediate_size, start=start, size=size),
        }
        super().__init__(hidden_size, shards, bias, dtype, allocate_weight)


class HeadLayout(NamedTuple):
    """How query and key heads are stored and computed, if not in the usual way.

    Args:
        order: [head_dim], the dimensions of a query or key head in the order in which they are computed.
        has_gate: each query head in the checkpoint has a gate of the output behind it. All gates are computed first.
    """

    order: np.ndarray
    has_gate: bool = False

    def query_rows(self, heads: range, num_heads: int, head_dim: int) -> tuple[int, np.ndarray]:
        """Return the rows of the checkpoint's query projection: how many there are, and those of these `heads`."""
        if not self.has_gate:
            return num_heads * head_dim, head_rows(heads, head_dim, self.order)
        gates = head_rows(heads, 2 * head_dim, head_dim + np.arange(head_dim))
        queries = head_rows(heads, 2 * head_dim, self.order)
        return 2 * num_heads * head_dim, np.concatenate((gates, queries))


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values in one GEMM, split by heads. Shard ids are "q", "k", "v".

    If there are more ranks than KV heads, a KV head is on every rank whose query heads use it.

    Args:
        layout: how the heads are stored and computed, if not in the usual way.

    Attributes:
        num_heads, num_kv_heads: numbers of heads on this rank.
        gate_size: number of outputs, before the queries, that are gates.
    """

    may_be_merged = True

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        bias: bool = False,
        layout: HeadLayout | None = None,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
        allocate_weight: AllocateWeight = Plain.allocate,
    ):
        tp = tp or TensorParallel.default()
        self.num_heads = divide("num_attention_heads", num_heads, tp)
        copies = max(1, tp.size // num_kv_heads)  # ranks that hold the same KV head
        if num_kv_heads * copies % tp.size:
            raise ValueError(
                f"tensor_parallel_size={tp.size} does not fit the model's num_key_value_heads={num_kv_heads}: "
                "one must divide the other"
            )
        self.num_kv_heads = num_kv_heads * copies // tp.size
        self.gate_size = self.num_heads * head_dim if layout is not None and layout.has_gate else 0
        size = self.num_heads * head_dim
        kv_size = self.num_kv_heads * head_dim
        kv_total = num_kv_heads * head_dim
        kv_start = tp.rank // copies * kv_size
        shards: dict[ShardId, Shard] = {
            "q": Shard("q_proj", total=num_heads * head_dim, start=tp.rank * size, size=size),
            "k": Shard("k_proj", total=kv_total, start=kv_start, size=kv_size),
            "v": Shard("v_proj", total=kv_total, start=kv_start, size=kv_size),
        }
        if layout is not None:
            heads = range(tp.rank * self.num_heads, (tp.rank + 1) * self.num_heads)
            kv_heads = range(kv_start // head_dim, (kv_start + kv_size) // head_dim)
            shards["q"] = Shard.reordered("q_proj", *layout.query_rows(heads, num_heads, head_dim))
            shards["k"] = Shard.reordered("k_proj", kv_total, head_rows(kv_heads, head_dim, layout.order))
        super().__init__(hidden_size, shards, bias, dtype, allocate_weight)


class RowParallelLinear(LinearLayer):
    """y = x W^T + b with the columns of W split: [T, this rank's inputs] -> [T, out_features] on every rank.

    Args:
        in_features, out_features: sizes of the whole layer. The number of ranks must divide `in_features`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
        allocate_weight: AllocateWeight = Plain.allocate,
    ):
        super().__init__()
        self.tp = tp or TensorParallel.default()
        self.in_features = in_features
        size = divide("input size of a row-parallel layer", in_features, self.tp)
        self.set_format(allocate_weight(out_features, size, dtype, self.weight_loader))
        self.bias = make_parameter(out_features, dtype=dtype) if bias else None
        self.zero_bias: torch.Tensor
        self.register_buffer("zero_bias", torch.zeros(out_features, dtype=dtype), persistent=False)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
        rows, size = param.shape
        check_shape(loaded, (rows, self.in_features))
        param.copy_(loaded[:, self.tp.rank * size : (self.tp.rank + 1) * size])

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        tensors = {f"{prefix}.weight": CheckpointTensor(self.weight, (len(self.zero_bias), self.in_features))}
        if self.bias is not None:
            tensors[f"{prefix}.bias"] = CheckpointTensor(self.bias, tuple(self.bias.shape))
        return tensors

    def forward(self, x: torch.Tensor) -> "PendingGemm":
        return PendingGemm(self, x)


@dataclass(eq=False)
class PendingGemm:
    """The output of a row-parallel layer whose GEMM has not run yet. Adding it to the residual stream runs it.

    So the GEMM, the all-reduce or the next norm can do the addition.
    """

    layer: RowParallelLinear
    x: torch.Tensor

    def __radd__(self, residual: Residual) -> Residual:
        """Run the GEMM and add it to the residual stream, whose memory may be overwritten."""
        layer, x = self.layer, self.x
        tp, weight, counters = layer.tp, layer.format, get_counters()
        stream = residual.sum()
        bias = layer.bias if tp.rank == 0 else None  # an all-reduce must add it once
        adder = weight.choose_adder(x, stream, tp.size, tp.peers)
        if adder is Adder.ALL_REDUCE_GEMV:
            return Residual(weight.linear_add(x, layer.bias, stream, peers=tp.peers), tp)
        if adder is Adder.NEXT_NORM:
            if bias is None and weight.wants_zero_bias(x):
                bias = layer.zero_bias
            return Residual(weight.linear(x, bias, counters=counters), tp, base=stream, is_partial=True)
        if adder is Adder.SLICED_GEMM and tp.overlapped is not None:
            for tokens in tp.overlapped.slices(stream):
                if tp.rank == 0:
                    weight.linear_add(x[tokens], bias, stream[tokens])
                else:
                    weight.matmul_into(stream[tokens], x[tokens])
            return Residual.from_summand(stream, tp)
        if tp.rank == 0:
            return Residual.from_summand(weight.linear_add(x, bias, stream, counters), tp)
        return Residual.from_summand(weight.linear(x, counters=counters), tp)

    def summand(self) -> torch.Tensor:
        """Run the GEMM without a bias. Return this rank's summand [T, out_features]."""
        return self.layer.format.linear(self.x, counters=get_counters())

    def all_reduce(self, norm: Norm | None = None) -> torch.Tensor:
        """Run the GEMM and the all-reduce. Return the result or its RMSNorm, [T, out_features], on every rank."""
        layer = self.layer
        bias = layer.bias if layer.tp.rank == 0 else None  # the all-reduce must add it once
        return layer.tp.all_reduce(layer.format.linear(self.x, bias, counters=get_counters()), norm)


def divide(name: str, value: int, tp: TensorParallel) -> int:
    """Return `value` divided by the number of ranks. Raise ValueError if that leaves a remainder."""
    if value % tp.size:
        raise ValueError(f"tensor_parallel_size={tp.size} does not divide the model's {name}={value}")
    return value // tp.size
