"""Helpers that tests of several folders share."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nanovllm.executor.processes import RankProcesses

# Seconds after which something that has not happened never will, even on a busy machine.
SOON = 60


def wait_until(condition: Callable[[], bool]) -> bool:
    """Return whether `condition` became true within `SOON`."""
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    """Return whether a process runs or is stopped. A zombie is neither."""
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(pids: list[int]) -> bool:
    """Return whether all these processes have ended within `SOON`."""
    return wait_until(lambda: not any(is_alive(pid) for pid in pids))


def threads_end(name: str) -> bool:
    """Return whether all threads of this name have ended within `SOON`."""
    return wait_until(lambda: all(thread.name != name for thread in threading.enumerate()))


def rank_pids(parent: int | None = None) -> list[int]:
    """Return the processes of ranks 1, 2, ... that `parent`, or this process, has started and that have not ended."""
    pids = []
    for children in Path(f"/proc/{parent or os.getpid()}/task").glob("*/children"):
        # Threads and children come and go.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for pid in children.read_text().split():
                if b"nanovllm.executor.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    pids.append(int(pid))
    return sorted(pids, key=_start_time)


def open_files(pid: int) -> set[str]:
    """Return the names of a process's open files. A socket's is `socket:[inode]`."""
    names = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.add(os.readlink(descriptor))
    return names


@contextlib.contextmanager
def running_ranks(
    monkeypatch, folder: Path, size: int, body: str, on_failure: Callable[[], None] = lambda: None
) -> Iterator[RankProcesses]:
    """Start processes of ranks that run `body`, which may use `rank` and call `report(error)`, and then sleep."""
    lines = [
        "import os, signal, time",
        "from multiprocessing.connection import Connection",
        "def main(rank, parent, report_descriptor):",
        "    report = Connection(report_descriptor, readable=False).send",
        *[f"    {line}" for line in body.splitlines()],
        "    time.sleep(600)",
    ]
    (folder / "rank_of_a_test.py").write_text("\n".join(lines))
    # A rank imports from where its parent does.
    monkeypatch.syspath_prepend(folder)
    processes = RankProcesses(
        size=size, module="rank_of_a_test", connect=lambda: contextlib.nullcontext(()), on_failure=on_failure
    )
    try:
        processes.start()
        yield processes
    finally:
        processes.close()


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat that follow the program's name."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def _start_time(pid: int) -> tuple[int, int]:
    try:
        return int(_stat(pid)[19]), pid
    except (FileNotFoundError, ProcessLookupError):
        return 0, pid
