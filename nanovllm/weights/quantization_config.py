"""The `quantization_config` of checkpoints, and the tables of quantization schemes."""

from collections.abc import Callable, Iterable
from typing import Any

import regex

from nanovllm.checks import shown
from nanovllm.weights.fp8 import Block, Fp8Scheme
from nanovllm.weights.parameter import WHOLE
from nanovllm.weights.quantization import QuantizationScheme

_MAX_PATTERN = 500  # characters of a module's name or pattern
_MAX_NAMES = 10_000  # real checkpoints have some hundreds; each takes 1 ms


def read_scheme(options: Any) -> QuantizationScheme:
    """Read the `quantization_config` of a checkpoint.

    Raises:
        ValueError: it is not supported. The message is the part that is not supported.
    """
    options = options if isinstance(options, dict) else options.to_dict()
    method = options.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise ValueError(f"a quantization_config with quant_method={shown(method)}")
    return _READERS[method](options)


def _read_fp8(options: dict[str, Any]) -> QuantizationScheme:
    """Read the config of Qwen's and transformers' FP8 checkpoints."""
    _expect(options, fmt=("e4m3", None), activation_scheme=("dynamic",), scale_fmt=("float", None))
    _expect(options, expert_dtype=("fp8", None), modules_to_convert=(None, []))
    names = [*_names(options, "modules_to_not_convert"), *_names(options, "ignored_layers")]
    excluded = _one_pattern(map(_transformers_pattern, names))
    return Fp8Scheme(block=_block(options, "weight_block_size"), suffix="_scale_inv", excluded=excluded)


def _read_compressed_tensors(options: dict[str, Any]) -> QuantizationScheme:
    _expect(options, format=("float-quantized",), kv_cache_scheme=(None,), quantization_status=("compressed", None))
    _expect(options, sparsity_config=(None, {}), transform_config=(None, {}))
    groups = options.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError(f"a quantization_config with config_groups={shown(groups)}")
    (group,) = groups.values()
    group = group if isinstance(group, dict) else {}
    weights = group.get("weights")
    activations = group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(activations, dict):
        raise ValueError(f"a quantization_config without weights or input_activations in {shown(groups)}")
    for part in (weights, activations):
        _expect(part, num_bits=(8,), type=("float",), symmetric=(True, None))
    _expect(group, targets=(["Linear"],), output_activations=(None,))
    _expect(weights, strategy=("channel", "block"), dynamic=(False, None))
    is_blocks = weights["strategy"] == "block"
    _expect(activations, strategy=("group" if is_blocks else "token",), dynamic=(True,))
    block = _block(weights, "block_structure") if is_blocks else (1, WHOLE)
    excluded = _one_pattern(map(_compressed_tensors_pattern, _names(options, "ignore")))
    return Fp8Scheme(block=block, suffix="_scale", excluded=excluded)


def _expect(options: dict[str, Any], **allowed: tuple) -> None:
    """Raise ValueError unless each option has one of its allowed values. A missing option is None."""
    for name, values in allowed.items():
        value = options.get(name)
        if value not in values:
            raise ValueError(f"a quantization_config with {name}={shown(value)}")


def _block(options: dict[str, Any], name: str) -> Block:
    block = options.get(name)
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or any(type(size) is not int or not 1 <= size <= 1 << 16 for size in sizes):
        raise ValueError(f"a quantization_config with {name}={shown(block)}")
    return sizes[0], sizes[1]


def _names(options: dict[str, Any], name: str) -> list[str]:
    names = options.get(name) or []
    if not isinstance(names, list) or not all(isinstance(entry, str) and len(entry) <= _MAX_PATTERN for entry in names):
        raise ValueError(f"a quantization_config with {name}={shown(names)}")
    if len(names) > _MAX_NAMES:
        raise ValueError(f"a quantization_config with {len(names)} entries of {name}, more than {_MAX_NAMES},")
    return names


def _transformers_pattern(name: str) -> str:
    """Return a regex for the modules that transformers leaves out for this entry.

    The entry is a regex for the start of a module's name, up to a dot, or the text at the end of its name.
    """
    return rf"(?:{name})(?:(?<=\.)|(?=\.|$))|.*{regex.escape(name)}$"


def _compressed_tensors_pattern(name: str) -> str:
    """Return a regex for the modules that compressed-tensors leaves out: a name, or a regex after re:."""
    return name.removeprefix("re:") if name.startswith("re:") else rf"{regex.escape(name)}$"


def _one_pattern(patterns: Iterable[str]) -> str | None:
    """Return a regex for what any of the patterns matches, which takes less time than a list of regexes."""
    patterns = list(patterns)
    for pattern in patterns:
        try:
            regex.compile(f"(?:{pattern})")
        except regex.error as error:
            raise ValueError(f"a quantization_config with the pattern {shown(pattern)} ({error})") from None
    return "|".join(f"(?:{pattern})" for pattern in patterns) if patterns else None


# By the quant_method of checkpoints.
_READERS: dict[str, Callable[[dict[str, Any]], QuantizationScheme]] = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed_tensors,
}
# The schemes that `read_scheme` reads, for messages.
SUPPORTED = "FP8 with dynamic activations (quant_method 'fp8' with a weight_block_size, or 'compressed-tensors')"
# By the value of the option `quantization`, which Config checks.
SCHEMES: dict[str, QuantizationScheme] = {scheme.name: scheme for scheme in (Fp8Scheme(),)}
