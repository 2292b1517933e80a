import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.layer import Layer
from nanovllm.layers.linear import QKVParallelLinear
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.weights.parameter import CheckpointTensor, check_shape, make_parameter


class WholeQKNorm(Layer):
    """RMSNorm of all query heads together and of all key heads together (Olmo 2), those of other ranks included.

    The weights are float32, so that only the products with them are rounded, as in transformers.

    Args:
        qkv_proj: computes the queries and keys.
    """

    def __init__(self, qkv_proj: QKVParallelLinear, eps: float, *, tp: TensorParallel):
        super().__init__()
        self.shards = {"q": qkv_proj.shards["q"], "k": qkv_proj.shards["k"]}
        self.eps, self.tp = eps, tp
        options = {"dtype": torch.float32, "weight_loader": self.weight_loader}
        self.q_weight = make_parameter(self.shards["q"].size, **options)
        self.k_weight = make_parameter(self.shards["k"].size, **options)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: str) -> None:
        shard = self.shards[shard_id]
        check_shape(loaded, (shard.total,))
        param.copy_(shard.take(loaded, param))

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        parent = prefix.rpartition(".")[0]
        q_total, k_total = (shard.total for shard in self.shards.values())
        return {
            f"{parent}.q_norm.weight": CheckpointTensor(self.q_weight, (q_total,), shard_id="q", dummy=1.0),
            f"{parent}.k_norm.weight": CheckpointTensor(self.k_weight, (k_total,), shard_id="k", dummy=1.0),
        }

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """Norm queries and keys in qkv [T, (num_heads + 2 num_kv_heads) head_dim], in place. Return qkv."""
        weights = self.q_weight, self.k_weight
        sizes = [len(weight) for weight in weights]
        parts = qkv[:, : sum(sizes)].split(sizes, dim=1)
        if self.tp.size == 1:
            for x, weight in zip(parts, weights, strict=True):
                x.copy_(rms_norm(x, weight, self.eps))
            return qkv
        squares = torch.stack([x.float().square().sum(1) for x in parts], dim=1)
        squares = self.tp.all_reduce(squares).split(1, dim=1)
        for x, weight, total in zip(parts, weights, squares, strict=True):
            # If several ranks hold the same key head, the sum and the count both include it once per rank.
            mean = total / (len(weight) * self.tp.size)
            x.copy_(x.float() * torch.rsqrt(mean + self.eps) * weight)
        return qkv
