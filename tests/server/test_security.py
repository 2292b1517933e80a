"""Keys, sizes of bodies, request ids, and origins."""

import asyncio
import contextlib
import json
from itertools import pairwise
from random import Random

import httpx
import pytest

from nanovllm.server import body, http_protocol
from nanovllm.server.options import ServerOptions
from tests.server.scripted import ScriptedLLM
from tests.server.serving import SECONDS, call, error_of, held, listening, make_server, with_client

PATH = "/v1/completions"
BODY = {"prompt": "a", "max_tokens": 1}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer onee"},
        {"authorization": "one"},
        {"authorization": "Basic one"},
        {"x-api-key": "on"},
        {"x-api-key": "one,two"},
    ],
)
@pytest.mark.parametrize("path", [PATH, "/v1/models", "/metrics", "/tokenize", "/nothing", "/openapi.json"])
def test_request_without_a_key_gets_401(llm, headers, path):
    answer = call(llm, "POST", path, BODY, headers, api_key="one, two")
    assert answer.status_code == 401
    assert "one" not in error_of(answer)
    assert answer.headers["x-request-id"] == answer.headers["request-id"]


def test_each_key_opens_in_both_headers(llm):
    for headers in ({"authorization": "Bearer one"}, {"authorization": "bearer two"}, {"x-api-key": "two"}):
        assert call(llm, "POST", PATH, BODY, headers, api_key="one,two").status_code == 200
    for headers in (
        {"authorization": "Bearer one", "x-api-key": "no"},
        {"authorization": "Bearer no", "x-api-key": "two"},
    ):
        assert call(llm, "POST", PATH, BODY, headers, api_key="one,two").status_code == 200


def test_health_needs_no_key(llm):
    assert call(llm, "GET", "/health", api_key="one").status_code == 200
    assert call(llm, "GET", "/health/", api_key="one").status_code == 200


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_slash_at_the_end_of_a_path_changes_nothing(llm, prefix):
    async def responses():
        _, app = make_server(llm)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://localhost{prefix}") as client:
            models = await client.get("/v1/models/")
            completion = await client.post("/v1/completions/", json=BODY)
            return models, completion, await client.get("/"), await client.get("/v1/nothing/")

    models, completion, page, nothing = asyncio.run(responses())
    assert models.status_code == 200 and models.json()["object"] == "list"
    assert completion.status_code == 200 and completion.json()["choices"]
    assert page.status_code == 200 and nothing.status_code == 404


def test_refusals_of_messages_have_anthropics_form(llm):
    answer = call(llm, "POST", "/v1/messages", BODY, api_key="one").json()
    assert (answer["type"], answer["error"]["type"]) == ("error", "authentication_error")


def test_app_below_a_prefix_opens_and_refuses_the_same_paths(llm):
    async def statuses_and_errors():
        _, app = make_server(llm, api_key="one")
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path="/llm")
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            opened = [(await client.get(f"/llm{path}")).status_code for path in ("/health", "/", "/page/chat.js")]
            refused = await client.post("/llm/v1/messages", json=BODY)
            wrong = await client.post("/llm/v1/chat/completions", json={"messages": []}, headers={"x-api-key": "one"})
            other = [(await client.get(path)).status_code for path in ("/llm/v1/models", "/llmhealth", "/llm/metrics")]
            return opened, refused, wrong, other

    opened, refused, wrong, other = asyncio.run(statuses_and_errors())
    assert opened == [200, 200, 200]
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "messages")
    assert other == [401, 401, 401]


def test_body_that_is_too_large_gets_413_without_being_read(llm):
    _, app = make_server(llm, max_body_mib=1)
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(b"content-length", str((1 << 20) + 1).encode()), (b"content-type", b"application/json")]
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413 and b"1048576" in sent[1]["body"]


def test_body_of_unknown_length_is_read_up_to_the_limit(llm):
    num_read = 0

    async def chunks():
        nonlocal num_read
        for _ in range(100):
            num_read += 1
            yield b" " * 100_000

    async def use(client, state):
        return await client.post(PATH, content=chunks(), headers={"content-type": "application/json"})

    answer = with_client(llm, use, max_body_mib=1)
    assert answer.status_code == 413 and error_of(answer)
    assert num_read == 11


def test_body_of_unknown_length_below_the_limit_is_answered(llm):
    async def chunks():
        for byte in json.dumps(BODY).encode():
            yield bytes([byte])

    async def use(client, state):
        return await client.post(PATH, content=chunks(), headers={"content-type": "application/json"})

    assert with_client(llm, use, max_body_mib=1).status_code == 200


@pytest.mark.parametrize(
    "body", [b"[" * 500_000, b'{"prompt":' * 100_000, b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}"]
)
def test_nested_bodies_get_400(llm, body):
    answer = call(llm, "POST", PATH, body)
    assert answer.status_code == 400 and error_of(answer)


def test_deeply_nested_schema_gets_400(llm):
    schema = {}
    for _ in range(400):
        schema = {"not": schema}
    answer = call(llm, "POST", PATH, {**BODY, "structured_outputs": {"json": schema}})
    assert answer.status_code == 400 and error_of(answer)


def test_other_content_types_are_not_read_as_json(llm):
    for content_type in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "text/json",
        "text/plain; application/json",
        "",
    ):
        answer = call(llm, "POST", PATH, json.dumps(BODY).encode(), {"content-type": content_type})
        assert answer.status_code == 415 and "application/json" in error_of(answer)


def test_request_ids_are_echoed_unless_they_are_odd(llm):
    for request_id in ("abc", "x" * 128):
        assert call(llm, "GET", "/version", headers={"x-request-id": request_id}).headers["x-request-id"] == request_id
    made = [call(llm, "GET", "/version", headers={"x-request-id": odd}).headers["x-request-id"] for odd in ("", "a b")]
    made.append(call(llm, "GET", "/version", headers={"x-request-id": "x" * 129}).headers["x-request-id"])
    assert {len(each) for each in made} == {32} and len(set(made)) == 3


def test_origins_are_allowed_only_when_asked_for(llm):
    preflight = {"origin": "http://a.example", "access-control-request-method": "POST"}
    preflight["access-control-request-headers"] = "authorization,content-type"
    answer = call(llm, "OPTIONS", PATH, headers=preflight)
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
    answer = call(llm, "OPTIONS", PATH, headers=preflight, cors_origins="http://a.example", api_key="one")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "http://a.example"
    other = call(
        llm, "OPTIONS", PATH, headers={**preflight, "origin": "http://b.example"}, cors_origins="http://a.example"
    )
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:80", "[::1]:80", "10.0.0.1", "a.localhost."])
def test_local_hosts_and_addresses_are_answered(llm, host):
    assert call(llm, "POST", PATH, BODY, {"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["a.example", "a.example:80", "127.0.0.1.a.example", "localhost.a.example", "[a]:80"])
def test_other_hosts_get_403_unless_a_key_or_the_network_protects(llm, host):
    for method, path in (("POST", PATH), ("GET", "/"), ("GET", "/metrics")):
        answer = call(llm, method, path, BODY if method == "POST" else None, {"host": host})
        assert answer.status_code == 403 and host in error_of(answer)
    with_key = {"host": host, "x-api-key": "one"}
    assert call(llm, "POST", PATH, BODY, with_key, api_key="one").status_code == 200
    assert call(llm, "POST", PATH, BODY, {"host": host}, host="0.0.0.0").status_code == 200


@pytest.mark.parametrize("own", ["LOCALHOST", "127.1", "127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_other_hosts_get_403_however_the_loopback_address_is_written(llm, own):
    assert call(llm, "GET", "/metrics", None, {"host": "a.example"}, host=own).status_code == 403
    host = f"[{own}]:80" if ":" in own else f"{own}:80"
    assert call(llm, "GET", "/metrics", None, {"host": host}, host=own).status_code == 200


@pytest.mark.parametrize("api_key", ["", " , "])
def test_empty_api_key_is_refused_instead_of_letting_everybody_in(api_key):
    with pytest.raises(ValueError, match="api_key must have at least one key"):
        ServerOptions(api_key=api_key)


@pytest.mark.parametrize("key", ["schlüssel", "two words", "a\x01"])
def test_api_keys_that_no_header_carries_are_refused_and_not_shown(key):
    with pytest.raises(ValueError, match="api_key must have ASCII characters only") as error:
        ServerOptions(api_key=f"one,{key}")
    assert key not in str(error.value)


@pytest.mark.parametrize("origin", ["http://a.example/", "a.example", "http://A.example", "http://", "http://u@a"])
def test_origins_that_no_browser_sends_are_refused(origin):
    with pytest.raises(ValueError, match="cors_origins must be like http://localhost:3000"):
        ServerOptions(cors_origins=f"http://b.example,{origin}")


def test_origins_of_all_kinds_are_accepted():
    ServerOptions(cors_origins="*")
    ServerOptions(cors_origins="http://localhost:3000, https://[::1]:80,null,app://obsidian.md")


@pytest.mark.parametrize("name", ["", " , "])
def test_empty_model_name_is_refused(name):
    with pytest.raises(ValueError, match="served_model_name must have at least one name"):
        ServerOptions(served_model_name=name)


def test_prompts_that_are_too_many_are_refused_before_any_is_decoded(llm, monkeypatch):
    monkeypatch.setattr(llm, "decode", None)
    answer = call(llm, "POST", PATH, {"prompt": [[5]] * 2000, "echo": True})
    assert answer.status_code == 400 and "2000 samples" in error_of(answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, {**BODY, "stop_token_ids": ["a"] * 101}),
        ("/v1/chat/completions", dict.fromkeys(map(str, range(101)), 1)),
        ("/v1/messages", {"messages": [5] * 101}),
        ("/v1/messages/count_tokens", {"messages": [5] * 101}),
        ("/v1/responses", {"input": [5] * 101}),
        ("/tokenize", {"messages": [5] * 101}),
        ("/detokenize", {"tokens": ["a"] * 101}),
    ],
)
def test_many_errors_of_a_body_are_counted_and_not_described(llm, path, body):
    answer = call(llm, "POST", path, body)
    assert answer.status_code == 400 and "values in the body are wrong" in error_of(answer)
    assert "token_ids.0:" in error_of(call(llm, "POST", PATH, {**BODY, "stop_token_ids": ["a"] * 100}))


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": [{}] * 20_000}]}, "20000 lists and objects"),
        ("/v1/responses", {"input": [{}] * 20_000}, "20000 lists and objects"),
        ("/v1/chat/completions", {"messages": [{}] * 20_000}, "20000 lists and objects"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}], "tools": [5] * 4097}, "4096"),
        (PATH, {**BODY, "logit_bias": dict.fromkeys(map(str, range(301)), 1)}, "300"),
        (PATH, {**BODY, "allowed_token_ids": [7] * (1 << 19)}, "524288 values"),
        (PATH, {**BODY, "stop": [7] * (1 << 16)}, "65536 values that are not token ids"),
        (PATH, {**BODY, "prompt": [[7] * 40_000, ["a"] * (1 << 16)]}, "65536 values that are not token ids"),
        ("/v1/messages", {"metadata": dict.fromkeys(map(str, range(1 << 16)), "")}, "65536 keys"),
        ("/v1/chat/completions", dict.fromkeys(map(str, range((1 << 16) + 1)), 1), "65536 keys"),
    ],
)
def test_bodies_of_far_too_many_values_are_refused(llm, path, body, named):
    answer = call(llm, "POST", path, body)
    assert answer.status_code == 400 and named in error_of(answer)


def random_json(rng, depth=4):
    """A JSON value, and how many lists and objects, and how many keys it has."""

    def text():
        return "".join(rng.choice('a\\"[{}],:é\n') for _ in range(rng.randrange(8)))

    kind = rng.randrange(5) if depth else 4
    if kind > 1:
        return rng.choice([text(), 1, 2.5, None, True]), (0, 0)
    parts = [random_json(rng, depth - 1) for _ in range(rng.randrange(5))]
    containers, keys = (sum(counts[i] for _, counts in parts) for i in range(2))
    if kind == 0:
        return [value for value, _ in parts], (containers + 1, keys)
    return {f"{i}{text()}": value for i, (value, _) in enumerate(parts)}, (containers + 1, keys + len(parts))


def test_parts_of_a_body_are_counted_before_it_is_parsed(monkeypatch):
    rng = Random(0)
    for _ in range(500):
        value, (containers, keys) = random_json(rng)
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])).encode()
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(5)))
        pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        for name, count in (("_MAX_CONTAINERS", containers), ("_MAX_KEYS", keys)):
            for limit in {count, max(0, count - 1)}:
                monkeypatch.setattr(body, name, limit)
                counter = body.JsonCounter()
                with contextlib.nullcontext() if count <= limit else pytest.raises(ValueError, match="body has more"):
                    for piece in pieces:
                        counter.add(piece)
            monkeypatch.undo()


PROMPT = "The same prompt, longer than two blocks of the KV cache."
GENERATING = {
    PATH: {"prompt": PROMPT, "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 1},
    "/v1/messages": {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1},
}


@pytest.mark.parametrize("path", GENERATING)
def test_keys_share_no_cached_prompts_when_asked_for(llm, path):
    def num_cached(key, header="authorization", **fields):
        headers = {header: f"Bearer {key}" if header == "authorization" else key}
        body = GENERATING[path] | fields
        usage = call(llm, "POST", path, body, headers, api_key="a,b", salt_prefix_cache=True).json()["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
        return details.get("cached_tokens", details.get("cache_read_input_tokens"))

    asyncio.run(llm.reset_prefix_cache())
    assert num_cached("a") == 0 and num_cached("a") > 0
    assert num_cached("b") == 0 and num_cached("b") > 0
    assert num_cached("b", "x-api-key") > 0
    if path != "/v1/messages":  # there it is an unknown field
        assert num_cached("a", cache_salt="s") == 0 and num_cached("a", cache_salt="s") > 0


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", b"a" * 1024),
        (b"GET /health HTTP/1.1\r\nX: ", b"a" * 1024),
        (b"GET /health HTTP/1.1\r\n", b"X: a\r\n" * 100),
        (CHUNKED + b"1;", b"a" * 1024),
        (CHUNKED + b"0\r\n", b"X: a\r\n" * 100),
    ],
)
def test_head_without_end_ends_the_connection(llm, start, piece):
    async def use():
        async with listening(llm) as (_, client, _):
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            reading = asyncio.create_task(reader.read())
            num_sent = len(start)
            writer.write(start)
            with contextlib.suppress(ConnectionError):
                while not reading.done():
                    writer.write(piece)
                    await writer.drain()
                    num_sent += len(piece)
                    await asyncio.sleep(0)
            assert num_sent < 16 << 20
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await reading
            assert (await client.post(PATH, content=chunks(), headers=JSON)).status_code == 200

    async def chunks():
        yield json.dumps(BODY).encode() + b" "
        for _ in range(20):  # a body of this size passes
            yield b" " * 8192

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_connection_whose_client_falls_silent_within_a_request_is_closed(llm, monkeypatch):
    monkeypatch.setattr(http_protocol, "_SILENT_SECONDS", 1)
    health = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def read_all(address, *parts):
        """Send parts, each after the response to the one before. Return what comes after the last one."""
        reader, writer = await asyncio.open_connection(*address)
        for part in parts[:-1]:
            writer.write(part)
            await reader.readuntil(b"\r\n\r\n")
        writer.write(parts[-1])
        received = await reader.read()  # until the server closes
        writer.close()
        return received

    async def use():
        async with listening(llm) as (_, client, _):
            address = client.base_url.host, client.base_url.port
            starts = [b"POST", b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % PATH.encode(), CHUNKED]
            silent = [read_all(address, start) for start in [b"", *starts]]
            silent += [read_all(address, health, start) for start in starts]
            silent += [read_all(address, health + b"POST", b" / HT")]
            assert await asyncio.gather(*silent) == [b""] * 8

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_client_may_be_silent_while_it_waits_for_a_response(own_llm, monkeypatch):
    monkeypatch.setattr(http_protocol, "_SILENT_SECONDS", 0.5)

    async def use():
        async with listening(own_llm) as (state, client, _):
            with held(own_llm):
                answering = asyncio.create_task(client.post(PATH, json=BODY))
                while not state.admission.num_samples:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(1.5)
            assert (await answering).status_code == 200

    asyncio.run(asyncio.wait_for(use(), SECONDS))


@pytest.mark.parametrize("last", [b"", b"X: a\r\n"])
def test_offer_to_go_on_in_http2_is_ignored(llm, last):
    body = json.dumps(BODY).encode()
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % PATH.encode()
    head += b"Content-Length: %d\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n" % len(
        body
    )

    async def use():
        async with listening(llm) as (_, client, _):
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            for _ in range(2):
                writer.write(head + b"Upgrade: h2c\r\n" + last + b"\r\n" + body)
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
                answer = await reader.readuntil(b"\r\n\r\n")
                size = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                assert json.loads(await reader.readexactly(size))["choices"]
            writer.close()

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_pipelined_request_is_dropped_and_a_vanished_client_noticed(own_llm):
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}

    def request(**changes):
        content = json.dumps(body | changes).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    async def use():
        async with listening(own_llm) as (state, client, _):
            address = client.base_url.host, client.base_url.port
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request(max_tokens=2) * 2)
            assert (await reader.read()).count(b"HTTP/1.1 200 OK") == 1  # reads until the server closes
            reader, writer = await asyncio.open_connection(*address)
            with held(own_llm):
                writer.write(request() * 2)
                while not state.admission.num_samples:
                    await asyncio.sleep(0.01)
                writer.transport.abort()
                while state.admission.num_samples:
                    await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_long_bodies_take_turns(monkeypatch):
    check, iterations, parsed = body._check_size, 0, []

    async def use(client, state):
        nonlocal iterations
        requests = [client.post("/v1/completions", json={"prompt": "a" * (1 << 16), "n": 0}) for _ in range(5)]
        answering = asyncio.gather(*requests)
        while not answering.done():
            iterations += 1
            await asyncio.sleep(0)
        assert {answer.status_code for answer in await answering} == {400}

    monkeypatch.setattr(body, "_check_size", lambda data: (parsed.append(iterations), check(data)))
    with_client(ScriptedLLM("a"), use)
    assert len(parsed) == len(set(parsed)) == 5
