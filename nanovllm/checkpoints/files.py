"""Paths and files that users name."""

from pathlib import Path


def local_path(what: str, name: str | Path) -> Path:
    """The absolute path of `name`, "~" resolved; whether something is there is not checked.

    Raises:
        ValueError: naming `what` it is for; the system has no such paths, or cannot look there.
    """
    if not str(name):
        raise ValueError(f"{what} must not be empty")
    try:
        path = Path(name).expanduser().absolute()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a closed folder; the home of nobody; a NUL
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{what} {str(name)!r:.100} is not a path that can be read: {reason}") from error
    return path


def regular_file(path: Path) -> Path:
    """`path`, which must be a regular file or lead to one: reading a pipe or a device may never end."""
    if not path.is_file():
        found = "something else" if path.exists() else "nothing"
        raise ValueError(f"{path} must be a regular file, but there is {found}")
    return path
