"""Download models and tokenizers from a model hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanovllm.checkpoints.files import MissingFileError, local_path
from nanovllm.checkpoints.weight_files import pickled_advice
from nanovllm.checks import shown
from nanovllm.library_errors import refusing

# Never *.py, never pickled weights.
_HUB_FILES = ["*.json", "merges.txt", "tokenizer.model"]
_TEMPLATES = "*.jinja"


def download(
    name: str, revision: str | None = None, download_dir: str | Path | None = None, with_weights: bool = True
) -> Path:
    """Download a hub's model or only its config and tokenizer: files that cannot run code. Return the local folder."""
    from huggingface_hub import snapshot_download

    cache_dir = None if download_dir is None else local_path("download_dir", download_dir)
    files = [*_HUB_FILES, "*.safetensors"] if with_weights else _HUB_FILES
    # Errors of the hub, of its HTTP library, of the disk.
    with refusing(f"{name!r:.100} is not a local path and could not be fetched from the hub", Exception):
        # Subfolders and consolidated.safetensors hold the same weights in the vendors' own layouts. A subfolder may
        # also have more chat templates.
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=[*files, _TEMPLATES],
            ignore_patterns=[*(f"*/{pattern}" for pattern in files), "consolidated*"],
        )
    return Path(folder)


def check_hub_id(kind: str, name: str, alternatives: str = "") -> None:
    """Raise ValueError unless `name`, which is no local path, has the form of a hub id."""
    if name.endswith(".gguf") or name.count("/") != 1 or name.startswith((".", "/", "~")):
        reason = "is not a folder or .gguf file on this machine; nor is it a hub id (owner/name)"
        raise ValueError(f"{kind} {name!r:.100} {reason}{alternatives}")


@contextmanager
def explaining_missing_files(name: str, revision: str | None) -> Iterator[None]:
    """If the cache lacks a file, raise an error that lists the hub's files, or says that the hub cannot be reached."""
    try:
        yield
    except MissingFileError as error:
        from huggingface_hub import HfApi

        with refusing(f"{error}; this is the cached copy of {name!r}, and the hub could not be reached", Exception):
            files = HfApi().list_repo_files(name, revision=revision)
        raise ValueError(f"{error}; the hub's {name!r} has the files {shown(files)}{pickled_advice(files)}") from error
