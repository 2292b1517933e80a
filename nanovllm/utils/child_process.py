"""How child processes start: the path on which they find modules, their program, and the descriptors they inherit."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_JOB_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


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
    - It ignores signals that a terminal, a service manager or a cluster sends to all processes of a job, such as
      SIGINT and SIGTERM: the caller decides what they end.
    """
    return f"""import sys; sys.path = {import_path()!r}
import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
for name in {_JOB_SIGNALS}:
    signal.signal(getattr(signal, name), signal.SIG_IGN)
from {module} import main
main(*{arguments!r})
"""


@contextmanager
def inheritable(*descriptors: int) -> Iterator[tuple[int, ...]]:
    """Yield copies of descriptors for a child process, and close them after.

    Their numbers are not those of the standard streams, which the child may have in their place: a program that runs
    without one of these gets its number for the next file that it opens.
    """
    with ExitStack() as stack:
        copies = []
        for descriptor in descriptors:
            copies.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3))
            stack.callback(os.close, copies[-1])
        yield tuple(copies)
