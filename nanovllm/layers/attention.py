import torch

from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.layers.state import PagedKVSpec, StatefulLayer
from nanovllm.ops.attention.paged_cache import PagedKV
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.utils.context import get_context
from nanovllm.weights.parameter import CheckpointTensor, checkpoint_tensors


class Attention(StatefulLayer):
    """Attention with RoPE over the paged KV cache, through the context's backend.

    qkv [T, (num_heads + 2 num_kv_heads) head_dim] -> [T, num_heads head_dim]. With `last_indices` [R], the index of
    each sequence's last token, all tokens store K and V, but only these attend: the output is [R, num_heads head_dim].

    Args:
        num_heads, num_kv_heads: numbers of heads on this rank.
        rotary: the tables of RoPE, shared by all layers with the same RoPE.
        qk_norm_eps: epsilon of the norm of each query and key head (Qwen3); None for models without such norms.
        zero_centered: whether these norms are; see `RMSNorm`.
        window: how many tokens a query sees; 0 if it sees its whole context. See `PagedKV`.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: RotaryEmbedding,
        qk_norm_eps: float | None = None,
        zero_centered: bool = False,
        window: int = 0,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dtype = dtype or torch.get_default_dtype()
        self.scale = head_dim**-0.5
        self.window = window
        self.rotary = rotary
        self.q_norm = self.k_norm = None
        q_weight = k_weight = None
        if qk_norm_eps is not None:
            options = {"dtype": dtype, "zero_centered": zero_centered, "order": rotary.order}
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, **options)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, **options)
            q_weight = self.q_norm.weight
            k_weight = self.k_norm.weight
        self.transform = QKTransform(
            num_heads, rotary.cos_sin, q_weight, k_weight, qk_norm_eps or 0.0, query_scale=rotary.query_scale
        )
        self.kv: PagedKV | None = None

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        """Declare the norms of the heads, which checkpoints keep one level up."""
        parent = prefix.rpartition(".")[0]
        tensors = {}
        for name, norm in self.named_children():
            tensors |= checkpoint_tensors(norm, f"{parent}.{name}")
        return tensors

    def state_spec(self) -> PagedKVSpec:
        return PagedKVSpec(self.num_kv_heads, self.head_dim, self.dtype, self.window)

    def bind(self, state: PagedKV | None) -> None:
        self.kv = state

    def forward(
        self, qkv: torch.Tensor, positions: torch.Tensor, last_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.kv is None:
            raise RuntimeError("this layer has no KV cache: bind() one first")
        context = get_context()
        attend = context.backend.store_and_attend
        return attend(qkv, self.transform, positions, self.kv, self.scale, context, last_indices).flatten(1)
