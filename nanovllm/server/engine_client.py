"""The engine in a process of its own, with the methods of `AsyncLLM` that the endpoints use.

In one process, the threads that render HTTP and JSON would hold Python's global lock while the engine's thread prepares
the next step.
"""

import asyncio
import contextlib
import itertools
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

from nanovllm.checkpoints.model_source import open_model_of
from nanovllm.config import Config
from nanovllm.inputs import Prompt
from nanovllm.output_stream import OutputStream, call_soon
from nanovllm.outputs import Metrics, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.server.engine_messages import (
    PackedOutput,
    keep_newest_packed,
    merge_packed_deltas,
    unpack_error,
    unpack_output,
)
from nanovllm.utils.child_process import child_program, inheritable
from nanovllm.utils.logs import log_level

_CLOSE_SECONDS = 10.0


@dataclass
class _Waiting:
    """A request or a call that a coroutine of `loop` awaits.

    Args:
        put: called in the loop with each output, or with the value of a call.
        fail: called in the loop with the error that ends it.
    """

    loop: asyncio.AbstractEventLoop
    put: Callable[[Any], None]
    fail: Callable[[Exception], None]


class EngineClient:
    """Starts the engine's process, and speaks with it for any number of coroutines.

    Args:
        **options: the fields of `Config`.

    Raises:
        TypeError, ValueError, RuntimeError: the engine cannot be made; see `AsyncLLM`.

    Attributes:
        max_model_len: longest prompt plus output, in tokens.
    """

    def __init__(self, **options: Any):
        self._config = Config.from_options(options)
        self._keys = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._error: str | None = None
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        with theirs, inheritable(theirs.fileno()) as descriptors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", child_program("nanovllm.server.engine_host", descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        try:
            self.max_model_len, self._default_params = self._start(options)
        except BaseException:
            self._process.kill()  # it may be loading a model for minutes
            self.close()
            raise
        for name, target in (("read", self._read), ("write", self._write)):
            threading.Thread(target=target, name=f"nanovllm-{name}", daemon=True).start()

    def _start(self, options: dict[str, Any]) -> tuple[int, Any]:
        try:
            self._connection.send_bytes(pickle.dumps((options, log_level())))
            kind, *rest = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise RuntimeError(self._describe_end()) from None
        if kind == "failed":
            raise unpack_error(rest[0])
        return rest[0], rest[1]

    # -- the threads -------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Send messages. Large ones wait for the other process, so the event loop does not send them."""
        with contextlib.suppress(OSError):
            while (message := self._outgoing.get()) is not None:
                self._connection.send_bytes(message)

    def _read(self) -> None:
        try:
            while True:
                kind, *rest = pickle.loads(self._connection.recv_bytes())
                if kind == "outputs":
                    self._hand_over(rest[0])
                elif waiting := self._waiting.pop(rest[0], None):
                    if kind == "result":
                        call_soon(waiting.loop, waiting.put, rest[1])
                    else:
                        call_soon(waiting.loop, waiting.fail, unpack_error(rest[1]))
        except (EOFError, OSError):
            self._fail(self._describe_end())

    def _hand_over(self, items: list[tuple[int, PackedOutput]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Waiting, PackedOutput]]] = {}
        for key, output in items:
            if waiting := self._waiting.get(key):  # else its client has gone
                by_loop.setdefault(waiting.loop, []).append((waiting, output))
        for loop, outputs in by_loop.items():
            call_soon(loop, _put_all, outputs)

    def _fail(self, reason: str) -> None:
        """End everything that waits, because the engine's process has ended."""
        self._error = self._error or reason
        for key in list(self._waiting):
            if waiting := self._waiting.pop(key, None):  # unless its coroutine has just removed it
                call_soon(waiting.loop, waiting.fail, RuntimeError(self._error))

    def _describe_end(self) -> str:
        try:
            status = self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return "the engine's process has closed its connection"
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the engine's process ({self._process.pid}) {how}"

    # -- coroutines --------------------------------------------------------------------------------------------------

    def _send(self, *message: Any) -> None:
        if self._error is not None:
            raise RuntimeError(self._error)
        # Pickled here, so that a message that is nested too deeply is an error of its request alone.
        self._outgoing.put(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """See `AsyncLLM.generate`. Everything that is wrong with a request raises at the first output."""
        kind = getattr(sampling_params, "output_kind", None)  # wrong parameters are refused by the engine
        is_delta = kind in (None, RequestOutputKind.DELTA)
        stream = OutputStream(merge_packed_deltas if is_delta else keep_newest_packed, copies=is_delta)
        key = next(self._keys)
        finished = False
        progress = prompt_fields = None
        self._waiting[key] = _Waiting(stream.loop, stream.put, stream.put)
        try:
            self._send("generate", key, prompt, sampling_params, request_id)
            while not finished:
                samples, new_progress, first = await stream.get()
                progress = new_progress or progress
                prompt_fields = first or prompt_fields
                assert progress is not None and prompt_fields is not None  # the first output has both
                output = unpack_output(samples, progress, prompt_fields, request_id or str(key))
                finished = output.finished
                yield output
        finally:
            if finished:
                self._waiting.pop(key, None)
            else:
                self._leave(key)

    def _leave(self, key: int) -> None:
        """Cancel a request or a call of a coroutine that awaits it no longer. Do nothing if it has its result."""
        if self._waiting.pop(key, None) is not None:
            with contextlib.suppress(RuntimeError):
                self._send("leave", key)

    async def _call(self, method: str, **arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        key = next(self._keys)
        future = loop.create_future()
        self._waiting[key] = _Waiting(
            loop, _unless_done(future, future.set_result), _unless_done(future, future.set_exception)
        )
        try:
            self._send("call", key, method, arguments)
            return await future
        finally:
            self._leave(key)

    async def check_request(self, prompt: Prompt, sampling_params: SamplingParams) -> None:
        """See `AsyncLLM.check_request`."""
        await self._call("check_request", prompt=prompt, sampling_params=sampling_params)

    async def chat_prompt(self, messages: Sequence[dict], **template: Any) -> list[int]:
        """See `AsyncLLM.chat_prompt`."""
        return await self._call("chat_prompt", messages=messages, **template)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See `AsyncLLM.encode`."""
        return await self._call("encode", text=text, add_special_tokens=add_special_tokens)

    async def decode(self, token_ids: list[int]) -> str:
        """See `AsyncLLM.decode`."""
        return await self._call("decode", token_ids=token_ids)

    async def metrics(self) -> Metrics:
        """See `AsyncLLM.metrics`."""
        return await self._call("metrics")

    async def is_sleeping(self) -> bool:
        """See `AsyncLLM.is_sleeping`."""
        return await self._call("is_sleeping")

    async def check_health(self) -> None:
        """See `AsyncLLM.check_health`."""
        await self._call("check_health")

    def get_default_sampling_params(self) -> SamplingParams:
        """See `LLM.get_default_sampling_params`."""
        if isinstance(self._default_params, SamplingParams):
            return self._default_params
        raise unpack_error(self._default_params)

    @cached_property
    def tokenizer(self) -> Any:
        """A copy of the model's transformers tokenizer."""
        return open_model_of(self._config).tokenizer()

    def close(self) -> None:
        """End the engine's process. Iterations that go on raise RuntimeError. May be called again."""
        self._error = self._error or "the engine is closed"
        self._outgoing.put(None)
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as connection:
            connection.shutdown(socket.SHUT_RDWR)  # wakes the threads here and the other process
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._fail(self._error)


def _put_all(outputs: list[tuple[_Waiting, PackedOutput]]) -> None:
    for waiting, output in outputs:
        waiting.put(output)


def _unless_done(future: asyncio.Future, call: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a function that sets a future, unless its coroutine has been cancelled."""
    return lambda value: None if future.done() else call(value)
