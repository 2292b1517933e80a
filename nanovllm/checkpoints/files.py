"""Paths and files that users name."""

import os
from pathlib import Path

from nanovllm.library_errors import refusing


class MissingFileError(ValueError):
    """A folder lacks a file that a model needs."""


def check_working_folder() -> None:
    """Raise RuntimeError if the working folder was deleted: transformers cannot be imported there."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise RuntimeError("the working folder has been deleted; change to another with os.chdir()") from error


def local_path(label: str, name: str | Path) -> Path:
    """Return the absolute path of `name` with "~" expanded. Nothing needs to exist there.

    Args:
        label: names the argument in errors.

    Raises:
        ValueError: the system has no such paths, or may not look there.
    """
    if not str(name):
        raise ValueError(f"{label} must not be empty")
    errors = (OSError, RuntimeError, ValueError)  # too long or forbidden, an unknown user's home, a NUL
    message = f"{label} {str(name)!r:.100} is not a path that can be read"
    with refusing(message, *errors, reason=lambda error: getattr(error, "strerror", None) or error):
        path = Path(name).expanduser().absolute()
        path.exists()  # raises for a path that the system cannot look up
    return path


def regular_file(path: Path) -> Path:
    """Return `path`. Raise ValueError unless it is a regular file: reading a pipe or a device may never end."""
    if not path.is_file():
        reason = "it is something else" if path.exists() else "it does not exist"
        raise ValueError(f"{path} must be a regular file, but {reason}")
    return path


def check_files(folder: Path) -> None:
    """Raise ValueError if the folder has pipes, sockets or devices: reading one may never end."""
    for file in folder.iterdir():
        if file.exists() and not file.is_dir():
            regular_file(file)
