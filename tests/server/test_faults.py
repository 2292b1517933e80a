"""Faults of clients, operators and engines: the server answers in words and frees all blocks and slots."""

import asyncio
import contextlib
import json
import random
import resource
import signal
import time

import httpx
import pytest

from nanovllm.server.app import Server, serve
from nanovllm.server.options import ServerOptions
from tests.server.serving import (
    SECONDS,
    error_of,
    events_of,
    held,
    listening,
    make_server,
    post,
    request_to,
    until,
    until_idle,
    with_client,
)

COMPLETIONS = "/v1/completions"

# Wrong values of fields that completions and chat completions share.
BAD_SAMPLING = {
    "max_tokens": [-1, 0, 1.5, "2", 10**30, [1], {}],
    "temperature": [-1, 1e9, "hot", [], float("nan"), float("inf")],
    "top_p": [0, -1, 2, "x"],
    "top_k": [-2, 0.5, 10**20],
    "n": [0, -1, 65, 10**9, "1"],
    "stop": [[""], [1], 5, ["a"] * 65, "x" * 1025],
    "seed": [-(2**63) - 1, 2**64, "s"],
    "logit_bias": [{"a": 1}, {"-1": 1}, {"1": 101}, {"99999": 1}, [1]],
    "stop_token_ids": [[-1], ["a"], [10**12], 5],
    "stream": ["yes", 1, []],
    "stream_options": [{"x": 1}, 5, {"include_usage": "no"}],
    "structured_outputs": [{}, {"json": 5}, {"regex": "("}, {"choice": []}, {"grammar": "\0"}, 5, {"xml": 1}],
    "store": [True],
    "min_tokens": [-1, 10**6],
    "cache_salt": ["", 5, "x" * 5000],
    "allowed_token_ids": [[], [-1], [10**6]],
}
MESSAGES = [{"role": "user", "content": "hi"}]

# For each endpoint: a right body, and wrong values of its fields.
BAD = {
    COMPLETIONS: (
        {"prompt": "a", "max_tokens": 2, "temperature": 0.5, "stream": True},
        {
            **BAD_SAMPLING,
            "prompt": [None, 5, True, [], [[]], [1.5], ["a", 1], {"a": 1}, [-1], [10**30], "\ud800", [["a"]]],
            "logprobs": [-2, 129, "all"],
            "suffix": ["x"],
            "best_of": [3, -1],
        },
    ),
    "/v1/chat/completions": (
        {"messages": MESSAGES, "max_tokens": 2, "stream": True},
        {
            **BAD_SAMPLING,
            "messages": [
                None,
                [],
                [{}],
                [5],
                "hi",
                [{"role": "king", "content": "x"}],
                [{"role": "user", "content": 5}],
            ],
            "logprobs": [1, "yes"],
            "top_logprobs": [1, -1, "x"],
            "tools": [5, [5], [{}], [{"type": "function"}], [{"type": "function", "function": {"name": 5}}]],
            "tool_choice": ["required", "maybe", 5, {"type": "function", "function": {"name": "nobody"}}],
            "response_format": [5, {}, {"type": "xml"}, {"type": "json_schema"}],
            "chat_template": ["{{ 1 }}"],
            "chat_template_kwargs": [5, {"chat_template": "{{ 1 }}"}, {"tools": []}],
        },
    ),
    "/tokenize": (
        {"prompt": "a"},
        {
            "prompt": [5, [], None, "\ud800"],
            "messages": [[], [{}], 5, [{"role": 5, "content": "x"}], MESSAGES],
            "add_special_tokens": ["no"],
            "tools": [[], 5],
        },
    ),
    "/detokenize": ({"tokens": [5]}, {"tokens": [None, "a", ["a"], [-1], [10**6], [1.5], [[1]], [10**30], [5] * 600]}),
}


def malformed(rng: random.Random) -> tuple[str, bytes]:
    """Return a path and a body that is wrong for it."""
    path = rng.choice(list(BAD))
    right, wrong_values = BAD[path]
    text = json.dumps(right)
    kind = rng.randrange(8)
    if kind == 0:
        return path, text[: rng.randrange(len(text))].encode()
    if kind == 1:
        return path, rng.randbytes(rng.randrange(1, 100))
    if kind == 2:
        return path, json.dumps(rng.choice([[], [right], "text", 5, None, True])).encode()
    if kind == 3:
        return path, json.dumps({**right, f"field{rng.randrange(100)}": rng.choice([1, None, {}])}).encode()
    if kind == 4:
        opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
        depth = rng.choice([5, 900, 3000, 100_000])
        return path, f'{{"deep": {opening * depth}1{closing * depth}}}'.encode()
    name = rng.choice(list(wrong_values))
    return path, json.dumps({**right, name: rng.choice(wrong_values[name])}).encode()


def test_malformed_bodies_get_4xx_with_a_message(llm):
    rng = random.Random(1)
    requests = [malformed(rng) for _ in range(500)]

    async def use(client, state):
        for path, body in requests:
            answer = await client.post(path, content=body, headers={"content-type": "application/json"})
            assert 400 <= answer.status_code < 500, (path, body[:300], answer.status_code, answer.text[:300])
            assert error_of(answer), (path, body[:300])
        await until_idle(llm, state)

    with_client(llm, use)
    assert post(llm, COMPLETIONS, {"prompt": "a", "max_tokens": 2})["choices"]


async def vanish(address, body, reads_first_event):
    """Send a request and drop the connection, at once or when the first event has come."""
    reader, writer = await asyncio.open_connection(*address)
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    if reads_first_event:
        await reader.readuntil(b"data:")
    writer.transport.abort()


def test_clients_that_vanish_give_slots_and_blocks_back(llm):
    async def use():
        before = await llm.metrics()
        async with listening(llm) as (state, client, _):
            address = client.base_url.host, client.base_url.port
            body = {"prompt": ["a", "b"], "max_tokens": 400, "ignore_eos": True}
            clients = []
            for i in range(200):
                streams = i % 4 != 0
                clients.append(vanish(address, {**body, "stream": streams}, reads_first_event=streams and i % 4 != 1))
            await asyncio.gather(*clients)
            await until_idle(llm, state)
            after = await llm.metrics()
            assert after.generated_tokens - before.generated_tokens < 200 * 2 * 400 / 4
            answer = await client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200
            assert b'finished_reason="abort"' in state.metrics.render(None)

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_full_queue_gets_429_until_there_is_room(llm):
    async def use(client, state):
        body = {"prompt": "a", "max_tokens": 2, "ignore_eos": True}
        with held(llm):
            first = asyncio.create_task(client.post(COMPLETIONS, json={**body, "n": 2}))
            await until(lambda: state.admission.num_samples == 2)
            for stream in (False, True):
                answer = await client.post(COMPLETIONS, json={**body, "n": 2, "stream": stream})
                assert answer.status_code == 429 and error_of(answer)
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
            second = asyncio.create_task(client.post(COMPLETIONS, json=body))
            await until(lambda: state.admission.num_samples == 3)
        assert [(await task).status_code for task in (first, second)] == [200, 200]
        assert (await client.post(COMPLETIONS, json={**body, "n": 3})).status_code == 200

    with_client(llm, use, max_concurrent_requests=3)


def test_request_that_is_cancelled_while_it_waits_leaves_nothing(llm):
    async def use(client, state):
        with held(llm):
            waiting = [
                asyncio.create_task(client.post(COMPLETIONS, json={"prompt": ["a", "b"], "n": 2, "stream": stream}))
                for stream in (False, True)
            ]
            await until(lambda: state.admission.num_samples == 8)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert state.admission.num_samples == 0
        await until_idle(llm, state)

    with_client(llm, use)


@contextlib.asynccontextmanager
async def streaming(client, num_tokens, count=4):
    """Start streams in a `with` block. Yield tasks that return their texts, once all have begun."""
    started = [asyncio.Event() for _ in range(count)]

    async def read(event):
        body = {"prompt": "a", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        text = ""
        async with client.stream("POST", COMPLETIONS, json=body) as answer:
            async for chunk in answer.aiter_text():
                text += chunk
                event.set()
        return text

    tasks = [asyncio.create_task(read(event)) for event in started]
    await asyncio.gather(*(event.wait() for event in started))
    yield tasks
    await asyncio.gather(*tasks, return_exceptions=True)


def slow_down(llm, seconds=0.03):
    """Let each step of an engine take longer."""
    step = llm.llm_engine.step

    def slow_step():
        time.sleep(seconds)
        return step()

    llm.llm_engine.step = slow_step


def raise_sigterm():
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None), "this would end the tests"
    signal.raise_signal(signal.SIGTERM)


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(own_llm):
    slow_down(own_llm, 0.005)

    async def use():
        async with listening(own_llm) as (_, client, serving), streaming(client, 60) as streams:
            with held(own_llm):
                raise_sigterm()
                answer = await client.post(COMPLETIONS, json={"prompt": "a"})
                assert answer.status_code == 503 and error_of(answer) and answer.headers["retry-after"]
                assert (await client.get("/health")).status_code == 503
            for stream in streams:
                assert events_of(await stream)[-1]["choices"][0]["finish_reason"] == "length"
            await serving
        with pytest.raises(RuntimeError, match="closed"):
            await own_llm.metrics()

    asyncio.run(asyncio.wait_for(use(), SECONDS))


class UnreadConnection:
    """A connection whose client has not read all that was written. It is its own transport."""

    def __init__(self):
        self.transport = self

    def get_write_buffer_size(self):
        return 9


def test_sigterm_lets_long_responses_be_sent(own_llm):
    """The engine is done with them, but their clients have not read all of them yet."""

    async def use():
        state, _ = make_server(own_llm)
        server = Server(state)
        server.config.load()
        sending = asyncio.create_task(asyncio.Event().wait())
        server.server_state.tasks.add(sending)
        server.handle_exit(signal.SIGTERM, None)
        assert not await server.on_tick(1)
        server.server_state.tasks.clear()
        connection = UnreadConnection()
        server.server_state.connections.add(connection)
        assert not await server.on_tick(1)
        server.server_state.connections.clear()
        assert await server.on_tick(1)
        sending.cancel()

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_sigterm_refuses_requests_whose_bodies_have_not_come(own_llm):
    """Such a request does not keep the server from stopping."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    async def use():
        async with listening(own_llm) as (state, client, serving):
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            writer.write(f"{head}Content-Length: 99\r\n\r\n{{".encode())
            await until(lambda: state.admission._waiting)
            raise_sigterm()
            response = (await reader.read()).decode()
            assert response.startswith("HTTP/1.1 503") and "about to stop" in response
            await serving
            writer.close()

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_requests_that_take_longer_than_the_drain_end_with_an_error(own_llm):
    slow_down(own_llm)

    async def use():
        async with listening(own_llm, drain_seconds=0) as (_, client, serving), streaming(client, 500) as streams:
            raise_sigterm()
            for stream in streams:
                last = (await stream).strip().split("\n\n")[-1]
                assert "the engine is closed" in json.loads(last.removeprefix("data: "))["error"]["message"]
            await serving

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_second_signal_ends_running_requests_with_an_error(own_llm):
    slow_down(own_llm)

    async def use():
        async with listening(own_llm) as (state, client, serving), streaming(client, 500) as streams:
            body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
            whole = asyncio.create_task(client.post(COMPLETIONS, json=body))
            await until(lambda: state.admission.num_samples == 5)
            raise_sigterm()
            raise_sigterm()
            answer = await whole
            assert answer.status_code == 503 and "the engine is closed" in error_of(answer)
            for stream in streams:
                last = (await stream).strip().split("\n\n")[-1]
                assert "the engine is closed" in json.loads(last.removeprefix("data: "))["error"]["message"]
            await serving

    asyncio.run(asyncio.wait_for(use(), SECONDS))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no device"), ValueError("shape"), MemoryError()])
def test_failed_engine_answers_503_and_says_why(own_llm, error, caplog):
    slow_down(own_llm)

    def fail():
        raise error

    async def use():
        async with listening(own_llm) as (state, client, _), streaming(client, 500) as streams:
            body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
            whole = asyncio.create_task(client.post(COMPLETIONS, json=body))
            await until(lambda: state.admission.num_samples == 5)
            own_llm.llm_engine.step = fail
            for stream in streams:
                last = (await stream).strip().split("\n\n")[-1]
                assert type(error).__name__ in json.loads(last.removeprefix("data: "))["error"]["message"]
            answers = [await whole, await client.post(COMPLETIONS, json=body), await client.get("/health")]
            for answer in answers:
                assert answer.status_code == 503 and type(error).__name__ in error_of(answer)
            metrics = await client.get("/metrics")
            assert metrics.status_code == 200 and "nanovllm:engine_up 0.0" in metrics.text
            assert 'vllm:request_success_total{finished_reason="error",model_name="tiny"} 5.0' in metrics.text
            assert state.admission.num_samples == 0

    asyncio.run(asyncio.wait_for(use(), SECONDS))
    assert caplog.text.count("The engine has failed") == 1


def test_server_stops_after_its_engine_has_failed(own_llm, monkeypatch):
    monkeypatch.setattr("nanovllm.server.app._FAILED_S", 1)

    def fail():
        raise RuntimeError("CUDA error: no device")

    async def use():
        async with listening(own_llm) as (_, client, serving):
            assert not serving.done()
            own_llm.llm_engine.step = fail
            assert (await client.post(COMPLETIONS, json={"prompt": "a"})).status_code == 503
            await serving

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_sleeping_engine_answers_503(own_llm):
    async def use(client, state):
        await own_llm.sleep()
        for stream in (False, True):
            answer = await client.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
            assert answer.status_code == 503 and "asleep" in error_of(answer)
        assert (await client.get("/health")).status_code == 503
        await own_llm.wake_up()
        assert (await client.get("/health")).status_code == 200

    with_client(own_llm, use)


def test_slow_reader_does_not_stop_the_others(llm):
    reads, texts = asyncio.Event(), []

    async def send(message):
        texts.append(message.get("body", b""))
        if texts[-1]:
            await reads.wait()

    async def use():
        state, app = make_server(llm)
        body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
        slow = asyncio.create_task(app(*request_to(COMPLETIONS, {**body, "stream": True}), send))
        await until(lambda: any(texts))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
            answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for _ in range(4)))
        assert not slow.done()
        reads.set()
        await slow
        events = events_of(b"".join(texts).decode())
        assert len(events) < 50, "what the reader did not take is not sent in one piece"
        joined = "".join(event["choices"][0]["text"] for event in events)
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {joined}
        await until_idle(llm, state)

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_unexpected_error_gets_500_without_its_text(llm, monkeypatch, caplog):
    monkeypatch.setattr("nanovllm.server.completions._Writer.choices", lambda *args: {}["secret"])

    async def use(client, state):
        answer = await client.post(COMPLETIONS, json={"prompt": "a"})
        assert answer.status_code == 500 and "secret" not in error_of(answer)
        assert answer.headers["x-request-id"]
        await until_idle(llm, state)

    with_client(llm, use)
    assert "secret" in caplog.text


def test_the_shells_limit_of_open_files_does_not_limit_clients():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    largest = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (largest // 2, hard))
    try:
        with pytest.raises(OSError, match="cannot listen"):
            serve({}, ServerOptions(host="203.0.113.1"))  # of no machine
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (largest, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
