"""The one decoder. Its module names are the checkpoints' own, but for merged projections (see loader.py)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GateUpParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Residual
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.registry import ModelConfig
from nanovllm.utils.context import get_context


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, rotary: RotaryEmbedding, dtype: torch.dtype | None, tp: TensorParallel):
        super().__init__()
        heads = (config.head_dim, config.num_heads, config.num_kv_heads)
        self.qkv_proj = QKVParallelLinear(config.hidden_size, *heads, config.qkv_bias, dtype=dtype, tp=tp)
        eps = config.rms_norm_eps if config.qk_norm else None
        self.attn = Attention(
            self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, config.head_dim, rotary, eps, dtype=dtype
        )
        sizes = config.num_heads * config.head_dim, config.hidden_size
        self.o_proj = RowParallelLinear(*sizes, config.o_bias, reduce_results=False, dtype=dtype, tp=tp)

    def forward(
        self, residual: Residual, norm: RMSNorm, positions: torch.Tensor, last: torch.Tensor | None
    ) -> Residual:
        attended = self.attn(self.qkv_proj(residual, norm), positions, last)
        return self.o_proj(attended, residual.x if last is None else residual.x[last])


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype | None, tp: TensorParallel):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = GateUpParallelLinear(hidden, inner, bias, dtype=dtype, tp=tp)
        self.down_proj = RowParallelLinear(inner, hidden, bias, reduce_results=False, dtype=dtype, tp=tp)

    def forward(self, residual: Residual, norm: RMSNorm) -> Residual:
        gated = self.gate_up_proj(residual, norm)
        return self.down_proj(gated, residual.x)


class DecoderLayer(nn.Module):
    """Adds attention and MLP to the residual stream, whose tensors it may overwrite.

    Norms belong to the products after them, residual sums to the ones before: where rows are few they are one kernel,
    sums over the ranks included. Else a norm makes the sums that a product left.
    """

    def __init__(self, config: ModelConfig, rotary: RotaryEmbedding, dtype: torch.dtype | None, tp: TensorParallel):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = SelfAttention(config, rotary, dtype, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype, tp)

    def forward(self, residual: Residual, positions: torch.Tensor, last: torch.Tensor | None = None) -> Residual:
        """That of all tokens, or of `last` [L] of them, once each has left its key and value to the others."""
        residual = self.self_attn(residual, self.input_layernorm, positions, last)
        return self.mlp(residual, self.post_attention_layernorm)


class Decoder(nn.Module):
    """A decoder-only transformer of any family in registry.py, built with uninitialised weights on the default device.

    Args:
        config: its options.
        dtype: of weights and activations; torch's default if None.
        tp: the tensor-parallel group; the process's default one if None.
        max_position: positions that sequences may have; all that the model knows if None.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
        max_position: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.tp = tp = tp or TensorParallel.default()
        max_position = max_position or config.max_position
        rotary = RotaryEmbedding(config.head_dim, max_position, config.rope_theta, config.rope_scaling)
        sizes = config.vocab_size, config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(*sizes, reduce_results=False, dtype=dtype, tp=tp)
        self.layers = nn.ModuleList(DecoderLayer(config, rotary, dtype, tp) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.lm_head = ParallelLMHead(*sizes, dtype=dtype, tp=tp)
        if config.tie_word_embeddings and not config.own_head:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> Residual:
        """input_ids, positions [T] int64 -> the hidden states before the norm.

        They are [L, hidden_size], of the context's `last_indices`: the others' are not wanted, so the last layer ends
        for them when their keys and values are stored. Without `last_indices` they are [T, hidden_size].
        """
        residual = self.embed_tokens(input_ids)
        *layers, last = self.layers
        for layer in layers:
            residual = layer(residual, positions)
        return last(residual, positions, get_context().last_indices)

    @contextmanager
    def few_layers(self) -> Iterator[None]:
        """Forward passes within go through the first and the last layer only; between are more of the first's kind."""
        layers = self.layers
        self.layers = nn.ModuleList(dict.fromkeys((layers[0], layers[-1])))
        try:
            yield
        finally:
            self.layers = layers

    def compute_logits(self, hidden: Residual) -> torch.Tensor:
        """What `forward` gives, or some rows of it -> logits [S, vocab_size] of this rank's share: `tp.rows(L)`."""
        return self.lm_head(hidden, self.norm)
