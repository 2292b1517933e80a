"""How child processes start: the path on which they find modules, and their program."""

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


def child_program(module: str, arguments: tuple) -> str:
    """Return a program for `python -c` that calls `main(*arguments)` of `module`. Before its slow imports:

    - Linux kills the process when the thread that started it ends, even if the process is stopped (PR_SET_PDEATHSIG).
    - It takes the caller's path. Python's own would start with the working folder, which may not be in the caller's.
    - It ignores Ctrl-C, which a terminal sends to all its processes: the caller decides what that ends.
    """
    return (
        f"import sys; sys.path = {import_path()!r}; import ctypes, signal; "
        "ctypes.CDLL(None).prctl(1, signal.SIGKILL); signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"from {module} import main; main(*{arguments!r})"
    )
