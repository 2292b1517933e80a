"""FP8 weights: what a checkpoint's config says of them, their formats, and the choice of a layer's format."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import regex
import torch
from torch import nn

from nanovllm.checks import shown
from nanovllm.ops.comm.peer_memory import PeerMemory
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.fp8.experts import experts_fp8
from nanovllm.ops.fp8.linear import (
    choose_adder_fp8,
    gate_up_fp8,
    linear_add_fp8,
    linear_all_reduce_fp8,
    linear_fp8,
)
from nanovllm.ops.fp8.quantize import PendingSwiglu
from nanovllm.ops.fp8.reference import BLOCK, FP8, Block, dequantize, quantize_weight, scale_shape
from nanovllm.ops.moe.dispatch import FP8_TILINGS, expert_compile_sizes
from nanovllm.ops.moe.experts import is_expert_gemv
from nanovllm.weights.formats import (
    AllocateExperts,
    AllocateWeight,
    ExpertFormat,
    ExpertSizes,
    Plain,
    PlainExperts,
    WeightFormat,
)
from nanovllm.weights.parameter import (
    BAD_SCALE,
    FLOATS,
    CheckpointTensor,
    MergedTensor,
    check_dtype,
    check_shape,
    is_valid,
    make_parameter,
)

WHOLE_ROW = 1 << 30  # columns of a block that has whole rows, more than any weight has
# How configs spell the module that the decoder calls "model.x": with a part for text, or as transformers 4 did.
_SPELLINGS = ("model.", "model.language_model.", "language_model.model.")
_MAX_PATTERN = 500  # characters of a module's name or pattern
_MATCH_SECONDS = 5  # a usual pattern takes microseconds, some patterns practically for ever


@dataclass(frozen=True)
class Fp8Scheme:
    """How linear layers are quantised.

    Args:
        block: rows and columns of a weight that one scale covers.
        suffix: the end of a scale's name, behind the weight's name.
        excluded: a regex for the names of the checkpoint's modules that are not quantised; None if all are.
        quantizes: loading also quantises weights of higher precision (`quantization="fp8"`).
    """

    block: Block = (BLOCK, BLOCK)
    suffix: str = "_scale_inv"
    excluded: str | None = None
    quantizes: bool = False

    @classmethod
    def from_hf(cls, options: Any) -> "Fp8Scheme":
        """Read the `quantization_config` of a checkpoint.

        Raises:
            ValueError: it is not one of FP8 that is supported. The message is the part that is not supported.
        """
        options = options if isinstance(options, dict) else options.to_dict()
        method = options.get("quant_method")
        if method == "fp8":
            return cls._from_blocks(options)
        if method == "compressed-tensors":
            return cls._from_compressed_tensors(options)
        raise ValueError(f"a quantization_config with quant_method={shown(method)}")

    @classmethod
    def _from_blocks(cls, options: dict[str, Any]) -> "Fp8Scheme":
        """Read the config of Qwen's and transformers' FP8 checkpoints."""
        _expect(options, fmt=("e4m3", None), activation_scheme=("dynamic",), scale_fmt=("float", None))
        _expect(options, expert_dtype=("fp8", None), modules_to_convert=(None, []))
        names = [*_names(options, "modules_to_not_convert"), *_names(options, "ignored_layers")]
        excluded = _one_pattern(map(_transformers_pattern, names))
        return cls(_block(options, "weight_block_size"), "_scale_inv", excluded)

    @classmethod
    def _from_compressed_tensors(cls, options: dict[str, Any]) -> "Fp8Scheme":
        _expect(options, format=("float-quantized",), kv_cache_scheme=(None,), quantization_status=("compressed", None))
        _expect(options, sparsity_config=(None, {}), transform_config=(None, {}))
        groups = options.get("config_groups")
        if not isinstance(groups, dict) or len(groups) != 1:
            raise ValueError(f"a quantization_config with config_groups={shown(groups)}")
        (group,) = groups.values()
        group = group if isinstance(group, dict) else {}
        weights, activations = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, dict) or not isinstance(activations, dict):
            raise ValueError(f"a quantization_config without weights or input_activations in {shown(groups)}")
        for part in (weights, activations):
            _expect(part, num_bits=(8,), type=("float",), symmetric=(True, None))
        _expect(group, targets=(["Linear"],), output_activations=(None,))
        _expect(weights, strategy=("channel", "block"), dynamic=(False, None))
        is_blocks = weights["strategy"] == "block"
        _expect(activations, strategy=("group" if is_blocks else "token",), dynamic=(True,))
        block = _block(weights, "block_structure") if is_blocks else (1, WHOLE_ROW)
        excluded = _one_pattern(map(_compressed_tensors_pattern, _names(options, "ignore")))
        return cls(block, "_scale", excluded)

    @property
    def layout(self) -> str:
        """Describe what the checkpoint's tensors look like."""
        rows, columns = self.block
        blocks = "row" if columns == WHOLE_ROW else f"{rows} x {columns} values"
        return f"FP8 with a scale *{self.suffix} for each {blocks}"

    def scale_name(self, weight_name: str) -> str:
        """Return the name of a weight's scales."""
        return weight_name + self.suffix

    def weight_name(self, name: str) -> str:
        """Return the name of the weight to which the tensor of this name, a weight or scales, belongs."""
        return name.removesuffix(self.suffix)

    def covers(self, name: str) -> bool:
        """Return whether the module with this name in the checkpoint is quantised.

        Raises:
            ValueError: a pattern of the checkpoint takes too long.
        """
        if self.excluded is None:
            return True
        rest = name.removeprefix("model.")
        try:
            return not any(regex.match(self.excluded, prefix + rest, timeout=_MATCH_SECONDS) for prefix in _SPELLINGS)
        except TimeoutError:
            raise ValueError(
                f"a pattern of the checkpoint's quantization_config takes too long for the module {name}: "
                f"{shown(self.excluded)}"
            ) from None

    def allocate(
        self,
        rows: int,
        columns: int,
        *,
        dtype: torch.dtype | None,
        weight_loader: Callable[..., None],
        alignment: int,
    ) -> WeightFormat:
        """Make a weight that the checkpoint has in FP8; see AllocateWeight. It is Plain where no kernel can read it."""
        if not self._is_computed(dtype, columns):
            weight_format = Plain.allocate(rows, columns, dtype=dtype, weight_loader=weight_loader, alignment=alignment)
        else:
            params = self._make((rows, columns), weight_loader, alignment)
            weight_format = Fp8(*params, scale_name=f"weight{self.suffix}")
        _mark(weight_format.weight)
        return weight_format

    def allocate_experts(
        self,
        sizes: ExpertSizes,
        *,
        dtype: torch.dtype | None,
        load_gate_up: Callable[..., None],
        load_down: Callable[..., None],
    ) -> ExpertFormat:
        """Make experts that the checkpoint has in FP8; see AllocateExperts."""
        num_experts, hidden, inner, alignment = sizes
        if not self._is_computed(dtype, hidden, inner):
            expert_format = PlainExperts.allocate(sizes, dtype=dtype, load_gate_up=load_gate_up, load_down=load_down)
        else:
            gate_up = self._make((num_experts, 2 * inner, hidden), load_gate_up, alignment)
            down = self._make((num_experts, hidden, inner), load_down, alignment=0)
            expert_format = Fp8Experts(gate_up, down, self.suffix)
        _mark(expert_format.gate_up)
        _mark(expert_format.down)
        return expert_format

    def _is_computed(self, dtype: torch.dtype | None, *columns: int) -> bool:
        """Return whether the default device's kernels can read weights with so many columns."""
        if any(size % 16 for size in columns):  # rows of whole 16 bytes
            return False
        return has_fp8_kernels(torch.get_default_device(), dtype or torch.get_default_dtype(), self.block)

    def _make(
        self, shape: tuple[int, ...], weight_loader: Callable[..., None], alignment: int
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Make the parameters of a weight [..., N, K] and of its scales."""
        row_block = 1 if alignment % self.block[0] else self.block[0]
        scales = scale_shape(shape, (row_block, self.block[1]))
        options = {"weight_loader": weight_loader, "block": self.block, "row_block": row_block, "is_scale": True}
        weight = make_parameter(*shape, dtype=FP8, weight_loader=weight_loader)
        return weight, make_parameter(*scales, dtype=torch.float32, **options)


def has_fp8_kernels(device: torch.device, dtype: torch.dtype, block: Block) -> bool:
    """Return whether kernels can multiply activations of this dtype by FP8 weights with scales of such blocks."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9) and block in ((BLOCK, BLOCK), (1, WHOLE_ROW))


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
    return names


def _transformers_pattern(name: str) -> str:
    """Return a regex for the modules that transformers leaves out for this entry: a module's name, or its end."""
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


def _mark(param: nn.Parameter) -> None:
    """Remember that the checkpoint has this weight in FP8, whatever the parameter's dtype is."""
    param.is_fp8_in_checkpoint = True  # pyright: ignore[reportAttributeAccessIssue]


def is_fp8_in_checkpoint(param: nn.Parameter) -> bool:
    """Return whether the checkpoint has the weight in FP8, or loading quantises it."""
    return getattr(param, "is_fp8_in_checkpoint", False)


class LayerFormats(NamedTuple):
    """Chooses the formats of a layer's weights by the names of its modules in the checkpoint.

    Attributes:
        scheme: None if no weight is quantised.
        prefix: the name of the layer.
    """

    scheme: Fp8Scheme | None = None
    prefix: str = ""

    def of(self, child: str) -> "LayerFormats":
        """Return what chooses the formats of a part of the layer."""
        return LayerFormats(self.scheme, f"{self.prefix}.{child}")

    def are_fp8(self, *names: str) -> bool:
        """Return whether all these modules are in FP8."""
        return self.scheme is not None and all(self.scheme.covers(f"{self.prefix}.{name}") for name in names)

    def weight(self, *names: str) -> AllocateWeight:
        """Return what makes the weight that merges these modules."""
        return self.scheme.allocate if self.scheme is not None and self.are_fp8(*names) else Plain.allocate

    def experts(self) -> AllocateExperts:
        """Return what makes the weights of this layer, the experts: all are like the first one."""
        if self.scheme is None or not self.scheme.covers(self.prefix):
            return PlainExperts.allocate
        is_fp8 = self.are_fp8("0.gate_proj", "0.up_proj", "0.down_proj")
        return self.scheme.allocate_experts if is_fp8 else PlainExperts.allocate


PLAIN_FORMATS = LayerFormats()


class Fp8(WeightFormat):
    """A weight [N, K] in e4m3 with scales in float32, on a GPU; see ops/fp8 for their shapes.

    Args:
        scale_name: the last part of the scales' name in checkpoints.
    """

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, scale_name: str):
        self.weight, self.scale, self.scale_name = weight, scale, scale_name

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight, self.scale_name: self.scale}

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear_fp8(x, self.weight, self.scale, bias)

    def linear(self, x, bias=None, norm=None, gated=False, counters=None) -> torch.Tensor:
        return linear_fp8(x, self.weight, self.scale, bias, norm=norm, gated=gated, counters=counters)

    def gate_up(self, x, bias=None, norm=None, counters=None) -> torch.Tensor | PendingSwiglu:
        return gate_up_fp8(x, self.weight, self.scale, bias, norm=norm, counters=counters)

    def prepare(self, x: torch.Tensor | PendingSwiglu) -> torch.Tensor | PendingSwiglu:
        return x

    def linear_add(self, x, bias, residual, counters=None, peers=None) -> torch.Tensor:
        if peers is not None:
            return linear_all_reduce_fp8(x, self.weight, self.scale, bias, residual=residual, peers=peers)
        return linear_add_fp8(x, self.weight, self.scale, bias, residual=residual, counters=counters)

    def choose_adder(self, x: torch.Tensor, residual: torch.Tensor, ranks: int, peers: PeerMemory | None) -> Adder:
        return choose_adder_fp8(x, self.weight, residual, ranks=ranks, peers=peers)


class Fp8Experts(ExpertFormat):
    """Experts in e4m3 with scales in float32, on a GPU.

    Args:
        gate_up, down: a weight and its scales each.
        suffix: the end of the scales' names in checkpoints.
    """

    def __init__(
        self, gate_up: tuple[nn.Parameter, nn.Parameter], down: tuple[nn.Parameter, nn.Parameter], suffix: str
    ):
        self.gate_up, self.gate_up_scale = gate_up
        self.down, self.down_scale = down
        self.suffix = suffix

    @property
    def parameters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        return {"": (self.gate_up, self.down), self.suffix: (self.gate_up_scale, self.down_scale)}

    def fuses_norm(self, x: torch.Tensor, top_k: int) -> bool:
        return is_expert_gemv(x, self.down, top_k)

    def compile_sizes(self, top_k: int, max_tokens: int) -> list[int]:
        return expert_compile_sizes(len(self.down), top_k, max_tokens, FP8_TILINGS)

    def run(self, x, ids, weights, norm=None, residual=None, shared=None) -> torch.Tensor:
        operands = self.gate_up, self.gate_up_scale, self.down, self.down_scale
        return experts_fp8(x, *operands, ids, weights, norm=norm, residual=residual, shared=shared)


class Fp8Loading:
    """Converts a checkpoint's tensors into what the parameters hold, where the two differ.

    A parameter may be in higher precision than the checkpoint: its weight and scale then wait for each other, and are
    multiplied. With `quantizes`, a weight of higher precision becomes a weight and a scale.

    Args:
        targets: the targets of the checkpoint's tensors, by name.
        merged: the parts of merged tensors, by the names of these and of the targets.
    """

    def __init__(
        self,
        scheme: Fp8Scheme,
        targets: Mapping[str, CheckpointTensor],
        merged: Mapping[str, Mapping[str, MergedTensor]],
    ):
        self.scheme, self.targets, self.merged = scheme, targets, merged
        self.waiting: dict[str, torch.Tensor] = {}
        self.paired: set[str] = set()

    def dequantized(self, name: str, loaded: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Return a tensor of the checkpoint and its name. It is the product of weight and scale if no parameter is FP8.

        Returns:
            None if the tensor waits for its scale or its weight.

        Raises:
            ValueError: a scale does not fit its weight. The message has the scale's name.
        """
        weight_name = self.scheme.weight_name(name)
        scale_name = self.scheme.scale_name(weight_name)
        is_pair = name == scale_name or loaded.dtype == FP8
        if not is_pair or not self._is_known(weight_name) or self._is_known(scale_name):
            return name, loaded
        if name in self.waiting or weight_name in self.paired:
            raise ValueError(f"the checkpoint has the tensor {name:.200} twice")
        self.waiting[name] = loaded
        if not {weight_name, scale_name} <= self.waiting.keys():
            return None
        self.paired.add(weight_name)
        weight, scale = self.waiting.pop(weight_name), self.waiting.pop(scale_name)
        if weight.dtype != FP8:
            raise ValueError(f"the tensor {weight_name:.200} has dtype {weight.dtype}, but its scale needs {FP8}")
        try:
            return weight_name, self._multiply(weight, scale, self._device(weight_name))
        except ValueError as error:
            raise ValueError(f"the tensor {scale_name:.200} {error}") from None

    def _multiply(self, weight: torch.Tensor, scale: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the weight in float32. Raise ValueError if the scale is malformed."""
        block = self.scheme.block
        check_dtype(scale, torch.float32)
        check_shape(scale, scale_shape(tuple(weight.shape), block))
        scale = scale.to(device, torch.float32)
        if not is_valid(scale, is_scale=True):
            raise ValueError(BAD_SCALE)
        return dequantize(weight.to(device), scale, block, torch.float32)

    def has_dequantized(self, name: str) -> bool:
        """Return whether a weight of this name has been dequantised."""
        return name in self.paired

    def quantized(self, name: str, loaded: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what to load, by name, for the tensor `loaded`: two tensors if it is quantised, or else itself.

        Raises:
            ValueError: it should be in FP8, but is of higher precision, and the scheme does not quantise it.
        """
        target, block = self.targets.get(name), self.scheme.block
        if target is None or not is_fp8_in_checkpoint(target.param) or loaded.dtype not in FLOATS:
            return {name: loaded}
        if not self.scheme.quantizes:
            hint = "quantization='fp8' quantises weights while they load"
            raise ValueError(f"has dtype {loaded.dtype}, but the model needs {FP8}; {hint}")
        check_shape(loaded, target.shape)
        weight, scale = quantize_weight(loaded.to(target.param.device), block)
        scale_name = self.scheme.scale_name(name)
        if scale_name in self.targets:
            return {name: weight, scale_name: scale}
        return {name: dequantize(weight, scale, block, torch.float32)}

    def keep(self) -> None:
        """Copy the tensors that wait, because the caller may overwrite them."""
        self.waiting = {name: tensor.clone() for name, tensor in self.waiting.items()}

    def missing(self) -> dict[str, str]:
        """Return the tensors that wait, and the weight or scale that each lacks."""
        weight_name, scale_name = self.scheme.weight_name, self.scheme.scale_name
        names = {name: weight_name(name) for name in self.waiting}
        return {name: scale_name(name) if weight == name else weight for name, weight in names.items()}

    def _is_known(self, name: str) -> bool:
        return name in self.targets or name in self.merged

    def _device(self, name: str) -> torch.device:
        """Return the device of the parameter that loads this tensor."""
        return self.targets[name if name in self.targets else next(iter(self.merged[name]))].param.device
