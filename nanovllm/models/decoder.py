"""The decoder of all families. Its module names are those of checkpoints, except for merged projections."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.gated_delta_net import GatedDeltaNet
from nanovllm.layers.layer import Layer
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import LazyGemm, LinearLayer, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.mlp import MLP
from nanovllm.layers.moe import Router, SparseMoE
from nanovllm.layers.residual import LazyNorm, Residual
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.layers.whole_qk_norm import WholeQKNorm
from nanovllm.models.model_config import ModelConfig
from nanovllm.ops.dispatch import compile_sizes
from nanovllm.ops.linear.sigmoid_mul import sigmoid_mul
from nanovllm.utils.context import get_context
from nanovllm.weights.int4_int8 import is_supported, with_compression
from nanovllm.weights.parameter import CheckpointTensor, checkpoint_tensors
from nanovllm.weights.row_order import HeadLayout


class SelfAttention(Layer):
    """Projections, attention and output projection.

    x [T, hidden_size] -> lazy [T, hidden_size], or [L, hidden_size] of the tokens `last_indices`.
    """

    def __init__(
        self, config: ModelConfig, index: int, rotary: RotaryEmbedding, dtype: torch.dtype | None, tp: TensorParallel
    ):
        super().__init__()
        formats = config.formats(index, "self_attn")
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            bias=config.qkv_bias,
            layout=_head_layout(config, rotary),
            dtype=dtype,
            tp=tp,
            allocate_weight=formats.weight("q_proj", "k_proj", "v_proj", "qkv_proj"),
        )
        self.attn = Attention(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_dim=config.head_dim,
            rotary=rotary,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
            zero_centered=config.zero_centered_norms,
            window=config.window(index, rotary.max_position),
            dtype=dtype,
        )
        self.whole_qk_norm = None
        if config.whole_qk_norm:
            self.whole_qk_norm = WholeQKNorm(self.qkv_proj, config.rms_norm_eps, tp=tp)
        attended_size = config.num_heads * config.head_dim
        self.o_proj = RowParallelLinear(
            attended_size,
            config.hidden_size,
            config.o_bias,
            dtype=dtype,
            tp=tp,
            allocate_weight=formats.weight("o_proj"),
        )

    def forward(self, x: LazyNorm | Residual, positions: torch.Tensor, last_indices: torch.Tensor | None) -> LazyGemm:
        projected = self.qkv_proj(x)
        gate_size = self.qkv_proj.gate_size  # 0 for most models
        # Gates come before queries, keys and values, so that attention gets these three as one slice.
        qkv = projected[:, gate_size:]
        if self.whole_qk_norm is not None:
            self.whole_qk_norm(qkv)
        attended = self.attn(qkv, positions, last_indices)
        if gate_size:
            gate = projected[:, :gate_size]
            attended = sigmoid_mul(attended, gate if last_indices is None else gate[last_indices])
        return self.o_proj(attended)


def _head_layout(config: ModelConfig, rotary: RotaryEmbedding) -> HeadLayout | None:
    """Return how query and key heads differ from the usual ones; None if they do not."""
    if rotary.order is None and not config.attention_gate:
        return None
    order = np.arange(config.head_dim) if rotary.order is None else rotary.order
    return HeadLayout(order, config.attention_gate)


class DecoderLayer(Layer):
    """A mixer (attention or Gated DeltaNet) and an MLP, each after a norm and added to the residual stream.

    It may overwrite the memory of the stream that it gets. Norms and row-parallel GEMMs are lazy values (see
    layers/residual.py and layers/linear.py), so that kernels can fuse them where that is faster.

    Args:
        index: the layer's index, which determines its kind.
        state_dtype: dtype of recurrent state.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        rotary: RotaryEmbedding,
        dtype: torch.dtype | None,
        tp: TensorParallel,
        state_dtype: torch.dtype,
    ):
        super().__init__()
        self.layer_type = config.layer_type(index)
        self.input_layernorm = _norm(config, dtype)
        self.post_attention_layernorm = _norm(config, dtype)
        # The mixer has different names in checkpoints.
        if self.layer_type == "gated_delta_net":
            self.mixer_name = "linear_attn"
            assert config.gated_delta_net is not None  # ModelConfig has checked it
            self.linear_attn = GatedDeltaNet(
                config.gated_delta_net,
                config.hidden_size,
                config.rms_norm_eps,
                dtype=dtype,
                state_dtype=state_dtype,
                tp=tp,
                formats=config.formats(index, "linear_attn"),
            )
        else:
            self.mixer_name = "self_attn"
            self.self_attn = SelfAttention(config, index, rotary, dtype, tp)
        if config.moe is not None and index not in config.moe.dense_layers:
            formats = config.formats(index, "mlp")
            self.mlp = SparseMoE(config.moe, config.hidden_size, dtype=dtype, tp=tp, formats=formats)
        else:
            self.mlp = _mlp(config, index, dtype, tp)

    def forward(
        self, residual: Residual, positions: torch.Tensor, last_indices: torch.Tensor | None = None
    ) -> Residual:
        """Return the residual stream of all tokens, or only of the tokens at the indices `last_indices` [L].

        The other tokens still store their keys and values, or update the recurrent state.
        """
        mixer = getattr(self, self.mixer_name)
        mixed = mixer(self.input_layernorm(residual), positions, last_indices)
        if last_indices is not None:
            residual = residual[last_indices]
        residual = residual.add(mixed)
        return residual.add(self.mlp(self.post_attention_layernorm(residual)))


class PostNormLayer(Layer):
    """A layer that norms the outputs of attention and MLP, in place of their inputs (Olmo 2).

    It has no recurrent state.

    Args:
        index: the layer's index.
    """

    def __init__(
        self, config: ModelConfig, index: int, rotary: RotaryEmbedding, dtype: torch.dtype | None, tp: TensorParallel
    ):
        super().__init__()
        self.layer_type = config.layer_type(index)
        self.post_attention_layernorm = _norm(config, dtype)
        self.post_feedforward_layernorm = _norm(config, dtype)
        self.self_attn = SelfAttention(config, index, rotary, dtype, tp)
        self.mlp = _mlp(config, index, dtype, tp)

    def forward(
        self, residual: Residual, positions: torch.Tensor, last_indices: torch.Tensor | None = None
    ) -> Residual:
        attended = self.post_attention_layernorm(self.self_attn(residual, positions, last_indices))
        if last_indices is not None:
            residual = residual[last_indices]
        residual = residual.add(attended)
        return residual.add(self.post_feedforward_layernorm(self.mlp(residual)))


def _mlp(config: ModelConfig, index: int, dtype: torch.dtype | None, tp: TensorParallel) -> MLP:
    """Make the MLP of a dense layer."""
    formats = config.formats(index, "mlp")
    return MLP(config.hidden_size, config.intermediate_size, config.mlp_bias, dtype=dtype, tp=tp, formats=formats)


def _kind(module: nn.Module) -> tuple[type, type]:
    """Return the class of a module, and of its weights' format if it has one."""
    return type(module), type(getattr(module, "format", None))


def _norm(config: ModelConfig, dtype: torch.dtype | None) -> RMSNorm:
    """Make a norm of the residual stream."""
    # Norms of Olmo multiply by the weight before they round. A float32 weight does that.
    dtype = torch.float32 if config.post_norms else dtype
    return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, zero_centered=config.zero_centered_norms)


def _rotary_embeddings(config: ModelConfig, max_position: int) -> list[RotaryEmbedding]:
    """Return the tables of RoPE of each layer. Layers with the same RoPE share them."""
    ropes = [config.rope(index) for index in range(config.num_layers)]
    tables: list[RotaryEmbedding] = []
    for index, rope in enumerate(ropes):
        first = ropes.index(rope)  # the first layer with the same RoPE; its options are a dict, which cannot be a key
        if first < index:
            tables.append(tables[first])
        else:
            theta, scaling = rope
            tables.append(RotaryEmbedding(config.head_dim, max_position, theta, scaling, config.rotary_dim))
    return tables


class Decoder(Layer):
    """A decoder-only transformer of any family in families.py, with uninitialized weights on the default device.

    Args:
        config: the model's options.
        dtype: dtype of weights and activations; torch's default if None.
        state_dtype: dtype of recurrent state.
        tp: the tensor-parallel group; the process's default one if None.
        max_position: number of positions that sequences may have; `config.max_position` if None.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        tp: TensorParallel | None = None,
        max_position: int | None = None,
    ):
        super().__init__()
        self.config = config
        tp = tp or TensorParallel.default()
        self.tp = tp
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, dtype=dtype, tp=tp)
        make_layer = PostNormLayer if config.post_norms else partial(DecoderLayer, state_dtype=state_dtype)
        self.layers = nn.ModuleList(
            make_layer(config, index, rotary, dtype, tp)
            for index, rotary in enumerate(_rotary_embeddings(config, max_position or config.max_position))
        )
        self.norm = _norm(config, dtype)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, dtype=dtype, tp=tp)
        if config.tie_word_embeddings and not config.separate_head:
            self.lm_head.tie(self.embed_tokens)
        self._check_shards()

    def _check_shards(self) -> None:
        """Raise ValueError if the blocks of a weight format do not fit the ranks' shards."""
        self.checkpoint_tensors()

    def checkpoint_tensors(self) -> dict[str, CheckpointTensor]:
        """Return the target of every tensor that a checkpoint must have, by its name."""
        tensors = {}
        for name, child in self.named_children():
            tensors |= checkpoint_tensors(child, name if name == "lm_head" else f"model.{name}")
        return tensors

    def compress(self) -> None:
        """Let loading compress plain weights, if this CPU is fast with them; see weights/int4_int8.py.

        Routers keep their precision, as in llama.cpp.
        """
        if not is_supported():
            return
        for module in self.modules():
            if isinstance(module, (LinearLayer, VocabParallelEmbedding)) and not isinstance(module, Router):
                module.format = with_compression(module.format, is_head=module is self.lm_head)

    def compile_sizes(self, max_tokens: int) -> list[int]:
        """Return the numbers of tokens, up to `max_tokens`, for which kernels are compiled at the start."""
        sizes = set(compile_sizes(max_tokens))
        for module in self.modules():
            if isinstance(module, SparseMoE):
                sizes.update(module.compile_sizes(max_tokens))
        return sorted(sizes)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> Residual:
        """Return the hidden states before the final norm: input_ids, positions [T] int64 -> [L, hidden_size].

        The L tokens are those of the context's `last_indices`, or all T tokens if that is None. The last layer skips
        unused work: it stores K and V for every token, or updates the recurrent state, but computes the rest only for
        those L.
        """
        residual = self.embed_tokens.residual(input_ids)
        *layers, last_layer = self.layers
        for layer in layers:
            residual = layer(residual, positions)
        return last_layer(residual, positions, get_context().last_indices)

    @contextmanager
    def few_layers(self) -> Iterator[None]:
        """Let the decoder have few layers within the body: the first one of each kind, and the last one.

        Nothing else may run the decoder meanwhile. The other layers use no other kernels. Layers are of one kind if
        they have the same type, and their modules the same classes and formats.
        """
        layers = self.layers
        *others, last_layer = layers
        first_of_kind: dict[tuple, nn.Module] = {}
        for layer in others:
            first_of_kind.setdefault((layer.layer_type, *map(_kind, layer.modules())), layer)
        self.layers = nn.ModuleList([*first_of_kind.values(), last_layer])
        try:
            yield
        finally:
            self.layers = layers

    def compute_logits(self, hidden: Residual) -> torch.Tensor:
        """Return logits [M, vocab_size]: those of the M tokens of `hidden` [L, hidden_size] that this rank samples.

        These are the tokens `tp.rows(L)`.
        """
        return self.lm_head(self.norm(hidden))
