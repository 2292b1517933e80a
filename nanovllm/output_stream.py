"""Carries the outputs of one request to its consumer in an event loop."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, TypeVar

from nanovllm.outputs import CompletionOutput, RequestOutput

Output = TypeVar("Output")


class OutputStream(Generic[Output]):
    """Carries the outputs of one request to a coroutine. Everything here runs in the coroutine's event loop.

    If the consumer is slower than the engine, outputs are merged, so the stream never holds more than the request's
    result.

    Args:
        merge: makes one output of two successive ones.
    """

    def __init__(self, merge: Callable[[Output, Output], Output]):
        self.loop = asyncio.get_running_loop()
        self._merge = merge
        self._ready = asyncio.Event()
        self._output: Output | None = None
        self._error: BaseException | None = None

    def put(self, item: Output | BaseException) -> None:
        """Add an output, or the error that ends the request."""
        if isinstance(item, BaseException):
            self._error = item
        else:
            self._output = item if self._output is None else self._merge(self._output, item)
        self._ready.set()

    async def get(self) -> Output:
        """Return what has come since the last call, waiting for it. Raise the error if there is nothing else."""
        await self._ready.wait()
        output, self._output = self._output, None
        if output is None:
            assert self._error is not None
            raise self._error
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


def merge_deltas(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Merge outputs that have only what is new."""
    samples = {sample.index: sample for sample in first.outputs}
    for new in second.outputs:
        old = samples.get(new.index)
        samples[new.index] = new if old is None else _merge_samples(old, new)
    return replace(second, outputs=[samples[index] for index in sorted(samples)])


def _merge_samples(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    logprobs = None
    if old.logprobs is not None and new.logprobs is not None:
        logprobs = old.logprobs + new.logprobs
    return replace(new, text=old.text + new.text, token_ids=old.token_ids + new.token_ids, logprobs=logprobs)
