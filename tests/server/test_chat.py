"""POST /v1/chat/completions: golden streams of scripted texts, and the whole path with a tiny model."""

import asyncio
import json
import threading

import pytest

from nanovllm import AsyncLLM, RequestOutputKind
from nanovllm.server import chat_writer, generation, streaming
from tests.models.tiny import save_tiny_with_tokenizer
from tests.server.scripted import ScriptedLLM
from tests.server.serving import SECONDS, call, events_of, make_server, until, until_idle, with_client

PATH = "/v1/chat/completions"
OPTIONS = dict(served_model_name="tiny,alias", tool_parser="hermes", reasoning_parser="think")
USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "東京"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call>'
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% if thinks %}<think>\n{% endif %}{% endif %}"
)


def ask(llm, **body):
    """Return the answer of a new server with this engine. Some fields have defaults."""
    return call(llm, "POST", PATH, {"model": "tiny", "messages": USER, **body}, **OPTIONS)


def whole(llm, **body):
    """Return the answer in one piece."""
    response = ask(llm, **body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(llm, **body):
    """Return the chunks of the answer."""
    response = ask(llm, stream=True, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def joined(chunks):
    """Return the choices that the chunks of a stream make, in the form of a whole answer."""
    choices = {}
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice["delta"]
            if index not in choices:
                assert delta == {"role": "assistant", "content": ""}
                choices[index] = {"index": index, "message": {"content": ""}, "logprobs": None, "finish_reason": None}
            made = choices[index]
            assert made["finish_reason"] is None  # nothing follows the end
            _add(made["message"], delta)
            if choice["logprobs"] is not None:
                made["logprobs"] = made["logprobs"] or {"content": [], "refusal": None}
                made["logprobs"]["content"] += choice["logprobs"]["content"]
            made["finish_reason"] = choice["finish_reason"]
            made["stop_reason"] = choice.get("stop_reason")
    return [choices[index] for index in sorted(choices)]


def _add(message, delta):
    for name, value in delta.items():
        if name == "role":
            message["role"] = value
        elif name == "tool_calls":
            (part,) = value
            calls = message.setdefault("tool_calls", [])
            if part["index"] == len(calls):  # a new call starts with its id and its name
                assert set(part) == {"index", "id", "type", "function"}
                assert part["function"]["arguments"] == ""
                calls.append({"id": part["id"], "type": part["type"], "function": dict(part["function"])})
            else:
                assert part["index"] == len(calls) - 1
                assert set(part["function"]) == {"arguments"}
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        else:
            message[name] = message.get(name, "") + value


def same(choices):
    """Return choices without what differs between two answers: ids, and how empty fields are written."""
    choices = json.loads(json.dumps(choices))
    for choice in choices:
        message = choice["message"]
        message.pop("refusal", None)
        message["content"] = message["content"] or ""
        for made in message.get("tool_calls", ()):
            assert made.pop("id").startswith("call_")
        for token in (choice["logprobs"] or {}).get("content", ()):
            for entry in (token, *token["top_logprobs"]):  # the first answer's prompt was not cached
                entry["logprob"] = pytest.approx(entry["logprob"], abs=1e-3)
    return choices


# -- golden streams ---------------------------------------------------------------------------------------------------

TEXTS = {
    "emoji": "Hello 👋🏽 👨‍👩‍👧 end",
    "cjk": "你好，世界。こんにちは",
    "thinking": "<think>\nLet me see: 2 < 3.\n</think>\n\nYes.",
    "unfinished thinking": "<think>\nLet me see",
    "half a tag": "a <tool_c and </thin and <",
    "call": CALL,
    "text and calls": f"I will look.\n{CALL}\n{CALL}",
    "all": f"<think>\n🤔\n</think>\n\nI will look.\n{CALL}",
    "malformed call": '<tool_call>\n{"name": "weather", "arg',
    "lines": "\n\na\n\nb\n",
}


@pytest.mark.parametrize("piece_size", [1, 3, 1000])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_joined_chunks_equal_the_whole_answer(text, piece_size):
    body = dict(tools=[WEATHER], max_tokens=100)
    expected = whole(ScriptedLLM(text), **body)["choices"]
    assert same(joined(chunks(ScriptedLLM(text, piece_size=piece_size), **body))) == same(expected)


def test_thinking_and_calls_of_a_whole_answer_have_their_own_fields():
    (choice,) = whole(ScriptedLLM(TEXTS["all"]), tools=[WEATHER])["choices"]
    message = choice["message"]
    assert message["role"] == "assistant"
    assert message["reasoning_content"] == message["reasoning"] == "🤔"
    assert message["content"] == "I will look."
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "東京"}
    assert choice["finish_reason"] == "tool_calls"


def test_thinking_that_the_prompt_opens_is_no_content():
    llm = ScriptedLLM("Hm.\n</think>\n\nYes.", prompt="<|im_start|>assistant\n<think>\n")
    (choice,) = whole(llm)["choices"]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("Hm.", "Yes.")


def test_each_of_several_samples_streams_its_own_choice():
    texts = ("one", "zwei 😀", CALL)
    body = dict(n=3, tools=[WEATHER])
    choices = joined(chunks(ScriptedLLM(*texts, piece_size=2), **body))
    assert same(choices) == same(whole(ScriptedLLM(*texts), **body)["choices"])
    assert [choice["message"]["content"] for choice in choices] == ["one", "zwei 😀", ""]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "stop", "tool_calls"]


def test_a_call_streams_its_id_and_name_before_pieces_of_its_arguments():
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(ScriptedLLM(CALL), tools=[WEATHER])]
    parts = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert parts[0]["function"] == {"name": "weather", "arguments": ""}
    assert parts[0]["id"].startswith("call_")
    assert len(parts) > 2
    assert all(set(part) == {"index", "function"} for part in parts[1:])
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {"city": "東京"}


def test_the_usage_chunk_is_last_and_has_no_choices():
    *others, last = chunks(ScriptedLLM("abc", prompt="12345"), stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 5
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["total_tokens"] == 8
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in others)
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks(ScriptedLLM("abc")))


def test_each_chunk_has_the_usage_so_far_if_asked():
    options = {"include_usage": True, "continuous_usage_stats": True}
    *others, last = chunks(ScriptedLLM("abc", prompt="12345"), stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in others]
    assert counts == sorted(counts) and (counts[0], counts[-1]) == (1, 3)
    assert last["usage"]["completion_tokens"] == 3 and others[0]["usage"]["prompt_tokens"] == 5
    without = chunks(ScriptedLLM("abc"), stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in without)


def test_all_chunks_share_an_id_and_the_last_one_has_the_finish_reason():
    made = chunks(ScriptedLLM("abc", finish_reason="length"), model="alias")
    assert len({chunk["id"] for chunk in made}) == 1
    assert {chunk["model"] for chunk in made} == {"tiny"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in made] == [None] * (len(made) - 1) + ["length"]
    assert made[-1]["choices"][0]["delta"] == {}


def test_a_call_that_is_cut_off_finishes_with_length():
    llm = ScriptedLLM(CALL[:-30], finish_reason="length")
    assert whole(llm, tools=[WEATHER])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "stop_reason", "finish_reason"),
    [
        (CALL, None, "tool_calls"),
        (CALL, 128008, "tool_calls"),
        (CALL, "</done>", "stop"),
        (CALL[:-20], '"n"', "stop"),
        (CALL[:-20], None, "stop"),
        (CALL.replace('"東京"', "東京"), None, "stop"),
        (CALL + CALL[:-20], None, "stop"),
        ("no call", None, "stop"),
    ],
)
def test_only_complete_calls_at_an_end_of_the_models_own_finish_with_tool_calls(
    text, stop_reason, finish_reason, stream
):
    llm = ScriptedLLM(text, stop_reason=stop_reason)
    body = dict(tools=[WEATHER], max_tokens=100)
    (choice,) = joined(chunks(llm, **body)) if stream else whole(llm, **body)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == (finish_reason, stop_reason)


# -- tools ------------------------------------------------------------------------------------------------------------


def test_without_parallel_calls_a_grammar_allows_one_call():
    llm = ScriptedLLM(CALL)
    whole(llm, tools=[WEATHER])
    assert llm.params.structured_outputs is None
    (choice,) = whole(llm, tools=[WEATHER], parallel_tool_calls=False)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert llm.params.structured_outputs.grammar


def test_with_tool_choice_none_the_model_sees_no_tools_and_calls_are_text():
    llm = ScriptedLLM(CALL)
    (choice,) = whole(llm, tools=[WEATHER], tool_choice="none")["choices"]
    assert "tools" not in llm.template
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


def test_the_template_gets_the_tools_in_the_order_that_models_know_without_strict():
    llm = ScriptedLLM("a")
    strict = {"function": {"strict": True, **WEATHER["function"]}, "type": "function"}
    null = {"type": "object", "properties": {"a": {"const": None}}}
    other = {"type": "function", "function": {"name": "now", "description": None, "parameters": null}}
    whole(llm, tools=[strict, other])
    shown = [WEATHER, {"type": "function", "function": {"name": "now", "parameters": null}}]
    assert json.dumps(llm.template["tools"]) == json.dumps(shown)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (dict(tool_choice="required"), ["tool_choice"]),
        (dict(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "news"}}), ["news"]),
        (dict(tools=[WEATHER], tool_choice="maybe"), ["tool_choice"]),
        (dict(tools=[{"type": "web_search"}]), ["type"]),
        (dict(tools=[WEATHER, WEATHER]), ["tools must have different names, got two of the name 'weather'"]),
        (dict(tools=[WEATHER], structured_outputs={"regex": "a"}), ["tools", "JSON"]),
        (dict(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}), ["response_format"]),
        (dict(response_format={"type": "json_schema"}), ["json_schema"]),
        (dict(top_logprobs=3), ["top_logprobs", "logprobs"]),
        (dict(top_logprobs=129, logprobs=True), ["logprobs", "128"]),
        (dict(chat_template="{{ messages }}"), ["chat_template"]),
        (dict(chat_template_kwargs={"tools": [WEATHER]}), ["tools"]),
        (dict(messages=[]), ["messages"]),
        (dict(messages=[{"role": "robot", "content": "a"}]), ["role", "robot"]),
        (dict(messages=[{"content": "a"}]), ["role"]),
        (dict(functions=[{}]), ["functions"]),
        (dict(modalities=["audio"]), ["modalities"]),
        (dict(n=0), ["n"]),
        (dict(n=65), ["n", "64"]),
        (dict(max_tokens=0), ["max_tokens"]),
        (dict(temprature=1), ["temprature"]),
    ],
    ids=str,
)
def test_a_wrong_field_gets_400_that_names_it(body, words):
    for stream in (False, True):
        response = ask(ScriptedLLM("a"), stream=stream, **body)
        assert response.status_code == 400, response.text
        assert all(word in response.text for word in words), response.text


def test_an_unknown_model_gets_404():
    assert ask(ScriptedLLM("a"), model="other").status_code == 404


def test_tools_without_a_known_format_of_calls_get_400_that_names_the_option():
    response = call(ScriptedLLM("a"), "POST", PATH, {"messages": USER, "tools": [WEATHER]})
    assert response.status_code == 400
    assert "--tool-parser" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "tools"


# -- messages and sampling --------------------------------------------------------------------------------------------


def test_messages_that_clients_send_back_reach_the_template_without_empty_fields():
    llm = ScriptedLLM("a")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    history = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "reasoning": "Hm."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
    ]
    whole(llm, messages=history)
    assert llm.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm."},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
    ]


def test_fields_reach_the_engine():
    llm = ScriptedLLM("a")
    options = {"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}}
    whole(llm, max_tokens=5, max_completion_tokens=7, logprobs=True, top_logprobs=2, seed=3, **options)
    assert (llm.params.max_tokens, llm.params.logprobs, llm.params.seed) == (7, 2, 3)
    assert llm.template == options
    assert llm.params.output_kind is RequestOutputKind.DELTA  # log-probabilities come little by little
    whole(llm)
    assert llm.params.output_kind is RequestOutputKind.FINAL_ONLY
    chunks(llm, max_tokens=5)
    assert (llm.params.max_tokens, llm.params.logprobs) == (5, None)
    assert llm.params.output_kind is RequestOutputKind.DELTA
    chunks(llm)
    assert llm.params.max_tokens is None  # up to the model's length


def test_an_answer_in_json_follows_the_models_thinking():
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "object"}}}
    llm = ScriptedLLM('Hm.\n</think>\n\n{"a": 1}', prompt="<assistant><think>\n")
    (choice,) = whole(llm, response_format=form)["choices"]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("Hm.", '{"a": 1}')
    assert "</think>" in llm.params.structured_outputs.grammar


def test_an_answer_in_another_form_starts_behind_thinking_that_the_prompt_opens():
    for prompt, ending in (("<assistant><think>\n", "<think>\n\n</think>\n\n"), ("<assistant>", "<assistant>")):
        llm = ScriptedLLM("aa", prompt=prompt)
        (choice,) = whole(llm, structured_outputs={"regex": "a+"})["choices"]
        assert choice["message"]["content"] == "aa"
        assert "reasoning" not in choice["message"]
        assert "".join(map(chr, llm.prompt_ids)).endswith(ending)
        assert llm.params.structured_outputs.regex == "a+"


def test_a_model_with_tools_may_answer_in_json():
    for text, finish_reason in (('{"a": 1}', "stop"), (CALL, "tool_calls")):
        llm = ScriptedLLM(text)
        (choice,) = whole(llm, tools=[WEATHER], response_format={"type": "json_object"})["choices"]
        assert choice["finish_reason"] == finish_reason
        assert choice["message"]["content"] == (None if finish_reason == "tool_calls" else text)
        assert llm.params.structured_outputs.grammar


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_aborted_ends_with_an_error_event():
    response = ask(ScriptedLLM("abc", finish_reason="abort", stop_reason="too costly"), stream=True)
    last = [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n") if "{" in event][-1]
    assert "too costly" in last["error"]["message"]
    assert "[DONE]" not in response.text
    response = ask(ScriptedLLM("abc", finish_reason="abort"))
    assert response.status_code == 503


def test_requests_beyond_the_limit_get_429_and_places_return():
    async def use(client, state):
        body = {"messages": USER, "n": 2}
        with state.admission.enter(2):
            assert (await client.post(PATH, json=body)).status_code == 429
        assert (await client.post(PATH, json=body)).status_code == 200
        assert state.admission.num_samples == 0

    with_client(ScriptedLLM("ab", "cd"), use, max_concurrent_requests=3)


# -- the whole path with a tiny model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = save_tiny_with_tokenizer(tmp_path_factory.mktemp("model"), "qwen3", TEMPLATE)
    llm = AsyncLLM(model, device="cpu", kvcache_block_size=16, max_model_len=512, max_num_seqs=8)
    yield llm
    llm.close()


GREETING = "日本語 👋🏽 fin"
FORCED = {"choice": [GREETING]}


@pytest.mark.parametrize("stop", [None, ["👋"], [" fin"], ["語 👋🏽 f"]], ids=str)
def test_a_models_stream_equals_its_whole_answer(llm, stop):
    body = dict(structured_outputs=FORCED, stop=stop, n=2, logprobs=True, top_logprobs=2, temperature=0)
    answer = whole(llm, **body)
    assert same(joined(chunks(llm, **body))) == same(answer["choices"])
    end = GREETING.index(stop[0]) if stop else len(GREETING)
    for choice in answer["choices"]:
        assert choice["message"]["content"] == GREETING[:end]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop and stop[0])


def test_long_pieces_of_log_probabilities_are_written_in_a_thread(llm, monkeypatch):
    body = dict(structured_outputs=FORCED, n=2, logprobs=True, top_logprobs=2, temperature=0)
    want = same(joined(chunks(llm, **body)))
    monkeypatch.setattr(chat_writer, "LONG_LOGPROBS", 2)  # one token's
    threads, make = set(), chat_writer.Form.logprobs

    def recording(*args):
        threads.add(threading.current_thread())
        return make(*args)

    monkeypatch.setattr(chat_writer.Form, "logprobs", recording)
    assert same(joined(chunks(llm, **body))) == want
    assert threads and threading.main_thread() not in threads


def test_log_probabilities_of_text_that_is_held_back_do_not_pile_up(llm, monkeypatch):
    text = "\n" * 30 + "x"
    body = dict(structured_outputs={"choice": [text]}, logprobs=True, top_logprobs=2, temperature=0)
    answer = whole(llm, **body)
    monkeypatch.setattr(chat_writer, "LONG_LOGPROBS", 9)
    write, num_new = chat_writer.ChunkWriter.chunks, []

    def recording(writer, sample):
        num_new.append(len(sample.token_ids))
        return write(writer, sample)

    monkeypatch.setattr(chat_writer.ChunkWriter, "chunks", recording)
    made = chunks(llm, **body)
    assert same(joined(made)) == same(answer["choices"])
    sizes = [len(chunk["choices"][0]["logprobs"]["content"]) for chunk in made if chunk["choices"][0]["logprobs"]]
    assert sum(sizes) == answer["usage"]["completion_tokens"] and max(sizes) <= 3 + max(num_new)


def test_long_texts_are_parsed_in_a_thread(monkeypatch):
    threads, parse = [], generation._Sample.piece

    def recording(*args):
        threads.append(threading.current_thread() is threading.main_thread())
        return parse(*args)

    monkeypatch.setattr(generation._Sample, "piece", recording)
    half = "a" * (generation._LONG_TEXT // 2)
    for texts, in_main in (([half, half], [True, True]), ([half, half, "a"], [False] * 3)):
        threads.clear()
        answer = whole(ScriptedLLM(*texts), n=len(texts))
        assert [choice["message"]["content"] for choice in answer["choices"]] == texts
        assert threads == in_main


def test_grammars_of_tools_are_made_in_a_thread(monkeypatch):
    threads, constrain = [], generation._constrained

    def recording(*args):
        threads.append(threading.current_thread() is threading.main_thread())
        return constrain(*args)

    monkeypatch.setattr(generation, "_constrained", recording)
    whole(ScriptedLLM("ok"), tools=[WEATHER], tool_choice="required")
    whole(ScriptedLLM("ok"), tools=[WEATHER])
    whole(ScriptedLLM("ok"))
    assert threads == [False, True, True]


def test_log_probabilities_that_fill_the_memory_are_refused(llm, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_RESPONSE_LOGPROBS", 30)
    body = dict(logprobs=True, ignore_eos=True, max_tokens=10)
    assert len(whole(llm, top_logprobs=2, **body)["choices"][0]["logprobs"]["content"]) == 10
    assert "more than 30 log-probabilities" in ask(llm, top_logprobs=3, **body).text
    # In a stream, only what is sent together counts.
    assert len(chunks(llm, top_logprobs=3, **body)) > 1
    assert "more than 30 log-probabilities" in ask(llm, top_logprobs=40, stream=True, **body).text


def test_logprobs_have_the_bytes_of_each_token_and_the_most_likely_ones(llm):
    answer = whole(llm, structured_outputs=FORCED, logprobs=True, top_logprobs=3)
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == GREETING
    assert len(tokens) == answer["usage"]["completion_tokens"]
    assert tokens[0]["token"] == "\ufffd"  # a part of a character
    for token in tokens:
        assert token["logprob"] < 0
        best = [top["logprob"] for top in token["top_logprobs"]]
        assert len(best) == 3 and best == sorted(best, reverse=True)
    assert whole(llm, max_tokens=3)["choices"][0]["logprobs"] is None
    (choice,) = whole(llm, max_tokens=3, logprobs=True, ignore_eos=True)["choices"]
    assert [token["top_logprobs"] for token in choice["logprobs"]["content"]] == [[], [], []]


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_required_call_is_valid_whatever_the_model_is(llm, tool_choice):
    body = dict(tools=[WEATHER], tool_choice=tool_choice, parallel_tool_calls=False, temperature=0)
    (choice,) = whole(llm, **body)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "東京")
    assert choice["finish_reason"] == "tool_calls"
    assert same(joined(chunks(llm, **body))) == same([choice])


def test_a_required_call_follows_thinking_that_the_prompt_opens(llm):
    body = dict(
        tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, chat_template_kwargs={"thinks": True}
    )
    (choice,) = whole(llm, **body, max_tokens=400)["choices"]
    assert choice["message"].get("tool_calls") or choice["finish_reason"] == "length"


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["without tools", "with tools"])
def test_a_json_schema_holds_and_the_answer_is_content(llm, tools):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    body = dict(
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        tools=tools,
        max_tokens=100,
        logit_bias={str(llm.tokenizer.encode("<")[0]): -100},  # keeps the model from thinking or calling
    )
    schema["additionalProperties"] = False
    (choice,) = whole(llm, **body)["choices"]
    assert json.loads(choice["message"]["content"])["ok"] in (True, False)


def test_a_continued_message_keeps_its_text_in_the_prompt(llm):
    messages = [*USER, {"role": "assistant", "content": "The answer"}]
    prompts = []
    for body in (dict(continue_final_message=True), dict()):
        answer = whole(llm, messages=messages, max_tokens=1, ignore_eos=True, **body)
        prompts.append(answer["usage"]["prompt_tokens"])
    assert prompts[0] == len("<user>hi<assistant>The answer")
    assert prompts[1] == prompts[0] + len("<assistant>")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (dict(messages=[{"role": "user", "content": "a" * 600}]), "max_model_len=512"),
        (dict(messages=[{"role": "user", "content": None}]), "content"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "image_url"),
        (dict(chat_template_kwargs={"color": 1}), "color"),
        (dict(reasoning_effort="high"), "reasoning_effort"),
        (dict(stop_token_ids=[1000]), "stop_token_ids"),
        (dict(structured_outputs={"regex": "("}), "structured_outputs"),
        (dict(continue_final_message=True, add_generation_prompt=True), "continue_final_message"),
    ],
    ids=str,
)
def test_a_fault_before_the_first_token_is_400_and_no_broken_stream(llm, body, words):
    for stream in (False, True):
        response = ask(llm, stream=stream, **body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert words in error["message"]
        assert error["code"] == ("context_length_exceeded" if words == "max_model_len=512" else None)


SCHEMA = {"type": "object", "properties": {"city": {"type": "strng"}}}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


@pytest.mark.parametrize("reasoning_parser", ["think", "none"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        (
            dict(tools=[{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}], tool_choice="required"),
            "tools",
        ),
        (dict(response_format=FORM), "response_format"),
        (dict(response_format=FORM, tools=[WEATHER]), "response_format"),
        (dict(response_format=FORM, tools=[WEATHER], tool_choice="none"), "response_format"),
    ],
    ids=["tools", "form", "form and tools", "form without its tools"],
)
def test_a_wrong_schema_is_refused_with_the_field_that_has_it_and_without_the_grammar(
    llm, body, field, reasoning_parser
):
    options = {**OPTIONS, "reasoning_parser": reasoning_parser}
    answer = call(llm, "POST", PATH, {"messages": USER, **body}, **options).json()["error"]
    assert answer["message"].startswith(f"{field} has a schema that cannot be followed: ")
    assert answer["message"].endswith("Invalid type: strng")
    assert answer["param"] == field


def test_a_wrong_schema_of_other_apis_is_refused_with_their_field(llm):
    body = {"input": "hi", "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}}
    answer = call(llm, "POST", "/v1/responses", body, **OPTIONS)
    assert answer.json()["error"]["message"].startswith("text has a schema that cannot be followed")
    body = {"model": "tiny", "max_tokens": 9, "messages": USER}
    body["output_config"] = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = call(llm, "POST", "/v1/messages", body, **OPTIONS)
    assert answer.json()["error"]["message"].startswith("output_config has a schema that cannot be followed")


MALFORMED = '{"city": "C:\\dir", }'


@pytest.mark.parametrize("arguments", [MALFORMED, '{"city": "Par', "[1]", ""])
def test_a_malformed_call_can_be_sent_back_with_an_error_as_its_result(llm, arguments):
    function = {"name": "weather", "arguments": arguments}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": "Error: the arguments are not JSON"},
    ]
    whole(llm, messages=messages, tools=[WEATHER], max_tokens=2)
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "1", "status": "incomplete", **function},
        {"type": "function_call_output", "call_id": "1", "output": "Error: the arguments are not JSON"},
    ]
    body = {"input": items, "max_output_tokens": 2}
    assert call(llm, "POST", "/v1/responses", body, **OPTIONS).status_code == 200
    tokens = call(llm, "POST", "/tokenize", {"messages": messages}, **OPTIONS).json()["tokens"]
    assert json.dumps(arguments or {}) in llm.tokenizer.decode(tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(llm, stream):
    async def run():
        state, app = make_server(llm)
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }
        body = {"messages": USER, "stream": stream, "ignore_eos": True, "temperature": 0}
        gone, has_sent, reads = asyncio.Event(), asyncio.Event(), asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            has_sent.set()
            await reads.wait()

        answering = asyncio.create_task(app(scope, receive, send))
        await until(lambda: state.admission.num_samples or has_sent.is_set())
        if stream:
            await has_sent.wait()
        gone.set()
        await answering
        assert state.admission.num_samples == 0
        await until_idle(llm, state)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_short_responses_do_not_wait_for_the_long_work_of_others():
    async def use(client, state):
        release = threading.Event()
        long = asyncio.create_task(streaming.in_thread(release.wait))
        try:
            for more in ({}, {"stream": True}, {"tools": [WEATHER]}):
                answer = await client.post(PATH, json={"model": "tiny", "messages": USER, **more})
                assert answer.status_code == 200, answer.text
            assert not long.done()
        finally:
            release.set()
            await long

    with_client(ScriptedLLM("ok"), use, **OPTIONS)
