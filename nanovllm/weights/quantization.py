"""Quantization schemes: how checkpoints store quantized weights, and what loading makes of them.

docs/architecture.md says how to add a weight format.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import regex
import torch
from torch import nn

from nanovllm.checks import shown
from nanovllm.weights.formats import ExpertFormat, ExpertSizes, Plain, PlainExperts, WeightFormat
from nanovllm.weights.parameter import (
    BAD_SCALE,
    FLOATS,
    CheckpointTensor,
    MergedTensor,
    Storage,
    WeightLoader,
    check_dtype,
    check_shape,
    is_valid,
    row_block_of,
    set_storage,
    storage_of,
)

# How configs spell the module that the decoder calls "model.x": with a part for text, or as transformers 4 did.
_SPELLINGS = ("model.", "model.language_model.", "language_model.model.")
_MATCH_SECONDS = 5  # a usual pattern takes microseconds, some patterns practically for ever


class StoredTensor(NamedTuple):
    """A tensor that a checkpoint has for a quantized weight: its values, scales or zero points.

    Attributes:
        is_scale: whether it has scales. Loading refuses negative ones.
    """

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
        name: the scheme's name in messages, and the value of the option `quantization` if
            `quantization_config.SCHEMES` has it.
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
        """Return the tensors that the checkpoint must have for a weight [..., N, K] of this name, by their names.

        Their order, such as values before scales, is the same for all weights.
        """

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Return other tensors that the checkpoint may have for the weight, such as its shape, by their names.

        They repeat what the scheme and the model's config say. Loading compares the values, and drops the tensor.
        """
        return {}

    @abstractmethod
    def weight_name(self, name: str, dtype: torch.dtype) -> str | None:
        """Return the name of the weight that a tensor of `stored` or `constants` belongs to; None if it is neither."""

    def arrange(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a `stored` tensor as its parameter loads it: by rows and columns of the weight.

        It differs from the checkpoint's tensor if that is transposed, or has no dimensions, such as a single scale. The
        tensor may also have a wrong number of dimensions: return it, and loading refuses it.
        """
        return tensor

    @abstractmethod
    def quantize(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the `stored` tensors for a float weight."""

    @abstractmethod
    def dequantize(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight in float32. The `stored` tensors have been checked."""

    @abstractmethod
    def has_kernels(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        """Return whether kernels multiply activations of this dtype by a quantized weight of this shape.

        If not, the parameter is plain, and loading dequantizes.

        Args:
            shape: of this rank's shard: [N, K] for a linear layer, [E, N, K] for experts.
        """

    @abstractmethod
    def make_weight(
        self, rows: int, columns: int, *, dtype: torch.dtype | None, weight_loader: WeightLoader, row_alignment: int
    ) -> WeightFormat:
        """Make a weight for the kernels; see AllocateWeight. Its parameters have the names and dtypes of `stored`."""

    def make_experts(
        self, sizes: ExpertSizes, *, dtype: torch.dtype | None, load_gate_up: WeightLoader, load_down: WeightLoader
    ) -> ExpertFormat:
        """Make experts for the kernels; see AllocateExperts. A scheme without kernels for experts has no such method.

        Its `has_kernels` returns False for their shapes.
        """
        raise NotImplementedError(f"{self.layout} has no kernels for experts")

    def allocate(
        self, rows: int, columns: int, *, dtype: torch.dtype | None, row_alignment: int, **options: Any
    ) -> WeightFormat:
        """Make a weight that the checkpoint has quantized, plain where no kernel can read it; see AllocateWeight."""
        has_kernels = self._has_kernels_here(dtype, (rows, columns))
        make = self.make_weight if has_kernels else Plain.allocate
        weight_format = make(rows, columns, dtype=dtype, row_alignment=row_alignment, **options)
        self._check_and_mark(weight_format.parameters.values(), has_kernels, row_alignment)
        return weight_format

    def allocate_experts(self, sizes: ExpertSizes, *, dtype: torch.dtype | None, **options: Any) -> ExpertFormat:
        """Make experts that the checkpoint has quantized, plain where no kernel can read them; see AllocateExperts."""
        has_kernels = self._has_kernels_here(dtype, sizes.gate_up_shape, sizes.down_shape)
        make = self.make_experts if has_kernels else PlainExperts.allocate
        expert_format = make(sizes, dtype=dtype, **options)
        gate_up, down = zip(*expert_format.parameters.values(), strict=True)
        self._check_and_mark(gate_up, has_kernels, sizes.row_alignment)
        self._check_and_mark(down, has_kernels, row_alignment=0)
        return expert_format

    def _check_and_mark(self, params: Iterable[nn.Parameter], has_kernels: bool, row_alignment: int) -> None:
        """Mark the parameters of a weight. Raise ValueError if a shard could split one of their blocks of rows."""
        for param in params:
            if row_alignment % row_block_of(param):
                raise ValueError(
                    f"shards that start at multiples of {row_alignment} rows split the blocks of {row_block_of(param)} "
                    f"rows in a weight in {self.layout}; another tensor_parallel_size may not"
                )
            set_storage(param, Storage.QUANTIZED if has_kernels else Storage.DEQUANTIZED)

    def _has_kernels_here(self, dtype: torch.dtype | None, *shapes: tuple[int, ...]) -> bool:
        """Return whether the default device has kernels for all of these shapes."""
        device = torch.get_default_device()
        dtype = dtype or torch.get_default_dtype()
        # On "meta", all weights are plain: `check_shapes` and `dummy_weights` ask the scheme what a checkpoint has.
        return device.type != "meta" and all(self.has_kernels(device, dtype, shape) for shape in shapes)

    def covers(self, name: str) -> bool:
        """Return whether the module with this name in the checkpoint is quantized.

        Raises:
            ValueError: a pattern of the checkpoint takes too long.
        """
        return self.excluded is None or not _is_excluded(self.excluded, name)


@lru_cache(maxsize=1 << 16)  # a start makes the layers several times, and each match of a long list takes 1 ms
def _is_excluded(pattern: str, name: str) -> bool:
    """Return whether the pattern matches the module in one of its spellings."""
    rest = name.removeprefix("model.")
    try:
        return any(regex.match(pattern, prefix + rest, timeout=_MATCH_SECONDS) for prefix in _SPELLINGS)
    except TimeoutError:
        message = f"a pattern of the checkpoint's quantization_config takes too long for the module {name}"
        raise ValueError(f"{message}: {shown(pattern)}") from None


class QuantizedLoading:
    """Converts a checkpoint's tensors into what the parameters hold, where the two differ.

    A parameter may be in higher precision than the checkpoint: the tensors of its weight then wait for one another, and
    are dequantized. If the scheme `quantizes`, a weight of higher precision is quantized.

    Args:
        targets: the targets of the checkpoint's tensors, by name.
        merged: the parts of each merged tensor, by its name, and then by the names of their targets.
        read_shapes: returns the shapes that the checkpoint's tensors, separate and merged, would have if none was
            quantized, by name. It is called only if they are needed, because it takes time.

    Attributes:
        kept: the names of the weights that stay quantized: their parameters are those of a quantized format.
        dequantized: the names of the weights that have been dequantized.
    """

    def __init__(
        self,
        scheme: QuantizationScheme,
        targets: Mapping[str, CheckpointTensor],
        merged: Mapping[str, Mapping[str, MergedTensor]],
        read_shapes: Callable[[], Mapping[str, tuple[int, ...]]],
    ):
        self.scheme, self.targets, self.read_shapes = scheme, targets, read_shapes
        self.loadable_names = targets.keys() | merged.keys()
        self.device = next(iter(targets.values())).param.device
        params = {name: [target.param] for name, target in targets.items()}
        params |= {name: [targets[part].param for part in parts] for name, parts in merged.items()}
        self.kept: set[str | None] = set()
        for name, tensor_params in params.items():
            if all(storage_of(param) is Storage.QUANTIZED for param in tensor_params):
                self.kept.add(scheme.weight_name(name, tensor_params[0].dtype))
        # By the names of weights and of their tensors.
        self.waiting: dict[str, dict[str, torch.Tensor]] = {}
        self.dequantized: set[str] = set()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the matrices among the checkpoint's tensors: any of them may be quantized there."""
        return {name: shape for name, shape in self.read_shapes().items() if len(shape) > 1}

    @cached_property
    def stored(self) -> dict[str, dict[str, StoredTensor]]:
        """The tensors that the checkpoint has for each matrix that is quantized, by the names of both."""
        return {name: self.scheme.stored(name, shape) for name, shape in self.shapes.items()}

    def receive(self, name: str, loaded: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what to load, by name, now that the checkpoint's tensor `loaded` has arrived.

        Returns:
            The tensor, as its parameter loads it. If no parameter holds its weight quantized: the dequantized weight if
            this is its last tensor, and nothing while others are missing. Nothing for a constant.

        Raises:
            ValueError: a tensor does not fit the weight. The message has its name.
        """
        weight_name = self.scheme.weight_name(name, loaded.dtype)
        if weight_name is None:
            return {name: loaded}
        is_kept = weight_name in self.kept
        if is_kept and name in self.loadable_names:
            arranged = self.scheme.arrange(name, loaded)
            if arranged is not loaded:
                _check(name, loaded, self.stored[weight_name][name])
            return {name: arranged}
        if weight_name in self.shapes:
            constant = self.scheme.constants(weight_name, self.shapes[weight_name]).get(name)
            if constant is not None:
                _check_constant(name, loaded, constant)
                return {}
            if not is_kept and name in self.stored[weight_name]:
                return self._dequantize_last(weight_name, name, loaded)
        return {name: loaded}

    def _dequantize_last(self, weight_name: str, name: str, loaded: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the dequantized weight if `loaded` is its last tensor. Otherwise let the tensor wait."""
        stored = self.stored[weight_name]
        waiting = self.waiting.setdefault(weight_name, {})
        if name in waiting or weight_name in self.dequantized:
            raise ValueError(f"the checkpoint has the tensor {name:.200} twice")
        waiting[name] = loaded
        if waiting.keys() != stored.keys():
            waiting[name] = loaded.clone()  # the caller may overwrite it once it makes the next tensor
            return {}
        del self.waiting[weight_name]
        self.dequantized.add(weight_name)
        for part, expected in stored.items():
            _check(part, waiting[part], expected)
            waiting[part] = waiting[part].to(self.device)
            if expected.is_scale and not is_valid(waiting[part], is_scale=True):
                raise ValueError(f"the tensor {part:.200} {BAD_SCALE}")
        return {weight_name: self.scheme.dequantize(weight_name, waiting)}

    def quantize_if_needed(self, name: str, loaded: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what to load, by name, for `loaded`, which goes to the target `name`.

        This is `loaded` itself, unless it is in higher precision and the checkpoint should have it quantized.

        Raises:
            ValueError: `loaded` should be quantized, but the scheme does not quantize while loading.
        """
        target = self.targets[name]
        is_quantized_weight = name in self.kept or storage_of(target.param) is Storage.DEQUANTIZED
        if not is_quantized_weight or loaded.dtype not in FLOATS:
            return {name: loaded}
        if not self.scheme.quantizes:
            hint = f"quantization={self.scheme.name!r} quantizes weights while they load"
            raise ValueError(f"has dtype {loaded.dtype}, but the model needs {self.scheme.layout}; {hint}")
        check_shape(loaded, target.shape)
        tensors = self.scheme.quantize(name, loaded.to(self.device))
        if name not in self.kept:
            return {name: self.scheme.dequantize(name, tensors)}
        return {part: self.scheme.arrange(part, tensor) for part, tensor in tensors.items()}

    def missing(self) -> dict[str, set[str]]:
        """Return the names of the tensors that each waiting weight lacks."""
        return {weight: self.stored[weight].keys() - tensors.keys() for weight, tensors in self.waiting.items()}


def _check(name: str, loaded: torch.Tensor, expected: StoredTensor) -> None:
    """Raise ValueError with the tensor's name unless dtype and shape are those that the checkpoint must have."""
    try:
        check_dtype(loaded, expected.dtype)
        check_shape(loaded, expected.shape)
    except ValueError as error:
        raise ValueError(f"the tensor {name:.200} {error}") from None


def _check_constant(name: str, loaded: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise ValueError with the tensor's name unless it has these values."""
    if loaded.shape != expected.shape or not torch.equal(loaded.to(expected), expected):
        raise ValueError(
            f"the tensor {name:.200} is {shown(loaded.tolist())}, but the model needs {shown(expected.tolist())}"
        )
