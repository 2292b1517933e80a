"""A mixture of experts: a router chooses a few small MLPs, the experts, for each token."""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.arithmetic import ceil_div
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import ColumnParallelLinear, Shard, divide
from nanovllm.layers.mlp import MLP
from nanovllm.layers.residual import Normed, Residual
from nanovllm.ops.moe.experts import Shared, check_expert_sizes, experts, is_expert_gemv
from nanovllm.ops.moe.router import route
from nanovllm.weights.formats import Plain
from nanovllm.weights.parameter import CheckpointTensor, MergedTensor, ShardId, check_shape, make_parameter


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

    def choose(self, x: Normed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the ids and weights of each token's experts, and the shared expert's gate [T, 1] if there is one."""
        logits = self(x)
        gate = logits[:, self.rows["shared"]] if "shared" in self.rows else None
        logits = logits[:, self.rows["experts"]]
        return *route(logits, self.config.experts_per_token, self.config.norm_topk_prob, logits.dtype), gate


def _allocate_aligned(rows: int, columns: int, dtype: torch.dtype | None, weight_loader) -> Plain:
    weight_format = Plain.allocate(ceil_div(rows, 8) * 8, columns, dtype, weight_loader)
    weight_format.weight[rows:].zero_()
    return weight_format


class Experts(nn.Module):
    """The experts' weights: gate_up_proj [E, 2 I / ranks, H] and down_proj [E, H, I / ranks], split by the inner size.

    Checkpoints have three tensors for each expert, or two for all of them.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, dtype: torch.dtype | None, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.intermediate_size = config.intermediate_size
        size = divide("moe_intermediate_size", config.intermediate_size, tp)
        check_expert_sizes(hidden_size, size, dtype)
        self.own = slice(tp.rank * size, (tp.rank + 1) * size)
        gate_up, down = (config.num_experts, 2 * size, hidden_size), (config.num_experts, hidden_size, size)
        self.gate_up_proj = make_parameter(*gate_up, dtype=dtype, weight_loader=self.load_gate_up)
        self.down_proj = make_parameter(*down, dtype=dtype, weight_loader=self.load_down)

    def load_gate_up(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: tuple[int, int]) -> None:
        """Load one expert's gate, `shard_id` (expert, 0), or up, (expert, 1)."""
        check_shape(loaded, (self.intermediate_size, param.shape[2]))
        expert, half = shard_id
        param[expert].chunk(2)[half].copy_(loaded[self.own])

    def load_down(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: int) -> None:
        check_shape(loaded, (param.shape[1], self.intermediate_size))
        param[shard_id].copy_(loaded[:, self.own])

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        num_experts, hidden, size = self.down_proj.shape
        inner = self.intermediate_size
        tensors = {}
        for expert in range(num_experts):
            for half, name in enumerate(("gate_proj", "up_proj")):
                location = expert, slice(half * inner, (half + 1) * inner)
                tensors[f"{prefix}.{expert}.{name}.weight"] = CheckpointTensor(
                    self.gate_up_proj,
                    (inner, hidden),
                    shard_id=(expert, half),
                    rows=(expert, slice(half * size, (half + 1) * size)),
                    merged=MergedTensor(f"{prefix}.gate_up_proj", (num_experts, 2 * inner, hidden), location),
                )
            tensors[f"{prefix}.{expert}.down_proj.weight"] = CheckpointTensor(
                self.down_proj,
                (hidden, inner),
                shard_id=expert,
                rows=(expert,),
                merged=MergedTensor(f"{prefix}.down_proj", (num_experts, hidden, inner), (expert,)),
            )
        return tensors


class SparseMoE(nn.Module):
    """The sum of the chosen experts' outputs, weighted, and of a shared expert that every token has.

    Args:
        config: numbers and sizes of experts. The number of ranks must divide the inner sizes.
        hidden_size: size of the input.
    """

    def __init__(
        self,
        config: MoEConfig,
        hidden_size: int,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        super().__init__()
        tp = tp or TensorParallel.default()
        self.gate = Router(config, hidden_size, dtype)
        self.experts = Experts(config, hidden_size, dtype, tp)
        self.shared_expert = None
        if config.shared_intermediate_size:
            self.shared_expert = MLP(hidden_size, config.shared_intermediate_size, dtype=dtype, tp=tp)

    def forward(self, x: Normed) -> "PendingExperts":
        if not is_expert_gemv(x.x, self.experts.down_proj, self.gate.config.experts_per_token):
            x = x.computed()
        ids, weights, gate = self.gate.choose(x)
        shared = None if self.shared_expert is None else (self.shared_expert(x).summand(), gate)
        return PendingExperts(self.experts, x, ids, weights, shared)


@dataclass(eq=False)
class PendingExperts:
    """The output of a sparse block whose experts have not run yet. Adding it to the residual stream runs them.

    So the kernel that sums the experts of a token also adds the residual.
    """

    layer: Experts
    x: Normed
    ids: torch.Tensor
    weights: torch.Tensor
    shared: Shared | None

    def __radd__(self, residual: Residual) -> Residual:
        """Run the experts and add them to the residual stream, whose memory may be overwritten."""
        layer, (x, norm) = self.layer, self.x
        stream = residual.sum()
        summand = experts(
            x,
            layer.gate_up_proj,
            layer.down_proj,
            self.ids,
            self.weights,
            norm=norm,
            residual=stream if layer.tp.rank == 0 else None,  # the all-reduce must add it once
            shared=self.shared,
        )
        return Residual.from_summand(summand, layer.tp)
