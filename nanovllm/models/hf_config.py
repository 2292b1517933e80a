"""Read the options of a model from its transformers config."""

from dataclasses import fields
from typing import Any

import torch

from nanovllm.checks import shown
from nanovllm.layers.gated_delta_net import GatedDeltaNetConfig
from nanovllm.layers.moe import MoEConfig
from nanovllm.layers.rotary_embedding import ROPE_WITH_ORIGINAL
from nanovllm.models.families import ATTENTION_TYPES, FAMILIES
from nanovllm.models.model_config import (
    ORIGINAL_POSITIONS,
    ModelConfig,
    Rope,
    check_model_type,
    checked_option,
    default_head_dim,
    known_ids,
    scaled_max_position,
    unsupported,
)
from nanovllm.weights.quantization import QuantizationScheme
from nanovllm.weights.quantization_config import read_scheme


def read_hf_config(config: Any, eos_token_ids: tuple[int, ...] = ()) -> ModelConfig:
    """Read a transformers config object, of transformers 4 or 5.

    Args:
        eos_token_ids: those of the generation config, which take precedence.

    Raises:
        ValueError: the model is not supported, or an option is wrong.
    """
    check_model_type(config.model_type)
    # The options of the decoder.
    text = config.text_config if FAMILIES[config.model_type].is_nested else config
    for part in (config, text):
        check_model_type(part.model_type)
        _check_variant(part)
    num_heads = text.num_attention_heads
    moe_size = getattr(text, "moe_intermediate_size", None)
    head_dim = getattr(text, "head_dim", None)
    (theta, scaling), sliding_rope, rotary_factor = _ropes(text)
    max_position = scaled_max_position(text.max_position_embeddings, scaling)
    layer_types = _layer_types(text, max_position, keep=sliding_rope is not None)
    vocab_size = checked_option("vocab_size", text.vocab_size, int)
    end_ids = _end_ids(config, text, eos_token_ids, vocab_size)
    return ModelConfig(
        model_type=text.model_type,
        vocab_size=vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=_first_given(getattr(text, "intermediate_size", None), moe_size, 0),
        num_layers=text.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=_first_given(getattr(text, "num_key_value_heads", None), num_heads),
        head_dim=default_head_dim(text.hidden_size, num_heads) if head_dim is None else head_dim,
        max_position=max_position,
        rms_norm_eps=text.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings or text.tie_word_embeddings,
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_rope=sliding_rope,
        partial_rotary_factor=rotary_factor,
        layer_types=layer_types,
        gated_delta_net=_gated_delta_net(text) if "gated_delta_net" in (layer_types or ()) else None,
        dtype=_first_given(stated_dtype(config), torch.float32),
        eos_token_ids=end_ids,
        moe=_moe(text) if FAMILIES[text.model_type].has_experts else None,
        quantization=_quantization(config) or _quantization(text),
        **_family_options(text, layer_types),
    )


def _end_ids(config: Any, text: Any, generation_ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Return the end-of-sequence ids of the first config that names any that the vocabulary has."""
    for given in (generation_ids, getattr(config, "eos_token_id", None), getattr(text, "eos_token_id", None)):
        if ids := known_ids(given, vocab_size):
            return ids
    return ()


def _moe(config: Any) -> MoEConfig | None:
    """Read the mixtures of experts of a transformers config; None if every layer is dense."""
    family = FAMILIES[config.model_type]
    num_layers = checked_option("num_layers", config.num_hidden_layers, int)
    step = checked_option("decoder_sparse_step", getattr(config, "decoder_sparse_step", 1), int)
    listed = getattr(config, "mlp_only_layers", None) or []
    if not isinstance(listed, list) or any(type(index) is not int for index in listed):
        raise ValueError(f"the model's mlp_only_layers must be a list of layer indices, got {shown(listed)}")
    dense_layers = tuple(i for i in range(num_layers) if (i + 1) % step or i in listed)
    if len(dense_layers) == num_layers:
        return None
    shared_size = 0
    if family.has_shared_expert:
        name = "shared_expert_intermediate_size"
        shared_size = checked_option(name, getattr(config, name), int)
    return MoEConfig(
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=family.always_norm_topk or getattr(config, "norm_topk_prob", True),
        shared_intermediate_size=shared_size,
        dense_layers=dense_layers,
    )


def _first_given(*values: Any) -> Any:
    """Return the first value that is not None. Wrong values such as 0 count, so that later checks name them."""
    return next(value for value in values if value is not None)


def stated_dtype(config: Any) -> Any:
    """Return the dtype that a transformers config states for the whole model or else for its text; None without one."""
    for part in (config, getattr(config, "text_config", config)):
        # Only configs of transformers 4 lack the newer name. Reading the older one makes transformers 5 warn.
        dtype = part.dtype if hasattr(part, "dtype") else getattr(part, "torch_dtype", None)
        if dtype is not None:
            return getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    return None


def _check_variant(config: Any) -> None:
    """Raise ValueError for an unsupported variant of a supported family."""
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise unsupported(f"hidden_act={shown(config.hidden_act)}")
    if not getattr(config, "is_causal", True):
        raise unsupported(f"is_causal={shown(config.is_causal)}")


def _quantization(config: Any) -> QuantizationScheme | None:
    options = getattr(config, "quantization_config", None)
    try:
        return read_scheme(options) if options else None
    except ValueError as error:
        raise unsupported(str(error)) from None


def _family_options(config: Any, layer_types: tuple[str, ...] | None) -> dict[str, Any]:
    """Return the options of ModelConfig that the family sets."""
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    options = {}
    for name, value in FAMILIES[config.model_type].options.items():
        options[name] = getattr(config, value, defaults[name]) if isinstance(value, str) else value
    if layer_types is None:
        options.pop("sliding_window", None)
    if options.get("rope_layers") is not None:
        options["rope_layers"] = tuple(options["rope_layers"][: config.num_hidden_layers])
    return options


def _layer_types(config: Any, max_position: int, keep: bool) -> tuple[str, ...] | None:
    """Return the types of the layers; None if all have full attention.

    A layer whose window hides nothing has full attention, unless `keep` is true. Configs without `layer_types` have a
    window in all layers or in none. A family without the options `sliding_window`, `layer_types` or
    `use_sliding_window` ignores them, as transformers does.
    """
    family = FAMILIES[config.model_type]
    is_uniform = family.uniform_window
    has_window = "sliding_window" in family.options
    window = getattr(config, "sliding_window", None) if has_window else None
    types = getattr(config, "layer_types", None)
    if is_uniform or not types:
        is_used = window and (is_uniform or getattr(config, "use_sliding_window", True))
        num_layers = checked_option("num_layers", config.num_hidden_layers, int)
        types = ["sliding_attention" if is_used else "full_attention"] * num_layers
    if not isinstance(types, list | tuple):
        raise ValueError(f"the model's layer_types must be a list, got {shown(types)}")
    if "linear_attention" in types:
        if family.linear_attention is None:
            raise unsupported(f"a model of type {shown(config.model_type)} with linear attention")
        types = [family.linear_attention if layer_type == "linear_attention" else layer_type for layer_type in types]
    elif not has_window and family.linear_attention is None:
        return None
    if "sliding_attention" in types:
        if not has_window:
            raise unsupported(f"a model of type {shown(config.model_type)} with sliding attention")
        hides = checked_option("sliding_window", window, int) < max_position
        if not hides and not keep:
            types = ["full_attention" if layer_type == "sliding_attention" else layer_type for layer_type in types]
    return None if all(layer_type == "full_attention" for layer_type in types) else tuple(types)


def _gated_delta_net(config: Any) -> GatedDeltaNetConfig:
    return GatedDeltaNetConfig(
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_head_dim=config.linear_key_head_dim,
        value_head_dim=config.linear_value_head_dim,
        conv_width=config.linear_conv_kernel_dim,
        is_packed=FAMILIES[config.model_type].packs_gated_delta_net,
    )


def _ropes(config: Any) -> tuple[Rope, Rope | None, float]:
    """Return the RoPE of the layers, that of layers with sliding attention if it differs, and `partial_rotary_factor`.

    transformers 5 has the options in `rope_parameters`, perhaps by the type of the layer. transformers 4 has
    `rope_theta` and `rope_scaling`. The sections of multimodal RoPE are all the same for text.

    If the config itself has `original_max_position_embeddings`, that takes precedence over the one among the RoPE
    options, unless these differ between types of layers. transformers 5 decides so when it makes a model, so
    `rope_parameters` may not have that number yet.
    """
    options = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    factor = _first_given(
        options.pop("partial_rotary_factor", None), getattr(config, "partial_rotary_factor", None), 1.0
    )
    if factor != 1.0 and not FAMILIES[config.model_type].partial_rope:
        raise unsupported("partial RoPE")
    if not any(isinstance(value, dict) for value in options.values()):
        return _rope(config, options, getattr(config, ORIGINAL_POSITIONS, None)), None, factor
    if not options.keys() <= set(ATTENTION_TYPES) or not all(isinstance(value, dict) for value in options.values()):
        raise unsupported("RoPE that differs between layers of one type")
    full = _rope(config, dict(options.get("full_attention", {})))
    sliding = _rope(config, dict(options.get("sliding_attention", {})))
    return full, None if sliding == full else sliding, factor


def _rope(config: Any, options: dict[str, Any], original: Any = None) -> Rope:
    """Return theta and the scaling options.

    Args:
        original: number of original positions that takes precedence over that of the options, or None.
    """
    if (options.pop("partial_rotary_factor", None) or 1.0) != 1.0:
        raise unsupported("partial RoPE that differs between layers")
    if not FAMILIES[config.model_type].scales_queries:
        options.pop("llama_4_scaling_beta", None)
    theta = _first_given(options.pop("rope_theta", None), getattr(config, "rope_theta", None), 10000.0)
    rope_type = _first_given(options.pop("rope_type", None), options.pop("type", None), "default")
    if rope_type == "default" and "llama_4_scaling_beta" not in options:
        return theta, None
    if original is not None and rope_type in ROPE_WITH_ORIGINAL:
        options[ORIGINAL_POSITIONS] = original
    if options.get(ORIGINAL_POSITIONS) is None:
        options[ORIGINAL_POSITIONS] = config.max_position_embeddings
    if rope_type == "longrope" and options.get("factor") is None:
        original = checked_option("RoPE original length", options[ORIGINAL_POSITIONS], float)
        options["factor"] = checked_option("max_position", config.max_position_embeddings, int) / original
    return theta, {**options, "rope_type": rope_type}
