"""Helpers for tests of the server."""

import asyncio
import contextlib
import json
import socket
import threading

import httpx

from nanovllm.server.app import Server, create_app, make_state
from nanovllm.server.options import ServerOptions

SECONDS = 120  # until what does not end is a failure, on a busy machine too


def make_server(llm, **options):
    """Return the state of a server, whose model has the name "tiny", and its app."""
    state = make_state(llm, "tiny", ServerOptions(**{"served_model_name": "tiny", **options}))
    return state, create_app(state)


def with_client(llm, use, **options):
    """Return the result of the coroutine `use(client, state)` with a client of a new server that needs no socket."""

    async def run_with_client():
        state, app = make_server(llm, **options)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
            return await asyncio.wait_for(use(client, state), SECONDS)

    return asyncio.run(run_with_client())


def call(llm, method, path, body=None, headers=None, **options):
    """Return a server's answer to one request.

    Args:
        body: bytes, or something to send as JSON.
    """

    async def use(client, state):
        if body is None:
            return await client.request(method, path, headers=headers)
        content = body if isinstance(body, bytes) else json.dumps(body)  # which escapes half a character
        sent = {"content-type": "application/json", **(headers or {})}
        return await client.request(method, path, content=content, headers=sent)

    return with_client(llm, use, **options)


def post(llm, path, body, **options):
    """Return the JSON of a server's answer with status 200."""
    answer = call(llm, "POST", path, body, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def error_of(answer):
    """Return the message of an error."""
    error = answer.json()["error"]
    assert error["message"] and "Traceback" not in error["message"]
    return error["message"]


def events_of(text):
    """Return the events of a stream, without `[DONE]`, which must be its end."""
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@contextlib.contextmanager
def held(llm):
    """Keep the engine's thread busy in a `with` block, so that no request goes on."""
    release = threading.Event()
    llm._engine_thread.submit(release.wait, SECONDS)
    try:
        yield
    finally:
        release.set()


async def until(condition):
    """Wait until a condition is true."""
    while not condition():
        await asyncio.sleep(0.002)


async def until_idle(llm, state):
    """Wait until the engine has nothing to do, and check that nothing is held."""
    await until(lambda: state.admission.num_samples == 0)
    while True:
        metrics = await llm.metrics()
        if metrics.num_running == metrics.num_waiting == 0:
            break
        await asyncio.sleep(0.002)
    # The last step may still be in flight, and holds the blocks of requests that ended meanwhile.
    while metrics.kv_usage or metrics.num_free_slots < llm.llm_engine.config.max_num_seqs:
        await asyncio.sleep(0.002)
        metrics = await llm.metrics()


@contextlib.asynccontextmanager
async def listening(llm, **options):
    """Run a server on a free port of this machine in a `with` block. Yield its state, its address and its task."""
    state, _ = make_server(llm, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server = Server(state)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        async with httpx.AsyncClient(base_url=f"http://{address[0]}:{address[1]}", timeout=None) as client:
            await client.get("/version")  # waits until the server accepts
            yield state, client, serving
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        for each in server.servers:  # else the loop would not hear a later socket that gets the same number
            each.close()
        listener.close()


def request_to(path, body):
    """Return the ASGI scope of a POST request whose client stays, and its `receive`."""
    content = json.dumps(body).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive():
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    return scope, receive
