"""Gated DeltaNet (arXiv:2412.06464): a layer whose tokens exchange information through a state of a fixed size."""

from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, LazyGemm, RowParallelLinear, Shard, divide
from nanovllm.layers.residual import LazyNorm
from nanovllm.layers.state import SlotStateSpec, StatefulLayer
from nanovllm.ops.gdn.gated_delta_net import gated_delta_net
from nanovllm.ops.gdn.inputs import CONV_WIDTH, GdnInputs, GdnState, GdnWeights
from nanovllm.ops.gdn.plan import PromptPlan, prompt_plan_triton
from nanovllm.utils.context import get_context
from nanovllm.weights.layer_formats import PLAIN_FORMATS, LayerFormats
from nanovllm.weights.parameter import CheckpointTensor, ShardId, checkpoint_tensors, rows_of
from nanovllm.weights.row_order import joined_rows, packed_rows


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """The options of a model's Gated DeltaNet layers.

    Args:
        num_value_heads: a multiple of `num_key_heads`.
        conv_width: taps of the convolution. The kernels have CONV_WIDTH; `ModelConfig` refuses others.
        is_packed: the checkpoint has one projection of q, k, v and z and one of b and a, both ordered by key head.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int = CONV_WIDTH
    is_packed: bool = False

    @property
    def num_channels(self) -> int:
        """Number of queries, keys and values of a token, which the convolution reads."""
        return 2 * self.num_key_heads * self.key_head_dim + self.num_value_heads * self.value_head_dim


class GatedDeltaNet(StatefulLayer):
    """Gated DeltaNet over the state of the slots.

    Every token updates the state. If `last_indices` has indices of tokens, only these go through the output projection.

    Args:
        eps: epsilon of the norm of each value head.
        state_dtype: dtype of the recurrent state. The state of the convolution has the dtype of the activations.
        tp: each rank has a part of the key heads, and the value heads that use them.
        formats: chooses the formats of the weights. Those of b and a are plain.

    Attributes:
        in_proj: computes q, k, v and z, and b and a as well unless `gates_proj` does.
        gates_proj: computes b and a if the format of the others is not plain.
    """

    def __init__(
        self,
        config: GatedDeltaNetConfig,
        hidden_size: int,
        eps: float,
        *,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        tp: TensorParallel | None = None,
        formats: LayerFormats = PLAIN_FORMATS,
    ):
        super().__init__()
        tp = tp or TensorParallel.default()
        num_key_heads = divide("linear_num_key_heads", config.num_key_heads, tp)
        num_heads = divide("linear_num_value_heads", config.num_value_heads, tp)
        key_heads = range(tp.rank * num_key_heads, (tp.rank + 1) * num_key_heads)
        heads = range(tp.rank * num_heads, (tp.rank + 1) * num_heads)
        num_values = num_heads * config.value_head_dim
        keys = (key_heads, config.key_head_dim, config.num_key_heads)
        channels = joined_rows(keys, keys, (heads, config.value_head_dim, config.num_value_heads))

        self.split_sizes = [len(channels), num_values, num_heads, num_heads]  # qkv, z, b and a
        shards = _packed_shards(config, key_heads) if config.is_packed else _shards(config, channels, heads)
        gates: dict[ShardId, Shard] = {name: shards.pop(name) for name in ("b", "a", "ba") if name in shards}
        names = [shard.name for shard in shards.values()]
        self.gates_proj = None
        if formats.are_plain(*names):
            shards |= gates
        else:
            self.gates_proj = ColumnParallelLinear(hidden_size, gates, bias=False, dtype=dtype)
        self.in_proj = ColumnParallelLinear(hidden_size, shards, False, dtype, formats.weight(*names))
        all_values = config.num_value_heads * config.value_head_dim
        self.out_proj = RowParallelLinear(
            all_values, hidden_size, dtype=dtype, tp=tp, allocate_weight=formats.weight("out_proj")
        )
        self.norm = RMSNorm(config.value_head_dim, eps, dtype=dtype)
        conv_shape = (len(channels), CONV_WIDTH)
        whole_conv_shape = (config.num_channels, 1, CONV_WIDTH)
        by_head = {"shape": (num_heads,), "whole": (config.num_value_heads,), "dtype": torch.float32}
        self.targets = {
            "conv1d.weight": rows_of(channels, shape=conv_shape, whole=whole_conv_shape, dtype=dtype),
            "A_log": rows_of(np.array(heads), **by_head)._replace(dummy=0.0),
            "dt_bias": rows_of(np.array(heads), **by_head)._replace(dummy=1.0),
        }
        self.conv_weight, self.a_log, self.dt_bias = (target.param for target in self.targets.values())
        self.weights = GdnWeights(self.conv_weight, self.a_log, self.dt_bias, self.norm.weight, eps)
        self.spec = SlotStateSpec(
            shapes=((num_heads, config.key_head_dim, config.value_head_dim), (CONV_WIDTH, len(channels))),
            dtypes=(state_dtype, dtype or torch.get_default_dtype()),
        )
        self.state: GdnState | None = None

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        tensors = {f"{prefix}.{name}": target for name, target in self.targets.items()}
        for name, child in self.named_children():
            tensors |= checkpoint_tensors(child, f"{prefix}.{name}")
        return tensors

    def state_spec(self) -> SlotStateSpec:
        return self.spec

    def bind(self, state: list[torch.Tensor] | None) -> None:
        self.state = None if state is None else GdnState(*state)

    @staticmethod
    def plan_prompts(cu_seqlens: torch.Tensor, num_tokens: int, max_prompts: int) -> PromptPlan | None:
        return prompt_plan_triton(cu_seqlens, num_tokens, max_prompts) if cu_seqlens.is_cuda else None

    def forward(self, x: LazyNorm, positions: torch.Tensor, last_indices: torch.Tensor | None) -> LazyGemm:
        rows = get_context().state_rows.get(type(self))
        if self.state is None or rows is None:
            raise RuntimeError("this layer has no recurrent state: bind() one first, and give the context state_rows")
        if self.gates_proj is None:
            inputs = GdnInputs(*self.in_proj(x).split(self.split_sizes, dim=1))
        else:
            x = x.computed()  # once for both projections
            qkvz = self.in_proj(x)
            gates = self.gates_proj(x)
            inputs = GdnInputs(*qkvz.split(self.split_sizes[:2], dim=1), *gates.split(self.split_sizes[2:], dim=1))
        out = gated_delta_net(inputs, self.weights, self.state, rows)
        return self.out_proj(out if last_indices is None else out[last_indices])


def _shards(config: GatedDeltaNetConfig, channels: np.ndarray, heads: range) -> dict[ShardId, Shard]:
    """Return the shards of qkv, z, b and a, for these value heads."""
    shards: dict[ShardId, Shard] = {"qkv": Shard.reordered("in_proj_qkv", config.num_channels, channels)}
    for name, size in {"z": config.value_head_dim, "b": 1, "a": 1}.items():
        total = config.num_value_heads * size
        start = heads.start * size
        shards[name] = Shard(f"in_proj_{name}", total=total, start=start, size=len(heads) * size)
    return shards


def _packed_shards(config: GatedDeltaNetConfig, key_heads: range) -> dict[ShardId, Shard]:
    """Return the shards of qkvz and ba, for these key heads and their value heads."""
    group = config.num_value_heads // config.num_key_heads
    key_dim = config.key_head_dim
    values = group * config.value_head_dim
    return {
        name: Shard.reordered(f"in_proj_{name}", config.num_key_heads * sum(sizes), packed_rows(key_heads, sizes))
        for name, sizes in {"qkvz": (key_dim, key_dim, values, values), "ba": (group, group)}.items()
    }
