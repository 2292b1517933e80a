"""The supported model families: the options of the decoder, by `model_type`."""

from dataclasses import dataclass, field, replace

# The types of layers with a KV cache. Layers of the other types have recurrent state.
ATTENTION_TYPES = ("full_attention", "sliding_attention")
LAYER_TYPES = (*ATTENTION_TYPES, "gated_delta_net")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Options of a family: how its configs and checkpoints differ from others.

    Args:
        options: the options of ModelConfig that the family sets. A string names the checkpoint's own option.
        is_nested: the config has the decoder's options in its `text_config`, which has a family of its own.
        uniform_window: all layers have the window if there is one, whatever options of other families say.
        partial_rope: the config may let RoPE rotate a part of each head.
        scales_queries: the RoPE option `llama_4_scaling_beta` is used. Other families ignore it, as in transformers.
        linear_attention: the type, one of LAYER_TYPES, of the layers that the config calls "linear_attention"; None if
            it has none. transformers has this one name for Gated DeltaNet, Mamba-2, lightning attention and others.
        packs_gated_delta_net: see `GatedDeltaNetConfig.is_packed`.
        has_experts, has_shared_expert: layers may have a mixture of experts, and this a shared expert.
        always_norm_topk: the option `norm_topk_prob` is ignored, as in transformers.
        unused_tensors: prefixes of tensor names that checkpoints may have and text generation does not need.
    """

    options: dict[str, bool | str] = field(default_factory=dict)
    is_nested: bool = False
    uniform_window: bool = False
    partial_rope: bool = False
    scales_queries: bool = False
    linear_attention: str | None = None
    packs_gated_delta_net: bool = False
    has_experts: bool = False
    has_shared_expert: bool = False
    always_norm_topk: bool = False
    unused_tensors: tuple[str, ...] = ()


_WINDOW: dict[str, bool | str] = {"sliding_window": "sliding_window"}
_ATTENTION_BIAS: dict[str, bool | str] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_LLAMA: dict[str, bool | str] = {**_ATTENTION_BIAS, "mlp_bias": "mlp_bias"}
_OLMO: dict[str, bool | str] = {**_ATTENTION_BIAS, "whole_qk_norm": True, "post_norms": True}
_HYBRID: dict[str, bool | str] = {
    **_ATTENTION_BIAS,
    "qk_norm": True,
    "attention_gate": True,
    "zero_centered_norms": True,
}
_PIXTRAL = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_QWEN3_NEXT = Family(
    options=_HYBRID,
    partial_rope=True,
    linear_attention="gated_delta_net",
    packs_gated_delta_net=True,
    has_experts=True,
    has_shared_expert=True,
    unused_tensors=("mtp.",),
)
_QWEN3_5_MOE = replace(
    _QWEN3_NEXT,
    packs_gated_delta_net=False,
    always_norm_topk=True,
    unused_tensors=("mtp.", "visual.", "model.visual."),
)
_QWEN3_5 = replace(_QWEN3_5_MOE, has_experts=False, has_shared_expert=False, always_norm_topk=False)
FAMILIES = {
    "qwen3": Family(options={**_ATTENTION_BIAS, **_WINDOW, "qk_norm": True}),
    "qwen2": Family(options={**_WINDOW, "qkv_bias": True}),
    "llama": Family(options=_LLAMA),
    "mistral": Family(options=_WINDOW, uniform_window=True, unused_tensors=_PIXTRAL),
    "mistral3": Family(is_nested=True),
    "qwen3_moe": Family(options={**_ATTENTION_BIAS, **_WINDOW, "qk_norm": True}, uniform_window=True, has_experts=True),
    "qwen2_moe": Family(options={**_WINDOW, "qkv_bias": "qkv_bias"}, has_experts=True, has_shared_expert=True),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5": Family(is_nested=True),
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe": Family(is_nested=True),
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "ministral": Family(options=_WINDOW),
    "ministral3": Family(options=_WINDOW, uniform_window=True, scales_queries=True, unused_tensors=_PIXTRAL),
    "smollm3": Family(options={**_LLAMA, **_WINDOW, "rope_layers": "no_rope_layers"}),
    "olmo2": Family(options=_OLMO),
    "olmo3": Family(options={**_OLMO, **_WINDOW}),
    "cwm": Family(options=_WINDOW),
    "phi3": Family(options=_WINDOW, uniform_window=True, partial_rope=True),
    "seed_oss": Family(options={**_LLAMA, "o_bias": "attention_out_bias"}),
}
