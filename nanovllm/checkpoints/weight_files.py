"""Read the tensors of checkpoints from safetensors folders and GGUF files."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nanovllm.checkpoints.files import MissingFileError, local_path, regular_file
from nanovllm.checks import shown
from nanovllm.library_errors import refusing

logger = logging.getLogger(__name__)

# A checkpoint with tied embeddings has either tensor, or both.
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TIED = {EMBEDDING: HEAD, HEAD: EMBEDDING}
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
# The supported dtypes, by their names in safetensors files.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLED = (".bin", ".pt", ".pth")


def full_name(name: str) -> str:
    """Return the tensor's name with the prefix "model.".

    Checkpoints without the head leave it out. Those with more than text have one of _PREFIXES.
    """
    if name in (HEAD, f"language_model.{HEAD}"):
        return HEAD
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return f"model.{name.removeprefix(prefix)}"


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
    if files == [location / "model.safetensors"] and any(location.glob("model-*-of-*.safetensors")):
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
    if not TIED.keys() <= set(map(full_name, shapes)):
        return False
    tied = [tensor for name, tensor in iterate_weights(location) if full_name(name) in TIED]
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

    transformers reads the file that config.json names, and else a single file rather than shards. Its `save_pretrained`
    may leave an older model's index next to a single file, and an older model's single file next to shards.
    """
    for name in (_named_file(folder), "model.safetensors", "model.safetensors.index.json"):
        if name is not None and (folder / name).exists():
            return _indexed_files(folder / name) if name.endswith(".json") else [folder / name]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        names = [file.name for file in folder.iterdir()]
        raise MissingFileError(f"{folder} has no weights: no *.safetensors files{pickled_advice(names)}")
    return files


def _named_file(folder: Path) -> str | None:
    """Return the file of weights, or of their index, that config.json names; None if it names none."""
    config = folder / "config.json"
    name = read_json(config).get("transformers_weights") if config.exists() else None
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")) or "/" in name:
        message = "must name a .safetensors or .safetensors.index.json file in its folder"
        raise ValueError(f"transformers_weights in {config} {message}, got {shown(name)}")
    if not (folder / name).exists():
        raise MissingFileError(f"{config} names the weights {name!r:.200}, which is not a file in that folder")
    return name


def _indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, or an empty one")
    names = sorted(set(map(str, weight_map.values())))
    files = {file.name for file in index.parent.iterdir() if file.is_file()}
    if missing := [name for name in names if name not in files]:
        raise MissingFileError(f"{index} names {missing[0]!r:.200}, which is not a file in that folder")
    return [index.parent / name for name in names]


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
