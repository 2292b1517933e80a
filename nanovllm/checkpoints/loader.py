"""Read checkpoints and copy their tensors into a decoder: strictly, one tensor at a time."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanovllm.checkpoints.files import MissingFileError, local_path, regular_file
from nanovllm.checks import plain, shown
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.linear import LinearLayer
from nanovllm.library_errors import refusing
from nanovllm.models.decoder import Decoder
from nanovllm.models.families import FAMILIES
from nanovllm.models.model_config import ModelConfig
from nanovllm.progress import ProgressBar
from nanovllm.weights.parameter import (
    BAD_SCALE,
    CheckpointTensor,
    MergedTensor,
    Storage,
    is_scale,
    is_valid,
    storage_of,
)
from nanovllm.weights.quantization import QuantizedLoading

logger = logging.getLogger(__name__)

# A checkpoint with tied embeddings has either tensor, or both.
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_TIED = {_EMBEDDING: _HEAD, _HEAD: _EMBEDDING}
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
# The supported dtypes, by their names in safetensors files.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLED = (".bin", ".pt", ".pth")
_DIFFERENT_HEAD = (
    f"the tensor {_HEAD} differs from the embedding, but the model was loaded with one parameter for both; "
    "make a new engine"
)


def _full_name(name: str) -> str:
    """Return the tensor's name with the prefix "model.".

    Checkpoints without the head leave it out. Those with more than text have one of _PREFIXES.
    """
    if name in (_HEAD, f"language_model.{_HEAD}"):
        return _HEAD
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return f"model.{name.removeprefix(prefix)}"


def _is_skipped(config: ModelConfig, name: str) -> bool:
    """Return whether checkpoints may have this tensor, but the model does not load it.

    Old checkpoints have tensors that the model computes.
    """
    return name.endswith("rotary_emb.inv_freq") or name.startswith(FAMILIES[config.model_type].unused_tensors)


def _meta_targets(config: ModelConfig) -> dict[str, CheckpointTensor]:
    """Return the tensors that a checkpoint of this model must have, by name. Allocate nothing."""
    with torch.device("meta"):
        return Decoder(config, tp=TensorParallel()).checkpoint_tensors()


def _is_quantized(target: CheckpointTensor) -> bool:
    """Return whether the checkpoint has one of `_meta_targets` quantized."""
    return storage_of(target.param) is not Storage.PLAIN


def _merged_tensors(targets: Mapping[str, CheckpointTensor]) -> dict[str, dict[str, MergedTensor]]:
    """Return the merged tensors that a checkpoint may have in place of some targets: by name, and then by target."""
    merged: dict[str, dict[str, MergedTensor]] = {}
    for name, target in targets.items():
        if target.merged is not None:
            merged.setdefault(target.merged.name, {})[name] = target.merged
    return merged


def _shapes(
    targets: Mapping[str, CheckpointTensor], merged: Mapping[str, Mapping[str, MergedTensor]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of separate and merged tensors, by name."""
    shapes = {name: target.shape for name, target in targets.items()}
    return shapes | {part.name: part.shape for parts in merged.values() for part in parts.values()}


def _unknown_tensor(name: str) -> ValueError:
    return ValueError(f"the checkpoint has the tensor {name:.200}, which the model does not have")


def _check_complete(config: ModelConfig, needed: Iterable[str], found: Iterable[str]) -> None:
    """Raise ValueError with the names of tensors of `needed` that are not in `found`."""
    found = set(found)
    if config.tie_word_embeddings:  # one of the two tied tensors is enough
        found |= {_HEAD} | ({_EMBEDDING} if _HEAD in found else set())
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:8])}")


def check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a config's sizes with a checkpoint's tensors, before memory of these sizes is allocated.

    Args:
        shapes: the shape of each tensor of the checkpoint, by its name there.

    Raises:
        ValueError: a tensor is missing, unknown, or has another shape than the config's sizes imply.
    """
    names = map(_full_name, shapes)
    layers = {match[1] for match in map(re.compile(r"model\.layers\.(\d+)\.").match, names) if match}
    if config.num_layers > len(layers):
        raise ValueError(f"the model's num_layers is {config.num_layers}, but the checkpoint has {len(layers)} layers")
    targets = _meta_targets(config)
    merged = _merged_tensors(targets)
    allowed = _shapes(targets, merged)
    needed = list(targets)
    parts_of = {name: list(parts) for name, parts in merged.items()}
    if (scheme := config.quantization) is not None:
        # Any matrix may be quantized in the checkpoint, also one that is merged with others that are not.
        matrices = {name: shape for name, shape in allowed.items() if len(shape) > 1}
        stored = {name: scheme.stored(name, shape) for name, shape in matrices.items()}
        for weight, shape in matrices.items():
            allowed |= {name: tensor.shape for name, tensor in stored[weight].items()}
            allowed |= {name: tuple(tensor.shape) for name, tensor in scheme.constants(weight, shape).items()}
        needed = []
        for name, target in targets.items():
            needed += stored[name] if _is_quantized(target) else [name]
        for name, parts in merged.items():
            if name in stored:
                rows = zip(stored[name], *(stored[part] for part in parts), strict=True)
                parts_of |= {whole: list(names) for whole, *names in rows}
    found: set[str] = set()
    for given, shape in shapes.items():
        name = _full_name(given)
        if _is_skipped(config, given):
            continue
        if name not in allowed:
            raise _unknown_tensor(given)
        if tuple(shape) != allowed[name]:
            has = shown(list(shape))
            raise ValueError(f"the tensor {given:.200} has shape {has}, but the model needs {list(allowed[name])}")
        found.update(parts_of.get(name, (name,)))
    _check_complete(config, needed, found)


@dataclass
class _LayerPart:
    """A layer's weight while it is loaded.

    Attributes:
        targets: all tensors of the weight, by name.
        lacking: the names of those that were not loaded yet.
    """

    layer: LinearLayer
    targets: dict[str, CheckpointTensor] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)


class WeightUpdate:
    """Copy a whole checkpoint into a decoder's parameters: in place, and in any number of parts.

    All ranks of a group must make the same calls: at the end they agree on whether the weights are valid. Until
    `finish` returns the parameters may be partly overwritten. After an error only a new update can complete them.

    Args:
        model: the decoder. Its weights become writable.
    """

    def __init__(self, model: Decoder):
        self.model = model
        self.seen: set[str] = set()
        # Whether the checkpoint's head differs from its embedding: a bool on the device, if one parameter is both.
        self.head_differs: torch.Tensor | None = None
        self.layers = [
            module for module in model.modules() if isinstance(module, (LinearLayer, VocabParallelEmbedding))
        ]
        # Whether the tensors of finished layers are valid: bools on the device, by name.
        self.valid: dict[str, torch.Tensor] = {}
        # Parameters made in inference mode can only be written in it.
        with torch.inference_mode():
            for layer in self.layers:
                layer.format = layer.format.start_loading()
        self.targets = model.checkpoint_tensors()
        self.merged = _merged_tensors(self.targets)
        scheme = model.config.quantization
        self.quantized = None
        if scheme is not None:
            self.quantized = QuantizedLoading(scheme, self.targets, self.merged, self._plain_shapes)
        # The weights that can be finished before all are loaded, by the names of their tensors.
        self.parts: dict[str, _LayerPart] = {}
        # On a GPU, a finished weight takes no less memory. The head may be the embedding, which is compared with it.
        if model.embed_tokens.weight.device.type == "cpu":
            by_param = _by_param(self.targets)
            for layer in self.layers:
                if isinstance(layer, LinearLayer) and layer is not model.lm_head:
                    part = _LayerPart(layer)
                    for param in layer.format.parameters.values():
                        part.targets |= by_param.get(param, {})
                    part.lacking = set(part.targets)
                    self.parts |= dict.fromkeys(part.targets, part)

    def _plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the checkpoint's tensors would have if none was quantized."""
        targets = _meta_targets(self.model.config)
        return _shapes(targets, _merged_tensors(targets))

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy some tensors. Each rank takes its shards. Return their names.

        Args:
            weights: the checkpoint's transformers names and whole tensors, each once in all calls and in any order.
                This method holds one of them at a time.

        Raises:
            ValueError: a tensor is unknown, given twice, or of the wrong dtype or shape.
        """
        names: set[str] = set()
        bar = ProgressBar(
            self._separate(weights, names),
            desc="Loading weights",
            total=len(self.targets) - len(self.seen),
            enabled=False if self.model.tp.rank else None,  # None: only on a terminal
            delay=2,
            leave=False,
        )
        with torch.inference_mode():
            for given, name, merged, loaded in bar:
                if name in self.seen:
                    raise ValueError(f"the checkpoint has the tensor {given:.200} twice")
                if name not in self.targets:
                    raise _unknown_tensor(given)
                try:
                    tensors = {name: loaded if merged is None else merged.part(loaded)}
                    stored_name = name if merged is None else merged.name
                    if self.quantized is not None and stored_name not in self.quantized.dequantized:
                        tensors = self.quantized.quantize_if_needed(name, tensors[name])
                    for target, tensor in tensors.items():
                        self._copy(target, tensor)
                        self.seen.add(target)
                        self._finish_layer(target)
                except ValueError as error:
                    raise ValueError(f"the tensor {given:.200} {error}") from None
            if self.quantized is not None:
                self.quantized.copy_waiting()
        return names

    def _separate(
        self, weights: Iterable[tuple[str, torch.Tensor]], names: set[str]
    ) -> Iterator[tuple[str, str, MergedTensor | None, torch.Tensor]]:
        """Iterate over given names, targets' names and tensors. A merged tensor comes once for each of its parts.

        Args:
            names: receives the given names.
        """
        for given, loaded in checked_weights(weights):
            names.add(given)
            name = _full_name(given)
            if _is_skipped(self.model.config, given):
                continue
            ready = {name: loaded} if self.quantized is None else self.quantized.receive(name, loaded)
            for ready_name, tensor in ready.items():
                for target, merged in self.merged.get(ready_name, {ready_name: None}).items():
                    yield given, target, merged, tensor

    def _finish_layer(self, name: str) -> None:
        """Convert a weight once its last tensor is loaded, so that few weights are held as they were loaded."""
        part = self.parts.get(name)
        if part is None:
            return
        part.lacking.discard(name)
        if not part.lacking:
            self.valid |= {name: _is_valid(target) for name, target in part.targets.items()}
            part.layer.format = part.layer.format.finish_loading()
            self.layers.remove(part.layer)

    def _copy(self, name: str, loaded: torch.Tensor) -> None:
        other = _TIED.get(name) if self.model.config.tie_word_embeddings else None
        is_shared = self.model.lm_head.weight is self.model.embed_tokens.weight
        if is_shared and other in self.seen:
            self.head_differs = self.model.embed_tokens.differs(loaded)
            return
        self.targets[name].load(loaded)
        # The first of two tied tensors fills both parameters.
        if other is not None and other not in self.seen and not is_shared:
            self.targets[other].load(loaded)

    def finish(self) -> None:
        """Check that the weights are whole and finite, and convert them to their fastest formats.

        Raises:
            ValueError: a tensor is missing or not finite, or the head differs from the embedding where both are one
                parameter.
        """
        missing = {} if self.quantized is None else self.quantized.missing()
        lacking = sorted(set().union(*missing.values()))
        waiting = {target for weight in missing for target in self.merged.get(weight, (weight,))}
        _check_complete(
            self.model.config, dict.fromkeys([*lacking, *self.targets]), self.seen | waiting.difference(lacking)
        )
        with torch.inference_mode():
            _check_finite(self.targets, self.valid, self.model.tp)
            if self.head_differs is not None and _first_true([self.head_differs], self.model.tp) is not None:
                raise ValueError(_DIFFERENT_HEAD)
            for layer in self.layers:
                layer.format = layer.format.finish_loading()


def load_weights(model: Decoder, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a whole checkpoint into the parameters; see `WeightUpdate`."""
    update = WeightUpdate(model)
    update.load(weights)
    update.finish()


def _check_finite(targets: Mapping[str, CheckpointTensor], valid: dict[str, torch.Tensor], tp: TensorParallel) -> None:
    """Raise ValueError with the name of a tensor that has NaN or infinity, or a negative scale: the same on all ranks.

    Whole parameters are checked first, because thousands of experts' tensors would take thousands of small kernels.

    Args:
        valid: whether a tensor is valid, for those that were checked before.
    """
    bad = _first_true([~flag for flag in valid.values()], tp)
    if bad is None:
        by_param = _by_param({name: target for name, target in targets.items() if name not in valid})
        bad_param = _first_true([~is_valid(param, is_scale(param)) for param in by_param], tp)
        if bad_param is None:
            return
        suspects = list(by_param.values())[bad_param]
        bad = _first_true([~_is_valid(target) for target in suspects.values()], tp)
        name = list(suspects)[bad or 0]
    else:
        name = list(valid)[bad]
    param = targets[name].param
    wrong = BAD_SCALE if is_scale(param) else f"has values that are NaN or infinite in {param.dtype}"
    raise ValueError(f"the tensor {name} {wrong}")


def _is_valid(target: CheckpointTensor) -> torch.Tensor:
    return is_valid(target.destination, is_scale(target.param))


def _by_param(targets: Mapping[str, CheckpointTensor]) -> dict[torch.nn.Parameter, dict[str, CheckpointTensor]]:
    """Return the targets of each parameter, by name."""
    by_param: dict[torch.nn.Parameter, dict[str, CheckpointTensor]] = {}
    for name, target in targets.items():
        by_param.setdefault(target.param, {})[name] = target
    return by_param


def _first_true(flags: list[torch.Tensor], tp: TensorParallel) -> int | None:
    """Return the index of the first flag that is true on any rank, the same on all ranks; None if all are false.

    Args:
        flags: bools on the device. The host reads all of them at once.
    """
    if not flags:
        return None
    stacked = torch.stack(flags)
    index = [*stacked.tolist(), True].index(True)
    if tp.group is not None:
        index = tp.all_reduce_min(index, stacked.device)
    return index if index < len(flags) else None


def checked_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over `weights`. Raise TypeError or ValueError at one that is not a name and a tensor with data."""
    for pair in weights:
        name, tensor = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"weights must be pairs (name, tensor), got {shown(pair)}")
        with torch._C.DisableTorchFunctionSubclass():  # read the memory, whatever methods a subclass has
            if fault := _fault(tensor):
                raise ValueError(f"the tensor {name:.200} {fault}; it must be a dense tensor of real numbers with data")
            tensor = tensor.detach().as_subclass(torch.Tensor).resolve_neg()
        yield plain(name), tensor


def _fault(tensor: torch.Tensor) -> str | None:
    """Return why the bytes of a tensor's numbers cannot be read; None if they can."""
    kind = type(tensor)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # pyright: ignore[reportAttributeAccessIssue]
        advice = " (give its .full_tensor())" if hasattr(tensor, "full_tensor") else ""
        return f"is a {kind.__name__:.100}, which has no plain data{advice}"
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_nested:
        return f"is a {'nested tensor' if tensor.is_nested else kind.__name__} without a shape"
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        return f"is on {tensor.device} with layout {tensor.layout} and dtype {tensor.dtype}"
    end = (
        tensor.storage_offset() + 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    )
    if tensor.numel() and tensor.untyped_storage().nbytes() < end * tensor.itemsize:
        return "has lost its memory: its storage was freed or made smaller"
    return None


def dummy_weights(model: Decoder, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over a checkpoint of small random numbers, and of constants where layers declare them.

    It is the same for any number of ranks.
    """
    param = next(model.parameters())
    scheme = model.config.quantization
    generator = torch.Generator(param.device).manual_seed(seed)
    targets = model.checkpoint_tensors()
    for name, target in _meta_targets(model.config).items():
        if name == _HEAD and model.config.tie_word_embeddings:
            continue
        tensor = torch.empty(target.shape, dtype=param.dtype, device=param.device)
        if target.dummy is None:
            tensor.normal_(std=0.02, generator=generator)
        else:
            tensor.fill_(target.dummy)
        if scheme is not None and _is_quantized(target):
            yield from scheme.quantize(name, tensor).items()
        else:
            yield name, tensor.to(targets[name].param.dtype)


def iterate_weights(location: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the memory-mapped tensors of a safetensors folder or a GGUF file, with their transformers names.

    Raises:
        ValueError: `location` has no weights, or only pickled ones, which are never loaded.
    """
    location = _weights_path(location)
    if not location.is_dir():
        from nanovllm.checkpoints.gguf import iterate_gguf

        return iterate_gguf(location)
    return _iterate_safetensors(_weight_files(location), lambda file, name: file.get_tensor(name))


def read_shapes(location: str | Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors of `iterate_weights` from the files' headers."""
    location = _weights_path(location)
    if not location.is_dir():
        from nanovllm.checkpoints import gguf

        return gguf.read_shapes(location)
    shapes: dict[str, tuple[int, ...]] = {}
    files = _weight_files(location)
    if files[0].name == "model.safetensors" and any(location.glob("model-*-of-*.safetensors")):
        logger.warning("Reading %s, as transformers does, and not the shards next to it", files[0])
    for name, shape in _iterate_safetensors(files, lambda file, name: file.get_slice(name).get_shape()):
        if name in shapes:
            raise ValueError(f"the checkpoint has the tensor {name:.200} twice")
        shapes[name] = tuple(shape)
    return shapes


def read_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the first tensor with a supported one, from the headers of the files; float32 without one."""
    files = _weight_files(folder)
    for _, dtype in _iterate_safetensors(files, lambda file, name: file.get_slice(name).get_dtype()):
        if dtype in _DTYPES:
            return _DTYPES[dtype]
    return torch.float32


def has_separate_head(location: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a checkpoint of tied embeddings has other weights for the head, which transformers then uses.

    Args:
        shapes: shapes of the checkpoint's tensors.
    """
    if not _TIED.keys() <= set(map(_full_name, shapes)):
        return False
    tied = [tensor for name, tensor in iterate_weights(location) if _full_name(name) in _TIED]
    return tied[0].dtype != tied[1].dtype or not torch.equal(tied[0], tied[1])


def _weights_path(location: str | Path) -> Path:
    path = local_path("the path of the weights", location)
    if not path.is_dir() and path.suffix != ".gguf":
        raise ValueError(f"the path of the weights {str(location)!r:.100} is not a folder or a .gguf file")
    return path


def read_json(file: Path) -> dict:
    """Return the object in a JSON file. Raise ValueError if the file has no JSON object."""
    regular_file(file)
    with refusing(f"{file} is not JSON", OSError, ValueError, RecursionError):
        content = json.loads(file.read_bytes())  # UTF-8 in any locale
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder's weights: those that transformers reads, or all if it would find none.

    transformers reads a single file rather than shards. Its `save_pretrained` may leave an older model's index next to
    a single file, and an older model's single file next to shards.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map, or an empty one")
        names = sorted(set(map(str, weight_map.values())))
        files = {file.name for file in folder.iterdir() if file.is_file()}
        if missing := [name for name in names if name not in files]:
            raise MissingFileError(f"{index} names {missing[0]!r:.200}, which is not a file in that folder")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        names = [file.name for file in folder.iterdir()]
        raise MissingFileError(f"{folder} has no weights: no *.safetensors files{pickled_advice(names)}")
    return files


def pickled_advice(names: Iterable[str]) -> str:
    """Return what to do with the pickled weights among files of these names, for the end of a message."""
    pickled = min((name for name in names if name.endswith(_PICKLED)), default=None)
    if pickled is None:
        return ""
    return f"; pickled weights ({pickled!r:.100}) can run code when loaded, so they must be converted"


def _iterate_safetensors(files: list[Path], read: Callable[[Any, str], Any]) -> Iterator[tuple[str, Any]]:
    """Iterate over the name and `read(file, name)` of each tensor in the files."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        with (
            refusing(f"{file} is not a safetensors file that can be read", OSError, SafetensorError),
            safe_open(regular_file(file), framework="pt") as tensors,
        ):
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                yield name, read(tensors, name)
