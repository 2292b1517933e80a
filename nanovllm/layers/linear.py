"""Linear layers split over the tensor-parallel ranks.

Column-parallel layers split the output features and need no communication. Row-parallel layers split the input features
and all-reduce the partial results. A pair of them needs a single all-reduce (Megatron-LM, arXiv:1909.08053).
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn

from nanovllm.arithmetic import ceil_div
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.layer import Layer
from nanovllm.layers.residual import LazyNorm, Norm, Residual, as_lazy_norm
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.fp8.quantize import LazySwiglu
from nanovllm.utils.context import get_counters
from nanovllm.weights.formats import AllocateWeight, Plain, WeightFormat
from nanovllm.weights.parameter import (
    CheckpointTensor,
    MergedTensor,
    ShardId,
    block_of,
    blocks_covering,
    check_shape,
    column_shard,
    make_parameter,
    row_block_of,
    select,
    splits_block,
)
from nanovllm.weights.row_order import HeadLayout, head_rows


class LinearLayer(Layer):
    """A layer whose weight has a format: loading may change it, and it owns the matmul (see weights/formats.py)."""

    format: WeightFormat

    def set_format(self, weight_format: WeightFormat) -> None:
        """Use this format, and register its parameters under their names in checkpoints."""
        self.format = weight_format
        for name, param in weight_format.parameters.items():
            self.register_parameter(name, param)


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

    def take(self, loaded: torch.Tensor, param: nn.Parameter) -> torch.Tensor:
        """Return this rank's rows of the checkpoint tensor that `param` loads.

        They are rows of the weight, or the rows of scales or zero points that cover them.
        """
        block = block_of(param)[0]
        if self.order is None and block == 1:
            return loaded[self.start : self.start + self.size]
        rows = np.arange(self.start, self.start + self.size) if self.order is None else self.order
        return select(loaded, rows[:: row_block_of(param)] // block)

    def row_alignment(self, offset: int) -> int:
        """Return the largest block height that this shard does not split. 0 stands for any height.

        It is the gcd of the shard's first row in the checkpoint's tensor and of `offset`, its first row in the layer's
        weight. A shard of the checkpoint's rows 128 to 255 at row 64 of the layer gives 64: blocks of 64 rows, or of
        32, are whole in both. If `order` jumps, the same goes for each run of consecutive rows.
        """
        if self.order is None:
            return math.gcd(self.start, offset)
        is_start = np.diff(self.order, prepend=self.order[0]) != 1  # the first row also starts a run
        starts = np.flatnonzero(is_start)
        return int(np.gcd.reduce(np.concatenate((starts + offset, self.order[starts]))))


class ColumnParallelLinear(LinearLayer):
    """y = x W^T + b with the rows of W split: [T, in_features] -> [T, this rank's rows].

    Args:
        in_features: size of the input, whole on every rank.
        shards: shards of the checkpoint tensors that this layer merges, by shard id and in order.
        bias: whether the layer has a bias, which is split like the rows.
        allocate_weight: makes the format of the weight, with its parameters.

    Attributes:
        may_be_merged: whether some checkpoints (Phi-3) have one tensor for all shards, with the name of this layer.
        rows: the rows of each shard in the merged weight.
    """

    may_be_merged = False

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
        num_rows = 0
        alignment = 0
        for shard_id, shard in shards.items():
            self.rows[shard_id] = slice(num_rows, num_rows + shard.size)
            alignment = math.gcd(alignment, shard.row_alignment(num_rows))
            num_rows += shard.size
        options = {"weight_loader": self.weight_loader, "row_alignment": alignment}
        self.set_format(allocate_weight(num_rows, in_features, dtype=dtype, **options))
        self.bias = make_parameter(num_rows, dtype=dtype, weight_loader=self.weight_loader) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId) -> None:
        target = self._target(param, shard_id)
        check_shape(loaded, target.shape)
        target.destination.copy_(self.shards[shard_id].take(loaded, param))

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        parent = prefix.rpartition(".")[0]
        tensors = {}
        for name, param in self.named_parameters():
            merged = self._merged(f"{prefix}.{name}", param)
            for shard_id, shard in self.shards.items():
                target = self._target(param, shard_id)
                tensors[f"{parent}.{shard.name}.{name}"] = target._replace(merged=merged.get(shard_id))
        return tensors

    def _merged(self, name: str, param: nn.Parameter) -> dict[ShardId, MergedTensor]:
        """Return the parts of the tensor `name`, which some checkpoints have in place of one for each shard."""
        if not self.may_be_merged:
            return {}
        block = block_of(param)[0]
        totals = [shard.total for shard in self.shards.values()]
        stops = list(accumulate(totals))
        parts = [slice(stop - total, stop) for stop, total in zip(stops, totals, strict=True)]
        if any(splits_block(part, stops[-1], block) for part in parts):
            return {}
        shape = (ceil_div(stops[-1], block), *param.shape[1:])
        return {
            shard_id: MergedTensor(name, shape, blocks_covering(part, stops[-1], block))
            for shard_id, part in zip(self.shards, parts, strict=True)
        }

    def _target(self, param: nn.Parameter, shard_id: ShardId) -> CheckpointTensor:
        """Return the tensor that fills a shard of `param`."""
        rows = self.rows[shard_id]
        step = row_block_of(param)
        shape = (ceil_div(self.shards[shard_id].total, block_of(param)[0]), *param.shape[1:])
        target_index = slice(rows.start // step, ceil_div(rows.stop, step))
        return CheckpointTensor(param, shape, shard_id, target_index)

    def forward(self, x: torch.Tensor | LazyNorm | Residual) -> torch.Tensor:
        x, norm = as_lazy_norm(x)
        return self.format.linear(x, self.bias, norm=norm, counters=get_counters())


class GateUpParallelLinear(ColumnParallelLinear):
    """The gated unit of SwiGLU (arXiv:2002.05202): silu(x G^T) * x U^T. Shard ids are 0 for gate and 1 for up.

    [T, hidden_size] -> [T, intermediate_size / ranks].

    Args:
        hidden_size: size of the input.
        intermediate_size: output size of each projection, which the number of ranks must divide.
    """

    may_be_merged = True

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

    def forward(self, x: torch.Tensor | LazyNorm | Residual) -> Any:
        """Return SwiGLU of x for a RowParallelLinear: a tensor, or a `LazySwiglu`."""
        x, norm = as_lazy_norm(x)
        return self.format.gate_up(x, self.bias, norm=norm, counters=get_counters())


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values in one GEMM, split by heads. Shard ids are "q", "k", "v".

    [T, hidden_size] -> [T, gate_size + (num_heads + 2 num_kv_heads) head_dim]: gates, queries, keys, values.

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
        query_rows = self.num_heads * head_dim
        kv_rows = self.num_kv_heads * head_dim
        self.gate_size = query_rows if layout is not None and layout.has_gate else 0
        total_kv_rows = num_kv_heads * head_dim
        first_kv_head = tp.rank // copies * self.num_kv_heads
        first_kv_row = first_kv_head * head_dim
        shards: dict[ShardId, Shard] = {
            "q": Shard("q_proj", total=num_heads * head_dim, start=tp.rank * query_rows, size=query_rows),
            "k": Shard("k_proj", total=total_kv_rows, start=first_kv_row, size=kv_rows),
            "v": Shard("v_proj", total=total_kv_rows, start=first_kv_row, size=kv_rows),
        }
        if layout is not None:
            heads = range(tp.rank * self.num_heads, (tp.rank + 1) * self.num_heads)
            kv_heads = range(first_kv_head, first_kv_head + self.num_kv_heads)
            shards["q"] = Shard.reordered("q_proj", *layout.query_rows(heads, num_heads, head_dim))
            shards["k"] = Shard.reordered("k_proj", total_kv_rows, head_rows(kv_heads, head_dim, layout.order))
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
        self.columns = slice(self.tp.rank * size, (self.tp.rank + 1) * size)
        options = {"weight_loader": self.weight_loader, "row_alignment": 0}
        self.set_format(allocate_weight(out_features, size, dtype=dtype, **options))
        self.bias = make_parameter(out_features, dtype=dtype) if bias else None
        # For `_add_in_next_norm`: torch computes some GEMMs faster with a bias (ops/linear/linear.py:wants_zero_bias).
        self.zero_bias: torch.Tensor
        self.register_buffer("zero_bias", torch.zeros(out_features, dtype=dtype), persistent=False)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
        shape, columns = column_shard(param, self.columns, self.in_features)
        check_shape(loaded, shape)
        param.copy_(loaded[:, columns])

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        tensors = {}
        for name, param in self.format.parameters.items():
            shape, _ = column_shard(param, self.columns, self.in_features)
            tensors[f"{prefix}.{name}"] = CheckpointTensor(param, shape)
        if self.bias is not None:
            tensors[f"{prefix}.bias"] = CheckpointTensor(self.bias, tuple(self.bias.shape))
        return tensors

    def forward(self, x: torch.Tensor | LazySwiglu) -> "LazyGemm":
        return LazyGemm(self, self.format.prepare(x))


@dataclass(eq=False)
class LazyGemm:
    """The output of a row-parallel layer whose GEMM has not run yet. Adding it to the residual stream runs it.

    So the GEMM, the all-reduce or the next norm can do the addition. x is what the layer's format made of the input.
    """

    layer: RowParallelLinear
    x: Any

    def add_to(self, residual: Residual) -> Residual:
        """Run the GEMM and add it to the residual stream, whose memory may be overwritten."""
        stream = residual.complete()
        tp = self.layer.tp
        match self.layer.format.choose_adder(self.x, stream, tp.size, tp.peers):
            case Adder.LINEAR:
                return self._add_in_linear(stream)
            case Adder.NEXT_NORM:
                return self._add_in_next_norm(stream)
            case Adder.ALL_REDUCE_GEMV:
                return self._add_in_all_reduce(stream)
            case Adder.SLICED_GEMM:
                return self._add_in_slices(stream)

    def _add_in_linear(self, stream: torch.Tensor) -> Residual:
        """Let the GEMM's kernel add, on rank 0 only. With several ranks, the next norm all-reduces."""
        layer = self.layer
        fmt = self.layer.format
        counters = get_counters()
        if layer.tp.rank == 0:
            partial_sum = fmt.linear_add(self.x, layer.bias, stream, counters)
        else:
            partial_sum = fmt.linear(self.x, counters=counters)
        return Residual.from_partial_sum(partial_sum, layer.tp)

    def _add_in_next_norm(self, stream: torch.Tensor) -> Residual:
        """Run the GEMM only. The next norm adds, and all-reduces with several ranks."""
        layer = self.layer
        fmt = self.layer.format
        bias = self._rank_bias
        if bias is None and fmt.wants_zero_bias(self.x):
            bias = layer.zero_bias
        partial_sum = fmt.linear(self.x, bias, counters=get_counters())
        return Residual(partial_sum, layer.tp, base=stream, is_pending=True)

    def _add_in_all_reduce(self, stream: torch.Tensor) -> Residual:
        """Let one kernel do the GEMM, the all-reduce and the addition. Every rank adds the bias to the result."""
        layer = self.layer
        return Residual(layer.format.linear_add(self.x, layer.bias, stream, peers=layer.tp.peers), layer.tp)

    def _add_in_slices(self, stream: torch.Tensor) -> Residual:
        """Overwrite slices of the stream with partial sums. Send each while the next one is computed. Rank 0 adds."""
        layer = self.layer
        fmt = self.layer.format
        overlapped = layer.tp.overlapped
        assert overlapped is not None  # choose_adder has checked this
        for tokens in overlapped.slices(stream):
            if layer.tp.rank == 0:
                fmt.linear_add(self.x[tokens], layer.bias, stream[tokens])
            else:
                fmt.matmul_into(stream[tokens], self.x[tokens])
        return Residual.from_partial_sum(stream, layer.tp)

    @property
    def _rank_bias(self) -> torch.Tensor | None:
        """The bias on rank 0, None on the others: the sum over the ranks must contain it once."""
        return self.layer.bias if self.layer.tp.rank == 0 else None

    def partial_sum(self) -> torch.Tensor:
        """Run the GEMM. Return this rank's partial sum [T, out_features]."""
        return self.layer.format.linear(self.x, self._rank_bias, counters=get_counters())

    def all_reduce(self, norm: Norm | None = None) -> torch.Tensor:
        """Run the GEMM and the all-reduce. Return the result or its RMSNorm, [T, out_features], on every rank."""
        return self.layer.tp.all_reduce(self.partial_sum(), norm)


def divide(name: str, value: int, tp: TensorParallel) -> int:
    """Return `value` divided by the number of ranks. Raise ValueError if that leaves a remainder."""
    if value % tp.size:
        raise ValueError(f"tensor_parallel_size={tp.size} does not divide the model's {name}={value}")
    return value // tp.size
