"""The options of a model, and their bounds."""

import logging
import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch

from nanovllm.arithmetic import is_power_of_2
from nanovllm.checks import check_in_vocabulary, shown
from nanovllm.layers.gated_delta_net import GatedDeltaNetConfig
from nanovllm.layers.moe import MoEConfig
from nanovllm.layers.rotary_embedding import ROPE_OPTIONAL, ROPE_TYPES, rope_frequencies
from nanovllm.models.families import ATTENTION_TYPES, FAMILIES, LAYER_TYPES
from nanovllm.ops.gdn.inputs import CONV_WIDTH
from nanovllm.weights.layer_formats import LayerFormats
from nanovllm.weights.quantization import QuantizationScheme
from nanovllm.weights.quantization_config import SUPPORTED

logger = logging.getLogger(__name__)


class _Range(NamedTuple):
    """The values that a model's option may have: their types in a file, bounds, and both in words."""

    types: tuple[type, ...]
    low: float
    high: float
    words: str


# By the type of the option. Real models stay far below.
_RANGES = {
    bool: _Range((bool,), 0, 1, "true or false"),
    int: _Range((int,), 1, 1 << 24, "an integer from 1 to 2**24"),
    float: _Range((int, float), 1e-15, 1e15, "a number from 1e-15 to 1e15"),
}
# Options that `check_same_model` does not compare by value: it compares RoPE by its frequencies, other checks cover the
# option, or the meaning of the weights does not depend on it.
_NOT_COMPARED = {"model_type", "max_position", "dtype", "eos_token_ids", "tie_word_embeddings", "separate_head"}
_NOT_COMPARED |= {"rope_theta", "rope_scaling", "sliding_rope", "rope_layers", "quantization"}
_MAX_END_IDS = 1024  # real models have a few
# Kernels hold a value for each expert in registers. Real models have up to 512 experts, and 22 per token.
MAX_EXPERTS = 4096
_MAX_EXPERTS_PER_TOKEN = 64
# Bounds the table of expected tensors. Real models have up to 31,000 experts.
_MAX_ALL_EXPERTS = 1 << 16
# Bounds the tables with an entry for each feature of all heads, which are made before the weights show the sizes.
_MAX_FEATURES = 1 << 20
# Bounds the loops over layers that run before the weights show how many there are.
MAX_LAYERS = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORIGINAL_POSITIONS = "original_max_position_embeddings"
Rope: TypeAlias = tuple[float, dict[str, Any] | None]  # theta and the scaling options


def unsupported(feature: str) -> ValueError:
    """Return the error for a model with this feature. It lists the supported ones."""
    return ValueError(
        f"{feature} is not supported; supported are models of the types {', '.join(FAMILIES)}, with RoPE of the types "
        f"{', '.join(ROPE_TYPES)}: unquantized, as GGUF files, or in {SUPPORTED}"
    )


def checked_option(name: str, value: Any, kind: type) -> Any:
    """Return `value`. Raise ValueError unless a model's option of the type `kind` can have it."""
    limits = _RANGES[kind]
    if type(value) not in limits.types or not limits.low <= value <= limits.high:
        raise ValueError(f"the model's {name} must be {limits.words}, got {shown(value)}")
    return value


def check_options(options: Any, prefix: str = "") -> None:
    """Check the numbers and bools of a dataclass; see `checked_option`."""
    for field in fields(options):
        kind = field.type
        if isinstance(kind, type) and kind in _RANGES:
            checked_option(prefix + field.name, getattr(options, field.name), kind)


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

    For linear and yarn this is the original number times the factor, or `max_position` if that is more. For longrope it
    is the original number, because longer texts have other frequencies. For other types `max_position` already includes
    the factor.
    """
    if scaling is None or scaling["rope_type"] not in ("linear", "yarn", "longrope"):
        return max_position
    original = checked_option(ORIGINAL_POSITIONS, scaling.get(ORIGINAL_POSITIONS), float)
    if scaling["rope_type"] == "longrope":
        logger.warning("The model's RoPE of type 'longrope' is supported for texts of up to %d tokens", original)
        return min(checked_option("max_position", max_position, int), int(original))
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
        sliding_rope: theta and scaling of the layers with sliding attention, if they differ from the others'.
        rope_layers: 1 for each layer with RoPE and 0 for each without; None if all have it.
        qk_norm: RMSNorm of each query and key head.
        whole_qk_norm: RMSNorm of all query heads together, and of all key heads together.
        post_norms: norms of the outputs of attention and MLP, in place of norms of their inputs.
        partial_rotary_factor: the part of a head's dimensions that RoPE rotates.
        attention_gate: the query projection also computes a gate of attention's output.
        zero_centered_norms: norms multiply by 1 + weight, except in recurrent layers.
        layer_types: one of LAYER_TYPES for each layer; None if all have full attention.
        sliding_window: how many tokens a query sees in layers with sliding attention.
        gated_delta_net: the options of the Gated DeltaNet layers; None if there are none.
        dtype: dtype of the checkpoint.
        eos_token_ids: ids that end a text.
        moe: the mixtures of experts in place of MLPs; None if all layers are dense.
        quantization: how the linear layers are quantized; None if they are not. It does not apply to the head.

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
    sliding_rope: Rope | None = None
    rope_layers: tuple[int, ...] | None = None
    qk_norm: bool = False
    whole_qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    partial_rotary_factor: float = 1.0
    attention_gate: bool = False
    zero_centered_norms: bool = False
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    gated_delta_net: GatedDeltaNetConfig | None = None
    dtype: torch.dtype = torch.bfloat16
    eos_token_ids: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    quantization: QuantizationScheme | None = None

    def __post_init__(self):
        check_model_type(self.model_type)
        check_options(self)
        check_in_vocabulary("the model's eos_token_id", self.eos_token_ids, self.vocab_size)
        if self.head_dim % 2:
            raise ValueError(f"the model's head_dim must be even for RoPE, got {self.head_dim}")
        if not 2 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            factor = self.partial_rotary_factor
            raise ValueError(f"the model's partial_rotary_factor must leave an even number of dimensions, got {factor}")
        if self.num_heads % self.num_kv_heads:
            raise unsupported(f"num_attention_heads={self.num_heads} with num_key_value_heads={self.num_kv_heads}")
        _check_features("num_attention_heads", self.num_heads, self.head_dim)
        if self.dtype not in _DTYPES:
            raise unsupported(f"a checkpoint of dtype {shown(self.dtype)}")
        self._check_rope(self.rope_theta, self.rope_scaling)
        if self.sliding_rope is not None:
            self._check_rope(*self.sliding_rope)
        if self.moe is not None:
            _check_moe(self.moe, self.num_layers)
        self._check_layers()

    @property
    def rotary_dim(self) -> int:
        """Number of a head's dimensions that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    def layer_type(self, index: int) -> str:
        """Return the type of a layer, one of LAYER_TYPES."""
        return "full_attention" if self.layer_types is None else self.layer_types[index]

    def formats(self, index: int, part: str) -> LayerFormats:
        """Return what chooses the formats of the weights in a part of a layer, such as "mlp"."""
        return LayerFormats(self.quantization, f"model.layers.{index}.{part}")

    def is_recurrent(self, index: int) -> bool:
        """Return whether the layer with this index has recurrent state in place of a KV cache."""
        return self.layer_type(index) not in ATTENTION_TYPES

    def window(self, index: int, max_position: int) -> int:
        """Return how many tokens a query of a layer sees; 0 if it sees all of up to `max_position`."""
        window = self.sliding_window if self.layer_type(index) == "sliding_attention" else None
        return 0 if window is None or window >= max_position else window

    def rope(self, index: int) -> tuple[float | None, dict[str, Any] | None]:
        """Return theta and the scaling of a layer's RoPE; theta is None for a layer without RoPE."""
        if self.rope_layers is not None and not self.rope_layers[index]:
            return None, None
        if self.sliding_rope is not None and self.layer_type(index) == "sliding_attention":
            return self.sliding_rope
        return self.rope_theta, self.rope_scaling

    def _check_layers(self) -> None:
        types = ("full_attention",) * self.num_layers if self.layer_types is None else self.layer_types
        for layer_type in types:
            if layer_type not in LAYER_TYPES:
                raise unsupported(f"a layer of type {shown(layer_type)}")
        if len(types) != self.num_layers:
            raise ValueError(f"the model's layer_types must be {self.num_layers} (num_layers), got {len(types)}")
        if not set(types) & set(ATTENTION_TYPES):
            raise unsupported("a model without layers of attention over a KV cache")
        if self.post_norms and (self.moe is not None or set(types) - set(ATTENTION_TYPES)):
            raise unsupported("a layer with post_norms that has experts or recurrent state")
        if "sliding_attention" in types:
            checked_option("sliding_window", self.sliding_window, int)
        has_rope = (1,) * self.num_layers if self.rope_layers is None else self.rope_layers
        if len(has_rope) != self.num_layers or any(flag not in (0, 1) for flag in has_rope):
            raise ValueError(f"the model's rope_layers must be {self.num_layers} times 0 or 1, got {shown(has_rope)}")
        if ("gated_delta_net" in types) != (self.gated_delta_net is not None):
            raise ValueError("the model's gated_delta_net must be None if and only if no layer has this type")
        if self.gated_delta_net is not None:
            self._check_gated_delta_net(self.gated_delta_net)

    def _check_gated_delta_net(self, options: GatedDeltaNetConfig) -> None:
        check_options(options, "gated_delta_net.")
        _check_features("linear_num_key_heads", options.num_key_heads, options.key_head_dim)
        _check_features("linear_num_value_heads", options.num_value_heads, options.value_head_dim)
        if options.num_value_heads % options.num_key_heads:
            heads = f"linear_num_value_heads={options.num_value_heads}"
            raise unsupported(f"{heads} with linear_num_key_heads={options.num_key_heads}")
        for dim in (options.key_head_dim, options.value_head_dim):
            if dim < 16 or not is_power_of_2(dim):
                raise unsupported(f"Gated DeltaNet with heads of {dim} dimensions, not a power of two from 16")
        if options.conv_width != CONV_WIDTH:
            raise unsupported(f"linear_conv_kernel_dim={options.conv_width}")

    def _check_rope(self, theta: Any, scaling: dict[str, Any] | None) -> None:
        checked_option("rope_theta", theta, float)
        options = scaling or {"rope_type": "default"}
        rope_type = options["rope_type"]
        num_factors = self.rotary_dim // 2
        if rope_type not in tuple(ROPE_TYPES):
            raise unsupported(f"RoPE of type {shown(rope_type)}")
        needed = dict.fromkeys(ROPE_TYPES[rope_type], float)
        given = {name: kind for name, kind in ROPE_OPTIONAL.items() if options.get(name) is not None}
        if "llama_4_scaling_beta" in given:
            needed[ORIGINAL_POSITIONS] = float
        for name, kind in (needed | given).items():
            value = options.get(name)
            if name not in ("factors", "short_factor"):
                checked_option(f"RoPE {name}", value, kind)
                continue
            if not isinstance(value, list) or len(value) != num_factors:
                raise ValueError(f"the model's RoPE {name} must be {num_factors} (half a head), got {shown(value)}")
            for factor in value:
                checked_option(f"RoPE {name}", factor, kind)
        if rope_type == "llama3" and not options["low_freq_factor"] < options["high_freq_factor"]:
            low = options["low_freq_factor"]
            high = options["high_freq_factor"]
            raise ValueError(f"the model's RoPE high_freq_factor must be above low_freq_factor={low}, got {high}")
        if rope_type == "yarn" and theta <= 1:
            raise ValueError(f"the model's rope_theta must be above 1 for RoPE of type 'yarn', got {theta}")
        if rope_type == "longrope" and options[ORIGINAL_POSITIONS] <= 1:
            raise ValueError("the model's original_max_position_embeddings must be above 1 for RoPE of type 'longrope'")

    def check_same_model(self, other: "ModelConfig") -> None:
        """Raise ValueError if this model would compute something else with the weights of a checkpoint of `other`.

        Two configs of one model may have different names for its family and its RoPE, and rounded numbers: a GGUF file
        and transformers' config. So this compares what the options result in, such as RoPE's frequencies.
        """
        self._check_same_options(other)
        self._check_same_quantization(other)
        for index in range(self.num_layers):
            self._check_same_rope(other, index)

    def _check_same_options(self, other: "ModelConfig") -> None:
        options = _comparable(self)
        their_options = _comparable(other)
        for name in options | their_options:
            mine = options.get(name)
            theirs = their_options.get(name)
            if isinstance(mine, float) and isinstance(theirs, float):
                is_same = math.isclose(mine, theirs, rel_tol=1e-5)
            else:
                is_same = mine == theirs
            if not is_same:
                raise ValueError(f"the checkpoint's {name} is {shown(theirs)}, but the model's is {shown(mine)}")

    def _check_same_quantization(self, other: "ModelConfig") -> None:
        mine = None if self.quantization is None else self.quantization.layout
        theirs = None if other.quantization is None else other.quantization.layout
        quantizes = self.quantization is not None and self.quantization.quantizes
        if mine != theirs and not (theirs is None and quantizes):
            raise ValueError(f"the checkpoint's quantization is {theirs}, but the model's is {mine}")

    def _check_same_rope(self, other: "ModelConfig", index: int) -> None:
        """Compare the RoPE of one layer."""
        theta, scaling = self.rope(index)
        their_theta, their_scaling = other.rope(index)
        with torch.device("cpu"):  # not the caller's default device, which may be "meta"
            frequencies, factor = rope_frequencies(self.rotary_dim, theta, scaling)
            their_frequencies, their_factor = rope_frequencies(other.rotary_dim, their_theta, their_scaling)
            is_same = torch.allclose(frequencies, their_frequencies, rtol=1e-4, atol=0)
        is_same = is_same and _query_scaling(scaling) == _query_scaling(their_scaling)
        if not is_same or not math.isclose(factor, their_factor, rel_tol=1e-4):
            mine = f"{theta} scaled by {shown(scaling)}"
            theirs = f"{their_theta} scaled by {shown(their_scaling)}"
            raise ValueError(f"the checkpoint's RoPE is rope_theta={theirs}, but the model's is rope_theta={mine}")


def _query_scaling(scaling: dict[str, Any] | None) -> tuple | None:
    """Return the options of the factor by which queries grow with their position; None if they do not grow."""
    if scaling is None or scaling.get("llama_4_scaling_beta") is None:
        return None
    return scaling["llama_4_scaling_beta"], scaling.get(ORIGINAL_POSITIONS)


def _check_features(name: str, num_heads: int, head_dim: int) -> None:
    if num_heads * head_dim > _MAX_FEATURES:
        message = f"the model's {name} must have at most {_MAX_FEATURES} features together"
        raise ValueError(f"{message}, got {num_heads} heads of {head_dim}")


def _check_moe(moe: MoEConfig, num_layers: int) -> None:
    # 0 stands for no shared expert, and would be out of range as a size.
    has_shared_expert = moe.shared_intermediate_size != 0
    check_options(moe if has_shared_expert else replace(moe, shared_intermediate_size=1), "moe.")
    if moe.num_experts > MAX_EXPERTS:
        raise ValueError(f"the model's num_experts must be at most {MAX_EXPERTS}, got {moe.num_experts}")
    if num_layers * moe.num_experts > _MAX_ALL_EXPERTS:
        most = f"at most {_MAX_ALL_EXPERTS} experts in all layers together"
        raise ValueError(f"the model must have {most}, got {num_layers} layers of num_experts={moe.num_experts}")
    most = min(moe.num_experts, _MAX_EXPERTS_PER_TOKEN)
    if moe.experts_per_token > most:
        raise ValueError(f"the model's experts_per_token must be at most {most}, got {moe.experts_per_token}")


def _comparable(config: Any) -> dict[str, Any]:
    """Return the options that equal models share, by name: "moe.num_experts" if nested."""
    options = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _NOT_COMPARED:
            continue
        if is_dataclass(value):
            options |= {f"{field.name}.{name}": option for name, option in _comparable(value).items()}
        else:
            options[field.name] = value
    return options


def check_model_type(model_type: Any) -> None:
    """Raise ValueError unless `model_type` is one of FAMILIES."""
    if model_type not in tuple(FAMILIES):  # a tuple, as a value from a file may be unhashable
        raise unsupported(f"model type {shown(model_type)}")
