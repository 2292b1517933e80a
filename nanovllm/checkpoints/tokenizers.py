"""Find and load a model's tokenizer."""

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.checkpoints.files import MissingFileError, check_files, local_path
from nanovllm.checkpoints.hub import check_hub_id, download, explaining_missing_files
from nanovllm.checkpoints.weight_files import read_json
from nanovllm.checks import shown
from nanovllm.library_errors import refusing
from nanovllm.vllm_options import translate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


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
    # Raises for values that would have an effect.
    translate({"tokenizer_mode": tokenizer_mode, "trust_remote_code": trust_remote_code})
    return load_tokenizer(find_tokenizer(name, revision, download_dir), **options)


def find_tokenizer(name: str | Path, revision: str | None = None, download_dir: str | Path | None = None) -> Path:
    """Return the folder or GGUF file of a tokenizer, downloaded if it has a hub id."""
    path = local_path("tokenizer", name)
    if revision is not None and path.exists():
        raise ValueError(f"revision must be None for a local tokenizer, got {shown(revision)}; only a hub id has one")
    if not path.exists():
        check_hub_id("tokenizer", str(name))
        path = download(str(name), revision, download_dir, with_weights=False)
        with explaining_missing_files(str(name), revision):
            return _check_tokenizer(name, path)
    return _check_tokenizer(name, path)


def _check_tokenizer(name: str | Path, path: Path) -> Path:
    """Return `path`. Raise ValueError if it has no tokenizer."""
    if path.is_dir():
        check_files(path)
    may_have_one = path.suffix == ".gguf" if path.is_file() else has_tokenizer_files(path)
    if not may_have_one:
        raise MissingFileError(f"tokenizer {str(name)!r:.100} is not a folder or .gguf file with a tokenizer")
    return path


def load_tokenizer(path: Path, **options: Any) -> "PreTrainedTokenizerBase":
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


def has_tokenizer_files(folder: Path) -> bool:
    return any((folder / file).exists() for file in _TOKENIZER_FILES)
