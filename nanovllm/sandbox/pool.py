"""Runs what models and clients send in child processes, whose CPU time and memory the kernel limits.

A chat template may loop without end, and compiling a grammar may overflow the stack. In this process either would take
the engine with it, or hold Python's lock, which the engine's thread needs.

A child runs `serve`, which runs one of the programs in this folder: `templates` or `grammars`.
"""

import json
import resource
import signal
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from nanovllm.utils.child_process import import_path, inheritable

_SERVE = Path(__file__).resolve().parent / "serve.py"
_COMMAND = "import sys; sys.path = {!r}; import runpy; runpy.run_path({!r})['main'](**{!r})"
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)  # a full stack, or an allocation that failed in Rust


class TooCostly(ValueError):
    """A request took more CPU time than it may."""


class Pool:
    """Asks child processes that run one program. Any number of threads may ask at once; each uses a child of its own.

    Starting a child takes up to a second. A child answers any number of requests; one that was killed is replaced. If
    no child is idle, one more starts, and the request takes the first that becomes idle.

    Args:
        program: name of a module in this folder. The child does not import torch.
        setup: arguments of the program's `prepare`, as plain data.
        failure: what a refused request means to the caller; errors start with it.

    Attributes:
        cpu_seconds: CPU time that one request may take.
        memory: bytes that requests may take on top of what the program needs.
        wall_seconds: time that one request may take, for a child that is stopped or starved.
    """

    cpu_seconds = 5  # rendering 1,000 messages takes about 0.05 s, compiling a usual schema 0.01 s
    memory = 1 << 30
    wall_seconds = 300

    def __init__(self, program: str, setup: dict[str, Any], failure: str):
        self.program = program
        self.failure = failure
        self._setup = json.dumps(setup).encode()
        self._closed = False
        self._children: set[_Child] = set()
        self._changed = threading.Condition()  # guards the fields below
        self._idle: list[_Child] = []
        self._num_waiting = 0  # requests that wait for a child
        self._num_starting = 0  # children that are not ready yet
        self._start_error: str | None = None
        weakref.finalize(self, _end_all, self._children)

    def ask(self, request: dict[str, Any], cpu_seconds: float | None = None) -> dict[str, Any]:
        """Return the program's reply to a request.

        Args:
            cpu_seconds: CPU time that this request may take, if it is not the attribute.

        Raises:
            TooCostly: it took more CPU time.
            ValueError: it is not plain data, took too much time or memory, or the program refused it.
            RuntimeError: the pool is closed, or no child could be started or kept alive.
        """
        try:
            message = json.dumps(request).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.failure}: {error!s:.500}") from None
        except RecursionError:
            raise ValueError(f"{self.failure}: the data is nested too deeply") from None
        code = None
        cpu_seconds = self.cpu_seconds if cpu_seconds is None else cpu_seconds
        for _ in range(2):  # once more if the child was killed, as the system may do where memory is short
            child = self._take()
            try:
                reply = child.ask(json.dumps(cpu_seconds).encode(), message, wall_seconds=self.wall_seconds)
                if reply is not None:
                    self._keep(child)
            except BaseException:  # an interrupt: the reply would be taken for the next request's
                self._end(child)
                raise
            if self._closed:
                _end_all(self._children)
                raise RuntimeError("the engine is closed")
            if reply is not None:
                if "error" in reply:
                    raise ValueError(f"{self.failure}: {reply['error']}")
                return reply
            self._end(child)
            code = child.process.returncode
            if code == -signal.SIGPROF:
                raise TooCostly(f"{self.failure}: it took more than {cpu_seconds:g} s of CPU time")
            if excess := self._excess(child):
                raise ValueError(f"{self.failure}: it took {excess}")
        raise RuntimeError(f"{self.failure}: two processes ended, the last with code {code}")

    def close(self) -> None:
        """End the children; threads that wait for one get RuntimeError. May be called again."""
        self._closed = True
        _end_all(self._children)
        with self._changed:
            self._changed.notify_all()

    def _take(self) -> "_Child":
        """Wait for an idle child. As many children start as requests wait."""
        with self._changed:
            self._num_waiting += 1
            self._start_error = None
            try:
                while True:
                    if self._closed:
                        raise RuntimeError("the engine is closed")
                    while self._idle:
                        child = self._idle.pop()
                        if child.process.poll() is None or child.is_broken:
                            return child
                        self._children.discard(child)
                    if self._start_error is not None:
                        raise RuntimeError(f"{self.failure}: no process can be started: {self._start_error}")
                    if self._num_starting < self._num_waiting:
                        threading.Thread(target=self._start, name="nanovllm-sandbox", daemon=True).start()
                        self._num_starting += 1
                    self._changed.wait()
            finally:
                self._num_waiting -= 1

    def _start(self) -> None:
        """Start a child, and let it be idle once it has prepared itself, or has ended."""
        child: _Child | None = None
        error: str | None = None
        try:
            child = _Child({"program": self.program, "memory": self.memory})
            self._children.add(child)
            if self._closed:  # meanwhile, so `close` may not have seen this child
                self._end(child)
            else:
                child.is_broken = child.ask(self._setup, wall_seconds=self.wall_seconds) is None
        except Exception as reason:
            error = str(reason)
        with self._changed:
            self._num_starting -= 1
            if child is not None:
                self._idle.append(child)
            else:
                self._start_error = error
            self._changed.notify_all()

    def _keep(self, child: "_Child") -> None:
        """Keep a child for the next request, unless its libraries have kept too much, such as compiled templates."""
        if child.resident_memory() > self.memory // 2:
            self._end(child)
            return
        with self._changed:
            self._idle.append(child)
            self._changed.notify()

    def _end(self, child: "_Child") -> None:
        self._children.discard(child)
        child.end()

    def _excess(self, child: "_Child") -> str | None:
        """Return what else a child took too much of, None if it was killed from outside."""
        if child.timed_out:
            return f"more than {self.wall_seconds} s"
        return "too much memory" if -child.process.returncode in _CRASHES else None


class _Child:
    """A process that answers one request after the other.

    Args:
        arguments: those of `serve.main`, but for the connection.

    Attributes:
        is_broken: it has ended before it was ready. The first request finds out why.
        timed_out: it was ended because a reply took too long.
    """

    def __init__(self, arguments: dict[str, Any]):
        if not sys.executable:
            raise OSError("sys.executable does not name Python")
        self.channel, theirs = Pipe()
        with theirs, inheritable(theirs.fileno()) as (descriptor,):
            program = _COMMAND.format(import_path(), str(_SERVE), arguments | {"fd": descriptor})
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", program],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[descriptor],
                    cwd="/",  # the parent's working folder may be gone, and transformers asks for it
                    start_new_session=True,  # Ctrl-C reaches all of a terminal's session; the parent decides
                )
            except BaseException:
                self.channel.close()  # the error may be kept for long, and this object with it
                raise
        self.is_broken = False
        self.timed_out = False

    def ask(self, *messages: bytes, wall_seconds: float) -> dict[str, Any] | None:
        """Return the reply to these messages, or None if the process ended instead."""
        timer = threading.Timer(wall_seconds, self._time_out)
        timer.daemon = True
        try:
            timer.start()  # an interrupt may come while it waits for its thread
            for message in messages:
                self.channel.send_bytes(message)
            return json.loads(self.channel.recv_bytes())
        except (EOFError, OSError):
            return None
        finally:
            timer.cancel()

    def resident_memory(self) -> int:
        """Return the bytes of the process that are in memory; 0 where the system does not tell."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):  # it has ended, or this is not Linux
            return 0
        return pages * resource.getpagesize()

    def _time_out(self) -> None:
        self.timed_out = True
        self.process.kill()

    def end(self) -> None:
        """End the process, and wait for its end. Another thread that waits in `ask` is woken."""
        self.process.kill()
        self.process.wait()


def _end_all(children: set[_Child]) -> None:
    for child in list(children):
        child.end()
        children.discard(child)
