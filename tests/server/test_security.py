"""Keys, sizes of bodies, request ids, and origins."""

import asyncio
import json

import pytest

from tests.server.serving import call, error_of, make_server, with_client

PATH = "/v1/completions"
BODY = {"prompt": "a", "max_tokens": 1}


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
    assert answer.headers["x-request-id"]


def test_each_key_opens_in_both_headers(llm):
    for headers in ({"authorization": "Bearer one"}, {"authorization": "bearer two"}, {"x-api-key": "two"}):
        assert call(llm, "POST", PATH, BODY, headers, api_key="one,two").status_code == 200


def test_health_needs_no_key(llm):
    assert call(llm, "GET", "/health", api_key="one").status_code == 200


def test_refusals_of_messages_have_anthropics_form(llm):
    answer = call(llm, "POST", "/v1/messages", BODY, api_key="one").json()
    assert (answer["type"], answer["error"]["type"]) == ("error", "authentication_error")


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
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
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
