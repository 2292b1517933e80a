"""Find a model: the default model, a folder, a GGUF file, a hub id, or the name of a preset shape."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanovllm.checkpoints.default_model import default_model
from nanovllm.checkpoints.files import MissingFileError, check_files, check_working_folder, local_path
from nanovllm.checkpoints.hub import check_hub_id, download, explaining_missing_files
from nanovllm.checkpoints.loader import check_shapes
from nanovllm.checkpoints.tokenizers import find_tokenizer, has_tokenizer_files, load_tokenizer
from nanovllm.checkpoints.weight_files import (
    has_separate_head,
    iterate_weights,
    read_dtype,
    read_json,
    read_shapes,
)
from nanovllm.checks import shown
from nanovllm.config import Config
from nanovllm.library_errors import refusing
from nanovllm.models.hf_config import read_hf_config, stated_dtype
from nanovllm.models.model_config import ModelConfig, check_model_type, token_ids
from nanovllm.models.presets import PRESETS
from nanovllm.weights.quantization_config import SCHEMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fields of generation_config.json that are arguments of SamplingParams, by their names there.
_DEFAULTS = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
_DEFAULTS["max_new_tokens"] = "max_tokens"
_MAX_LENGTH = 4096  # longest list that transformers may make from a length in a config


@dataclass(frozen=True)
class ModelSource:
    """The config of a model that was found, and the path of its weights and tokenizer.

    Args:
        config: the model's options.
        path: a folder in transformers' layout or a GGUF file; None for a shape without weights and tokenizer.
        has_tokenizer: whether the model has a tokenizer.
        tokenizer_path: a folder or a GGUF file whose tokenizer replaces the model's.
        sampling_defaults: arguments of SamplingParams that generation_config.json or the GGUF file has.
    """

    config: ModelConfig
    path: Path | None = None
    has_tokenizer: bool = False
    tokenizer_path: Path | None = None
    sampling_defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def has_quantized_gguf(self) -> bool:
        """Whether the weights are those of a GGUF file with quantized matrices."""
        if self.path is None or not self.path.is_file():
            return False
        from nanovllm.checkpoints.gguf import has_quantized

        return has_quantized(self.path)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the checkpoint's tensors, for `load_weights`."""
        if self.path is None:
            raise ValueError("the model is a shape only and has no weights; use load_format='dummy'")
        return iterate_weights(self.path)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Return the transformers tokenizer, with the model's chat template if it has one. It is loaded once."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        path = self.tokenizer_path or self.path
        if path is None or not self.has_tokenizer:
            advice = "give prompts as token ids"
            if path is not None and (path / "tekken.json").exists():
                advice = f"tekken.json is not supported; set tokenizer= to a folder with a tokenizer.json, or {advice}"
            raise ValueError(f"the model {path or ''} has no tokenizer: {advice}")
        if not path.exists():
            raise ValueError(f"the tokenizer of {path} cannot be read: the path does not exist any more")
        return load_tokenizer(path)


def open_model_of(config: Config) -> ModelSource:
    """Find the model of an engine's config, and its tokenizer; see `open_model`."""
    source = open_model(config.model, config.load_format, revision=config.revision, download_dir=config.download_dir)
    if config.quantization is not None:
        scheme = replace(source.config.quantization or SCHEMES[config.quantization], quantizes=True)
        source = replace(source, config=replace(source.config, quantization=scheme))
    if config.tokenizer is None:
        return source
    revision = config.revision if str(config.tokenizer) == str(config.model) else None
    path = find_tokenizer(config.tokenizer, revision, config.download_dir)
    return replace(source, tokenizer_path=path, has_tokenizer=True)


def open_model(
    name: str | Path | None,
    load_format: str = "auto",
    revision: str | None = None,
    download_dir: str | Path | None = None,
) -> ModelSource:
    """Find a model, read its config, and compare it with the headers of its weights.

    Args:
        name: a folder, a `.gguf` file, a hub id such as "Qwen/Qwen3-0.6B" (downloaded into the hub's cache), a key of
            PRESETS with load_format="dummy", or None for the default model.
        load_format: "dummy" needs no weights.
        revision: branch, tag or commit of a hub id; a local model has none.
        download_dir: folder for downloads instead of the hub's cache.

    Raises:
        ValueError: no model has that name, the model is not supported, or its config does not fit its weights.
        RuntimeError: the working folder was deleted, or the default model could not be fetched.
    """
    check_working_folder()
    # Absolute: the working folder may change before the weights are read.
    path = default_model() if name is None else local_path("model", name)
    is_preset = not path.exists() and isinstance(name, str) and name in PRESETS and load_format == "dummy"
    if revision is not None and (path.exists() or is_preset):
        raise ValueError(f"revision must be None for a local model, got {shown(revision)}; only a hub id has one")
    if is_preset:
        return ModelSource(PRESETS[str(name)])
    if not path.exists():
        if str(name) in PRESETS:
            advice = "use load_format='dummy' or a folder or hub id"
            raise ValueError(f"model {str(name)!r} is a shape without weights; {advice}")
        check_hub_id("model", str(name), f" or, with load_format='dummy', one of {', '.join(PRESETS)}")
        path = download(str(name), revision, download_dir, with_weights=load_format != "dummy")
        with explaining_missing_files(str(name), revision):
            return _open_folder(path, load_format)
    if path.is_dir():
        return _open_folder(path, load_format)
    if path.suffix != ".gguf":
        raise ValueError(f"model {str(name)!r:.100} is a file, but not a .gguf file")
    from nanovllm.checkpoints.gguf import read_gguf

    config, has_tokenizer, defaults = read_gguf(path)
    if load_format != "dummy":
        config = _compare_with_weights(config, path)
    return ModelSource(config, path, has_tokenizer, sampling_defaults=defaults)


def _compare_with_weights(config: ModelConfig, path: Path) -> ModelConfig:
    """Raise ValueError unless the config fits the headers of its weights. Return it with `separate_head` set."""
    shapes = read_shapes(path)
    check_shapes(config, shapes)
    if config.tie_word_embeddings and has_separate_head(path, shapes):
        return replace(config, separate_head=True)
    return config


def new_weights(location: str | Path, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the weights of a checkpoint that replace those of a model; see `iterate_weights`.

    Raises:
        ValueError: the checkpoint has a config, and it is another model's.
    """
    weights = iterate_weights(location)
    path = local_path("the path of the weights", location)
    if path.is_file():
        from nanovllm.checkpoints.gguf import read_gguf

        config.check_same_model(read_gguf(path).config)
    elif (path / "config.json").exists():
        config.check_same_model(_read_config(path, generation={}))
    return weights


def _open_folder(path: Path, load_format: str) -> ModelSource:
    if not (path / "config.json").exists():
        raise MissingFileError(f"model {str(path)!r} is a folder without a config.json")
    check_files(path)
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    defaults = {ours: generation[name] for name, ours in _DEFAULTS.items() if generation.get(name) is not None}
    config = _read_config(path, generation, load_format)
    source = ModelSource(config, path, has_tokenizer_files(path), sampling_defaults=defaults)
    if load_format == "dummy":
        return source
    return replace(source, config=_compare_with_weights(source.config, path))


def _read_config(path: Path, generation: dict[str, Any], load_format: str = "dummy") -> ModelConfig:
    """Read the config.json of a folder.

    Args:
        generation: the content of generation_config.json, which may have more end tokens.
        load_format: "dummy" does not look at the weights' dtype if the config states none.
    """
    content = read_json(path / "config.json")
    # Refuse an unsupported type before transformers may want to run the folder's code.
    check_model_type(content.get("model_type"))
    _check_lengths(content)
    _check_lengths(content.get("text_config"))
    from transformers import AutoConfig

    # transformers raises errors of many types.
    with refusing(f"{path / 'config.json'} is not a config that transformers can read", Exception):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    if load_format != "dummy" and stated_dtype(config) is None:
        config.dtype = read_dtype(path)
    return read_hf_config(config, token_ids(generation.get("eos_token_id")))


def _check_lengths(options: Any) -> None:
    """Raise ValueError if transformers would make a list of a huge or wrong length from these options of a config."""
    if not isinstance(options, dict):
        return
    for key in ("num_hidden_layers", "num_labels"):
        length = options.get(key)
        if length is not None and (type(length) is not int or not 1 <= length <= _MAX_LENGTH):
            raise ValueError(f"the model's {key} must be an integer from 1 to {_MAX_LENGTH}, got {shown(length)}")
