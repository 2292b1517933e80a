"""Read checkpoints and copy their tensors into a decoder: strictly, one tensor at a time."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanovllm.checkpoints.files import local_path, regular_file
from nanovllm.checks import plain
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import LinearLayer
from nanovllm.progress import ProgressBar
from nanovllm.weights.parameter import CheckpointTensor

if TYPE_CHECKING:
    from nanovllm.models.decoder import Decoder
    from nanovllm.models.registry import ModelConfig

# A checkpoint with tied embeddings has either tensor, or both.
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TIED = {_EMBEDDING: _HEAD, _HEAD: _EMBEDDING}


def _full_name(name: str) -> str:
    """The name in a checkpoint of the whole model; one of the model without its head has no prefix "model."."""
    return name if name == _HEAD or name.startswith("model.") else f"model.{name}"


def _is_computed(name: str) -> bool:
    """Whether the model computes what old checkpoints keep as this tensor."""
    return name.endswith("rotary_emb.inv_freq")


def _whole_shapes(config: "ModelConfig") -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a checkpoint of this model may have, by its name. Allocates nothing."""
    from nanovllm.models.decoder import Decoder

    with torch.device("meta"):
        targets = Decoder(config, tp=TensorParallel()).checkpoint_tensors()
    return {name: target.shape for name, target in targets.items()}


def _no_place(name: str) -> ValueError:
    return ValueError(f"the checkpoint has the tensor {name:.200}, for which the model has no place")


def _check_complete(config: "ModelConfig", needed: Iterable[str], found: Iterable[str]) -> None:
    """Raise ValueError, naming tensors of `needed` that are not in `found`."""
    found = set(found)
    if config.tie_word_embeddings:  # either will do
        found |= {_HEAD} | ({_EMBEDDING} if _HEAD in found else set())
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:8])}")


def check_shapes(config: "ModelConfig", shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the sizes that a config states with a checkpoint's tensors, before anything of these sizes is made.

    Args:
        shapes: the shape of each tensor of the checkpoint, by its name there.

    Raises:
        ValueError: naming a tensor that is missing, left over or of another shape than the config's sizes give.
    """
    layers = {match[1] for match in map(re.compile(r"(?:model\.)?layers\.(\d+)\.").match, shapes) if match}
    if config.num_layers > len(layers):
        raise ValueError(f"the model's num_layers is {config.num_layers}, but the checkpoint has {len(layers)} layers")
    whole = _whole_shapes(config)
    for name, shape in shapes.items():
        if _is_computed(name):
            continue
        if _full_name(name) not in whole:
            raise _no_place(name)
        if tuple(shape) != whole[_full_name(name)]:
            needed = f"but the model needs {list(whole[_full_name(name)])}"
            raise ValueError(f"the tensor {name} has shape {list(shape)}, {needed}")
    _check_complete(config, whole, map(_full_name, shapes))


def load_weights(model: "Decoder", weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a whole checkpoint into the parameters, in place; each rank takes its slices.

    All ranks of a group must call this, as at the end they agree on whether the weights are fine.

    Args:
        weights: the checkpoint's names (as transformers has them) and whole tensors, each once and in any order. Only
            one at a time is held here.

    Raises:
        ValueError: naming a tensor that is missing, left over, given twice, of the wrong shape, not floating point, or
            not finite. The parameters may be partly overwritten then.
    """
    targets, seen = model.checkpoint_tensors(), set()
    tied = _TIED if model.config.tie_word_embeddings else {}
    shares = model.lm_head.weight is model.embed_tokens.weight
    differs: dict[str, torch.Tensor] = {}
    shown = None if model.tp.rank == 0 else False  # None: only on a terminal
    bar = ProgressBar(checked_weights(weights), "Loading weights", len(targets), enabled=shown, delay=2, leave=False)
    # Parameters made in inference mode can only be written in it.
    with torch.inference_mode(), _plain_layout(model):
        for given, loaded in bar:
            name = _full_name(given)
            if _is_computed(name):
                continue
            if name in seen:
                raise ValueError(f"the checkpoint has the tensor {given} twice")
            if name not in targets:
                raise _no_place(given)
            # The first of two tied tensors fills both parameters.
            other = tied.get(name)
            fill = [name, other] if other and other not in seen and not shares else [name]
            try:
                if shares and other in seen:
                    what = "differs from the embedding, but the model was loaded with one parameter for both"
                    differs[f"the tensor {_HEAD} {what}; make a new engine"] = model.embed_tokens.differs(loaded)
                else:
                    for filled in fill:
                        targets[filled].load(loaded)
            except ValueError as error:
                raise ValueError(f"the tensor {given} {error}") from None
            seen.add(name)
        _check_complete(model.config, targets, seen)
        _raise_first(_not_finite(targets) | differs, model.tp)


def _not_finite(targets: Mapping[str, CheckpointTensor]) -> dict[str, torch.Tensor]:
    """For each tensor, whether its values are NaN or infinite, as a bool on the device, by the error that says so."""
    wrong = {}
    for name, target in targets.items():
        extremes = torch.stack(torch.aminmax(target.shard))  # one pass; NaN if there is one
        wrong[f"the tensor {name} has values that are NaN or infinite in {extremes.dtype}"] = ~extremes.isfinite().all()
    return wrong


def _raise_first(wrong: dict[str, torch.Tensor], tp: TensorParallel) -> None:
    """Raise ValueError with the first error that is true on any rank: the same one on all ranks.

    Args:
        wrong: whether each error is true, as a bool on the device. The host reads all at once.
    """
    flags = torch.stack(list(wrong.values()))
    index = [*flags.tolist(), True].index(True)
    if tp.group is not None:
        index = tp.all_reduce_min(index, flags.device)
    if index < len(wrong):
        raise ValueError(list(wrong)[index])


@contextmanager
def _plain_layout(model: "Decoder") -> Iterator[None]:
    """Make the weights writable in the body. Then bring them into their fastest format."""
    layers = [module for module in model.modules() if isinstance(module, LinearLayer)]
    for layer in layers:
        layer.format = layer.format.start_loading()
    yield
    for layer in layers:
        layer.format = layer.format.finish_loading()


def checked_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights`, which must be pairs of a name and a floating-point tensor: TypeError or ValueError if one is not."""
    for pair in weights:
        name, tensor = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"weights must be pairs (name, tensor), got {str(pair)[:80]}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"the tensor {name} has dtype {tensor.dtype}; it must be float32, bfloat16 or float16")
        if tensor.is_meta or tensor.layout is not torch.strided:
            what = f"is on {tensor.device} with layout {tensor.layout}; it must be a dense tensor that has its data"
            raise ValueError(f"the tensor {name} {what}")
        yield plain(name), tensor


def dummy_weights(model: "Decoder", seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint of small random numbers (norms of ones) for `model`, the same whatever ranks it is split over."""
    param = next(model.parameters())
    generator = torch.Generator(param.device).manual_seed(seed)
    for name, shape in _whole_shapes(model.config).items():
        if name == _HEAD and model.config.tie_word_embeddings:
            continue
        tensor = torch.ones(shape, dtype=param.dtype, device=param.device)
        yield name, tensor if name.endswith("norm.weight") else tensor.normal_(std=0.02, generator=generator)


def iterate_weights(location: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors folder or a GGUF file, memory-mapped, one at a time, named as in transformers.

    Raises:
        ValueError: there are none, or only pickled ones, which are never loaded.
    """
    location = _weights_path(location)
    if not location.is_dir():
        from nanovllm.checkpoints.gguf import iterate_gguf

        return iterate_gguf(location)
    return _iterate_safetensors(_weight_files(location), lambda file, name: file.get_tensor(name))


def read_shapes(location: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `iterate_weights` gives, read from the files' headers."""
    location = _weights_path(location)
    if not location.is_dir():
        from nanovllm.checkpoints import gguf

        return gguf.read_shapes(location)
    shapes: dict[str, tuple[int, ...]] = {}
    files = _weight_files(location)
    for name, shape in _iterate_safetensors(files, lambda file, name: file.get_slice(name).get_shape()):
        if name in shapes:
            raise ValueError(f"the checkpoint has the tensor {name} twice")
        shapes[name] = tuple(shape)
    return shapes


def has_own_head(location: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a checkpoint of tied embeddings has other weights for the head, which transformers then uses.

    Args:
        shapes: those of the checkpoint's tensors.
    """
    if not _TIED.keys() <= set(map(_full_name, shapes)):
        return False
    pair = [tensor for name, tensor in iterate_weights(location) if _full_name(name) in _TIED]
    return pair[0].dtype != pair[1].dtype or not torch.equal(*pair)


def _weights_path(location: str | Path) -> Path:
    path = local_path("the path of the weights", location)
    if not path.is_dir() and path.suffix != ".gguf":
        raise ValueError(f"weights are to be read from {str(location)!r:.100}, but that is no folder or .gguf file")
    return path


def read_json(file: Path) -> dict:
    """Return the object in a JSON file; ValueError if there is none."""
    regular_file(file)
    try:
        content = json.loads(file.read_bytes())  # in UTF-8, whatever the locale says
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        here = {file.name for file in folder.iterdir() if file.is_file()}
        absent = [name for name in names if name not in here]
        if absent:
            raise ValueError(f"{index} names {absent[0]!r}, which is not a file in that folder")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no *.safetensors files; pickled weights can run code when loaded, so they must be converted"
        )
    return files


def _iterate_safetensors(files: list[Path], read: Callable[[Any, str], Any]) -> Iterator[tuple[str, Any]]:
    """The name of each tensor in the files, and what `read(file, name)` gives."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(regular_file(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    yield name, read(tensors, name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not a safetensors file that can be read: {error}") from error
