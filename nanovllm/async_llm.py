"""The engine for asyncio: many concurrent requests on one engine thread.

Other threads prepare requests: they tokenise prompts, render chat templates and compile grammars. So however long that
takes, the steps of other requests go on.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from collections.abc import Sequence as SequenceType
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nanovllm.checks import is_list, number, shown
from nanovllm.config import check_names
from nanovllm.engine.llm_engine import checked_id, close_at_exit
from nanovllm.engine.request import Request
from nanovllm.llm import LLM
from nanovllm.ops.triton_utils import current_gpu_initializer
from nanovllm.outputs import Metrics, RequestOutput
from nanovllm.sampling_params import SamplingParams

_PREPARING_THREADS = 4


class _Stream:
    """Outputs of one request on their way from the engine's thread to a coroutine.

    A consumer that is slower than the engine gets what has gathered as one output, so that no more is held than the
    request's result.
    """

    def __init__(self):
        self.request_id: int | str | None = None  # as soon as the engine has it
        self.aborted = False  # before the engine had it
        self.loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.output: RequestOutput | None = None
        self.error: BaseException | None = None

    def put(self, news: RequestOutput | BaseException) -> None:
        """Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the consumer's loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self._put, news)

    def _put(self, news: RequestOutput | BaseException) -> None:
        if isinstance(news, BaseException):
            self.error = news
        else:
            self.output = news if self.output is None else _merged(self.output, news)
        self.ready.set()

    async def get(self) -> RequestOutput:
        await self.ready.wait()
        output, self.output = self.output, None
        if output is None:
            raise self.error
        if self.error is None:
            self.ready.clear()
        return output


def _merged(a: RequestOutput, b: RequestOutput) -> RequestOutput:
    samples = {sample.index: sample for sample in a.outputs}
    for new in b.outputs:
        if old := samples.get(new.index):
            logprobs = None if new.logprobs is None else old.logprobs + new.logprobs
            text, token_ids = old.text + new.text, old.token_ids + new.token_ids
            new = replace(new, text=text, token_ids=token_ids, logprobs=logprobs)
        samples[new.index] = new
    return replace(b, outputs=[samples[index] for index in sorted(samples)])


class AsyncLLM:
    """An `LLM` whose requests come and go one by one, from coroutines.

        async for output in llm.generate(prompt, SamplingParams(...)):
            print(output.text, end="")  # what is new

    All work of the engine is done by one thread, whatever event loops the coroutines run in. A few more threads prepare
    requests, each of which starts as soon as it is ready. Close the engine, or use it as `async with`.

    Args:
        model: see `Config`.
        max_concurrent_requests: of one event loop, more wait in `generate` until one has ended.
        **kwargs: the other fields of `Config`.
    """

    def __init__(self, model: str | Path | None = None, *, max_concurrent_requests: int = 1024, **kwargs):
        check_names(kwargs, "max_concurrent_requests")
        self._most = number("max_concurrent_requests", max_concurrent_requests, int, 1, 1 << 30)
        self._free: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self._thread = ThreadPoolExecutor(1, "nanovllm-engine", current_gpu_initializer())
        self._preparing_threads = ThreadPoolExecutor(_PREPARING_THREADS, "nanovllm-prepare")
        self._preparing: dict[int | str, _Stream] = {}  # requests with an id that the engine does not have yet
        self._end: BaseException | None = None  # why there is no engine any more
        # The rest belongs to the thread of the engine.
        self._streams: dict[int | str, _Stream] = {}
        self._step_queued = False
        try:
            self._llm = self._thread.submit(LLM, model, **kwargs).result()
        except BaseException:
            self._thread.shutdown()
            raise
        if find_spec("llguidance"):
            # Now, because this holds the GIL for a while. Should it fail, each structured request says why.
            self._preparing_threads.submit(lambda: self._llm.input_processor.grammars)
        close_at_exit(self)

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self, call: Callable[[LLM], Any]) -> Any:
        try:
            return call(self._llm)
        finally:
            if self._llm.error is not None:
                self._finish(self._llm.error)
            self._queue_step()

    def _queue_step(self) -> None:
        """Let a step come after all calls that wait, and the next one after those that have come meanwhile."""
        if self._llm.can_step and not self._step_queued:
            with contextlib.suppress(RuntimeError):  # the thread is to end
                self._thread.submit(self._step)
                self._step_queued = True

    def _step(self) -> None:
        self._step_queued = False
        try:
            for output in self._llm.step() if self._llm.can_step else ():
                self._deliver(output)
        except BaseException as error:
            self._finish(error)
        else:
            self._queue_step()

    def _finish(self, end: BaseException) -> None:
        self._end = self._end or end
        try:
            self._llm.close()
        finally:
            for stream in self._streams.values():
                stream.put(end)
            self._streams.clear()

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is not None:
            stream.put(output)
            if output.finished or stream.loop.is_closed():
                del self._streams[output.request_id]
                self._llm.abort(output.request_id)  # which does nothing to one that has ended

    def _add(self, request: Request, stream: _Stream) -> None:
        self._release(request.id, stream)
        self._llm._check_addable(request.id)
        stream.request_id = self._llm._queue(request)
        self._streams[stream.request_id] = stream
        if stream.aborted:
            self._abort(stream.request_id)

    def _leave(self, stream: _Stream) -> None:
        """End a request that nobody waits for any more, if it has not ended."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self._llm.abort(stream.request_id)

    def _abort(self, request_id: int | str) -> None:
        if output := self._llm.abort(request_id):
            self._deliver(output)
        elif stream := self._preparing.get(request_id):
            stream.aborted = True

    # -- coroutines --------------------------------------------------------------------------------------------------

    def _call(self, call: Callable[[LLM], Any]) -> asyncio.Future:
        """Let the engine's thread run `call` between two steps; its result."""
        self._check_usable()
        try:
            return asyncio.wrap_future(self._thread.submit(self._run, call))
        except RuntimeError as error:
            raise RuntimeError("the engine is closed") from error

    def _check_usable(self) -> None:
        if self._end is not None:
            raise RuntimeError(f"the engine is closed or has failed: {self._end!r}") from self._end
        self._llm.check_process()

    def _prepare(self, work: Callable[[], Any]) -> asyncio.Future:
        """Let a preparing thread run `work`, which must not use the engine's state; its result."""

        def run() -> Any:
            self._check_usable()  # it may have been closed while this waited
            try:
                return work()
            finally:
                self._check_usable()  # which may be why the work failed

        self._check_usable()
        try:
            return asyncio.wrap_future(self._preparing_threads.submit(run))
        except RuntimeError as error:
            raise RuntimeError("the engine is closed") from error

    def _turns(self) -> asyncio.Semaphore:
        """The running loop's semaphore: each belongs to one."""
        for loop in list(self._free):
            if loop.is_closed():
                self._free.pop(loop, None)
        return self._free.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._most))

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
        stream = _Stream()
        if request_id is not None and self._preparing.setdefault(checked_id(request_id), stream) is not stream:
            raise ValueError(f"request_id {shown(request_id)} is that of a request that is being prepared")
        try:
            async with self._turns():
                process = self._llm.input_processor.process
                request = await self._prepare(lambda: process(prompt, sampling_params, request_id, stream=True))
                adding = self._call(lambda llm: self._add(request, stream))
                adding.add_done_callback(lambda done: done.cancelled() or done.exception())  # the task may be cancelled
                await asyncio.shield(adding)
                finished = False
                while not finished:
                    output = await stream.get()
                    finished = output.finished
                    yield output
        finally:
            self._release(request_id, stream)
            with contextlib.suppress(RuntimeError):  # the engine is closed
                self._thread.submit(self._run, lambda llm: self._leave(stream))

    def _release(self, request_id: int | str | None, stream: _Stream) -> None:
        """Forget that a request is being prepared."""
        if self._preparing.get(request_id) is stream:
            self._preparing.pop(request_id, None)

    async def abort(self, request_id: int | str) -> None:
        """End a request in whatever state it is: its iteration gets what is new, with finish_reason "abort".

        One that is still being prepared ends once it is ready.
        """
        await self._call(lambda llm: self._abort(request_id))

    async def chat_prompt(self, messages: SequenceType[dict], **template: Any) -> list[int]:
        """Return the token ids of one conversation; see `LLM.chat_prompts`."""
        if is_list(messages) and len(messages) > 1 and is_list(messages[0]):
            raise ValueError(f"messages must be one conversation, got a list of {len(messages)}")
        prompts = await self._prepare(lambda: self._llm.chat_prompts(messages, **template))
        return prompts[0]

    async def metrics(self) -> Metrics:
        """See `LLM.metrics`."""
        return await self._call(lambda llm: llm.metrics())

    async def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str | Path) -> int:
        """Between two steps; see `LLM.update_weights`.

        What a CUDA stream other than the default one computes of the weights must have ended: nothing waits for it.
        """
        return await self._call(lambda llm: llm.update_weights(weights))

    async def sleep(self, level: int = 1) -> None:
        """See `LLM.sleep`; requests that are being answered wait until `wake_up`, and new ones are refused."""
        await self._call(lambda llm: llm.sleep(level))

    async def wake_up(self) -> None:
        """See `LLM.wake_up`."""
        await self._call(lambda llm: llm.wake_up())

    def close(self) -> None:
        """End the engine. Iterations that go on raise RuntimeError. May be called again."""
        self._end = self._end or RuntimeError("the engine is closed")
        self._llm.input_processor.close()  # wakes preparing threads that wait for a template
        self._preparing_threads.shutdown()
        with contextlib.suppress(RuntimeError):  # closed before
            self._thread.submit(self._finish, self._end)
        self._thread.shutdown()
        self._llm.close()  # if that failed; or if Python itself ends, when its threads have ended before

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await asyncio.to_thread(self.close)
