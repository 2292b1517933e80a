"""A mixture of experts: a router chooses a few small MLPs, the experts, for each token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.arithmetic import ceil_div
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.layer import Layer
from nanovllm.layers.linear import ColumnParallelLinear, Shard, divide
from nanovllm.layers.mlp import MLP
from nanovllm.layers.residual import LazyNorm, Residual
from nanovllm.ops.moe.experts import Shared
from nanovllm.ops.moe.router import route
from nanovllm.weights.formats import ExpertSizes, Plain
from nanovllm.weights.layer_formats import PLAIN_FORMATS, LayerFormats
from nanovllm.weights.parameter import (
    CheckpointTensor,
    MergedTensor,
    ShardId,
    block_of,
    blocks_covering,
    check_shape,
    column_shard,
    row_block_of,
    splits_block,
)


@dataclass(frozen=True)
class MoEConfig:
    """The options of a decoder's mixtures of experts.

    Args:
        num_experts, experts_per_token: numbers of experts, and of those that the router chooses for a token.
        intermediate_size: inner size of an expert.
        norm_topk_prob: divide the weights of a token's experts by their sum.
        shared_intermediate_size: inner size of the expert that every token has; 0 if no such expert exists.
        dense_layers: indices of the layers with a plain MLP instead of experts.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    norm_topk_prob: bool
    shared_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()


class Router(ColumnParallelLinear):
    """Chooses the experts of each token. The gate of a shared expert is one more row of its weight.

    Every rank has the whole weight, in a multiple of 8 rows, so that the logits of each token are aligned.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, dtype: torch.dtype | None):
        num_experts = config.num_experts
        shards: dict[ShardId, Shard] = {"experts": Shard("gate", total=num_experts, start=0, size=num_experts)}
        if config.shared_intermediate_size:
            shards["shared"] = Shard("shared_expert_gate", total=1, start=0, size=1)
        super().__init__(hidden_size, shards, bias=False, dtype=dtype, allocate_weight=_allocate_aligned)
        self.config = config

    def choose(self, x: LazyNorm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Choose the experts of x [T, H]. The weights are rounded to the dtype of the logits, as in transformers.

        Returns:
            Ids [T, top_k] int32 and weights [T, top_k] of each token's experts; the shared expert's gate [T, 1] before
            the sigmoid, or None.
        """
        logits = self(x)
        gate = logits[:, self.rows["shared"]] if "shared" in self.rows else None
        logits = logits[:, self.rows["experts"]]
        return *route(logits, self.config.experts_per_token, self.config.norm_topk_prob, logits.dtype), gate


def _allocate_aligned(rows: int, columns: int, **options: Any) -> Plain:
    """Make the weight with a multiple of 8 rows, the last ones zeros; see AllocateWeight."""
    weight_format = Plain.allocate(ceil_div(rows, 8) * 8, columns, **options)
    weight_format.weight[rows:].zero_()
    return weight_format


class Experts(Layer):
    """The experts' weights: gate_up_proj [E, 2 I / ranks, H] and down_proj [E, H, I / ranks] for an inner size of I.

    Checkpoints have three tensors for each expert, or two for all of them. A format may add scales of each.
    """

    def __init__(
        self,
        config: MoEConfig,
        hidden_size: int,
        dtype: torch.dtype | None,
        tp: TensorParallel,
        formats: LayerFormats,
    ):
        super().__init__()
        self.tp = tp
        self.num_experts = config.num_experts
        self.inner_size = config.intermediate_size
        size = divide("moe_intermediate_size", self.inner_size, tp)
        self.rank_inner_size = size  # I / ranks
        self.columns = slice(tp.rank * size, (tp.rank + 1) * size)  # the down projection's
        # The gates of an expert; its ups have the same rows.
        self.shard = Shard("gate_proj", total=self.inner_size, start=tp.rank * size, size=size)
        sizes = ExpertSizes(self.num_experts, hidden_size, size, self.shard.row_alignment(offset=size))
        allocate = formats.experts()
        self.format = allocate(sizes, dtype=dtype, load_gate_up=self.load_gate_up, load_down=self.load_down)
        for suffix, (gate_up, down) in self.format.parameters.items():
            self.register_parameter(f"gate_up_proj{suffix}", gate_up)
            self.register_parameter(f"down_proj{suffix}", down)

    def load_gate_up(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: tuple[int, int]) -> None:
        """Load one expert's gate, `shard_id` (expert, 0), or up, (expert, 1)."""
        check_shape(loaded, self._gate_shape(param))
        expert, half = shard_id
        param[expert].chunk(2)[half].copy_(self.shard.take(loaded, param))

    def load_down(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: int) -> None:
        shape, columns = column_shard(param, self.columns, self.inner_size)
        check_shape(loaded, shape)
        param[shard_id].copy_(loaded[:, columns])

    def _gate_shape(self, gate_up: nn.Parameter) -> tuple[int, int]:
        """Return the shape of the tensor of one expert's gate, or of its up."""
        return ceil_div(self.inner_size, block_of(gate_up)[0]), gate_up.shape[2]

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        tensors = {}
        for suffix, (gate_up, down) in self.format.parameters.items():
            for expert in range(self.num_experts):
                for half, name in enumerate(("gate_proj", "up_proj")):
                    tensors[f"{prefix}.{expert}.{name}.weight{suffix}"] = self._gate_tensor(
                        gate_up, f"{prefix}.gate_up_proj{suffix}", expert, half
                    )
                tensors[f"{prefix}.{expert}.down_proj.weight{suffix}"] = self._down_tensor(
                    down, f"{prefix}.down_proj{suffix}", expert
                )
        return tensors

    def _gate_tensor(self, gate_up: nn.Parameter, merged: str, expert: int, half: int) -> CheckpointTensor:
        """Return the target of one expert's gate or up, which is a part of the tensor `merged` in some checkpoints."""
        rows, columns = self._gate_shape(gate_up)
        size = self.rank_inner_size // row_block_of(gate_up)
        block = block_of(gate_up)[0]
        total = 2 * self.inner_size
        part = None
        half_rows = slice(half * self.inner_size, (half + 1) * self.inner_size)
        # Otherwise a block of the merged tensor has rows of gate and of up.
        if not splits_block(half_rows, total, block):
            location = expert, blocks_covering(half_rows, total, block)
            part = MergedTensor(merged, (self.num_experts, ceil_div(total, block), columns), location)
        target = expert, slice(half * size, (half + 1) * size)
        return CheckpointTensor(gate_up, (rows, columns), shard_id=(expert, half), target_index=target, merged=part)

    def _down_tensor(self, down: nn.Parameter, merged: str, expert: int) -> CheckpointTensor:
        """Return the target of one expert's down projection."""
        shape, _ = column_shard(down, self.columns, self.inner_size)
        part = MergedTensor(merged, (self.num_experts, *shape), (expert,))
        return CheckpointTensor(down, shape, shard_id=expert, target_index=(expert,), merged=part)


class SparseMoE(Layer):
    """The sum of the chosen experts' outputs, weighted, and of a shared expert that every token has.

    Args:
        config: numbers and sizes of experts. The number of ranks must divide the inner sizes.
        hidden_size: size of the input.
        formats: chooses the formats of the weights.
    """

    def __init__(
        self,
        config: MoEConfig,
        hidden_size: int,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
        formats: LayerFormats = PLAIN_FORMATS,
    ):
        super().__init__()
        tp = tp or TensorParallel.default()
        self.gate = Router(config, hidden_size, dtype)
        self.experts = Experts(config, hidden_size, dtype, tp, formats.child("experts"))
        self.shared_expert = None
        if config.shared_intermediate_size:
            options = {"dtype": dtype, "tp": tp, "formats": formats.child("shared_expert")}
            self.shared_expert = MLP(hidden_size, config.shared_intermediate_size, **options)

    def forward(self, x: LazyNorm) -> "LazyExperts":
        if not self.experts.format.fuses_norm(x.x, self.gate.config.experts_per_token):
            x = x.computed()
        ids, weights, gate = self.gate.choose(x)
        # The shared expert runs now: the kernel that sums the experts of a token reads its output.
        shared = None if self.shared_expert is None else (self.shared_expert(x).partial_sum(), gate)
        return LazyExperts(self.experts, x, ids, weights, shared)

    def compile_sizes(self, max_tokens: int) -> list[int]:
        """Return the numbers of tokens, up to `max_tokens`, at which the experts' kernels or tiles change."""
        return self.experts.format.compile_sizes(self.gate.config.experts_per_token, max_tokens)


@dataclass(eq=False)
class LazyExperts:
    """The output of a sparse block whose experts have not run yet. Adding it to the residual stream runs them.

    So the kernel that sums the experts of a token also adds the residual.

    Args:
        layer: the experts.
        x: the lazy norm of [T, H].
        ids, weights: [T, top_k], those of each token's experts.
        shared: output of the shared expert and its gate.
    """

    layer: Experts
    x: LazyNorm
    ids: torch.Tensor
    weights: torch.Tensor
    shared: Shared | None

    def add_to(self, residual: Residual) -> Residual:
        """Run the experts and add them to the residual stream, whose memory may be overwritten."""
        layer, (x, norm) = self.layer, self.x
        stream = residual.complete()
        partial_sum = layer.format.run(
            x,
            self.ids,
            self.weights,
            norm=norm,
            residual=stream if layer.tp.rank == 0 else None,  # the all-reduce must add it once
            shared=self.shared,
        )
        return Residual.from_partial_sum(partial_sum, layer.tp)
