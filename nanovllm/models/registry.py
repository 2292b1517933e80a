"""Which models there are: families are rows of options of one decoder."""

from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.layers.rotary_embedding import ROPE_TYPES


@dataclass(frozen=True)
class Family:
    """What tells a family from the others. A string names the checkpoint's own option."""

    qk_norm: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False


FAMILIES = {
    "qwen3": Family(qk_norm=True, qkv_bias="attention_bias", o_bias="attention_bias"),
    "qwen2": Family(qkv_bias=True),
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
_SIZES += ("max_position",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(what: str) -> ValueError:
    """The error that refuses a model, naming why and what is supported."""
    return ValueError(
        f"{what} is not supported; supported are unquantised dense models with full attention of the types "
        f"{', '.join(FAMILIES)} (GGUF files may be quantised), with RoPE of the types {', '.join(ROPE_TYPES)}"
    )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A checkpoint's spelling of some token ids as a tuple."""
    ids = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    if any(type(token_id) is not int for token_id in ids):
        raise ValueError(f"the model's eos_token_id must be a token id or a list of them, got {value!r}")
    return ids


@dataclass(frozen=True)
class ModelConfig:
    """The options of one decoder, resolved.

    Args:
        model_type: a key of FAMILIES.
        max_position: positions the model knows.
        rope_scaling: None, or the options of one of ROPE_TYPES, which "rope_type" names.
        dtype: the checkpoint's.
        eos_token_ids: ids that end a text.

    Raises:
        ValueError: the model is not supported.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_model_type(self.model_type)
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"the model's {name} must be an integer of at least 1, got {value!r}")
        wrong = [i for i in self.eos_token_ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"the model's eos_token_id has {wrong[0]}; ids go from 0 to {self.vocab_size - 1}")
        if self.head_dim % 2:
            raise ValueError(f"the model's head_dim must be even for RoPE, got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise unsupported(f"num_attention_heads={self.num_heads} with num_key_value_heads={self.num_kv_heads}")
        if self.dtype not in _DTYPES:
            raise unsupported(f"a checkpoint of dtype {self.dtype}")
        rope_type = (self.rope_scaling or {"rope_type": "default"})["rope_type"]
        if rope_type not in ROPE_TYPES:
            raise unsupported(f"RoPE of type {rope_type!r}")
        for name in ROPE_TYPES[rope_type]:
            values = self.rope_scaling.get(name)
            for value in values if isinstance(values, list | tuple) else [values]:
                if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                    raise ValueError(f"the model's RoPE of type {rope_type!r} needs a {name} above 0, got {value!r}")

    @classmethod
    def from_hf(cls, config: Any, eos_token_ids: tuple[int, ...] = ()) -> "ModelConfig":
        """Read a transformers config object, of transformers 4 or 5.

        Args:
            eos_token_ids: the generation config's, which come before the config's own.
        """
        check_model_type(config.model_type)
        _check_variant(config)
        family = FAMILIES[config.model_type]

        def flag(option: bool | str) -> bool:
            return getattr(config, option, False) if isinstance(option, str) else option

        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
        theta, scaling = _rope(config)
        return cls(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            max_position=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_theta=theta,
            rope_scaling=scaling,
            qk_norm=family.qk_norm,
            qkv_bias=flag(family.qkv_bias),
            o_bias=flag(family.o_bias),
            mlp_bias=flag(family.mlp_bias),
            dtype=getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype,
            eos_token_ids=eos_token_ids or token_ids(getattr(config, "eos_token_id", None)),
        )


def check_model_type(model_type: str | None) -> None:
    """Raise ValueError unless `model_type` is one of FAMILIES."""
    if model_type not in FAMILIES:
        raise unsupported(f"model type {model_type!r}")


def _check_variant(config: Any) -> None:
    """Refuse what the family's name does not tell."""
    if getattr(config, "quantization_config", None):
        raise unsupported("a quantised checkpoint (quantization_config)")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise unsupported(f"hidden_act={config.hidden_act!r}")
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        slides = any(layer_type != "full_attention" for layer_type in layer_types)
    else:
        slides = getattr(config, "use_sliding_window", True) and window and window < config.max_position_embeddings
    if slides:
        raise unsupported(f"sliding_window={window}")


def _rope(config: Any) -> tuple[float, dict[str, Any] | None]:
    """theta and the scaling options: `rope_parameters` in transformers 5, `rope_theta` and `rope_scaling` in 4."""
    options = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if any(isinstance(value, dict) for value in options.values()):
        raise unsupported("RoPE that differs between layers")
    if (options.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0) != 1.0:
        raise unsupported("partial RoPE")
    theta = options.pop("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0
    rope_type = options.pop("rope_type", None) or options.pop("type", None) or "default"
    if rope_type == "default":
        return theta, None
    if options.get("original_max_position_embeddings") is None:
        options["original_max_position_embeddings"] = config.max_position_embeddings
    return theta, {**options, "rope_type": rope_type}


def _qwen3(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        max_position=40960,
        tie_word_embeddings=tied,
        rope_theta=1e6,
        qk_norm=True,
        eos_token_ids=(151645, 151643),
    )


# Real shapes for load_format="dummy".
PRESETS = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
}
