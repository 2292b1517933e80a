"""POST /v1/responses, called by OpenAI's own client."""

import json

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from pydantic import BaseModel  # noqa: E402

from nanovllm import AsyncLLM, StructuredOutputsParams  # noqa: E402
from nanovllm.server.responses import ResponsesRequest, chat_messages  # noqa: E402
from tests.models.tiny import CHAT_TEMPLATE, save_tiny_with_tokenizer  # noqa: E402
from tests.server import real_clients  # noqa: E402
from tests.server.real_clients import MODEL  # noqa: E402
from tests.server.scripted import ScriptedLLM  # noqa: E402

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
ARGUMENTS = '{"city": "Zürich 🌦"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
EVERYTHING = f"<think>\nhm, 雨?\n</think>\n\nI look.\n{CALL}\n{CALL}"


def ask(llm, act, **options):
    """Do what `act` does with a client of a server with this engine; see `real_clients.ask`."""
    return real_clients.ask(openai, openai.AsyncOpenAI, "http://localhost/v1", act, llm, **options)


def create(llm, **request):
    """Return the response to a request."""
    request = {"model": MODEL, "input": "Hello", **request}
    return ask(llm, lambda client: client.responses.create(**request))


def stream(llm, **request):
    """Return the events that answer a request."""

    async def act(client):
        raw = await client.responses.create(model=MODEL, **{"input": "Hello", **request}, stream=True)
        return [event async for event in raw]

    return ask(llm, act)


def translated(items, **fields):
    return chat_messages(ResponsesRequest(model=MODEL, input=items, **fields))


def without_ids(items):
    return [{key: value for key, value in item.to_dict().items() if key not in ("id", "call_id")} for item in items]


def test_text_is_one_message_with_its_usage():
    llm = ScriptedLLM("Grüezi 👋")
    response = create(llm, instructions="Be brief.", metadata={"a": "b"})
    assert response.output_text == "Grüezi 👋"
    assert [item.type for item in response.output] == ["message"]
    assert (response.status, response.incomplete_details, response.error) == ("completed", None, None)
    assert (response.model, response.metadata, response.instructions) == (MODEL, {"a": "b"}, "Be brief.")
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(llm.prompt), 8)
    assert usage.total_tokens == len(llm.prompt) + 8 and usage.output_tokens_details.reasoning_tokens == 0
    assert llm.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_the_tokens_of_an_input_are_counted_as_the_usage_says():
    llm = ScriptedLLM("Grüezi")
    request = {"model": MODEL, "input": [{"role": "user", "content": "Hello"}], "instructions": "Be brief."}

    async def act(client):
        response = await client.responses.create(**request, tools=[WEATHER])
        return response.usage, await client.responses.input_tokens.count(**request, tools=[WEATHER])

    usage, count = ask(llm, act)
    assert count.to_dict() == {"object": "response.input_tokens", "input_tokens": usage.input_tokens}
    with pytest.raises(openai.BadRequestError, match="input"):
        ask(llm, lambda client: client.responses.input_tokens.count(model=MODEL))


def test_thinking_text_and_calls_are_items_that_follow_each_other():
    response = create(ScriptedLLM(EVERYTHING), tools=[WEATHER])
    reasoning, message, first, second = response.output
    assert reasoning.content[0].text.strip() == "hm, 雨?" and reasoning.summary == []
    assert message.content[0].text.strip() == "I look."
    assert (first.type, first.name, json.loads(first.arguments)) == ("function_call", "weather", json.loads(ARGUMENTS))
    assert first.call_id != second.call_id
    assert response.status == "completed"
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens


@pytest.mark.parametrize("piece_size", [1, 7, 1000])
def test_a_stream_builds_the_whole_response(piece_size):
    events = stream(ScriptedLLM(EVERYTHING, piece_size=piece_size), tools=[WEATHER])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    final = events[-1].response
    whole = create(ScriptedLLM(EVERYTHING), tools=[WEATHER])
    assert without_ids(final.output) == without_ids(whole.output)
    assert final.usage == whole.usage

    for i, item in enumerate(final.output):
        own = [event for event in events if getattr(event, "output_index", None) == i]
        assert own[0].type == "response.output_item.added" and own[-1].type == "response.output_item.done"
        assert own[-1].item == item
        assert {event.item_id for event in own[1:-1]} == {item.id}
        text = item.arguments if item.type == "function_call" else item.content[0].text
        assert "".join(event.delta for event in own if event.type.endswith(".delta")) == text
    kinds = [event.type for event in events if getattr(event, "output_index", None) == 1]
    assert [kind for kind in kinds if not kind.endswith(".delta")] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]


def test_the_client_accumulates_a_stream():
    async def act(client):
        async with client.responses.stream(model=MODEL, input="Hello", tools=[{**WEATHER, "strict": True}]) as events:
            snapshots = [event.snapshot async for event in events if event.type == "response.output_text.delta"]
            return snapshots, await events.get_final_response()

    snapshots, response = ask(ScriptedLLM(EVERYTHING), act)
    assert snapshots[-1] == response.output_text
    assert response.output[2].parsed_arguments == json.loads(ARGUMENTS)


def test_server_sent_events_carry_their_names():
    async def act(client):
        body = {"model": MODEL, "input": "Hello", "stream": True}
        return await client._client.post("http://localhost/v1/responses", json=body)

    lines = ask(ScriptedLLM("ab"), act).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names == [json.loads(line.removeprefix("data: "))["type"] for line in lines if line.startswith("data: ")]


def test_a_tool_call_makes_a_round_trip():
    first = create(ScriptedLLM(EVERYTHING), tools=[WEATHER])
    llm = ScriptedLLM("It rains.")
    results = [
        {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": first.output[3].call_id,
            "output": [{"type": "input_text", "text": "storm"}],
        },
    ]
    items = [{"role": "user", "content": "Hello"}, *[item.to_dict() for item in first.output], *results]
    assert create(llm, input=items, tools=[WEATHER]).output_text == "It rains."
    user, turn, rain, storm = llm.messages
    assert user == {"role": "user", "content": "Hello"}
    assert turn["content"].strip() == "I look." and turn["reasoning_content"].strip() == "hm, 雨?"
    assert [call["id"] for call in turn["tool_calls"]] == [item["call_id"] for item in results]
    assert json.loads(turn["tool_calls"][0]["function"]["arguments"]) == json.loads(ARGUMENTS)
    assert rain == {"role": "tool", "tool_call_id": first.output[2].call_id, "content": "rain"}
    assert storm["content"] == "storm"
    assert llm.template["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def test_a_request_of_codex_is_answered():
    llm = ScriptedLLM("Done.")
    events = stream(
        llm,
        instructions="You are Codex.",
        input=[
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: none"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<cwd>/</cwd>"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA", "content": None},
            {"type": "function_call", "name": "weather", "arguments": ARGUMENTS, "call_id": "call_1"},
            {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        ],
        tools=[WEATHER, {"type": "custom", "name": "apply_patch", "format": {}}, {"type": "web_search"}],
        tool_choice="auto",
        parallel_tool_calls=True,
        reasoning={"effort": "medium", "summary": "auto", "generate_summary": None},
        store=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="0-1",
        text={"verbosity": "medium"},
        extra_body={"client_metadata": {"x-codex-installation-id": "1"}},
    )
    assert events[-1].response.output_text == "Done."
    assert [message["role"] for message in llm.messages] == ["system", "user", "assistant", "tool"]
    assert llm.messages[0]["content"] == "You are Codex.\n\nSandbox: none"
    assert llm.messages[1]["content"] == "<cwd>/</cwd>\nFix it"
    assert [tool["function"]["name"] for tool in llm.template["tools"]] == ["weather"]
    assert llm.template["chat_template_kwargs"] == {"enable_thinking": True}


def test_system_and_developer_messages_merge_into_the_first():
    items = [
        {"role": "user", "content": "Hello"},
        {"role": "developer", "content": "Be kind."},
        {"role": "assistant", "content": "Hi"},
        {"role": "system", "content": [{"type": "input_text", "text": "Be fast."}]},
    ]
    assert translated(items, instructions="Be brief.") == [
        {"role": "system", "content": "Be brief.\n\nBe kind.\n\nBe fast."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]


def test_each_message_of_the_assistant_after_its_calls_is_a_turn():
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
    items = [call, {**call, "call_id": "2"}, {"role": "assistant", "content": "Hi"}, call]
    turns = translated(items)
    assert [(turn["content"], len(turn["tool_calls"])) for turn in turns] == [("", 2), ("Hi", 1)]


def test_a_response_that_is_cut_off_is_incomplete():
    llm = ScriptedLLM("one, two", finish_reason="length")
    response = create(llm, max_output_tokens=8)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[-1].status == "incomplete"
    assert llm.params.max_tokens == 8
    last = stream(llm)[-1]
    assert last.type == "response.incomplete" and last.response.output_text == "one, two"


@pytest.mark.parametrize(
    ("text", "stop_reason", "statuses"),
    [
        (CALL, None, ["completed", "completed"]),
        (f"{CALL}{CALL[:-30]}", '"n"', ["incomplete", "completed", "incomplete"]),
        (CALL[:-30], None, ["incomplete", "incomplete"]),
        (CALL.replace('"Zürich', "Zürich"), None, ["incomplete", "incomplete"]),
        (CALL.replace('"Zürich', "Zürich") + "Well.", None, ["incomplete", "incomplete", "completed"]),
    ],
)
def test_a_response_with_a_call_that_is_not_complete_is_incomplete(text, stop_reason, statuses):
    response = create(ScriptedLLM(text, stop_reason=stop_reason), tools=[WEATHER])
    assert [response.status, *[item.status for item in response.output]] == statuses
    assert response.incomplete_details is None
    events = stream(ScriptedLLM(text, stop_reason=stop_reason), tools=[WEATHER])
    last = events[-1]
    assert last.type == f"response.{statuses[0]}"
    assert [last.response.status, *[item.status for item in last.response.output]] == statuses
    done = [event.item.status for event in events if event.type == "response.output_item.done"]
    assert done == statuses[1:]


def test_text_format_constrains_the_answer():
    class City(BaseModel):
        city: str

    async def act(client):
        response = await client.responses.parse(model=MODEL, input="Hello", text_format=City)
        schema = llm.params.structured_outputs
        await client.responses.create(model=MODEL, input="Hello", text={"format": {"type": "json_object"}})
        json_object = llm.params.structured_outputs
        await client.responses.create(model=MODEL, input="Hello", text={"format": {"type": "text"}})
        return response, schema, json_object, llm.params.structured_outputs

    llm = ScriptedLLM('{"city": "Ulm"}')
    response, schema, json_object, text = ask(llm, act, reasoning_parser="none")
    assert response.output_parsed == City(city="Ulm")
    assert json.loads(schema.json)["required"] == ["city"]
    assert json_object == StructuredOutputsParams(json_object=True)
    assert text is None


def test_sampling_fields_reach_the_engine():
    llm = ScriptedLLM("ok")
    response = create(llm, temperature=0.25, top_p=0.5, extra_body={"top_k": 7})
    assert (llm.params.temperature, llm.params.top_p, llm.params.top_k) == (0.25, 0.5, 7)
    assert (response.temperature, response.top_p) == (0.25, 0.5)


@pytest.mark.parametrize(("effort", "kwargs"), [("none", False), ("minimal", True), ("high", True), ("max", True)])
def test_the_effort_none_switches_thinking_off(effort, kwargs):
    llm = ScriptedLLM("ok")
    create(llm, reasoning={"effort": effort})
    assert llm.template["chat_template_kwargs"] == {"enable_thinking": kwargs}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("store", True),
        ("background", True),
        ("conversation", "conv_1"),
        ("include", ["file_search_call.results"]),
        ("max_tool_calls", 1),
        ("n", 2),
        ("max_tokens", 5),
        ("truncation", "auto"),
        ("top_logprobs", 2),
        ("tool_choice", "required"),
        ("tools", [WEATHER, WEATHER]),
        ("tool_choice", {"type": "function", "name": "clock"}),
        ("text", {"verbosity": "low"}),
        ("text", {"format": {"type": "json_schema", "name": "x"}}),
        ("temperature", 1000),
        ("max_output_tokens", 0),
        ("input", [{"type": "item_reference", "id": "msg_1"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]),
        ("input", [{"role": "tool", "content": "x"}]),
        ("input", []),
        ("reasoning", {"effort": "nnone"}),
        ("unheard_of", 1),
    ],
)
def test_what_has_an_effect_that_is_not_supported_is_refused_by_name(name, value):
    with pytest.raises(openai.BadRequestError) as caught:
        create(ScriptedLLM("ok"), extra_body={name: value})
    error = caught.value.body
    assert error["type"] == "invalid_request_error"
    assert name in error["message"]


def test_a_function_without_a_name_is_refused():
    with pytest.raises(openai.BadRequestError, match="tools has a function without a name"):
        create(ScriptedLLM("ok"), tools=[{"type": "function"}])


def test_two_forms_of_the_answer_are_refused():
    text = {"format": {"type": "json_object"}}
    with pytest.raises(openai.BadRequestError, match=r"text\.format and structured_outputs"):
        create(ScriptedLLM("{}"), text=text, extra_body={"structured_outputs": {"regex": "a"}})


def test_refusals_of_other_models_are_their_text():
    refusal = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert translated([refusal]) == [{"role": "assistant", "content": "No."}]


def test_an_unknown_model_is_not_found():
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        create(ScriptedLLM("ok"), model="gpt-5")


def test_a_failure_in_mid_stream_is_an_event_with_the_next_number():
    class Failing(ScriptedLLM):
        async def generate(self, *args):
            outputs = super().generate(*args)
            yield await anext(outputs)
            await outputs.aclose()
            raise RuntimeError("the engine has failed")

    events = stream(Failing("abc"))
    assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["a"]
    last = events[-1]
    assert last.type == "response.failed" and last.sequence_number == len(events) - 1
    assert last.response.status == "failed" and "the engine has failed" in last.response.error.message
    assert [item.status for item in last.response.output] == ["incomplete"]


def test_a_model_answers_with_the_same_text_whether_it_streams_or_not(tmp_path):
    llm = AsyncLLM(save_tiny_with_tokenizer(tmp_path, "qwen3", CHAT_TEMPLATE), max_model_len=256, dtype="float32")

    async def act(client):
        request = {"model": MODEL, "input": "Hello", "max_output_tokens": 24, "temperature": 0}
        whole = await client.responses.create(**request)
        events = [event async for event in await client.responses.create(**request, stream=True)]
        return whole, events[-1].response

    try:
        whole, streamed = ask(llm, act, tool_parser="none", reasoning_parser="none")
    finally:
        llm.close()
    assert whole.usage.output_tokens > 1
    assert whole.output_text == streamed.output_text
    assert whole.usage.total_tokens == streamed.usage.total_tokens
    assert streamed.usage.input_tokens_details.cached_tokens >= 0
