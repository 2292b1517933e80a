"""POST /v1/messages, called by Anthropic's own client."""

import json

import pytest

pytest.importorskip("fastapi")
anthropic = pytest.importorskip("anthropic")

from nanovllm import AsyncLLM, StructuredOutputsParams  # noqa: E402
from nanovllm.server.events import CallArguments, CallEnd, CallStart  # noqa: E402
from nanovllm.server.generation import Piece, SamplePiece  # noqa: E402
from nanovllm.server.messages import MessagesRequest, chat_messages  # noqa: E402
from nanovllm.server.messages_writer import MessageWriter  # noqa: E402
from tests.models.tiny import save_tiny_with_tokenizer  # noqa: E402
from tests.server import real_clients  # noqa: E402
from tests.server.real_clients import MODEL  # noqa: E402
from tests.server.scripted import ScriptedLLM  # noqa: E402

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "name": "weather",
    "description": "Say what the weather is like",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
LARGEST = 1.7976931348623157e308
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🌦"}}\n</tool_call>'


def ask(llm, act, **options):
    """Do what `act` does with a client of a server with this engine; see `real_clients.ask`."""
    return real_clients.ask(anthropic, anthropic.AsyncAnthropic, "http://localhost", act, llm, **options)


def create(llm, **request):
    """Return the message that answers a request."""
    request = {"model": MODEL, "max_tokens": 1000, "messages": HELLO, **request}
    return ask(llm, lambda client: client.messages.create(**request))


def stream(llm, **request):
    """Return the events that answer a request, and the message that the client makes of them."""
    request = {"model": MODEL, "max_tokens": 1000, "messages": HELLO, **request}

    async def act(client):
        raw = await client.messages.create(**request, stream=True)
        events = [event async for event in raw]
        async with client.messages.stream(**request) as messages:
            return events, await messages.get_final_message()

    return ask(llm, act)


def translated(messages, **fields):
    return chat_messages(MessagesRequest(model=MODEL, max_tokens=1, messages=messages, **fields))


def test_text_is_one_block_with_its_usage():
    llm = ScriptedLLM("Grüezi 👋")
    message = create(llm)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Grüezi 👋"}]
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == (
        "assistant",
        MODEL,
        "end_turn",
        None,
    )
    assert message.id.startswith("msg_")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (len(llm.prompt), 8)
    assert llm.messages == [{"role": "user", "content": "Hello"}]


def test_streamed_thinking_text_and_calls_are_blocks_that_follow_each_other():
    llm = ScriptedLLM(f"<think>\nhm, 雨?\n</think>\n\nI look.\n{CALL}\n{CALL}")
    events, message = stream(llm, tools=[WEATHER], thinking={"type": "enabled", "budget_tokens": 1024})
    whole = create(llm, tools=[WEATHER], thinking={"type": "enabled", "budget_tokens": 1024})
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    blocks = [
        (event.type, event.index) for event in events if event.type in ("content_block_start", "content_block_stop")
    ]
    assert blocks == [(kind, i) for i in range(4) for kind in ("content_block_start", "content_block_stop")]
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[0].thinking.strip() == "hm, 雨?" and message.content[0].signature
    assert message.content[1].text.strip() == "I look."
    assert message.content[2].input == {"city": "Zürich 🌦"} and message.content[2].name == "weather"
    assert message.content[2].id != message.content[3].id
    assert message.stop_reason == "tool_use"
    assert (events[0].message.usage.input_tokens, message.usage.output_tokens) == (len(llm.prompt), len(llm.texts[0]))

    def without_ids(content):
        return [{**block.to_dict(), "id": None} for block in content]

    assert without_ids(whole.content) == without_ids(message.content)
    assert (whole.stop_reason, whole.usage.output_tokens) == (message.stop_reason, message.usage.output_tokens)


def test_server_sent_events_carry_their_names():
    async def act(client):
        body = {"model": MODEL, "max_tokens": 9, "messages": HELLO, "stream": True}
        response = await client._client.post("http://localhost/v1/messages", json=body)
        return response

    response = ask(ScriptedLLM("ab", piece_size=2), act)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    types = [json.loads(line.removeprefix("data: "))["type"] for line in lines if line.startswith("data: ")]
    assert names == types
    assert types == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_a_tool_call_makes_a_round_trip():
    first = create(ScriptedLLM(f"I look.\n{CALL}"), tools=[WEATHER])
    call = first.content[-1]
    llm = ScriptedLLM("It rains.")
    turns = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    assert create(llm, messages=turns, tools=[WEATHER]).content[0].text == "It rains."
    _, assistant, tool, user = llm.messages
    function = {"name": "weather", "arguments": {"city": "Zürich 🌦"}}
    assert assistant["tool_calls"] == [{"id": call.id, "type": "function", "function": function}]
    assert assistant["content"].strip() == "I look."
    assert tool == {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    assert user == {"role": "user", "content": "So?"}
    weather = {key: WEATHER[key] for key in ("name", "description")} | {"parameters": WEATHER["input_schema"]}
    assert llm.template["tools"] == [{"type": "function", "function": weather}]


def test_tools_without_a_schema_are_skipped():
    llm = ScriptedLLM("ok")
    create(llm, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    assert "tools" not in llm.template


def test_tool_choice_none_shows_the_model_no_tools():
    llm = ScriptedLLM("ok")
    create(llm, tools=[WEATHER], tool_choice={"type": "none"})
    assert "tools" not in llm.template


@pytest.mark.parametrize(
    ("choice", "tools"),
    [({"type": "any"}, []), ({"type": "tool", "name": "clock"}, [WEATHER]), ({"type": "tool"}, [WEATHER])],
)
def test_a_tool_choice_that_no_tool_fulfils_is_refused(choice, tools):
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        create(ScriptedLLM("ok"), tool_choice=choice, tools=tools)


@pytest.mark.parametrize(("choice", "is_required"), [("auto", False), ("any", True)])
def test_tool_use_is_constrained_to_one_call_or_to_some(choice, is_required):
    llm = ScriptedLLM(CALL)
    create(llm, tools=[WEATHER], tool_choice={"type": choice})
    many = llm.params.structured_outputs
    create(llm, tools=[WEATHER], tool_choice={"type": choice, "disable_parallel_tool_use": True})
    one = llm.params.structured_outputs
    assert (many is not None) == is_required
    assert one is not None and one != many


CUT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Z'
MALFORMED = '<tool_call>\n{"name": "weather", "arguments": {"city": "C:\\dir", }}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "stop", "content", "reason"),
    [
        (MALFORMED, {}, [MALFORMED], "end_turn"),
        (f"I look.\n\n{MALFORMED}\nDone", {}, [f"I look.\n\n{MALFORMED}\nDone"], "end_turn"),
        (CUT, {}, [CUT], "end_turn"),
        (CUT, {"stop_reason": "ürich"}, [CUT], "stop_sequence"),
        (CALL, {"stop_reason": "</done>"}, [{"city": "Zürich 🌦"}], "stop_sequence"),
        (f"{CALL}\n{CUT}", {}, [{"city": "Zürich 🌦"}, CUT], "end_turn"),
        (f"{MALFORMED}\n{CALL}", {}, [f"{MALFORMED}\n", {"city": "Zürich 🌦"}], "end_turn"),
        (CUT, {"finish_reason": "length"}, [{"city": "Z"}], "max_tokens"),
        (f"{MALFORMED} Done", {"finish_reason": "length"}, [f"{MALFORMED} Done"], "max_tokens"),
        (MALFORMED[:-20], {"finish_reason": "length"}, [MALFORMED[:-20]], "max_tokens"),
    ],
)
def test_a_call_is_whole_or_text_and_never_has_other_arguments(text, stop, content, reason):
    limit = {"max_tokens": len(text), "tools": [WEATHER]}
    whole = create(ScriptedLLM(text, **stop), **limit)
    _, streamed = stream(ScriptedLLM(text, **stop), **limit)
    assert [block.text if block.type == "text" else block.input for block in whole.content] == content
    assert [block.type for block in streamed.content] == [block.type for block in whole.content]
    assert [block.text for block in streamed.content if block.type == "text"] == [
        text for text in content if isinstance(text, str)
    ]
    assert whole.stop_reason == streamed.stop_reason == reason


def test_a_stream_holds_a_call_back_and_pings_meanwhile():
    async def act(client):
        body = {"model": MODEL, "max_tokens": 999, "messages": HELLO, "tools": [WEATHER], "stream": True}
        return await client._client.post("http://localhost/v1/messages", json=body)

    lines = ask(ScriptedLLM(CALL), act).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    start = names.index("content_block_start")
    assert set(names[1:start]) == {"ping"} and start > 40
    assert names[start:] == [
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"city": "Z\\u00fcr', {"city": "Zür"}),
        ('{"city": "Z\\u00', {"city": "Z"}),
        ('{"city": "Ulm", "days": 2', {"city": "Ulm", "days": 2}),
        ('{"days": [1e999, -1e999]}', {"days": [LARGEST, -LARGEST]}),
        ('{"days": [1e999, -1e999', {"days": [LARGEST, -LARGEST]}),
        ("{", {}),
        ("", None),
        ('{"days": NaN, "city": "U', None),
        ("[" * 5000, None),
    ],
)
def test_a_call_that_a_token_limit_cuts_off_has_its_arguments_so_far(arguments, value):
    events = [CallStart(0, "weather"), CallArguments(0, arguments), CallEnd(0, False, "written")]
    writer = MessageWriter("msg_1", MODEL, 9)
    writer.add(Piece(1, 0, [SamplePiece(0, events, [5], None, "length", None)]))
    (block,) = writer.body()["content"]
    assert block.get("input") == value and (value is not None or block["text"] == "written")


def test_a_call_whose_text_has_half_a_character_keeps_it():
    text = CALL.replace("Zürich 🌦", "\\ud83d")
    (block,) = create(ScriptedLLM(text), tools=[WEATHER]).content
    assert block.input == {"city": "\ud83d"}


def test_stop_sequences_are_named():
    llm = ScriptedLLM("one, two", stop_reason="three")
    message = create(llm, stop_sequences=["three", "four"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "three")
    assert list(llm.params.stop) == ["three", "four"]
    _, message = stream(llm, stop_sequences=["three"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "three")


@pytest.mark.parametrize(("max_tokens", "reason"), [(8, "max_tokens"), (9, "model_context_window_exceeded")])
def test_the_end_says_whether_the_request_or_the_model_is_full(max_tokens, reason):
    llm = ScriptedLLM("one, two", finish_reason="length")
    assert create(llm, max_tokens=max_tokens).stop_reason == reason


def test_sampling_fields_reach_the_engine():
    llm = ScriptedLLM("ok")
    create(llm, max_tokens=11, extra_body={"temperature": 0.25, "top_p": 0.5, "top_k": 7})
    params = llm.params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.25, 0.5, 7, 11)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("thread", {"type": "create"}),
        ("container", "container_1"),
        ("compaction", {"type": "summarize"}),
        ("mcp_servers", [{"type": "url", "url": "http://localhost", "name": "x"}]),
    ],
)
def test_what_the_server_would_have_to_keep_or_run_is_refused_by_name(name, value):
    with pytest.raises(anthropic.BadRequestError, match=name) as caught:
        create(ScriptedLLM("a"), extra_body={name: value})
    details = caught.value.body["error"].get("details")
    assert details == ({"error_code": "thread_unsupported_request"} if name == "thread" else None)


def test_the_tool_runner_of_the_client_sends_the_whole_conversation_again():
    """It asks for a thread first, in which the server would have to keep the messages."""
    llm = ScriptedLLM(CALL)

    @anthropic.beta_async_tool
    async def weather(city: str) -> str:
        """Return the weather."""
        llm.texts = ("It is sunny.",)
        return "sunny"

    async def act(client):
        runner = client.beta.messages.tool_runner(model=MODEL, max_tokens=99, messages=HELLO, tools=[weather])
        return await runner.until_done()

    message = ask(llm, act)
    assert message.content[0].text == "It is sunny."
    assert [each["role"] for each in llm.messages] == ["user", "assistant", "tool"]
    assert llm.template["tools"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("has_older_name", [False, True])
def test_output_config_constrains_the_answer(has_older_name):
    schema = {"type": "object"}
    form = {"type": "json_schema", "schema": schema}
    request = {"model": MODEL, "max_tokens": 9, "messages": HELLO}
    request["extra_body"] = {"output_format": form} if has_older_name else {"output_config": {"format": form}}
    llm = ScriptedLLM("{}")
    ask(llm, lambda client: client.messages.create(**request), reasoning_parser="none")
    assert llm.params.structured_outputs == StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    ("thinking", "kwargs"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, {"enable_thinking": True}),
        ({"type": "disabled"}, {"enable_thinking": False}),
        ({"type": "adaptive"}, None),
        (anthropic.omit, {"enable_thinking": False}),
    ],
)
def test_thinking_sets_the_switch_of_the_template(thinking, kwargs):
    llm = ScriptedLLM("ok")
    create(llm, thinking=thinking)
    assert llm.template.get("chat_template_kwargs") == kwargs


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(anthropic.BadRequestError, match="tools must have different names, got two of the name 'wea"):
        create(ScriptedLLM("ok"), tools=[WEATHER, WEATHER])


@pytest.mark.parametrize("name", ["", "the weather"])
def test_a_name_that_no_function_can_have_is_refused(name):
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.0\.name: String should match pattern"):
        create(ScriptedLLM("ok"), tools=[WEATHER | {"name": name}])


def test_an_unknown_kind_of_thinking_is_refused():
    with pytest.raises(anthropic.BadRequestError, match=r"thinking\.type: Input should be 'enabled', 'disabled' or"):
        create(ScriptedLLM("ok"), thinking={"type": "disable"})


def test_system_blocks_are_one_message_without_the_billing_header():
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.37; cch=fa690;"},
        {"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "You are kind."},
    ]
    messages = translated(HELLO, system=system)
    assert messages == [{"role": "system", "content": "You are brief.\n\nYou are kind."}, *HELLO]
    assert translated(HELLO, system="Be brief.")[0] == {"role": "system", "content": "Be brief."}


def test_later_system_messages_stay_at_their_place_as_reminders():
    messages = translated([*HELLO, {"role": "system", "content": "9 tokens left"}, {"role": "user", "content": "Go"}])
    reminder = "<system-reminder>\n9 tokens left\n</system-reminder>"
    assert messages == [{"role": "user", "content": f"Hello\n{reminder}\nGo"}]


def test_thinking_of_earlier_turns_is_kept_and_redacted_thinking_left_out():
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "?"},
        {"type": "text", "text": "Hi"},
    ]
    messages = translated([*HELLO, {"role": "assistant", "content": blocks}, *HELLO])
    assert messages[1] == {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}


def test_a_failed_tool_is_marked():
    failed = {"type": "tool_result", "tool_use_id": "1", "content": "no such city", "is_error": True}
    assert translated([{"role": "user", "content": [failed]}])[0]["content"] == "Error: no such city"
    assert translated([{"role": "user", "content": [failed | {"is_error": None}]}])[0]["content"] == "no such city"


def test_an_answer_continues_the_last_message_of_the_assistant():
    llm = ScriptedLLM(" five")
    create(llm, messages=[*HELLO, {"role": "assistant", "content": "Two and three are"}])
    assert llm.template["continue_final_message"] is True
    assert llm.messages[-1] == {"role": "assistant", "content": "Two and three are"}


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}},
        {"type": "tool_use", "id": "1", "name": "f", "input": {}},
        {"type": "text"},
    ],
)
def test_a_block_that_a_user_cannot_send_is_refused_in_the_form_of_the_api(block):
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(ScriptedLLM("ok"), messages=[{"role": "user", "content": [block]}])
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert "messages" in body["error"]["message"] or block["type"] in body["error"]["message"]


def test_an_unknown_model_is_not_found():
    with pytest.raises(anthropic.NotFoundError, match="claude"):
        create(ScriptedLLM("ok"), model="claude-sonnet-5")


def test_unknown_fields_are_ignored():
    message = create(ScriptedLLM("ok"), extra_body={"context_management": {"edits": []}, "new": 1}, metadata={})
    assert message.content[0].text == "ok"


def test_max_tokens_is_required():
    async def act(client):
        return await client._client.post("http://localhost/v1/messages", json={"model": MODEL, "messages": HELLO})

    response = ask(ScriptedLLM("ok"), act)
    assert response.status_code == 400 and "max_tokens" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "field",
    [{"max_tokens": "3"}, {"max_tokens": True}, {"temperature": "0.5"}, {"top_k": False}, {"stream": "yes"}],
    ids=str,
)
def test_values_of_wrong_types_are_refused(field):
    async def act(client):
        body = {"model": MODEL, "max_tokens": 3, "messages": HELLO, **field}
        return await client._client.post("http://localhost/v1/messages", json=body)

    response = ask(ScriptedLLM("ok"), act)
    assert response.status_code == 400 and next(iter(field)) in response.json()["error"]["message"]


def test_a_failure_in_mid_stream_is_an_error_event():
    class Failing(ScriptedLLM):
        async def generate(self, *args):
            outputs = super().generate(*args)
            yield await anext(outputs)
            await outputs.aclose()
            raise RuntimeError("the engine has failed")

    async def act(client):
        texts = []
        raw = await client.messages.create(model=MODEL, max_tokens=9, messages=HELLO, stream=True)
        with pytest.raises(anthropic.APIStatusError) as caught:
            async for event in raw:
                texts += [event.delta.text] if event.type == "content_block_delta" else []
        return texts, caught.value.body

    texts, body = ask(Failing("abc"), act)
    assert texts == ["a"]
    assert body["type"] == "error" and "the engine has failed" in body["error"]["message"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return save_tiny_with_tokenizer(tmp_path_factory.mktemp("models"), "qwen3", template)


def test_count_tokens_counts_the_prompt_that_the_engine_gets(model):
    turns = [
        *HELLO,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Ulm"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "rain"}]},
    ]
    request = {"model": MODEL, "messages": turns, "system": "Be brief.", "tools": [WEATHER]}

    async def act(client):
        counted = await client.messages.count_tokens(**request)
        message = await client.messages.create(**request, max_tokens=4)
        again = await client.messages.create(**request, max_tokens=4)
        return counted.input_tokens, message.usage, again.usage

    with_llm = AsyncLLM(model, max_model_len=512, dtype="float32")
    try:
        counted, first, second = ask(with_llm, act)
    finally:
        with_llm.close()
    assert counted > 100
    assert first.input_tokens == counted and first.output_tokens >= 1
    assert second.input_tokens + second.cache_read_input_tokens == counted and second.cache_read_input_tokens > 0
