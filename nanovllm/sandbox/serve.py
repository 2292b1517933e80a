"""The main program of a child process; `pool` starts it by its path."""

import importlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

_MAX_ERROR_CHARS = 500


def main(fd: int, program: str, memory: int) -> None:
    """Answer requests until the parent closes the connection or ends.

    Args:
        fd: of the connection to the parent. The first message has the arguments of the program's `prepare`. The reply
            says that this process is ready. Then two messages are a request: the CPU time it may take in seconds, and
            its data. If it takes more, the kernel ends this process (SIGPROF).
        program: a module of this folder with `prepare`, which returns a function from a request to a reply.
        memory: bytes that requests may take on top of what this process has once it is prepared.
    """
    channel = Connection(fd)
    try:
        answer = load(program).prepare(**json.loads(channel.recv_bytes()))
        lower_limit(resource.RLIMIT_CORE, 0)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a parent's choice to ignore or block it is inherited
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        if sys.platform == "linux":
            num_pages = int(Path("/proc/self/statm").read_text().split()[0])
            lower_limit(resource.RLIMIT_AS, num_pages * resource.getpagesize() + memory)
        channel.send_bytes(b"{}")
        while True:
            cpu_seconds = json.loads(channel.recv_bytes())
            message = channel.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            answered = reply(answer, message)
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.send_bytes(answered)
    except (EOFError, OSError):
        return


def load(program: str) -> ModuleType:
    """Import a module of this folder, but not nanovllm's package, whose own code imports torch."""
    package = ModuleType("nanovllm")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["nanovllm"] = package
    return importlib.import_module(f"nanovllm.sandbox.{program}")


def lower_limit(kind: int, value: int) -> None:
    """Set a soft limit to `value`, or to the hard limit if that is lower."""
    _, hard = resource.getrlimit(kind)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, hard))


def reply(answer: Callable[[dict[str, Any]], dict[str, Any]], message: bytes) -> bytes:
    """Return the JSON of the answer, or of `{"error": ...}` with the reason."""
    try:
        return json.dumps(answer(json.loads(message))).encode()
    except MemoryError:
        reason = "it took too much memory"
    except BaseException as error:  # templates raise what they like, and a panic in Rust is no Exception
        reason = str(error)[:_MAX_ERROR_CHARS] or type(error).__name__
    return json.dumps({"error": reason}).encode()
