"""The path on which child processes find modules."""

import os
import sys


def import_path() -> list[str]:
    """Return `sys.path` with absolute paths, for a child process in another working folder.

    A working folder that was deleted has no path, and no modules either.
    """
    entries = [entry for entry in sys.path if isinstance(entry, str)]
    try:
        folder = os.getcwd()
    except OSError:
        return [entry for entry in entries if os.path.isabs(entry)]
    return [os.path.join(folder, entry) if entry else folder for entry in entries]
