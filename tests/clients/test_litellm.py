"""LiteLLM in front of the server, by OpenAI's API and by Anthropic's."""

import json

import litellm
import pytest

from nanovllm import SamplingParams
from tests.clients.serving import SECONDS

MESSAGES = [{"role": "user", "content": "Zürich 🙂?"}]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "book", "parameters": SCHEMA}}


@pytest.fixture(params=["openai", "hosted_vllm", "anthropic"])
def fields(request, server):
    """The arguments of a greedy call through one of LiteLLM's providers."""
    base = server.url if request.param == "anthropic" else f"{server.url}/v1"
    name = f"{request.param}/{server.model}"
    greedy = {"temperature": 0, "max_tokens": 24, "timeout": SECONDS, "num_retries": 0}
    return {"model": name, "api_base": base, "api_key": "-", "messages": MESSAGES, **greedy}


def test_a_completion_equals_the_offline_answer(fields, offline):
    (want,) = offline.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    answer = litellm.completion(**fields)
    assert answer.choices[0].message.content == want.outputs[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24


def test_a_joined_stream_equals_the_whole_completion(fields):
    chunks = list(litellm.completion(**fields, stream=True))
    whole = litellm.completion(**fields).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_a_required_tool_is_called(fields):
    tools = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    (call,) = litellm.completion(**{**fields, **tools}).choices[0].message.tool_calls
    assert call.function.name == "book"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_a_wrong_value_raises_litellms_own_error(fields):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**{**fields, "temperature": -1})


def test_a_prompt_that_is_too_long_raises_litellms_own_error(fields):
    messages = [{"role": "user", "content": "word " * 20_000}]
    with pytest.raises(litellm.ContextWindowExceededError, match="too many for max_model_len"):
        litellm.completion(**{**fields, "messages": messages})
