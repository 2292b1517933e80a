"""The engine for asyncio: many concurrent requests on one engine thread."""

import asyncio
import atexit
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from collections.abc import Sequence as SequenceType
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Metrics, RequestOutput
from nanovllm.sampling_params import SamplingParams


class _Stream:
    """Outputs of one request on their way from the engine's thread to a coroutine.

    A consumer that is slower than the engine gets what has gathered as one output, so that no more is held than the
    request's result.
    """

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.output: RequestOutput | None = None
        self.error: BaseException | None = None

    def put(self, output: RequestOutput | None, error: BaseException | None = None) -> None:
        """Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the consumer's loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self._put, output, error)

    def _put(self, output: RequestOutput | None, error: BaseException | None) -> None:
        if output is not None:
            self.output = output if self.output is None else _merged(self.output, output)
        self.error = self.error or error
        self.ready.set()

    async def get(self) -> RequestOutput:
        await self.ready.wait()
        self.ready.clear()
        output, self.output = self.output, None
        if output is None:
            raise self.error
        if self.error is not None:
            self.ready.set()
        return output


def _merged(a: RequestOutput, b: RequestOutput) -> RequestOutput:
    samples = {sample.index: sample for sample in a.outputs}
    for new in b.outputs:
        old = samples.get(new.index)
        samples[new.index] = new if old is None else _joined(old, new)
    return replace(b, outputs=[samples[index] for index in sorted(samples)])


def _joined(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    logprobs = None if new.logprobs is None else old.logprobs + new.logprobs
    return replace(new, text=old.text + new.text, token_ids=old.token_ids + new.token_ids, logprobs=logprobs)


class AsyncLLM:
    """An `LLM` whose requests come and go one by one, from coroutines of one event loop.

        async for output in llm.generate(prompt, SamplingParams(...)):
            print(output.text, end="")  # what is new

    All work of the engine is done by one thread. Close it, or use it as `async with`.

    Args:
        model: see `Config`.
        max_concurrent_requests: more wait in `generate` until one has ended.
        **kwargs: the other fields of `Config`.
    """

    def __init__(self, model: str | Path | None = None, *, max_concurrent_requests: int = 1024, **kwargs):
        if isinstance(max_concurrent_requests, bool) or not isinstance(max_concurrent_requests, int):
            raise TypeError(f"max_concurrent_requests must be an integer, got {max_concurrent_requests!r}")
        if max_concurrent_requests < 1:
            raise ValueError(f"max_concurrent_requests must be at least 1, got {max_concurrent_requests}")
        self._free = asyncio.Semaphore(max_concurrent_requests)
        self._calls: queue.SimpleQueue[tuple[Callable[[LLM], Any] | None, Future]] = queue.SimpleQueue()
        self._streams: dict[int | str, _Stream] = {}  # the engine thread's
        self._end: BaseException | None = None  # why there is no engine any more
        self._lock = threading.Lock()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(model, kwargs, started), name="nanovllm-engine", daemon=True
        )
        self._thread.start()
        started.result()
        atexit.register(self.close)

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self, model: str | Path | None, kwargs: dict[str, Any], started: Future) -> None:
        try:
            llm = LLM(model, **kwargs)  # here, as a thread has a current CUDA device of its own
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        end: BaseException = RuntimeError("the engine is closed")
        try:
            with llm:
                while self._answer_calls(llm):
                    for output in llm.step() if llm.can_step else ():
                        self._deliver(output)
        except BaseException as error:
            end = error
        with self._lock:
            self._end = end
        for stream in self._streams.values():
            stream.put(None, end)
        while not self._calls.empty():
            future = self._calls.get()[1]
            if future.set_running_or_notify_cancel():
                future.set_exception(end)

    def _answer_calls(self, llm: LLM) -> bool:
        """Do what coroutines have asked for; wait for that if there is nothing else to do. False: close."""
        idle = not llm.can_step
        while idle or not self._calls.empty():
            idle = False
            call, future = self._calls.get()
            if call is None:
                return False
            if not future.set_running_or_notify_cancel():  # from here on it cannot be cancelled
                continue
            try:
                future.set_result(call(llm))
            except BaseException as error:
                future.set_exception(error)
        return True

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is not None:
            stream.put(output)
            if output.finished:
                del self._streams[output.request_id]

    # -- coroutines --------------------------------------------------------------------------------------------------

    def _call(self, call: Callable[[LLM], Any] | None) -> Future:
        future: Future = Future()
        with self._lock:
            if self._end is not None:
                raise RuntimeError(f"the engine is closed or has failed: {self._end!r}") from self._end
            self._calls.put((call, future))
        return future

    async def generate(
        self,
        prompt: str | SequenceType[int],
        sampling_params: SamplingParams | None = None,
        request_id: int | str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one prompt as it comes: each output has what is new since the one before.

        Waits for its turn while `max_concurrent_requests` are being answered. Leaving the iteration, or cancelling the
        task, ends the request.

        Raises:
            TypeError, ValueError: the request cannot be served; others are not affected.
            RuntimeError: the engine is closed or has failed.
        """
        async with self._free:
            stream = _Stream()

            def add(llm: LLM) -> int | str:
                added = llm.add_request(prompt, sampling_params, request_id, stream=True)
                self._streams[added] = stream
                return added

            adding = self._call(add)
            try:
                await asyncio.shield(asyncio.wrap_future(adding))
                finished = False
                while not finished:
                    output = await stream.get()
                    finished = output.finished
                    yield output
            finally:
                self._leave(adding, stream)

    def _leave(self, adding: Future, stream: _Stream) -> None:
        """End the request of a generator that is left, unless it has ended."""

        def leave(llm: LLM) -> None:
            if not adding.exception() and self._streams.get(adding.result()) is stream:
                del self._streams[adding.result()]
                llm.abort(adding.result())

        with self._lock:
            if self._end is None:
                self._calls.put((leave, Future()))

    async def abort(self, request_id: int | str) -> None:
        """End a request in whatever state it is: its iteration gets what is new, with finish_reason "abort"."""

        def abort(llm: LLM) -> None:
            output = llm.abort(request_id)
            if output is not None:
                self._deliver(output)

        await asyncio.wrap_future(self._call(abort))

    async def chat_prompt(self, messages: SequenceType[dict], **template: Any) -> list[int]:
        """The token ids of a conversation; see `LLM.chat_prompts`."""
        return (await asyncio.wrap_future(self._call(lambda llm: llm.chat_prompts(messages, **template))))[0]

    async def metrics(self) -> Metrics:
        """See `LLM.metrics`."""
        return await asyncio.wrap_future(self._call(lambda llm: llm.metrics()))

    async def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str | Path) -> int:
        """Between two steps; see `LLM.update_weights`."""
        return await asyncio.wrap_future(self._call(lambda llm: llm.update_weights(weights)))

    async def sleep(self, level: int = 1) -> None:
        """See `LLM.sleep`; requests wait until `wake_up`."""
        await asyncio.wrap_future(self._call(lambda llm: llm.sleep(level)))

    async def wake_up(self) -> None:
        """See `LLM.wake_up`."""
        await asyncio.wrap_future(self._call(lambda llm: llm.wake_up()))

    def close(self) -> None:
        """End the engine. Iterations that go on raise RuntimeError. May be called again."""
        atexit.unregister(self.close)
        with contextlib.suppress(RuntimeError):
            self._call(None)
        self._thread.join()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await asyncio.to_thread(self.close)
