"""Models, tokens, health, metrics, and the errors of the app."""

import asyncio
import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import nanovllm
from nanovllm.server.app import _greeting, _listen, make_state, serve
from nanovllm.server.options import ServerOptions
from tests.server.conftest import OPTIONS
from tests.server.scripted import ScriptedLLM
from tests.server.serving import SECONDS, call, error_of, listening, make_server, post, until, with_client


def test_models_are_listed_and_found_by_name(llm):
    async def use(client, state):
        return [await client.get(f"/v1/models{path}") for path in ("", "/org/one", "/three")]

    # One server, because its models have the time at which it was made.
    every, one, none = with_client(llm, use, served_model_name="org/one, two")
    listed = every.json()["data"]
    assert [card["id"] for card in listed] == ["org/one", "two"]
    assert listed[0]["max_model_len"] == llm.max_model_len
    assert one.json() == listed[0]
    assert none.status_code == 404 and "org/one, two" in error_of(none)


def test_model_name_is_that_of_the_folder_or_the_hub(llm, model):
    names = [
        make_state(llm, path, ServerOptions()).model_names for path in (model, str(model), "Qwen/Qwen3-0.6B", None)
    ]
    assert names == [("qwen3",), ("qwen3",), ("Qwen/Qwen3-0.6B",), ("SmolLM2-135M-Instruct",)]


def test_server_does_not_start_with_a_wrong_generation_config(model, tmp_path):
    path = shutil.copytree(model, tmp_path / "model")
    (path / "generation_config.json").write_text('{"temperature": -1}')
    llm = nanovllm.AsyncLLM(path, **OPTIONS)
    try:
        with pytest.raises(ValueError, match=r"generation_config.json is wrong \(.*\): temperature must be from 0"):
            make_state(llm, path, ServerOptions())
    finally:
        llm.close()


def test_full_queue_of_the_engine_is_no_fault_of_the_request(model):
    llm = nanovllm.AsyncLLM(model, max_num_waiting=3, **OPTIONS)
    try:
        answer = call(llm, "POST", "/v1/completions", {"prompt": ["a"] * 20, "max_tokens": 50})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "queue_full" and "max_num_waiting=3" in error_of(answer)
        answer = call(llm, "POST", "/v1/completions", {"prompt": "a", "n": 4})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    finally:
        llm.close()


def test_parser_of_calls_that_the_model_has_no_token_for_is_refused(llm):
    with pytest.raises(ValueError, match=r"mistral needs a model with the token \[TOOL_CALLS\]"):
        make_state(llm, None, ServerOptions(tool_parser="mistral"))


def test_tokenize_and_detokenize_are_inverse(llm):
    answer = post(llm, "/tokenize", {"prompt": "héllo", "return_token_strs": True})
    assert answer["tokens"] == llm.tokenizer.encode("héllo")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 6
    assert answer["max_model_len"] == llm.max_model_len
    assert post(llm, "/detokenize", {"tokens": answer["tokens"]}) == {"prompt": "héllo"}
    assert post(llm, "/detokenize", {"tokens": []}) == {"prompt": ""}


def test_tokenize_renders_messages(llm):
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "hi"}]
    answer = post(llm, "/tokenize", {"messages": messages})
    assert llm.tokenizer.decode(answer["tokens"]) == "<system>a<user>hi<assistant>"


def test_tokenize_counts_a_strict_tool_as_chat_completions_do():
    template = "{{ messages }}{{ tools | tojson }}"
    function = {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": function}]}
    llm = ScriptedLLM("a")
    llm.tokenizer = SimpleNamespace(chat_template=template)
    post(llm, "/tokenize", body, tool_parser="hermes")
    shown = llm.template
    post(llm, "/v1/chat/completions", body, tool_parser="hermes")
    assert shown == llm.template and "strict" not in shown["tools"][0]["function"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "a", "add_generation_prompt": True},
        {"messages": [{"role": "user", "content": "hi"}], "add_special_tokens": True},
        {"messages": [{"role": "user", "content": "hi"}], "chat_template": "{{ 1 }}"},
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"prompt": "x" * 600_000},
    ],
)
def test_wrong_tokenize_gets_400(llm, body):
    answer = call(llm, "POST", "/tokenize", body)
    assert answer.status_code == 400 and error_of(answer)


LONG = "many " * 2000


@pytest.mark.parametrize(
    ("path", "body", "method"),
    [
        ("/tokenize", {"prompt": LONG}, "encode_bounded"),
        ("/detokenize", {"tokens": [7] * 9000}, "decode"),
        (
            "/v1/messages/count_tokens",
            {"model": "tiny", "messages": [{"role": "user", "content": LONG}]},
            "texts_and_ids",
        ),
        ("/v1/responses/input_tokens", {"input": LONG}, "texts_and_ids"),
    ],
)
def test_long_requests_that_only_tokenize_leave_threads_to_others(llm, monkeypatch, path, body, method):
    inputs, release, started = llm.llm_engine.input_processor, threading.Event(), threading.Event()
    owner = inputs.chats if method == "texts_and_ids" else inputs.codec

    def wait(value, *args, **kwargs):
        if len(str(value)) < len(LONG):
            return work(value, *args, **kwargs)
        started.set()
        assert release.wait(SECONDS)
        raise ValueError("it is too long")

    work = getattr(owner, method)
    monkeypatch.setattr(owner, method, wait)

    async def use(client, state):
        many = [asyncio.create_task(client.post(path, json=body)) for _ in range(8)]
        try:
            await until(started.is_set)
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
            others = [await client.post("/v1/chat/completions", json=chat)]
            others.append(await client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 1}))
            others.append(await client.post("/tokenize", json={"prompt": "ab"}))
            others.append(await client.post("/detokenize", json={"tokens": [7]}))
            assert [other.status_code for other in others] == [200] * 4
            assert not any(task.done() for task in many)
        finally:
            release.set()
            answers = await asyncio.gather(*many)
        assert {answer.status_code for answer in answers} == {400}

    with_client(llm, use)


def test_health_and_version(llm):
    assert call(llm, "GET", "/health").status_code == 200
    answer = call(llm, "HEAD", "/health")
    assert (answer.status_code, answer.content) == (200, b"")
    assert call(llm, "GET", "/version").json() == {"version": nanovllm.__version__}


@pytest.mark.filterwarnings("error")
def test_schema_has_each_operation_once_with_the_status_of_wrong_requests(llm):
    paths = call(llm, "GET", "/openapi.json").json()["paths"]
    assert "/metrics" in paths and "/health" not in paths
    assert paths["/v1/completions"]["post"]["responses"].keys() == {"200", "4XX"}


def test_unknown_paths_and_methods_get_errors_in_words(llm):
    answer = call(llm, "GET", "/v1/nothing")
    assert answer.status_code == 404 and "/v1/nothing" in error_of(answer)
    answer = call(llm, "GET", "/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert error_of(answer) == "/v1/completions takes POST, not GET"


USER = [{"role": "user", "content": "hi"}]
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        (CHAT, {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "Field required"),
        (CHAT, {"messages": USER, "response_format": {"type": "json_schema", "json_schema": 5}},
         "response_format.json_schema", "Input should be a valid dictionary"),
        (CHAT, {"messages": USER, "tool_choice": "maybe"}, "tool_choice", "Input should be 'none', 'auto'"),
        (CHAT, {"messages": USER, "stop": 5}, "stop", "Input should be a valid string"),
        (CHAT, {"messages": USER, "logit_bias": {"1": "x"}}, "logit_bias.1", "Input should be a valid number"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input.0.content.0", "Input tag 'input_image'"),
        (RESPONSES, {"input": [*USER, {"type": "function_call", "call_id": "1", "name": "f", "arguments": {}}]},
         "input.1.arguments", "Input should be a valid string"),
        (RESPONSES, {"input": [*USER, {"type": "function_call_output", "call_id": "1", "output": {}}]},
         "input.1.output", "must be a text or a list"),
        (RESPONSES, {"input": 5}, "input", "must be a text or a list"),
        (RESPONSES, {}, "input", "Field required"),
        (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 200}, "top_logprobs", "Input should be less than"),
    ],
)  # fmt: skip
def test_a_wrong_field_has_the_path_that_it_has_in_the_body(path, body, field, message):
    answer = call(ScriptedLLM("a"), "POST", path, body)
    assert answer.status_code == 400 and error_of(answer).startswith(f"{field}: {message}")
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("path", "body", "field", "bounds"),
    [
        (CHAT, {"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens", "from 1 to 2147483647, got 0"),
        (CHAT, {"messages": USER, "max_tokens": 0}, "max_tokens", "from 1 to 2147483647, got 0"),
        (CHAT, {"messages": USER, "n": 0}, "n", "from 1 to 64, got 0"),
        (COMPLETIONS, {"prompt": "a", "n": 65}, "n", "from 1 to 64, got 65"),
        (RESPONSES, {"input": "a", "max_output_tokens": 2**31}, "max_output_tokens", "from 1 to 2147483647, got"),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_that_the_client_has_sent(path, body, field, bounds):
    answer = call(ScriptedLLM("a"), "POST", path, body)
    assert answer.status_code == 400 and error_of(answer).startswith(f"{field} must be {bounds}")
    assert answer.json()["error"]["param"] == field


def test_an_unsupported_field_is_named_even_if_the_engine_has_another_use_for_its_name():
    answer = call(ScriptedLLM("a"), "POST", RESPONSES, {"input": "a", "prompt": {"id": "p"}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_an_integer_of_too_many_digits_is_refused_with_the_reason():
    answer = call(ScriptedLLM("a"), "POST", COMPLETIONS, b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}")
    assert answer.status_code == 400 and "the body cannot be read: Exceeds the limit" in error_of(answer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_sequences": [""]}, "stop_sequences must have strings of 1 to 1024 characters, got ''"),
        ({"messages": []}, "messages must have a text, a tool call or its result"),
        ({"messages": [{"role": "user", "content": []}]}, "messages must have a text, a tool call or its result"),
        ({"system": 5}, "system: must be a text or a list"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: must be a text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
    ],
)
def test_a_wrong_field_of_messages_is_named_as_in_the_body(fields, message):
    body = {"model": "tiny", "max_tokens": 1, "messages": USER, **fields}
    answer = call(ScriptedLLM("a"), "POST", "/v1/messages", body)
    assert answer.status_code == 400 and error_of(answer) == message


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"", {}, "the body must be a JSON object, got none"),
        (b"null", {}, "the body must be a JSON object, got None"),
        (b"[1]", {}, "the body must be a JSON object, got [1]"),
        (b'{"prompt": "h\xe9"}', {}, "the body is not UTF-8"),
        ('{"prompt": "\\""}'.encode("utf-16"), {}, "the body is not UTF-8, or has a NUL character that is not escaped"),
        (b"\x1f\x8b", {"content-encoding": "gzip"}, "the body must not be compressed, got 'gzip'"),
        (b"\x1f\x8b\x08\0", {"content-encoding": "gzip"}, "the body must not be compressed, got 'gzip'"),
        (b'{"prompt": ' + b"[" * 10_000, {}, "the request is nested too deeply"),
        (b'{"prompt": "a", "x": {"maximum": -1e999}}', {}, "the body has the number -inf, but numbers must be finite"),
        (b'{"prompt": "a", "x": [[0.5, NaN]]}', {}, "the body has the number nan, but numbers must be finite"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else "",
)
def test_a_body_that_cannot_be_read_gets_400_that_says_why(body, headers, message):
    answer = call(ScriptedLLM("a"), "POST", COMPLETIONS, body, headers)
    assert answer.status_code == 400 and error_of(answer) == message


def samples(text):
    """Return the values of metrics by name and labels, without buckets."""
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "model_name")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_metrics_count_requests_tokens_and_times(own_llm):
    async def use(client, state):
        body = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True, "n": 2}
        for stream in (False, True):
            await client.post("/v1/completions", json={**body, "stream": stream})
        await client.post("/v1/completions", json={"prompt": 5})
        await client.post("/v1/completions", json={"prompt": [5000]})
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return samples(answer.text)

    found = with_client(own_llm, use)
    assert found["nanovllm:engine_up",] == 1
    assert found["vllm:request_success_total", "finished_reason=length"] == 4
    assert ("vllm:request_success_total", "finished_reason=error") not in found
    assert found["vllm:prompt_tokens_total",] == 20 and found["vllm:generation_tokens_total",] == 16
    assert found["vllm:num_requests_running",] == found["vllm:num_requests_waiting",] == 0
    assert found["vllm:request_prompt_tokens_sum",] == 10 and found["vllm:request_generation_tokens_sum",] == 16
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert found[f"vllm:{name}_count",] == 2 and 0 <= found[f"vllm:{name}_sum",] < SECONDS
    assert found["vllm:request_time_per_output_token_seconds_count",] == 2
    assert found["nanovllm:http_requests_total", "path=/v1/completions", "status=200"] == 2
    assert found["nanovllm:http_requests_total", "path=/v1/completions", "status=400"] == 2


def test_port_that_is_taken_is_an_error_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve({"model": "nothing/of-this-name"}, ServerOptions(port=port))


def test_port_is_taken_while_the_model_is_loaded():
    with _listen("127.0.0.1", 0) as first, pytest.raises(OSError, match="cannot listen"):
        _listen("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(
    ("bound", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80")],
)
def test_greeting_has_the_url_and_no_key(llm, bound, url):
    lines = _greeting(make_server(llm, api_key="secret")[0], bound, 80).splitlines()
    assert lines[0] == f"Serving tiny at {url}"
    assert f"curl {url}/v1/chat/completions" in lines[4] and "Bearer $API_KEY" in lines[5]
    assert "secret" not in " ".join(lines)


def test_serve_prints_its_address_and_ends_after_sigterm(model):
    code = f"""
from nanovllm.server.app import serve
from nanovllm.server.options import ServerOptions
serve({{"model": {str(model)!r}, **{OPTIONS!r}}}, ServerOptions(port=0, api_key="secret"))
"""
    root = Path(__file__).parents[2]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, text=True, **pipes)
    try:
        lines = iter(process.stdout.readline, "")
        url = next(match[0] for line in lines if (match := re.search(r"http://127.0.0.1:\d+", line)))
        assert httpx.get(f"{url}/health", timeout=SECONDS).status_code == 200
        assert httpx.get(f"{url}/v1/models", timeout=SECONDS).status_code == 401
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0
        assert "secret" not in rest + errors and "leaked" not in errors
    finally:
        process.kill()
        process.wait()


def test_server_whose_greeting_cannot_be_printed_serves(llm, monkeypatch, caplog):
    async def use():
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            async with listening(llm) as (_, client, _):
                assert (await client.get("/health")).status_code == 200
            sys.stdout.flush()  # as the command line does at its end
            sys.stdout.close()
            monkeypatch.undo()
            with contextlib.suppress(OSError):
                full.close()

    asyncio.run(use())
    assert "greeting cannot be printed" in caplog.text


def test_server_starts_the_process_for_templates_before_the_first_conversation(own_llm):
    async def use():
        async with listening(own_llm):
            await asyncio.wait_for(until(lambda: own_llm.llm_engine.input_processor.chats.templates._idle), SECONDS)

    asyncio.run(use())
