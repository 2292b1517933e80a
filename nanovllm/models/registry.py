"""The supported models: each family is a row of options of one decoder."""

import logging
import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from nanovllm.checks import in_vocabulary, shown
from nanovllm.layers.rotary_embedding import ROPE_OPTIONAL, ROPE_TYPES, rope_frequencies
from nanovllm.weights.formats import AllocateWeight, Plain

logger = logging.getLogger(__name__)

# The options of ModelConfig that each family sets. A string names the checkpoint's own option.
FAMILIES: dict[str, dict[str, bool | str]] = {
    "qwen3": {"qk_norm": True, "qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    "qwen2": {"qkv_bias": True},
    "llama": {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    "mistral": {},
}
# By the type of an option: its types in a file, its range, and the range in words. Real models stay far below.
_KINDS = {
    bool: ((bool,), 0, 1, "true or false"),
    int: ((int,), 1, 1 << 24, "an integer from 1 to 2**24"),
    float: ((int, float), 1e-15, 1e15, "a number from 1e-15 to 1e15"),
}
# Options that `check_same_model` need not compare: other checks cover them, or the weights do not depend on them.
_FREE_OPTIONS = {"max_position", "rope_theta", "tie_word_embeddings", "separate_head"}
_MAX_END_IDS = 1024  # real models have a few
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(feature: str) -> ValueError:
    """Return the error for a model with this feature. It lists the supported ones."""
    return ValueError(
        f"{feature} is not supported; supported are unquantised dense models with full attention of the types "
        f"{', '.join(FAMILIES)} (GGUF files may be quantised), with RoPE of the types {', '.join(ROPE_TYPES)}"
    )


def checked_option(name: str, value: Any, kind: type) -> Any:
    """Return `value`. Raise ValueError unless a model's option of the type `kind` can have it."""
    types, low, high, words = _KINDS[kind]
    if type(value) not in types or not low <= value <= high:
        raise ValueError(f"the model's {name} must be {words}, got {shown(value)}")
    return value


def default_head_dim(hidden_size: Any, num_heads: Any) -> int:
    """Return the head_dim of a checkpoint that does not state it."""
    return checked_option("hidden_size", hidden_size, int) // checked_option("num_heads", num_heads, int)


def token_ids(value: Any) -> tuple[int, ...]:
    """Return a checkpoint's token id, list of ids or None as a tuple."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(ids) > _MAX_END_IDS:
        raise ValueError(f"the model's eos_token_id must have at most {_MAX_END_IDS} ids, got {len(ids)}")
    if any(type(token_id) is not int for token_id in ids):
        raise ValueError(f"the model's eos_token_id must be a token id or a list of them, got {shown(value)}")
    return ids


def known_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """Return the `token_ids` that the vocabulary has. Warn of others, such as -1: no text can end with them."""
    ids = token_ids(value)
    known = tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)
    if known != ids:
        unknown = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
        logger.warning("Ignoring the model's eos_token_id %.80r: ids go from 0 to %d", unknown, vocab_size - 1)
    return known


def scaled_max_position(max_position: int, scaling: dict[str, Any] | None) -> int:
    """Return the number of positions that a model supports with its RoPE scaling.

    For linear and yarn this is the original number times the factor, or `max_position` if that is more. For other types
    `max_position` already includes the factor.
    """
    if scaling is None or scaling["rope_type"] not in ("linear", "yarn"):
        return max_position
    key = "original_max_position_embeddings"
    original = checked_option(key, scaling.get(key), float)
    factor = checked_option("RoPE factor", scaling.get("factor"), float)
    return max(checked_option("max_position", max_position, int), int(original * factor))


@dataclass(frozen=True)
class ModelConfig:
    """The options of one decoder, resolved.

    Args:
        model_type: a key of FAMILIES.
        max_position: number of positions, with RoPE scaling.
        tie_word_embeddings: the head uses the embedding's weights, and a checkpoint may leave out one of the two.
        separate_head: the checkpoint has other weights for the head in spite of `tie_word_embeddings`.
        rope_scaling: None, or the options of one of ROPE_TYPES with its name as "rope_type".
        dtype: dtype of the checkpoint.
        eos_token_ids: ids that end a text.
        allocate_weight: makes the weights of attention and MLP in the checkpoint's format. The head's format is Plain.

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
    separate_head: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    eos_token_ids: tuple[int, ...] = ()
    allocate_weight: AllocateWeight = Plain.allocate

    def __post_init__(self):
        check_model_type(self.model_type)
        for field in fields(self):
            kind = field.type
            if isinstance(kind, type) and kind in _KINDS:
                checked_option(field.name, getattr(self, field.name), kind)
        in_vocabulary("the model's eos_token_id", self.eos_token_ids, self.vocab_size)
        if self.head_dim % 2:
            raise ValueError(f"the model's head_dim must be even for RoPE, got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise unsupported(f"num_attention_heads={self.num_heads} with num_key_value_heads={self.num_kv_heads}")
        if self.dtype not in _DTYPES:
            raise unsupported(f"a checkpoint of dtype {shown(self.dtype)}")
        self._check_rope(self.rope_scaling or {"rope_type": "default"})

    def _check_rope(self, options: dict[str, Any]) -> None:
        rope_type = options["rope_type"]
        num_factors = self.head_dim // 2
        if rope_type not in tuple(ROPE_TYPES):
            raise unsupported(f"RoPE of type {shown(rope_type)}")
        needed = dict.fromkeys(ROPE_TYPES[rope_type], float)
        given = {name: kind for name, kind in ROPE_OPTIONAL.items() if options.get(name) is not None}
        for name, kind in (needed | given).items():
            value = options.get(name)
            if name != "factors":
                checked_option(f"RoPE {name}", value, kind)
                continue
            if not isinstance(value, list) or len(value) != num_factors:
                raise ValueError(f"the model's RoPE factors must be {num_factors} (head_dim / 2), got {shown(value)}")
            for factor in value:
                checked_option("RoPE factors", factor, kind)
        if rope_type == "llama3" and not options["low_freq_factor"] < options["high_freq_factor"]:
            low, high = options["low_freq_factor"], options["high_freq_factor"]
            raise ValueError(f"the model's RoPE high_freq_factor must be above low_freq_factor={low}, got {high}")
        if rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"the model's rope_theta must be above 1 for RoPE of type 'yarn', got {self.rope_theta}")

    def check_same_model(self, other: "ModelConfig") -> None:
        """Raise ValueError if weights of a checkpoint with the config `other` would mean something else here.

        Formats differ in the names of families and of kinds of RoPE, and round numbers, so the results are compared.
        """
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.type not in _KINDS or field.name in _FREE_OPTIONS:
                continue
            if not math.isclose(mine, theirs, rel_tol=1e-5):
                raise ValueError(f"the checkpoint's {field.name} is {theirs}, but the model's is {mine}")
        with torch.device("cpu"):  # not the caller's default device, which may be "meta"
            frequencies, factor = rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
            their_frequencies, their_factor = rope_frequencies(other.head_dim, other.rope_theta, other.rope_scaling)
            is_same = torch.allclose(frequencies, their_frequencies, rtol=1e-4, atol=0)
        if not is_same or not math.isclose(factor, their_factor, rel_tol=1e-4):
            theirs, mine = (f"rope_theta={c.rope_theta} scaled by {shown(c.rope_scaling)}" for c in (other, self))
            raise ValueError(f"the checkpoint's RoPE is {theirs}, but the model's is {mine}")

    @classmethod
    def from_hf(cls, config: Any, eos_token_ids: tuple[int, ...] = ()) -> "ModelConfig":
        """Read a transformers config object, of transformers 4 or 5.

        Args:
            eos_token_ids: those of the generation config, which take precedence.
        """
        check_model_type(config.model_type)
        _check_variant(config)
        family = FAMILIES[config.model_type].items()
        flags: dict[str, Any] = {
            name: getattr(config, flag, False) if isinstance(flag, str) else flag for name, flag in family
        }
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None)
        theta, scaling = _rope(config)
        vocab_size = checked_option("vocab_size", config.vocab_size, int)
        ends = known_ids(eos_token_ids, vocab_size) or known_ids(getattr(config, "eos_token_id", None), vocab_size)
        return cls(
            model_type=config.model_type,
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=_first_given(getattr(config, "num_key_value_heads", None), num_heads),
            head_dim=default_head_dim(config.hidden_size, num_heads) if head_dim is None else head_dim,
            max_position=scaled_max_position(config.max_position_embeddings, scaling),
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_theta=theta,
            rope_scaling=scaling,
            dtype=_dtype(config),
            eos_token_ids=ends,
            **flags,
        )


def _first_given(*values: Any) -> Any:
    """Return the first value that is not None. Wrong values such as 0 count, so that later checks name them."""
    return next(value for value in values if value is not None)


def _dtype(config: Any) -> Any:
    dtype = getattr(config, "dtype", None)
    if dtype is None:  # only then, as the older name makes transformers 5 warn
        dtype = _first_given(getattr(config, "torch_dtype", None), torch.float32)
    return getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype


def check_model_type(model_type: Any) -> None:
    """Raise ValueError unless `model_type` is one of FAMILIES."""
    if model_type not in tuple(FAMILIES):  # a tuple, as a value from a file may be unhashable
        raise unsupported(f"model type {shown(model_type)}")


def _check_variant(config: Any) -> None:
    """Raise ValueError for an unsupported variant of a supported family."""
    if getattr(config, "quantization_config", None):
        raise unsupported("a quantised checkpoint (quantization_config)")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise unsupported(f"hidden_act={shown(config.hidden_act)}")
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    for layer_type in layer_types or ():
        if layer_type != "full_attention":
            raise unsupported(f"a layer of type {shown(layer_type)}")
    used = not layer_types and getattr(config, "use_sliding_window", True) and window
    if used and checked_option("sliding_window", window, int) < config.max_position_embeddings:
        raise unsupported(f"sliding_window={shown(window)}")


def _rope(config: Any) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling options: `rope_parameters` of transformers 5, or the two options of 4."""
    options = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if any(isinstance(value, dict) for value in options.values()):
        raise unsupported("RoPE that differs between layers")
    if (options.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0) != 1.0:
        raise unsupported("partial RoPE")
    theta = _first_given(options.pop("rope_theta", None), getattr(config, "rope_theta", None), 10000.0)
    rope_type = _first_given(options.pop("rope_type", None), options.pop("type", None), "default")
    if rope_type == "default":
        return theta, None
    if options.get("original_max_position_embeddings") is None:
        options["original_max_position_embeddings"] = config.max_position_embeddings
    return theta, {**options, "rope_type": rope_type}


_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_kv_heads": 8, "head_dim": 128, "max_position": 40960}
_QWEN3 |= {"rope_theta": 1e6, "qk_norm": True, "eos_token_ids": (151645, 151643)}
# Shapes of real models for load_format="dummy".
PRESETS = {
    "qwen3-0.6b": ModelConfig(
        **_QWEN3, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, tie_word_embeddings=True
    ),
    "qwen3-4b": ModelConfig(
        **_QWEN3, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, tie_word_embeddings=True
    ),
    "qwen3-8b": ModelConfig(**_QWEN3, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32),
}
