"""Renders chat templates with bounded time and memory.

A template is a program that comes with a model or a caller. One may loop without end or ask for all memory, and while
it runs in this process it holds Python's lock, which the engine's thread needs. So templates run in child processes,
whose CPU time and memory the kernel limits.
"""

import json
import os
import signal
import subprocess
import sys
import weakref
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

CPU_SECONDS = 5  # a template of 1,000 messages takes about 0.05 s
MEMORY = 1 << 30
_WORKER = "import sys; sys.path = {!r}; import runpy; runpy.run_path({!r})['main'](*{!r})"


_UNFIT = "messages do not fit the model's chat template"


class TemplateLimitError(ValueError):
    """A template ended its process: it took too much CPU time."""


class _Child:
    """A process that renders one request after the other."""

    def __init__(self):
        if not sys.executable:
            raise RuntimeError("chat templates run in a process of their own, but sys.executable does not say which")
        ours, theirs = Pipe()
        path = [p or os.getcwd() for p in sys.path if isinstance(p, str)]
        worker = str(Path(__file__).with_name("template_worker.py"))
        with theirs:
            program = _WORKER.format(path, worker, (theirs.fileno(), CPU_SECONDS, MEMORY))
            command = [sys.executable, "-c", program]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self.channel: Connection = ours

    def ask(self, message: bytes) -> dict[str, Any]:
        try:
            self.channel.send_bytes(message)
            return json.loads(self.channel.recv_bytes())
        except (EOFError, OSError):
            self.end()
            if self.process.returncode == -signal.SIGXCPU:
                return {"error": f"it took more than {CPU_SECONDS} s of CPU time"}
            return {"error": f"its process ended with status or signal {self.process.returncode}"}

    def end(self) -> None:
        """End the process. Another thread that waits in `ask` is woken."""
        self.process.kill()
        self.process.wait()


def _end_all(children: set[_Child]) -> None:
    for child in list(children):
        child.end()
        children.discard(child)


class TemplateRenderer:
    """Renders templates for any number of threads: each takes an idle child, or starts one, which takes a second."""

    def __init__(self):
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        weakref.finalize(self, _end_all, self._children)

    def render(self, arguments: dict[str, Any], max_chars: int) -> str:
        """Return the text that a template makes of one conversation.

        Args:
            arguments: those of transformers' `apply_chat_template`, as plain data.
            max_chars: longer texts are refused.

        Raises:
            TemplateLimitError: the template took too much CPU time.
            ValueError: an argument is not plain data, or the template failed.
        """
        return self._ask({"arguments": arguments, "max_chars": max_chars})["text"]

    def variables(self, template: str) -> frozenset[str]:
        """Return the names of the variables that a template reads; raises as `render` does."""
        return frozenset(self._ask({"template": template})["variables"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            message = json.dumps(request).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_UNFIT}: {error}") from None
        except RecursionError:
            raise ValueError(f"{_UNFIT}: the data is nested too deeply") from None
        child = self._take()
        try:
            reply = child.ask(message)
        except BaseException:  # an interrupt: the reply would be the next request's
            self._children.discard(child)
            child.end()
            raise
        has_ended = child.process.returncode is not None
        if has_ended:
            self._children.discard(child)
        else:
            self._idle.append(child)
        if "error" in reply:
            raise (TemplateLimitError if has_ended else ValueError)(f"{_UNFIT}: {reply['error']}")
        return reply

    def _take(self) -> _Child:
        with suppress(IndexError):
            while True:
                child = self._idle.pop()
                if child.process.poll() is None:
                    return child
                self._children.discard(child)
        child = _Child()
        self._children.add(child)
        return child

    def close(self) -> None:
        """End the children; threads that wait for one get ValueError. Rendering again starts new ones."""
        _end_all(self._children)
