"""The engine's process: runs an AsyncLLM for the server's process, whose side is `EngineClient`."""

import asyncio
import gc
import pickle
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.outputs import RequestOutput
from nanovllm.server.engine_messages import PackedError, PackedOutput, pack_error, pack_output
from nanovllm.utils.logs import log_to_stderr
from nanovllm.utils.threads import switch_threads_often


def main(descriptor: int) -> None:
    """Load the model that the first message describes, and serve it until the connection ends."""
    switch_threads_often()
    connection = Connection(descriptor)
    try:
        options, level = pickle.loads(connection.recv_bytes())
        log_to_stderr(level)
        llm = AsyncLLM(**options)
    except Exception as error:
        connection.send_bytes(pickle.dumps(("failed", pack_error(error))))
        return
    # The garbage collector skips what is loaded, about a million objects, instead of checking it again and again.
    gc.collect()
    gc.freeze()
    try:
        connection.send_bytes(pickle.dumps(("ready", llm.max_model_len, _default_params(llm))))
        asyncio.run(_Host(llm, connection).run())
    finally:
        llm.close()
        gc.unfreeze()  # else libraries take what is frozen for leaks


def _default_params(llm: AsyncLLM) -> SamplingParams | PackedError:
    try:
        return llm.get_default_sampling_params()
    except ValueError as error:
        return pack_error(error)


class _Host:
    """Does what the server's process asks for.

    Attributes:
        requests: for each unfinished request, the task that prepares it; later, the function that ends it.
        started: the unfinished requests that have had an output.
        outbox: the outputs of the next message. Those of one step travel together.
        calls: the tasks of unfinished calls.
    """

    def __init__(self, llm: AsyncLLM, connection: Connection):
        self.llm = llm
        self.connection = connection
        self.requests: dict[int, asyncio.Task | Callable[[], None]] = {}
        self.started: set[int] = set()
        self.outbox: list[tuple[int, PackedOutput]] = []
        self.calls: dict[int, asyncio.Task] = {}
        self.ended = asyncio.Event()

    async def run(self) -> None:
        """Serve until the connection ends."""
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name="nanovllm-messages", daemon=True).start()
        await self.ended.wait()

    def _read(self) -> None:
        try:
            while True:
                message = pickle.loads(self.connection.recv_bytes())
                self.loop.call_soon_threadsafe(self._handle, *message)
        except (EOFError, OSError):  # the server is gone or has closed the engine
            self.loop.call_soon_threadsafe(self.ended.set)

    def _handle(self, kind: str, key: int, *arguments: Any) -> None:
        if kind == "generate":
            self.requests[key] = self.loop.create_task(self._generate(key, *arguments))
        elif kind == "leave":
            self._leave(key)
        else:
            task = self.calls[key] = self.loop.create_task(self._call(key, *arguments))
            task.add_done_callback(lambda _: self.calls.pop(key))

    async def _generate(self, key: int, prompt: Any, params: SamplingParams | None, request_id: str | None) -> None:
        try:
            leave = await self.llm.submit(prompt, params, request_id, receive=partial(self._receive, key))
        except Exception as error:
            self._receive(key, error)
        else:
            if key in self.requests:
                self.requests[key] = leave

    def _leave(self, key: int) -> None:
        work = self.calls.get(key) or self._forget(key)
        if isinstance(work, asyncio.Task):
            work.cancel()
        elif work is not None:
            work()  # ends a request that the engine has

    def _forget(self, key: int) -> asyncio.Task | Callable[[], None] | None:
        self.started.discard(key)
        return self.requests.pop(key, None)

    def _receive(self, key: int, item: RequestOutput | BaseException) -> None:
        if key not in self.requests:
            return
        if isinstance(item, BaseException):
            self._forget(key)
            self._flush()
            self._send("error", key, pack_error(item))
            return
        if not self.outbox:
            self.loop.call_soon(self._flush)  # when all outputs of the step are there
        self.outbox.append((key, pack_output(item, is_first=key not in self.started)))
        self.started.add(key)
        if item.finished:
            self._forget(key)

    def _flush(self) -> None:
        outbox, self.outbox = self.outbox, []
        if outbox:
            self._send("outputs", outbox)

    async def _call(self, key: int, method: str, arguments: dict[str, Any]) -> None:
        try:
            value = await getattr(self.llm, method)(**arguments)
        except Exception as error:
            self._send("error", key, pack_error(error))
        else:
            self._send("result", key, value)

    def _send(self, *message: Any) -> None:
        try:
            self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError:
            self.ended.set()
