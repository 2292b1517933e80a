"""Linear layers split over the tensor-parallel ranks.

Column-parallel layers split the output features: no communication. Row-parallel layers split the input features and sum
the partial results. One after the other they need a single all-reduce (Megatron-LM, arXiv:1909.08053).
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.residual import Normed, Residual
from nanovllm.ops.dispatch import Adder
from nanovllm.utils.context import get_counters
from nanovllm.weights.formats import Plain, WeightFormat
from nanovllm.weights.parameter import CheckpointTensor, ShardId, check_shape, make_parameter


class LinearLayer(nn.Module):
    """A layer whose `weight` has a format, which loading changes (see weights/formats.py)."""

    format: WeightFormat
    weight: nn.Parameter


@dataclass(frozen=True)
class Part:
    """This rank's share of one checkpoint tensor."""

    name: str  # of the module in the checkpoint
    total: int  # rows of the whole tensor
    start: int  # first row that this rank holds
    size: int  # rows that it holds


class ColumnParallelLinear(LinearLayer):
    """y = x W^T + b with the rows of W split: [T, in_features] -> [T, this rank's rows].

    Args:
        in_features: size of the input, whole on every rank.
        parts: shares of the checkpoint tensors that are merged here, by shard id and in order.
        bias: whether there is a bias, which is split like the rows.
    """

    gated = False  # whether the rows are gate and up of SwiGLU

    def __init__(self, in_features: int, parts: dict[ShardId, Part], bias: bool, dtype: torch.dtype | None):
        super().__init__()
        self.rows: dict[ShardId, slice] = {}  # of each part
        self.parts, rows = parts, 0
        for shard_id, part in parts.items():
            self.rows[shard_id] = slice(rows, rows + part.size)
            rows += part.size
        self.format = Plain.allocate(rows, in_features, dtype, self.weight_loader)
        self.weight = self.format.weight
        self.bias = make_parameter(rows, dtype=dtype, weight_loader=self.weight_loader) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId) -> None:
        part = self.parts[shard_id]
        check_shape(loaded, (part.total, *param.shape[1:]))
        param[self.rows[shard_id]].copy_(loaded[part.start : part.start + part.size])

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        parent, tensors = prefix.rpartition(".")[0], {}
        for name, param in self.named_parameters():
            for shard_id, part in self.parts.items():
                shape = (part.total, *param.shape[1:])
                where = CheckpointTensor(param, shape, shard_id, self.rows[shard_id])
                tensors[f"{parent}.{part.name}.{name}"] = where
        return tensors

    def forward(self, x: torch.Tensor | Normed) -> torch.Tensor:
        x, norm = x if isinstance(x, Normed) else (x, None)
        return self.format.linear(x, self.bias, norm, self.gated, get_counters())


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
        where = (intermediate_size, tp.rank * size, size)
        parts: dict[ShardId, Part] = {0: Part("gate_proj", *where), 1: Part("up_proj", *where)}
        super().__init__(hidden_size, parts, bias, dtype)


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values in one GEMM, split by heads. Shard ids are "q", "k", "v".

    If there are more ranks than KV heads, every rank whose query heads use a KV head holds it.

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
        kv = (num_kv_heads * head_dim, tp.rank // copies * kv_size, kv_size)
        parts: dict[ShardId, Part] = {
            "q": Part("q_proj", num_heads * head_dim, tp.rank * size, size),
            "k": Part("k_proj", *kv),
            "v": Part("v_proj", *kv),
        }
        super().__init__(hidden_size, parts, bias, dtype)


class RowParallelLinear(LinearLayer):
    """y = x W^T + b with the columns of W split: [T, this rank's inputs] -> [T, out_features] on every rank.

    Args:
        in_features, out_features: sizes of the whole layer; `in_features` must be divisible by the ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        super().__init__()
        self.tp = tp or TensorParallel.default()
        self.in_features = in_features
        size = divide("input size of a row-parallel layer", in_features, self.tp)
        self.format = Plain.allocate(out_features, size, dtype, self.weight_loader)
        self.weight = self.format.weight
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
    """The output of a row-parallel layer before its GEMM ran: it runs when it is added to the residual stream.

    Then the GEMM, the all-reduce or the next norm can do the addition.
    """

    layer: RowParallelLinear
    x: torch.Tensor

    def __radd__(self, residual: Residual) -> Residual:
        """Run the GEMM and add it to the residual stream, whose memory may be overwritten."""
        layer, x, stream = self.layer, self.x, residual.sum()
        tp, weight, counters = layer.tp, layer.format, get_counters()
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
                    torch.mm(x[tokens], layer.weight.t(), out=stream[tokens])
            return Residual.of(stream, tp)
        if tp.rank == 0:
            return Residual.of(weight.linear_add(x, bias, stream, counters), tp)
        return Residual.of(weight.linear(x, counters=counters), tp)

    def all_reduce(self) -> torch.Tensor:
        """Run the GEMM by itself. Return [T, out_features], the same on every rank."""
        layer = self.layer
        return layer.tp.all_reduce(layer.format.linear(self.x, layer.bias if layer.tp.rank == 0 else None))


def divide(name: str, value: int, tp: TensorParallel) -> int:
    """Return a rank's share of `value`; ValueError if the ranks cannot share it evenly."""
    if value % tp.size:
        raise ValueError(f"tensor_parallel_size={tp.size} does not divide the model's {name}={value}")
    return value // tp.size
