"""The main program of a child process; `pool` starts it by its path."""

import json
import math
import resource
import runpy
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_MAX_ERROR_CHARS = 500


def main(fd: int, program: str, cpu_seconds: int, memory: int) -> None:
    """Answer requests until the parent closes the connection or ends.

    Args:
        fd: of the connection to the parent. The first message has the arguments of the program's `prepare`.
        program: path of a file with `prepare`, which returns a function from a request to a reply.
        cpu_seconds: CPU time of one request. The kernel ends this process (SIGXCPU) if it takes more.
        memory: bytes that requests may take on top of what this process has once it is prepared.
    """
    channel = Connection(fd)
    try:
        answer = runpy.run_path(program)["prepare"](**json.loads(channel.recv_bytes()))
        lower_limit(resource.RLIMIT_CORE, 0)
        if sys.platform == "linux":
            num_pages = int(Path("/proc/self/statm").read_text().split()[0])
            lower_limit(resource.RLIMIT_AS, num_pages * resource.getpagesize() + memory)
        while True:
            message = channel.recv_bytes()
            used = resource.getrusage(resource.RUSAGE_SELF)
            lower_limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds)
            channel.send_bytes(reply(answer, message))
    except (EOFError, OSError):
        return


def lower_limit(kind: int, value: int) -> None:
    """Set a soft limit, or keep the hard one if that is lower."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def reply(answer: Callable[[dict[str, Any]], dict[str, Any]], message: bytes) -> bytes:
    """Return the JSON of the answer, or of `{"error": ...}` with the reason."""
    try:
        return json.dumps(answer(json.loads(message))).encode()
    except MemoryError:
        reason = "it took too much memory"
    except BaseException as error:  # templates raise what they like, and a panic in Rust is no Exception
        reason = str(error)[:_MAX_ERROR_CHARS] or type(error).__name__
    return json.dumps({"error": reason}).encode()
