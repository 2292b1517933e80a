"""Carries the outputs of one request to its consumer in an event loop."""

import asyncio
from dataclasses import replace

from nanovllm.outputs import CompletionOutput, RequestOutput


class OutputStream:
    """Carries the outputs of one request to a coroutine. Everything here runs in the coroutine's event loop.

    If the consumer is slower than the engine, outputs are merged, so the stream never holds more than the request's
    result.

    Args:
        is_delta: each output has only what is new.
    """

    def __init__(self, is_delta: bool):
        self.is_delta = is_delta
        self.loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None

    def put(self, item: RequestOutput | BaseException) -> None:
        """Add an output, or the error that ends the request."""
        if isinstance(item, BaseException):
            self._error = item
        elif self._output is None or not self.is_delta:
            self._output = item
        else:
            self._output = _merged(self._output, item)
        self._ready.set()

    async def get(self) -> RequestOutput:
        """Return what has come since the last call, waiting for it. Raise the error if there is nothing else."""
        await self._ready.wait()
        output, self._output = self._output, None
        if output is None:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._ready.clear()
        return output


def _merged(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Return two successive outputs of a stream as one."""
    samples = {sample.index: sample for sample in first.outputs}
    for new in second.outputs:
        old = samples.get(new.index)
        samples[new.index] = new if old is None else _merged_samples(old, new)
    return replace(second, outputs=[samples[index] for index in sorted(samples)])


def _merged_samples(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    logprobs = None
    if old.logprobs is not None and new.logprobs is not None:
        logprobs = old.logprobs + new.logprobs
    return replace(new, text=old.text + new.text, token_ids=old.token_ids + new.token_ids, logprobs=logprobs)
