"""Quantization schemes: how checkpoints store quantized weights, and what loading makes of them.

To add one, subclass QuantizationScheme in a module of its own, and enter it in the tables of quantization_config.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import regex
import torch

from nanovllm.checks import shown
from nanovllm.weights.formats import ExpertFormat, ExpertSizes, Plain, PlainExperts, WeightFormat
from nanovllm.weights.parameter import (
    BAD_SCALE,
    FLOATS,
    CheckpointTensor,
    MergedTensor,
    WeightLoader,
    check_dtype,
    check_shape,
    is_quantized_in_checkpoint,
    is_valid,
    mark_quantized,
)

# How configs spell the module that the decoder calls "model.x": with a part for text, or as transformers 4 did.
_SPELLINGS = ("model.", "model.language_model.", "language_model.model.")
_MATCH_SECONDS = 5  # a usual pattern takes microseconds, some patterns practically for ever


class StoredTensor(NamedTuple):
    """A tensor that a checkpoint has for a quantized weight. `is_scale` says whether it has scales."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantizationScheme(ABC):
    """How a checkpoint stores the weights of linear layers and experts, and which formats compute with them.

    Args:
        excluded: a regex for the names of the checkpoint's modules that are not quantized; None if all are.
        quantizes: loading also quantizes weights of higher precision.

    Attributes:
        name: the value of the option `quantization` that sets `quantizes`.
    """

    name: ClassVar[str]
    excluded: str | None = None
    quantizes: bool = False

    @property
    @abstractmethod
    def layout(self) -> str:
        """Describe what the checkpoint's tensors look like. Only checkpoints of the same layout update a model."""

    @abstractmethod
    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        """Return the tensors that the checkpoint has for a weight [..., N, K] of this name, by their names."""

    @abstractmethod
    def weight_name(self, name: str, dtype: torch.dtype) -> str | None:
        """Return the name of the weight that a checkpoint's tensor belongs to; None if it is not quantized."""

    @abstractmethod
    def quantize(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the `stored` tensors for a float weight."""

    @abstractmethod
    def dequantize(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight in float32. The `stored` tensors have been checked."""

    @abstractmethod
    def has_kernels(self, device: torch.device, dtype: torch.dtype, columns: tuple[int, ...]) -> bool:
        """Return whether kernels multiply activations of this dtype by quantized weights with each number of columns.

        If not, parameters are plain, and loading dequantizes.
        """

    @abstractmethod
    def make_weight(
        self, rows: int, columns: int, *, dtype: torch.dtype | None, weight_loader: WeightLoader, alignment: int
    ) -> WeightFormat:
        """Make a weight for the kernels; see AllocateWeight. Its parameters have the names and dtypes of `stored`."""

    @abstractmethod
    def make_experts(
        self, sizes: ExpertSizes, *, dtype: torch.dtype | None, load_gate_up: WeightLoader, load_down: WeightLoader
    ) -> ExpertFormat:
        """Make experts for the kernels; see AllocateExperts."""

    def allocate(self, rows: int, columns: int, *, dtype: torch.dtype | None, **options: Any) -> WeightFormat:
        """Make a weight that the checkpoint has quantized, plain where no kernel can read it; see AllocateWeight."""
        make = self.make_weight if self._is_computed(dtype, columns) else Plain.allocate
        weight_format = make(rows, columns, dtype=dtype, **options)
        mark_quantized(weight_format.parameters.values())
        return weight_format

    def allocate_experts(self, sizes: ExpertSizes, *, dtype: torch.dtype | None, **options: Any) -> ExpertFormat:
        """Make experts that the checkpoint has quantized, plain where no kernel can read them; see AllocateExperts."""
        is_computed = self._is_computed(dtype, sizes.hidden, sizes.inner)
        make = self.make_experts if is_computed else PlainExperts.allocate
        expert_format = make(sizes, dtype=dtype, **options)
        for params in expert_format.parameters.values():
            mark_quantized(params)
        return expert_format

    def _is_computed(self, dtype: torch.dtype | None, *columns: int) -> bool:
        device = torch.get_default_device()
        # On "meta", all weights are plain: `check_shapes` and `dummy_weights` ask the scheme what a checkpoint has.
        return device.type != "meta" and self.has_kernels(device, dtype or torch.get_default_dtype(), columns)

    def covers(self, name: str) -> bool:
        """Return whether the module with this name in the checkpoint is quantized.

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


class QuantizedLoading:
    """Converts a checkpoint's tensors into what the parameters hold, where the two differ.

    A parameter may be in higher precision than the checkpoint: the tensors of its weight then wait for one another, and
    are dequantized. If the scheme `quantizes`, a weight of higher precision is quantized.

    Args:
        targets: the targets of the checkpoint's tensors, by name.
        merged: the parts of merged tensors, by the names of these and of the targets.
    """

    def __init__(
        self,
        scheme: QuantizationScheme,
        targets: Mapping[str, CheckpointTensor],
        merged: Mapping[str, Mapping[str, MergedTensor]],
    ):
        self.scheme, self.targets = scheme, targets
        shapes = {name: target.shape for name, target in targets.items()}
        shapes |= {name: part.shape for name, parts in merged.items() for part in parts.values()}
        self.stored = {name: scheme.stored(name, shape) for name, shape in shapes.items() if len(shape) > 1}
        self.known = shapes.keys()
        self.device = next(iter(targets.values())).param.device
        # By the names of weights and of their tensors.
        self.waiting: dict[str, dict[str, torch.Tensor]] = {}
        self.dequantized: set[str] = set()

    def dequantize_if_needed(self, name: str, loaded: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Return the tensor to load, and its name: the weight if no parameter holds it quantized, or else `loaded`.

        Returns:
            None if the tensor waits for others of its weight.

        Raises:
            ValueError: a tensor does not fit the weight. The message has its name.
        """
        weight_name = self.scheme.weight_name(name, loaded.dtype)
        stored = self.stored.get(weight_name or "", {})
        if weight_name is None or name not in stored or stored.keys() <= self.known:
            return name, loaded
        waiting = self.waiting.setdefault(weight_name, {})
        if name in waiting or weight_name in self.dequantized:
            raise ValueError(f"the checkpoint has the tensor {name:.200} twice")
        waiting[name] = loaded
        if waiting.keys() != stored.keys():
            return None
        del self.waiting[weight_name]
        self.dequantized.add(weight_name)
        tensors = {}
        for part, expected in stored.items():
            try:
                check_dtype(waiting[part], expected.dtype)
                check_shape(waiting[part], expected.shape)
                tensors[part] = waiting[part].to(self.device)
                if expected.is_scale and not is_valid(tensors[part], is_scale=True):
                    raise ValueError(BAD_SCALE)
            except ValueError as error:
                raise ValueError(f"the tensor {part:.200} {error}") from None
        return weight_name, self.scheme.dequantize(weight_name, tensors)

    def quantize_if_needed(self, name: str, loaded: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what to load, by name, for the tensor `loaded`: the tensors of a quantized weight, or else itself.

        Raises:
            ValueError: it should be quantized, but is of higher precision, and the scheme does not quantize it.
        """
        target = self.targets.get(name)
        if target is None or not is_quantized_in_checkpoint(target.param) or loaded.dtype not in FLOATS:
            return {name: loaded}
        if not self.scheme.quantizes:
            needed, *_ = self.stored[name].values()
            hint = f"quantization={self.scheme.name!r} quantizes weights while they load"
            raise ValueError(f"has dtype {loaded.dtype}, but the model needs {needed.dtype}; {hint}")
        check_shape(loaded, target.shape)
        tensors = self.scheme.quantize(name, loaded.to(self.device))
        return tensors if tensors.keys() <= self.targets.keys() else {name: self.scheme.dequantize(name, tensors)}

    def copy_waiting(self) -> None:
        """Copy the tensors that wait, because the caller may overwrite them."""
        for tensors in self.waiting.values():
            tensors.update({name: tensor.clone() for name, tensor in tensors.items()})

    def missing(self) -> dict[str, set[str]]:
        """Return the names of the tensors that each waiting weight lacks."""
        return {weight: self.stored[weight].keys() - tensors.keys() for weight, tensors in self.waiting.items()}
