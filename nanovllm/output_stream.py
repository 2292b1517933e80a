"""Carries the outputs of one request to its consumer in an event loop."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Output = TypeVar("Output")


class OutputStream(Generic[Output]):
    """Carries the outputs of one request to a coroutine. Everything here runs in the coroutine's event loop.

    If the consumer is slower than the engine, outputs are merged, so the stream never holds more than the request's
    result.

    Args:
        merge: makes one output of two successive ones.
        copies: whether it copies both. Then outputs wait until there is one of about the same length to merge with, so
            that each is copied log2(n) times and not n times while n of them come.
    """

    def __init__(self, merge: Callable[[Output, Output], Output], copies: bool):
        self.loop = asyncio.get_running_loop()
        self._merge = merge
        self._copies = copies
        self._ready = asyncio.Event()
        self._outputs: list[tuple[int, Output]] = []  # and from how many each was merged: fewer than the one before it
        self._error: BaseException | None = None

    def put(self, item: Output | BaseException) -> None:
        """Add an output, or the error that ends the request."""
        if isinstance(item, BaseException):
            self._error = item
        else:
            self._add(1, item)
        self._ready.set()

    def _add(self, count: int, output: Output) -> None:
        """Add an output that was merged from `count`."""
        while self._outputs and (self._outputs[-1][0] <= count or not self._copies):
            older_count, older = self._outputs.pop()
            count = older_count + count
            output = self._merge(older, output)
        self._outputs.append((count, output))

    async def get(self) -> Output:
        """Return what has come since the last call, waiting for it. Raise the error if there is nothing else."""
        await self._ready.wait()
        if not self._outputs:
            assert self._error is not None
            raise self._error
        _, output = self._outputs.pop()
        while self._outputs:
            output = self._merge(self._outputs.pop()[1], output)
        if self._error is None:
            self._ready.clear()
        return output


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[Any], None], argument: Any) -> None:
    """Let an event loop of another thread make a call. Do nothing if the loop is closed, because then nobody waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, argument)


def keep_newest(first: Output, second: Output) -> Output:
    """Merge outputs that have everything since the start."""
    return second
