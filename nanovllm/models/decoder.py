"""The decoder of all families. Its module names are those of checkpoints, except for merged projections."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GateUpParallelLinear, PendingGemm, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Normed, Residual
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.registry import ModelConfig
from nanovllm.utils.context import get_context
from nanovllm.weights.parameter import CheckpointTensor, checkpoint_tensors


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, rotary: RotaryEmbedding, dtype: torch.dtype | None, tp: TensorParallel):
        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            bias=config.qkv_bias,
            dtype=dtype,
            tp=tp,
            allocate_weight=config.allocate_weight,
        )
        self.attn = Attention(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_dim=config.head_dim,
            rotary=rotary,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
            dtype=dtype,
        )
        attended_size = config.num_heads * config.head_dim
        self.o_proj = RowParallelLinear(
            attended_size, config.hidden_size, config.o_bias, dtype=dtype, tp=tp, allocate_weight=config.allocate_weight
        )

    def forward(self, x: Normed, positions: torch.Tensor, last: torch.Tensor | None) -> PendingGemm:
        return self.o_proj(self.attn(self.qkv_proj(x), positions, last))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype | None, tp: TensorParallel):
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        bias, allocate = config.mlp_bias, config.allocate_weight
        self.gate_up_proj = GateUpParallelLinear(
            hidden, intermediate, bias, dtype=dtype, tp=tp, allocate_weight=allocate
        )
        self.down_proj = RowParallelLinear(intermediate, hidden, bias, dtype=dtype, tp=tp, allocate_weight=allocate)

    def forward(self, x: Normed) -> PendingGemm:
        return self.down_proj(self.gate_up_proj(x))


class DecoderLayer(nn.Module):
    """A layer that adds attention and MLP to the residual stream, whose memory it may overwrite.

    Norms and row-parallel GEMMs are lazy values (see layers/residual.py and layers/linear.py), so that kernels can fuse
    them where that is faster.
    """

    def __init__(self, config: ModelConfig, rotary: RotaryEmbedding, dtype: torch.dtype | None, tp: TensorParallel):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = SelfAttention(config, rotary, dtype, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype, tp)

    def forward(self, residual: Residual, positions: torch.Tensor, last: torch.Tensor | None = None) -> Residual:
        """Return the residual stream of all tokens, or only of the tokens at the indices `last` [L].

        The other tokens still store their keys and values.
        """
        attended = self.self_attn(self.input_layernorm(residual), positions, last)
        residual = (residual if last is None else residual[last]) + attended
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Decoder(nn.Module):
    """A decoder-only transformer of any family in registry.py, with uninitialised weights on the default device.

    Args:
        config: the model's options.
        dtype: dtype of weights and activations; torch's default if None.
        tp: the tensor-parallel group; the process's default one if None.
        max_position: number of positions that sequences may have; `config.max_position` if None.
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
        tp = tp or TensorParallel.default()
        self.tp = tp
        max_position = max_position or config.max_position
        rotary = RotaryEmbedding(config.head_dim, max_position, config.rope_theta, config.rope_scaling)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, dtype=dtype, tp=tp)
        self.layers = nn.ModuleList(DecoderLayer(config, rotary, dtype, tp) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, dtype=dtype, tp=tp)
        if config.tie_word_embeddings and not config.separate_head:
            self.lm_head.tie(self.embed_tokens)
        self.checkpoint_tensors()  # raises ValueError if the blocks of a weight format do not fit the ranks' shards

    def checkpoint_tensors(self) -> dict[str, CheckpointTensor]:
        """Return the target of every tensor that a checkpoint must have, by its name."""
        tensors = {}
        for name, child in self.named_children():
            tensors |= checkpoint_tensors(child, name if name == "lm_head" else f"model.{name}")
        return tensors

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> Residual:
        """Return the hidden states before the final norm: input_ids, positions [T] int64 -> [L, hidden_size].

        The L tokens are those of the context's `last_indices`, or all T tokens if that is None. The last layer skips
        unused work: it stores K and V for every token, but computes attention and MLP only for those L.
        """
        residual = self.embed_tokens.residual(input_ids)
        *layers, last_layer = self.layers
        for layer in layers:
            residual = layer(residual, positions)
        return last_layer(residual, positions, get_context().last_indices)

    @contextmanager
    def few_layers(self) -> Iterator[None]:
        """Let the decoder have few layers within the body: the first one of each kind, and the last one.

        The other layers use no other kernels. Layers are of one kind if their children have the same classes.
        """
        layers = self.layers
        kinds = {tuple(map(type, layer.children())): layer for layer in reversed(layers)}
        self.layers = nn.ModuleList(dict.fromkeys([*kinds.values(), layers[-1]]))
        try:
            yield
        finally:
            self.layers = layers

    def compute_logits(self, hidden: Residual) -> torch.Tensor:
        """Return the logits [S, vocab_size] of this rank's slice `tp.rows(L)` of the hidden states [L, hidden_size]."""
        return self.lm_head(self.norm(hidden))
