"""Gets weights into a decoder: strictly, one tensor at a time."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.parameter import PackedLayer
from nanovllm.utils.checks import plain

if TYPE_CHECKING:
    from nanovllm.models.decoder import Decoder

# Merged parameters, and the checkpoint's name of each of their shards.
_MERGED = {
    "qkv_proj": {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    "gate_up_proj": {0: "gate_proj", 1: "up_proj"},
}


def _targets(model: "Decoder") -> dict[str, tuple[nn.Parameter, str | int | None]]:
    """Every tensor that a checkpoint must have, by its name there, with the parameter and shard id it belongs to."""
    targets = {}
    for name, param in model.named_parameters():
        # Attention owns the norms of the heads, which checkpoints keep one level up.
        *path, module, kind = name.replace(".attn.", ".").split(".")
        for shard_id, shard in _MERGED.get(module, {None: module}).items():
            hf_name = ".".join((*path, shard, kind))
            targets[hf_name if module == "lm_head" else f"model.{hf_name}"] = param, shard_id
    return targets


def load_weights(model: "Decoder", weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a whole checkpoint into the parameters, in place; each rank takes its slices.

    Args:
        weights: the checkpoint's names (as transformers has them) and whole tensors, each once and in any order. Only
            one at a time is held here.

    Raises:
        ValueError: naming a tensor that is missing, left over, given twice, of the wrong shape or not floating point.
            The parameters may be partly overwritten then.
    """
    targets, seen = _targets(model), set()
    quiet = True if model.tp.rank else None  # None: silent unless on a terminal
    bar = tqdm(checked_weights(weights), "Loading weights", len(targets), delay=2, disable=quiet, leave=False)
    # Parameters made in inference mode can only be written in it.
    with torch.inference_mode(), _plain_layout(model):
        for name, loaded in bar:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
                continue  # the model computes it, or has it elsewhere
            if name in seen:
                raise ValueError(f"the checkpoint has the tensor {name} twice")
            if name not in targets:
                raise ValueError(f"the checkpoint has the tensor {name}, for which the model has no place")
            param, shard_id = targets[name]
            try:
                param.weight_loader(param, loaded, shard_id)
            except ValueError as error:
                raise ValueError(f"the tensor {name} {error}") from None
            seen.add(name)
        missing = [name for name in targets if name not in seen]
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:8])}")


@contextmanager
def _plain_layout(model: "Decoder") -> Iterator[None]:
    """Weights can be written within; after it the layers have them in the layout they like best."""
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    for layer in layers:
        layer.unpack()
    yield
    for layer in layers:
        layer.pack(keep_plain=layer.weight is model.embed_tokens.weight)


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
    with torch.device("meta"):
        whole = type(model)(model.config, tp=TensorParallel())
    for name, (target, shard_id) in _targets(whole).items():
        shape = list(target.shape)
        if shard_id is not None:
            shape[0] = target.weight_loader.__self__.parts[shard_id].total
        tensor = torch.ones(shape, dtype=param.dtype, device=param.device)
        yield name, tensor if name.endswith("norm.weight") else tensor.normal_(std=0.02, generator=generator)


def iterate_weights(location: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors folder or a GGUF file, memory-mapped, one at a time, named as in transformers.

    Raises:
        ValueError: there are none, or only pickled ones, which are never loaded.
    """
    if location.suffix == ".gguf" and location.is_file():
        from nanovllm.utils.gguf import iterate_gguf

        return iterate_gguf(location)
    if not location.is_dir():
        raise ValueError(f"weights are to be read from {str(location)!r}, but that is no folder or .gguf file")
    return _iterate_safetensors(_weight_files(location))


def read_json(file: Path) -> dict:
    """The object in a JSON file; ValueError if there is none."""
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


def _iterate_safetensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    yield name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not a safetensors file that can be read: {error}") from error
