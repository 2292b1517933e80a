"""Server-sent events."""

import asyncio
import json

import pytest

from nanovllm.server import streaming
from nanovllm.server.errors import ApiError, anthropic_error
from nanovllm.server.json_text import LongJson, json_bytes, long_json_bytes
from nanovllm.server.streaming import JsonResponse, LongEvent, in_thread, long_response, sse


async def sent(response):
    """Return the messages that a response sends."""
    messages = []

    async def send(message):
        messages.append(message)

    await response({"type": "http"}, None, send)
    return messages


def stream(*items, closed=None):
    """Return a generator of items, in which errors are raised. `closed` gets an entry at its end."""

    async def generate():
        try:
            for item in items:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            if closed is not None:
                closed.append(True)

    return generate()


def test_items_become_events_and_lists_share_a_chunk():
    async def use():
        return await sent(await sse(stream({"a": 1}, [{"b": "é\n"}, {"c": None}])))

    start, *chunks = asyncio.run(use())
    assert start["status"] == 200
    assert dict(start["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert b"content-length" not in dict(start["headers"])
    expected = ['data: {"a":1}\n\n', 'data: {"b":"é\\n"}\n\ndata: {"c":null}\n\n', "data: [DONE]\n\n", ""]
    assert [chunk["body"].decode() for chunk in chunks] == expected
    assert [chunk["more_body"] for chunk in chunks] == [True, True, True, False]


def test_long_values_are_written_in_small_parts():
    top = [{"token": 'é"\n', "logprob": -1.5, "bytes": [1, 2]}] * 20
    content = [{"token": "a", "top_logprobs": top}] * 100
    choices = [{"logprobs": {"content": content, "none": None}}, {}, []]
    body = {"choices": choices, "text": "x\ud83d", "empty": {}, "n": 0.5}
    for value in (body, [], {}, [[]], None, "a", [1, [2, {"a": [{}]}]]):
        assert long_json_bytes(value) == json_bytes(value)
    long = LongJson(body)
    sizes = [max(map(len, long._parts), default=0) for _ in long]
    assert len(sizes) > 100 and max(sizes) < 2 * len(json_bytes(content[0]))
    assert long.bytes() == json_bytes(body)

    async def use():
        return await sent(await sse(stream(LongEvent(body))))

    assert asyncio.run(use())[1]["body"] == b"data: " + json_bytes(body) + b"\n\n"


def test_long_responses_take_turns(monkeypatch):
    monkeypatch.setattr(streaming, "_SLICE_S", 0.0)
    body = {"choices": [{"logprobs": list(range(100))}]}

    async def use():
        turns = 0
        writing = asyncio.create_task(long_response(lambda: body, streaming.LONG_LOGPROBS + 1))
        while not writing.done():
            await in_thread(len, ())
            turns += 1
        return turns, writing.result()

    turns, response = asyncio.run(use())
    assert turns > 50
    assert response.body == json_bytes(body) and response.headers["content-type"] == "application/json"


def test_names_of_events_come_from_their_type():
    async def use():
        return await sent(await sse(stream({"type": "ping"}), names_events=True, sends_done=False))

    _, *chunks = asyncio.run(use())
    assert b"".join(chunk["body"] for chunk in chunks) == b'event: ping\ndata: {"type":"ping"}\n\n'


def test_fault_before_the_first_item_is_raised():
    closed = []
    with pytest.raises(ValueError, match="wrong"):
        asyncio.run(sse(stream(ValueError("wrong"), closed=closed)))
    assert closed


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ApiError(429, "busy"), "rate_limit_error", "busy"),
        (RuntimeError("the engine has failed"), "server_error", "the engine has failed"),
        (KeyError("secret"), "server_error", "the server has failed to answer; its log says why"),
    ],
)
def test_fault_in_mid_stream_becomes_the_last_event(error, status, message):
    async def use():
        return await sent(await sse(stream({"a": 1}, error)))

    _, *chunks = asyncio.run(use())
    assert b"[DONE]" not in b"".join(chunk["body"] for chunk in chunks)
    shown = json.loads(chunks[-2]["body"].decode().removeprefix("data: "))["error"]
    assert (shown["type"], shown["message"]) == (status, message)


def test_fault_in_mid_stream_takes_the_form_of_the_api():
    async def use():
        response = await sse(
            stream({"type": "a"}, ApiError(400, "no")), names_events=True, sends_done=False, error_event=anthropic_error
        )
        return await sent(response)

    assert asyncio.run(use())[-2]["body"].startswith(b'event: error\ndata: {"type":"error","error":')


def test_cancelled_response_closes_the_generator():
    closed = []

    async def use():
        response = await sse(stream({"a": 1}, {"a": 2}, closed=closed))

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        sending = asyncio.create_task(response({"type": "http"}, None, send))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert closed

    asyncio.run(use())


def test_half_characters_are_escaped_in_json():
    assert json_bytes(["\ud800", "😀"]) == '["\\ud800","😀"]'.encode()
    assert json.loads(JsonResponse({"a": "\udc00x"}).body) == {"a": "\udc00x"}
