"""Streams of several prompts, JSON responses and server-sent events."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

from fastapi.responses import JSONResponse, Response

from nanovllm.server.errors import ApiError, as_api_error, openai_error
from nanovllm.server.json_text import LongJson, json_bytes, long_json_bytes

logger = logging.getLogger("nanovllm")

# The most log-probabilities of a response. Each takes 200 bytes of memory, and more in chat completions.
MAX_RESPONSE_LOGPROBS = 1 << 20
# Writing more than this many takes a few milliseconds, so it is done in a thread.
LONG_LOGPROBS = 512
# A long response is written in slices of this time. Other long work runs between them, so that it does not wait long.
_SLICE_S = 0.02
# Does work that takes long, one piece after the other: several threads at once would keep the GIL from the event loop.
_long_work = ThreadPoolExecutor(1, "nanovllm-long-work")
# So many streams of one request start at once. Each pickles its prompt and its parameters in the event loop.
_STARTED_AT_ONCE = 16
# An event, or a list of events that are sent together.
Item: TypeAlias = dict | list[dict]
T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any, thread: ThreadPoolExecutor = _long_work) -> T:
    """Return `function(*args)`, which may take long. The thread does its earlier work first."""
    return await asyncio.get_running_loop().run_in_executor(thread, function, *args)


async def merge_streams(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield the items of several streams as they come, each with its stream's index. Close all at the end."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue(1)

    async def forward(index: int, stream: AsyncGenerator[T, None]) -> None:
        end = None
        async with aclosing(stream):
            try:
                async for item in stream:
                    await queue.put((index, item))
            except Exception as error:
                end = error
        await queue.put((index, end))

    tasks = []
    num_open = len(streams)
    try:
        for index, stream in enumerate(streams):
            tasks.append(asyncio.create_task(forward(index, stream)))
            if len(tasks) % _STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)  # lets these start, and then what else waits in the event loop
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def json_logprob(value: float) -> float:
    """Return a log-probability as JSON can express it, which has no minus infinity."""
    return max(value, -9999.0)


def check_num_logprobs(num_logprobs: int) -> None:
    """Raise ApiError for more log-probabilities than a response may have."""
    if num_logprobs > MAX_RESPONSE_LOGPROBS:
        fault = f"the response has more than {MAX_RESPONSE_LOGPROBS} log-probabilities"
        raise ApiError(400, f"{fault}: ask for fewer, or for fewer samples", param="logprobs")


class JsonResponse(JSONResponse):
    """A response in JSON. Return one from an endpoint, so that FastAPI does not walk through its values."""

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


async def long_response(body: Callable[[], Any], num_logprobs: int) -> Response:
    """Return a response with `body()`, which may have iterators as lists. A thread makes it if it is long."""
    if num_logprobs <= LONG_LOGPROBS:
        content = long_json_bytes(body())
    else:
        content = await _write_long(await in_thread(body))
    return Response(content, media_type=JsonResponse.media_type)


async def _write_long(value: Any) -> bytes:
    """Return a value as JSON, written in slices by the thread for long work."""
    long = LongJson(value)
    steps = iter(long)
    while await in_thread(_do_steps, steps):
        pass
    return await in_thread(long.bytes)


def _do_steps(steps: Iterator[None]) -> bool:
    """Do steps for the time of a slice. Return whether there may be more."""
    end = time.perf_counter() + _SLICE_S
    return any(time.perf_counter() > end for _ in steps)


class LongEvent(dict):
    """An event that takes long to write."""


class EventStream(Response):
    """Sends server-sent events as an iterator makes them. See `sse`, which makes it."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: Item | None,
        items: AsyncGenerator[Item, None],
        names_events: bool,
        sends_done: bool,
        error_event: Callable[[ApiError], dict],
    ):
        # Proxies must neither keep the events nor gather them.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._items = items
        self._names_events = names_events
        self._sends_done = sends_done
        self._error_event = error_event

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Opened first, because the client may go before the first chunk.
        async with aclosing(self._items), aclosing(self._chunks()) as chunks:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            if self._first is not None:
                yield await self._encode(self._first)
            async for item in self._items:
                yield await self._encode(item)
            if self._sends_done:
                yield b"data: [DONE]\n\n"
        except Exception as error:
            api_error = as_api_error(error)
            if api_error.status == 500:
                logger.exception("A stream has failed")
            yield await self._encode(self._error_event(api_error))

    async def _encode(self, item: Item) -> bytes:
        events = item if isinstance(item, list) else [item]
        return b"".join([await self._encode_event(event) for event in events])

    async def _encode_event(self, event: dict) -> bytes:
        data = await _write_long(event) if isinstance(event, LongEvent) else json_bytes(event)
        name = f"event: {event['type']}\n".encode() if self._names_events else b""
        return b"%bdata: %b\n\n" % (name, data)


async def sse(
    items: AsyncGenerator[Item, None],
    *,
    names_events: bool = False,
    sends_done: bool = True,
    error_event: Callable[[ApiError], dict] = openai_error,
) -> EventStream:
    """Return a response that sends `items` as server-sent events.

        return await sse(stream_events(state, request))

    It waits for the first item, so what raises before it becomes a response with the status of the error. Later errors
    become a last event. If the client goes, the iterator is closed at once.

    Args:
        items: an async generator of events, or of lists of events that are sent together.
        names_events: start each event with a line that has its "type".
        sends_done: end with `data: [DONE]`, unless there was an error.
        error_event: makes the event of an error.
    """
    try:
        first = await anext(items, None)
    except BaseException:
        await items.aclose()
        raise
    return EventStream(first, items, names_events, sends_done, error_event)
