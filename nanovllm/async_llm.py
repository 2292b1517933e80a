"""The engine for asyncio: many concurrent requests on one engine thread.

Other threads prepare requests (`input_threads`).
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceType
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nanovllm.checks import is_list, length, number, shown
from nanovllm.config import Config, check_names
from nanovllm.engine.guard import close_at_exit, without_traceback
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Request, check_request_id
from nanovllm.executor.start import is_replicated
from nanovllm.input_threads import InputThreads, future_of
from nanovllm.inputs import Prompt
from nanovllm.ops.triton_utils import current_gpu_initializer
from nanovllm.output_stream import OutputStream, keep_newest
from nanovllm.outputs import Metrics, RequestOutput, merge_deltas
from nanovllm.sampling_params import RequestOutputKind, SamplingParams, copy_params
from nanovllm.vllm_options import NEUTRAL_ASYNC, check_call

logger = logging.getLogger("nanovllm")


class _Consumer:
    """Receives the outputs of one request in its event loop.

    Args:
        receive: called in the event loop with each output, or with the error that ends the request.

    Attributes:
        request_id: the request's id; None until the engine has the request.
        aborted: the request was aborted before the engine had it.
        failed: `receive` has raised, so it is not called again.
    """

    def __init__(self, receive: Callable[[RequestOutput | BaseException], None]):
        self.receive = receive
        self.loop = asyncio.get_running_loop()
        self.request_id: str | None = None
        self.aborted = False
        self.failed = False


class AsyncLLM:
    """An `LLM` for coroutines: its requests come and go one by one.

        async for output in llm.generate(prompt, SamplingParams(...)):
            print(output.text, end="")  # the new text

    One thread does all work of the engine, whatever event loops the coroutines run in. Other threads prepare requests.
    A request starts as soon as it is ready. Close the engine, or use it in an `async with` block.

    Args:
        model: see `Config`.
        max_concurrent_requests: how many requests of one event loop the engine has at once; more wait in `generate`.
        **kwargs: the other fields of `Config`.

    Attributes:
        llm_engine: only the engine's thread may call methods that use its state. `input_processor` and
            `guard.check_process` are safe in any thread, and `close` is once the engine's thread has ended.
    """

    def __init__(self, model: str | Path | None = None, *, max_concurrent_requests: int = 1024, **kwargs: Any):
        check_names(kwargs, "max_concurrent_requests")
        _check_one_engine(Config.from_options({"model": model, **kwargs}))
        self._max_concurrent = number("max_concurrent_requests", max_concurrent_requests, int, 1, 1 << 30)
        self._semaphores: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self._engine_thread = ThreadPoolExecutor(1, "nanovllm-engine", current_gpu_initializer())
        # By id: the requests whose id was chosen by the caller, until the engine has them.
        self._preparing: dict[str, _Consumer] = {}
        self._end_reason: BaseException | None = None  # set when the engine is closed or has failed
        # Only the engine's thread uses these two.
        self._consumers: dict[str, _Consumer] = {}
        self._step_queued = False
        try:
            self.llm_engine = self._engine_thread.submit(LLMEngine, model, **kwargs).result()
        except BaseException:
            self._engine_thread.shutdown()
            raise
        self._input_threads = InputThreads(self.llm_engine.input_processor, self._check_usable)
        if find_spec("llguidance"):
            self._input_threads.load_grammars()
        close_at_exit(self)

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self, call: Callable[[LLMEngine], Any]) -> Any:
        try:
            return call(self.llm_engine)
        finally:
            guard = self.llm_engine.guard
            if guard.error is not None:
                self._close_with(guard.error)
            elif guard.update_failed:
                self._end_streams()
            elif self.llm_engine.core.outputs and not self.llm_engine.can_step:
                self._deliver(self.llm_engine.take_outputs())  # such as those that `sleep` has collected
            self._queue_step()

    def _queue_step(self) -> None:
        """Queue a step after all calls that wait now; calls that come later run before the step after it."""
        if self.llm_engine.can_step and not self._step_queued:
            with contextlib.suppress(RuntimeError):  # the thread is shutting down
                self._engine_thread.submit(self._step)
                self._step_queued = True

    def _step(self) -> None:
        self._step_queued = False
        try:
            if self.llm_engine.can_step:
                self._deliver(self.llm_engine.step())
        except BaseException as error:
            self._close_with(error)
        else:
            self._queue_step()

    def _close_with(self, reason: BaseException) -> None:
        """Close the engine and raise `reason` in all iterations."""
        if self._end_reason is None:
            logger.error("The engine has failed", exc_info=reason)
            self._end_reason = without_traceback(reason)
        try:
            self.llm_engine.close()
        finally:
            self._hand_over([(consumer, reason) for consumer in self._consumers.values()])
            self._consumers.clear()

    def _end_streams(self) -> None:
        """End all requests, and let their iterations raise the reason why the engine cannot be used."""
        self._deliver(self.llm_engine.take_outputs())
        try:
            self.llm_engine.ensure_usable(needs=())
        except RuntimeError as reason:
            self._hand_over([(consumer, reason) for consumer in self._consumers.values()])
            for request_id in self._consumers:
                self.llm_engine.abort(request_id)
            self._consumers.clear()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        pairs = []
        for output in outputs:
            consumer = self._consumers.get(output.request_id)
            if consumer is not None:
                pairs.append((consumer, output))
                if output.finished or consumer.loop.is_closed():
                    del self._consumers[output.request_id]
                    self.llm_engine.abort(output.request_id)  # does nothing to a finished request
        self._hand_over(pairs)

    def _hand_over(self, items: list[tuple[_Consumer, RequestOutput | BaseException]]) -> None:
        """Hand outputs or errors over to their consumers, each in its event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        for consumer, item in items:
            by_loop.setdefault(consumer.loop, []).append((consumer, item))
        for loop, pairs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(self._receive_all, iter(pairs))

    def _add(self, request: Request, consumer: _Consumer) -> None:
        self._forget_preparing(request.chosen_id, consumer)
        consumer.request_id = self.llm_engine.queue(request)
        self._consumers[consumer.request_id] = consumer
        if consumer.aborted:
            self._abort(consumer.request_id)

    def _abort_consumer(self, consumer: _Consumer) -> None:
        """End a request whose consumer has gone, if it has not finished."""
        if consumer.request_id is not None and self._consumers.get(consumer.request_id) is consumer:
            del self._consumers[consumer.request_id]
            self.llm_engine.abort(consumer.request_id)

    def _abort(self, request_id: str) -> None:
        if output := self.llm_engine.abort(request_id):
            self._deliver([output])
        elif consumer := self._preparing.get(request_id):
            consumer.aborted = True

    # -- event loops -------------------------------------------------------------------------------------------------

    def _receive_all(self, pairs: Iterator[tuple[_Consumer, RequestOutput | BaseException]]) -> None:
        """Call the consumers of this event loop with their items."""
        try:
            for consumer, item in pairs:
                self._receive(consumer, item)
        except BaseException:
            # Ctrl-C leaves the event loop here. If the loop goes on, the other consumers get their items.
            asyncio.get_running_loop().call_soon(self._receive_all, pairs)
            raise

    def _receive(self, consumer: _Consumer, item: RequestOutput | BaseException) -> None:
        """Call a consumer. If it raises, call the event loop's exception handler and end this request only."""
        if consumer.failed:
            return
        try:
            consumer.receive(item)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            consumer.failed = True
            self._end(None, consumer)
            message = f"receive() of request {consumer.request_id} has raised, which ends the request"
            consumer.loop.call_exception_handler({"message": message, "exception": error})

    # -- coroutines --------------------------------------------------------------------------------------------------

    def _call(self, call: Callable[[LLMEngine], Any]) -> asyncio.Future:
        """Let the engine's thread run `call` between two steps. Return a future of its result."""
        self._check_usable()
        return future_of(lambda: self._engine_thread.submit(self._run, call))

    def _check_usable(self) -> None:
        if self._end_reason is not None:
            raise RuntimeError(f"the engine is closed or has failed: {self._end_reason!r:.500}") from self._end_reason
        self.llm_engine.guard.check_process()

    def _get_semaphore(self) -> asyncio.Semaphore:
        """Return the running loop's semaphore, a new one at its first request. Forget those of closed loops."""
        for loop in list(self._semaphores):
            if loop.is_closed():
                self._semaphores.pop(loop, None)
        return self._semaphores.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._max_concurrent))

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: int | str | None = None,
        **neutral: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Generate for one prompt. Yield an output for each step: what is new, or what `output_kind` says.

        The request waits while `max_concurrent_requests` others are unfinished. Leaving the iteration, or cancelling
        the task, ends the request.

        Args:
            neutral: vLLM's other arguments, such as `lora_request` and `priority`, at values without effect.

        Raises:
            TypeError, ValueError: the request cannot be served; others are not affected. This call raises what shows
                without tokenizing. The first output raises the rest: a text that is too long, a token mask that allows
                nothing, an id that another request has.
            RuntimeError: the engine is closed or has failed, or an update of the weights has failed meanwhile.
        """
        check_call(neutral, NEUTRAL_ASYNC)
        chosen_id = self._check(prompt, sampling_params, request_id)
        return self._outputs(prompt, copy_params(sampling_params), chosen_id)

    async def check_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> None:
        """Raise what `generate` would raise for this request before its first output, without generating anything."""
        self._check(prompt, sampling_params, None)
        await self._input_threads.process(prompt, sampling_params, None)

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: int | str | None = None,
        *,
        receive: Callable[[RequestOutput | BaseException], None],
    ) -> Callable[[], None]:
        """Generate for one prompt. Call `receive`, in this event loop, with each output that `generate` would yield.

        This costs less than `generate`, because no coroutine wakes for each output. Outputs are not merged, and
        `max_concurrent_requests` does not count the request.

        Args:
            receive: gets the outputs, of which the last is `finished`, or the error that ends the request. If it
                raises, the event loop's exception handler gets its error, and the request ends.

        Returns:
            A function that ends the request and may be called again.

        Raises:
            TypeError, ValueError, RuntimeError: as in `generate`.
        """
        chosen_id = self._check(prompt, sampling_params, request_id)
        if not callable(receive):
            raise TypeError(f"receive must be a function, got {shown(receive)}")
        consumer = _Consumer(receive)
        self._reserve(chosen_id, consumer)
        try:
            await self._start(prompt, copy_params(sampling_params), chosen_id, consumer)
        except BaseException:
            self._end(chosen_id, consumer)
            raise
        return partial(self._end, chosen_id, consumer)

    def _check(self, prompt: Any, sampling_params: SamplingParams | None, request_id: Any) -> str | None:
        """Raise if a request is wrong, as far as this shows at once. Return its chosen id."""
        self._check_usable()
        self.llm_engine.input_processor.check(prompt, sampling_params)
        return None if request_id is None else check_request_id(request_id)

    async def _outputs(
        self, prompt: Any, sampling_params: SamplingParams | None, request_id: str | None
    ) -> AsyncIterator[RequestOutput]:
        kind = sampling_params.output_kind if sampling_params else None
        is_delta = kind in (None, RequestOutputKind.DELTA)
        stream = OutputStream(merge_deltas if is_delta else keep_newest, copies=is_delta)
        consumer = _Consumer(stream.put)
        self._reserve(request_id, consumer)
        try:
            async with self._get_semaphore():
                await self._start(prompt, sampling_params, request_id, consumer)
                finished = False
                while not finished:
                    output = await stream.get()
                    finished = output.finished
                    yield output
        finally:
            self._end(request_id, consumer)

    async def _start(
        self, prompt: Any, sampling_params: SamplingParams | None, request_id: str | None, consumer: _Consumer
    ) -> None:
        """Prepare a request and hand it to the engine."""
        request = await self._input_threads.process(prompt, sampling_params, request_id)
        adding = self._call(lambda engine: self._add(request, consumer))
        adding.add_done_callback(_retrieve_exception)
        await asyncio.shield(adding)

    def _end(self, request_id: str | None, consumer: _Consumer) -> None:
        """End a request if it has not finished, whether the engine has it or not."""
        self._forget_preparing(request_id, consumer)
        with contextlib.suppress(RuntimeError):  # the engine is closed
            self._engine_thread.submit(self._run, lambda engine: self._abort_consumer(consumer))

    def _reserve(self, request_id: str | None, consumer: _Consumer) -> None:
        """Take a chosen id for a request that the engine does not have yet."""
        if request_id is None:
            return
        holder = self._preparing.setdefault(request_id, consumer)
        if holder is not consumer and not holder.loop.is_closed():
            raise ValueError(f"request_id {shown(request_id)} belongs to a request that is being prepared")
        self._preparing[request_id] = consumer

    def _forget_preparing(self, request_id: str | None, consumer: _Consumer) -> None:
        if request_id is not None and self._preparing.get(request_id) is consumer:
            self._preparing.pop(request_id, None)

    async def abort(self, request_id: int | str | SequenceType[int | str]) -> None:
        """End requests in whatever state they are: each iteration gets what is new, with finish_reason "abort".

        A request that is still being prepared ends once it is ready.

        Args:
            request_id: one id, or a list of them.
        """
        given: Any = request_id if is_list(request_id) else [request_id]
        request_ids = [check_request_id(each) for each in given]

        def abort_all(engine: LLMEngine) -> None:
            for each in request_ids:
                self._abort(each)

        await self._call(abort_all)

    async def chat_prompt(self, messages: SequenceType[dict], **template: Any) -> list[int]:
        """Return the token ids of one conversation; see `LLM.chat_prompts`."""
        _, token_ids = await self._chat_text_and_ids(messages, **template)
        return token_ids

    async def _chat_text_and_ids(self, messages: SequenceType[dict], **template: Any) -> tuple[str, list[int]]:
        if is_list(messages) and length(messages) > 1 and is_list(messages[0]):
            raise ValueError(f"messages must be one conversation, got a list of {length(messages)}")
        return await self._input_threads.chat_prompt(messages, **template)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, by default as those of a prompt."""
        return await self._input_threads.encode(text, add_special_tokens)

    async def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return await self._input_threads.decode(token_ids)

    def get_default_sampling_params(self) -> SamplingParams:
        """See `LLM.get_default_sampling_params`."""
        return self.llm_engine.input_processor.default_params.clone()

    async def metrics(self) -> Metrics:
        """See `LLM.metrics`."""
        return await self._call(lambda engine: engine.metrics())

    async def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str | Path) -> int:
        """Update the weights between two steps; see `LLM.update_weights`.

        If this fails, unfinished requests raise RuntimeError, and new ones are refused until an update
        succeeds.

        Work on the weights in CUDA streams other than the default one must have finished: nothing waits for it.
        """
        return await self._call(lambda engine: engine.update_weights(weights))

    async def start_weight_update(self) -> None:
        """See `LLM.start_weight_update`. Unfinished requests wait until the update has finished."""
        await self._call(lambda engine: engine.start_weight_update())

    async def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `LLM.load_weights`, and `update_weights` about CUDA streams."""
        await self._call(lambda engine: engine.load_weights(weights))

    async def finish_weight_update(self) -> int:
        """See `LLM.finish_weight_update`."""
        return await self._call(lambda engine: engine.finish_weight_update())

    async def sleep(self, level: int = 1) -> None:
        """See `LLM.sleep`. Unfinished requests wait until `wake_up`, and new ones are refused."""
        await self._call(lambda engine: engine.sleep(level))

    async def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """See `LLM.wake_up`."""
        await self._call(lambda engine: engine.wake_up(tags))

    async def is_sleeping(self) -> bool:
        """See `LLM.is_sleeping`."""
        return await self._call(lambda engine: engine.is_sleeping)

    async def reset_prefix_cache(self) -> bool:
        """See `LLM.reset_prefix_cache`."""
        return await self._call(lambda engine: engine.reset_prefix_cache())

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine is closed or has failed. Wait for the step that runs."""
        await self._call(lambda engine: engine.ensure_usable(needs=(), allow_partial_weights=True))

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self.llm_engine.tokenizer

    async def get_tokenizer(self) -> Any:
        """Return `tokenizer`."""
        return self.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self.llm_engine.max_model_len

    def close(self) -> None:
        """Close the engine. Iterations that go on raise RuntimeError. May be called again."""
        self._end_reason = self._end_reason or RuntimeError("the engine is closed")
        self._input_threads.close()
        with contextlib.suppress(RuntimeError):  # closed before
            self._engine_thread.submit(self._close_with, self._end_reason)
        self._engine_thread.shutdown()
        # Again, in case that failed, or Python is exiting and had stopped the engine's thread before.
        self.llm_engine.close()

    def shutdown(self) -> None:
        """Do the same as `close`."""
        self.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)


def _check_one_engine(config: Config) -> None:
    """Refuse ranks that each run the engine: all must run the same steps, but requests reach them at other times."""
    if is_replicated(config):
        raise ValueError(
            f"AsyncLLM with tensor_parallel_size={config.tensor_parallel_size} cannot share an engine among processes "
            "that torchrun or the caller has started; use LLM, or distributed_executor_backend='mp', which lets the "
            "engine start its ranks"
        )


def _retrieve_exception(future: asyncio.Future) -> None:
    """Keep asyncio from logging an exception that was never retrieved: the task that awaits it may be cancelled."""
    if not future.cancelled():
        future.exception()
