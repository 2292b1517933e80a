import torch
from torch import nn

from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.ops.norm_rope.rope_store import QKTransform
from nanovllm.utils.context import get_context
from nanovllm.weights.parameter import CheckpointTensor, checkpoint_tensors


class Attention(nn.Module):
    """Rotates queries and keys, writes keys and values to the paged cache, and attends through the context's backend.

    qkv [T, (num_heads + 2 num_kv_heads) head_dim] -> [T, num_heads head_dim]; or [R, num_heads head_dim], of the tokens
    `last` alone, which are the last ones of the rows.

    Args:
        num_heads, num_kv_heads: this rank's.
        rotary: the table of angles, shared by all layers.
        qk_norm_eps: epsilon of the norm of each query and key head (Qwen3); None for models that have none.

    Attributes:
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], set by the runner.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: RotaryEmbedding,
        qk_norm_eps: float | None = None,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5
        self.rotary = rotary
        self.eps = qk_norm_eps or 0.0
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, dtype=dtype)
        self.k_cache = self.v_cache = torch.empty(0)

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        """Checkpoints keep the norms of the heads one level up."""
        parent, tensors = prefix.rpartition(".")[0], {}
        for name, norm in self.named_children():
            tensors |= checkpoint_tensors(norm, f"{parent}.{name}")
        return tensors

    def forward(self, qkv: torch.Tensor, positions: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        norms = (self.q_norm.weight, self.k_norm.weight) if self.q_norm else (None, None)
        transform = QKTransform(self.num_heads, self.rotary.cos_sin, *norms, self.eps)
        context = get_context()
        attend = context.backend.store_and_attend
        return attend(qkv, transform, positions, self.k_cache, self.v_cache, self.scale, context, last).flatten(1)
