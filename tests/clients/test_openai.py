"""OpenAI's own client, and a server in a process of its own: what it gets is what the engine says offline."""

import asyncio
import json
from typing import Literal

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from nanovllm import SamplingParams
from tests.clients.serving import SECONDS, served

MESSAGES = [{"role": "user", "content": "Zürich 🙂?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


class Trip(BaseModel):
    """The schema that the model must follow. A random model would never end a text or a number of any length."""

    city: Literal["Paris", "Rome"]
    is_booked: bool


PARAMETERS = Trip.model_json_schema()
TOOL = {"type": "function", "function": {"name": "book", "description": "Book a trip.", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=SECONDS) as client:
        yield client


@pytest.fixture
def chat(client, server):
    """Return a function that asks for a greedy answer."""

    def ask(messages=MESSAGES, **fields):
        fields = {"model": server.model, "temperature": 0, "max_tokens": 24, **fields}
        return client.chat.completions.create(messages=messages, **fields)

    return ask


def test_models_lists_the_model(client, server):
    assert [model.id for model in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).id == server.model


def test_chat_equals_the_offline_answer(chat, offline):
    answer = chat()
    (want,) = offline.chat(MESSAGES, GREEDY, use_tqdm=False)
    assert answer.choices[0].message.content == want.outputs[0].text
    assert answer.choices[0].finish_reason == want.outputs[0].finish_reason
    assert answer.usage.prompt_tokens == len(want.prompt_token_ids)
    assert answer.usage.completion_tokens == len(want.outputs[0].token_ids)


def test_a_joined_stream_equals_the_whole_answer(chat):
    *chunks, last = chat(stream=True, stream_options={"include_usage": True})
    whole = chat()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens


def test_samples_with_a_seed_are_the_same_each_time(chat):
    one, two = (chat(n=3, temperature=1, seed=7).choices for _ in range(2))
    assert [choice.message.content for choice in one] == [choice.message.content for choice in two]
    assert len({choice.message.content for choice in one}) == 3


def test_chat_logprobs_equal_the_offline_ones(chat, offline):
    tokens = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=3)
    (want,) = offline.chat(MESSAGES, params, use_tqdm=False)
    sample = want.outputs[0]
    expected = [row[token].logprob for row, token in zip(sample.logprobs, sample.token_ids, strict=True)]
    assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-4)
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == sample.text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_a_tool_that_must_be_called_is_called_with_valid_arguments(chat, choice):
    message = chat(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=200).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "book"
    Trip.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    assert chat([*MESSAGES, message.model_dump(), result], tools=[TOOL]).choices[0].finish_reason == "length"


def test_a_streamed_tool_call_equals_the_whole_one(chat):
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    whole = chat(**fields).choices[0]
    chunks = [chunk.choices[0] for chunk in chat(**fields, stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert calls[0].id and calls[0].function.name == "book"
    assert "".join(call.function.arguments or "" for call in calls) == whole.message.tool_calls[0].function.arguments
    assert chunks[-1].finish_reason == whole.finish_reason == "tool_calls"


def test_an_answer_follows_a_json_schema(client, server):
    answer = client.chat.completions.parse(
        model=server.model, messages=MESSAGES, response_format=Trip, temperature=0, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Trip)


def test_completions_of_token_ids_with_echo_equal_the_offline_logprobs(client, server, offline):
    prompts = [offline.tokenizer.encode(text) for text in ("Hello", "ünïcødé 🙂", "1, 2, 3")]
    fields = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1}
    answer = client.completions.create(model=server.model, prompt=prompts, **fields)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1)
    for choice, want in zip(
        answer.choices,
        offline.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False),
        strict=True,
    ):
        ids = want.prompt_token_ids + want.outputs[0].token_ids
        rows = want.prompt_logprobs + want.outputs[0].logprobs
        expected = [row[token].logprob for row, token in zip(rows[1:], ids[1:], strict=True)]
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        assert choice.text == offline.tokenizer.decode(want.prompt_token_ids) + want.outputs[0].text


def test_a_stop_string_ends_a_streamed_completion_before_it(client, server, offline):
    text = offline.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].text
    stop = text[5:7]
    fields = {"model": server.model, "prompt": "Hello", "temperature": 0, "max_tokens": 24, "stop": stop}
    chunks = list(client.completions.create(**fields, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_responses_equal_chat(client, server, chat):
    whole = chat().choices[0].message.content
    fields = {"model": server.model, "input": MESSAGES, "temperature": 0, "max_output_tokens": 24}
    response = client.responses.create(**fields)
    assert response.output_text == whole
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(**fields) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(pieces) == whole


def test_responses_call_a_tool(client, server):
    tool = {"type": "function", "name": "book", "parameters": PARAMETERS, "strict": False}
    fields = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    response = client.responses.create(model=server.model, input="Go", temperature=0, **fields)
    (call,) = response.output
    assert call.type == "function_call" and call.name == "book"
    Trip.model_validate_json(call.arguments)


def test_more_tokens_than_fit_behind_the_prompt_are_cut(client, server):
    answer = client.completions.create(
        model=server.model, prompt="x" * 500, max_tokens=5000, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "error", "word"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "gpt-5"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": [{"role": "user", "content": "long " * 300}]}, openai.BadRequestError, "max_model_len"),
        ({"n": 65}, openai.BadRequestError, "n must be from 1 to 64"),
        ({"extra_body": {"speed": 3}}, openai.BadRequestError, "speed"),
        ({"stream": True, "temperature": -1}, openai.BadRequestError, "temperature"),
    ],
)
def test_a_wrong_field_raises_the_clients_own_error_that_names_it(chat, fields, error, word):
    with pytest.raises(error, match=word):
        chat(**fields)


def test_many_answers_at_once_are_the_offline_ones(server, offline):
    texts = [f"Question {i} 🙂" for i in range(24)]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", timeout=SECONDS) as client:

            async def ask(text):
                return await client.completions.create(model=server.model, prompt=text, temperature=0, max_tokens=24)

            return [answer.choices[0].text for answer in await asyncio.gather(*map(ask, texts))]

    want = [output.outputs[0].text for output in offline.generate(texts, GREEDY, use_tqdm=False)]
    assert asyncio.run(ask_all()) == want


def test_a_client_that_leaves_frees_its_request(chat, server):
    stream = chat(stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    for _ in range(10_000):
        lines = dict(
            line.rsplit(" ", 1) for line in httpx.get(f"{server.url}/metrics").text.splitlines() if line[0] != "#"
        )
        label = f'{{model_name="{server.model}"}}'
        if float(lines[f"vllm:num_requests_running{label}"]) == float(lines[f"vllm:kv_cache_usage_perc{label}"]) == 0:
            break
    else:
        pytest.fail("the request goes on")
    aborted = [line for line in lines if line.startswith("vllm:request_success_total") and '"abort"' in line]
    assert float(lines[aborted[0]]) >= 1


def test_a_key_is_needed_where_the_server_has_one(server):
    with served(server.folder, "--api-key", "one,two") as locked:
        for key in ("one", "two"):
            OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0).models.list()
        with pytest.raises(openai.AuthenticationError, match="API key"):
            OpenAI(base_url=f"{locked.url}/v1", api_key="three", max_retries=0).models.list()
        assert httpx.get(f"{locked.url}/health").status_code == 200
        assert json.loads(httpx.get(f"{locked.url}/metrics").text)["error"]["code"] == "invalid_api_key"
