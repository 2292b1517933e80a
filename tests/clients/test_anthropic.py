"""Anthropic's own client, and a server in a process of its own."""

import anthropic
import pytest
from anthropic import Anthropic

from nanovllm import SamplingParams
from tests.clients.serving import SECONDS

MESSAGES = [{"role": "user", "content": "Zürich 🙂?"}]
# A random model would never end a text or a number of any length.
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "is_booked": {"type": "boolean"}},
    "required": ["city", "is_booked"],
    "additionalProperties": False,
}
TOOL = {"name": "book", "description": "Book a trip.", "input_schema": SCHEMA}


@pytest.fixture(scope="module")
def client(server):
    with Anthropic(base_url=server.url, api_key="-", max_retries=0, timeout=SECONDS) as client:
        yield client


@pytest.fixture
def fields(server):
    greedy = {"temperature": 0}  # the client itself has no such argument any more
    return {"model": server.model, "messages": MESSAGES, "max_tokens": 24, "extra_body": greedy}


def test_a_message_equals_the_offline_answer(client, fields, offline):
    answer = client.messages.create(**fields, system="Be brief.")
    prompt = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    (want,) = offline.chat(prompt, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    assert [block.text for block in answer.content] == [want.outputs[0].text]
    assert answer.stop_reason == {"stop": "end_turn", "length": "max_tokens"}[want.outputs[0].finish_reason]
    assert answer.usage.input_tokens == len(want.prompt_token_ids)
    assert answer.usage.output_tokens == len(want.outputs[0].token_ids)


def test_a_joined_stream_equals_the_whole_message(client, fields):
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "book"}])
def test_a_streamed_tool_call_has_valid_input_and_its_result_can_be_sent(client, fields, choice):
    tools = {"tools": [TOOL], "tool_choice": {**choice, "disable_parallel_tool_use": True}}
    with client.messages.stream(**{**fields, "max_tokens": 200}, **tools) as stream:
        message = stream.get_final_message()
    (call,) = message.content
    assert message.stop_reason == "tool_use"
    assert call.name == "book"
    assert call.input["city"] in ("Paris", "Rome") and isinstance(call.input["is_booked"], bool)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
    turns = [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**{**fields, "messages": MESSAGES + turns}, tools=[TOOL]).usage.output_tokens == 24


def test_count_tokens_equals_the_usage_of_the_answer(client, fields):
    prompt = {"model": fields["model"], "messages": MESSAGES, "system": "Be brief.", "tools": [TOOL]}
    count = client.messages.count_tokens(**prompt).input_tokens
    usage = client.messages.create(**{**fields, **prompt}).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens


def test_a_stop_sequence_is_named(client, fields):
    text = client.messages.create(**fields).content[0].text
    answer = client.messages.create(**fields, stop_sequences=[text[5:7]])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", text[5:7])
    assert answer.content[0].text == text[: text.index(text[5:7])]


def test_wrong_requests_raise_the_clients_own_errors(client, fields):
    with pytest.raises(anthropic.NotFoundError, match="claude-x"):
        client.messages.create(**{**fields, "model": "claude-x"})
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**{**fields, "max_tokens": -1})
