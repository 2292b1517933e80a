"""Read checkpoints and copy their tensors into a decoder: strictly, one tensor at a time."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nanovllm.checkpoints.files import local_path, regular_file
from nanovllm.checks import plain, shown
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import LinearLayer
from nanovllm.models.decoder import Decoder
from nanovllm.models.registry import ModelConfig
from nanovllm.progress import ProgressBar
from nanovllm.weights.parameter import CheckpointTensor, is_finite

# A checkpoint with tied embeddings has either tensor, or both.
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TIED = {_EMBEDDING: _HEAD, _HEAD: _EMBEDDING}
_DIFFERENT_HEAD = (
    f"the tensor {_HEAD} differs from the embedding, but the model was loaded with one parameter for both; "
    "make a new engine"
)


def _full_name(name: str) -> str:
    """Return the tensor's name with the prefix "model.", which checkpoints without the head leave out."""
    return name if name == _HEAD or name.startswith("model.") else f"model.{name}"


def _is_computed(name: str) -> bool:
    """Return whether old checkpoints have this tensor, but the model computes it."""
    return name.endswith("rotary_emb.inv_freq")


def _whole_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a checkpoint of this model may have, by its name. Allocate nothing."""
    with torch.device("meta"):
        targets = Decoder(config, tp=TensorParallel()).checkpoint_tensors()
    return {name: target.shape for name, target in targets.items()}


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
    layers = {match[1] for match in map(re.compile(r"(?:model\.)?layers\.(\d+)\.").match, shapes) if match}
    if config.num_layers > len(layers):
        raise ValueError(f"the model's num_layers is {config.num_layers}, but the checkpoint has {len(layers)} layers")
    whole = _whole_shapes(config)
    for name, shape in shapes.items():
        if _is_computed(name):
            continue
        if _full_name(name) not in whole:
            raise _unknown_tensor(name)
        needed = whole[_full_name(name)]
        if tuple(shape) != needed:
            found = shown(list(shape))
            raise ValueError(f"the tensor {name:.200} has shape {found}, but the model needs {list(needed)}")
    _check_complete(config, whole, map(_full_name, shapes))


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
        self.differs: dict[str, torch.Tensor] = {}
        self.layers = [module for module in model.modules() if isinstance(module, LinearLayer)]
        # Parameters made in inference mode can only be written in it.
        with torch.inference_mode():
            for layer in self.layers:
                layer.format = layer.format.start_loading()
        self.targets = model.checkpoint_tensors()

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy some tensors. Each rank takes its slices. Return their names.

        Args:
            weights: the checkpoint's transformers names and whole tensors, each once in all calls and in any order.
                This method holds one of them at a time.

        Raises:
            ValueError: a tensor is unknown, given twice, or of the wrong dtype or shape.
        """
        bar = ProgressBar(
            checked_weights(weights),
            desc="Loading weights",
            total=len(self.targets) - len(self.seen),
            enabled=False if self.model.tp.rank else None,  # None: only on a terminal
            delay=2,
            leave=False,
        )
        names = set()
        with torch.inference_mode():
            for given, loaded in bar:
                names.add(given)
                name = _full_name(given)
                if _is_computed(name):
                    continue
                if name in self.seen:
                    raise ValueError(f"the checkpoint has the tensor {given:.200} twice")
                if name not in self.targets:
                    raise _unknown_tensor(given)
                try:
                    self._copy(name, loaded)
                except ValueError as error:
                    raise ValueError(f"the tensor {given:.200} {error}") from None
                self.seen.add(name)
        return names

    def _copy(self, name: str, loaded: torch.Tensor) -> None:
        other = _TIED.get(name) if self.model.config.tie_word_embeddings else None
        is_shared = self.model.lm_head.weight is self.model.embed_tokens.weight
        if is_shared and other in self.seen:
            self.differs[_DIFFERENT_HEAD] = self.model.embed_tokens.differs(loaded)
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
        _check_complete(self.model.config, self.targets, self.seen)
        with torch.inference_mode():
            _raise_first(_not_finite(self.targets) | self.differs, self.model.tp)
            for layer in self.layers:
                layer.format = layer.format.finish_loading()


def load_weights(model: Decoder, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a whole checkpoint into the parameters; see `WeightUpdate`."""
    update = WeightUpdate(model)
    update.load(weights)
    update.finish()


def _not_finite(targets: Mapping[str, CheckpointTensor]) -> dict[str, torch.Tensor]:
    """Check each tensor for NaN and infinity. Return an error text and a bool on the device for each."""
    errors = {}
    for name, target in targets.items():
        error = f"the tensor {name} has values that are NaN or infinite in {target.param.dtype}"
        errors[error] = ~is_finite(target.shard)
    return errors


def _raise_first(errors: dict[str, torch.Tensor], tp: TensorParallel) -> None:
    """Raise ValueError with the first error that is true on any rank: the same one on all ranks.

    Args:
        errors: whether each error text is true, as a bool on the device. The host reads all of them at once.
    """
    flags = torch.stack(list(errors.values()))
    index = [*flags.tolist(), True].index(True)
    if tp.group is not None:
        index = tp.all_reduce_min(index, flags.device)
    if index < len(errors):
        raise ValueError(list(errors)[index])


def checked_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over `weights`. Raise TypeError or ValueError at one that is not a name and a tensor with data."""
    for pair in weights:
        name, tensor = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"weights must be pairs (name, tensor), got {shown(pair)}")
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
            raise ValueError(
                f"the tensor {name:.200} is on {tensor.device} with layout {tensor.layout} and dtype {tensor.dtype}; "
                "it must be a dense tensor of real numbers with data"
            )
        yield plain(name), tensor


def dummy_weights(model: Decoder, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over a checkpoint of small random numbers, with norms of ones. It is the same for any number of ranks."""
    param = next(model.parameters())
    generator = torch.Generator(param.device).manual_seed(seed)
    targets = model.checkpoint_tensors()
    for name, shape in _whole_shapes(model.config).items():
        if name == _HEAD and model.config.tie_word_embeddings:
            continue
        tensor = torch.ones(shape, dtype=param.dtype, device=param.device)
        if not name.endswith("norm.weight"):
            tensor.normal_(std=0.02, generator=generator)
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
    for name, shape in _iterate_safetensors(files, lambda file, name: file.get_slice(name).get_shape()):
        if name in shapes:
            raise ValueError(f"the checkpoint has the tensor {name:.200} twice")
        shapes[name] = tuple(shape)
    return shapes


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
    try:
        content = json.loads(file.read_bytes())  # UTF-8 in any locale
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error!s:.500}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        files = {file.name for file in folder.iterdir() if file.is_file()}
        missing = [name for name in names if name not in files]
        # transformers leaves the index of an earlier model when it saves a new one as a single file in its folder.
        if missing == names and single.exists():
            return [single]
        if missing:
            raise ValueError(f"{index} names {missing[0]!r:.200}, which is not a file in that folder")
        return [folder / name for name in names]
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no *.safetensors files; pickled weights can run code when loaded, so they must be converted"
        )
    return files


def _iterate_safetensors(files: list[Path], read: Callable[[Any, str], Any]) -> Iterator[tuple[str, Any]]:
    """Iterate over the name and `read(file, name)` of each tensor in the files."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(regular_file(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    yield name, read(tensors, name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not a safetensors file that can be read: {error!s:.500}") from error
