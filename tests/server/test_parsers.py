"""Parsers find thinking and tool calls in text, however it is split into pieces."""

import json
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.server import schemas
from nanovllm.server.events import CallArguments, CallEnd, CallStart, Text, Thinking, joined
from nanovllm.server.parsers.output_parser import MAX_HELD_CHARS
from nanovllm.server.text_format import TextFormat
from tests.server.scripted import ScriptedLLM
from tests.server.serving import make_server

FORMATS = ["none", "hermes", "qwen3_coder", "llama3", "mistral"]
PROPERTIES = {
    "a": {"type": "string"},
    "n": {"type": "integer"},
    "x": {"type": "number"},
    "b": {"type": "boolean"},
    "o": {"type": "object"},
    "l": {"type": "array"},
    "s": {"type": ["string", "null"]},
    "u": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/word"}]},
    "e": {"enum": ["p", "q", 1]},
    "k": {"const": "5"},
    "z": {},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "$defs": {"word": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "get_time"}},
]


def parsed(text, tool_format="none", reasoning="none", prompt="", step=None, tools=TOOLS):
    """Return the joined events of a text that arrives in pieces of `step` characters, or whole."""
    (parser,) = TextFormat(tool_format, reasoning).parsers(prompt, tools)
    step = step or max(len(text), 1)
    events = [event for at in range(0, len(text), step) for event in parser.feed(text[at : at + step])]
    return joined(events + parser.finish())


def calls(events):
    """Return the name and the arguments' JSON of each call."""
    found = [[event.name, ""] for event in events if isinstance(event, CallStart)]
    for event in events:
        if isinstance(event, CallArguments):
            found[event.index][1] += event.text
    return [tuple(call) for call in found]


def texts(events, kind=Text):
    return [event.text for event in events if isinstance(event, kind)]


def completeness(events):
    """Return for each call whether it is complete."""
    return [event.is_complete for event in events if isinstance(event, CallEnd)]


def is_object(text):
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


# -- any text ---------------------------------------------------------------------------------------------------------

# fmt: off
FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "<function=g>", "<function=", "</function>",
    "<parameter=a>", "<parameter=n>", "<parameter=s>", "</parameter>", "<parameter", "[TOOL_CALLS]", "[ARGS]",
    "[CALL_ID]", "[TOOL_CALLS]f[ARGS]", "<|python_tag|>", '{"name":"f","arguments":{', '{"name": "f", "parameters": {',
    '{"name":"g","arguments":{', '"name":"f"', '"arguments":', '"arguments":"{}"', '{"arguments":', "{", "}", "[", "]",
    '"', "\\", ",", ":", ";", "<", "é", "你", "🙂", "null", "12", "{}", "}}", '"}', "f", "a", "\n", "\n\n", " ", "\\n",
    "x y",
]
# fmt: on
# Whole calls in each format, so that what follows a call is reached as well.
WHOLE = [
    '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>',
    "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>",
    '<tool_call>\n{"name": "f", "arguments": {"a": x}}\n</tool_call>',
    '{"name": "f", "parameters": {"a": "x"}}',
    '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x"}}]',
    '[TOOL_CALLS]f[ARGS]{"a": "x"}',
]
any_text = st.lists(st.sampled_from(FRAGMENTS) | st.sampled_from(WHOLE) | st.text(max_size=3), max_size=20).map("".join)


@pytest.mark.parametrize("tool_format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(any_text, st.lists(st.integers(1, 9), min_size=1, max_size=10), st.sampled_from(["", "<think>\n"]))
def test_any_split_of_a_text_gives_the_same_events(tool_format, text, sizes, prompt):
    (parser,) = TextFormat(tool_format, "think").parsers(prompt, TOOLS)
    events, at, i = [], 0, 0
    while at < len(text):
        size = sizes[i % len(sizes)]
        events += parser.feed(text[at : at + size])
        at, i = at + size, i + 1
    events += parser.finish()
    assert joined(events) == parsed(text, tool_format, "think", prompt)


@pytest.mark.parametrize("tool_format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(any_text)
def test_text_without_a_call_is_returned_whole_and_other_text_in_order(tool_format, text):
    events = parsed(text, tool_format)
    shown = "".join(texts(events))
    if not calls(events):
        assert shown == text
    rest = iter(text)
    assert all(character in rest for character in shown), "the shown text is not a part of the whole"


@pytest.mark.parametrize("tool_format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(any_text)
def test_texts_and_calls_as_they_were_written_are_the_whole_text(tool_format, text):
    events = parsed(text, tool_format)
    written = [
        event.written if isinstance(event, CallEnd) else event.text
        for event in events
        if isinstance(event, Text | CallEnd)
    ]
    assert "".join(written) == text
    assert [event.index for event in events if isinstance(event, CallEnd)] == list(range(len(calls(events))))
    for (_, arguments), is_complete in zip(calls(events), completeness(events), strict=True):
        assert is_complete == is_object(arguments)


@pytest.mark.parametrize("tool_format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(any_text, any_text)
def test_all_text_before_the_end_tag_of_thinking_is_thinking(tool_format, thinking, text):
    thinking = thinking.replace("</think>", "").strip("\n")
    events = parsed(f"{thinking}</think>{text}", tool_format, "think", "<think>\n", step=7)
    assert "".join(texts(events, Thinking)) == thinking
    assert [event for event in events if not isinstance(event, Thinking)] == parsed(text.lstrip("\n"), tool_format)


@settings(max_examples=200, deadline=None)
@given(any_text, st.booleans())
def test_thinking_and_answer_are_the_text_without_tags_and_their_line_breaks(text, in_thinking):
    events = parsed(text, "none", "think", "<think>" if in_thinking else "")
    before, tag, after = text.partition("</think>")
    starts = before.lstrip("\n").startswith("<think>") and len(before) - len(before.lstrip("\n")) <= 16
    if not in_thinking and not starts:
        before, tag, after = "", "", text
    elif not in_thinking:
        before = before.lstrip("\n").removeprefix("<think>")
    thinking = before.lstrip("\n")
    assert "".join(texts(events, Thinking)) == (thinking.rstrip("\n") if tag else thinking)
    assert "".join(texts(events)) == (after.lstrip("\n") if tag else after)


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("none", "\n" * 60_000),
        ("none", "<think>" * 9_000),
        ("hermes", "<tool_call>" * 6_000),
        ("hermes", '<tool_call>{"name"' * 4_000),
        ("hermes", '<tool_call>{"name": "f", "arguments": {' + "[" * 60_000),
        ("hermes", '<tool_call>{"arguments": ' + "[" * 80_000),
        ("qwen3_coder", "<function=f><parameter=a>" + "</parameter>\n" * 5_000),
        ("qwen3_coder", "<function=f><parameter=o>" + "[" * 60_000 + "</parameter></function>"),
        ("llama3", '{"name": "f", "parameters": {"a": "' + "\\\n" * 30_000),
        ("mistral", "[TOOL_CALLS]" * 5_000),
        ("mistral", "[TOOL_CALLS]" + " " * 60_000),
        ("mistral", '[TOOL_CALLS] [{"name": ' * 2_600),
        ("mistral", '[TOOL_CALLS] [{"name": "' * 2_600),
    ],
    ids=lambda value: f"{value[:24]!r}",
)
def test_a_hostile_text_takes_linear_time(tool_format, text):
    start = time.process_time()
    parsed(text, tool_format, "think", step=4)
    assert time.process_time() - start < 5, "these 15,000 pieces take 0.3 s"


def test_one_property_that_cannot_be_read_does_not_change_the_types_of_others():
    unknown = {f"x{i}": {"$ref": f"other.json#/x{i}"} for i in range(70)}
    schema = {"type": "object", "properties": {**unknown, "zip": {"type": "string"}}}
    written = "".join(f"<parameter={key}>\n12345\n</parameter>\n" for key in schema["properties"])
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    text = f"<tool_call>\n<function=f>\n{written}</function>\n</tool_call>"
    ((_, arguments),) = calls(parsed(text, "qwen3_coder", tools=tools))
    assert json.loads(arguments) == {**dict.fromkeys(unknown, 12345), "zip": "12345"}


@pytest.mark.parametrize(
    "parts",
    [
        [{"properties": {f"q{i}": True}} for i in range(2000)],
        [{"anyOf": [{"properties": {"q": True}}] * 64}, *[{"title": "q"}] * 60_000],
    ],
    ids=["many properties", "many alternatives"],
)
def test_a_large_schema_is_taken_apart_in_bounded_time(parts):
    schema = {"type": "object", "properties": {f"p{i}": True for i in range(2000)}, "allOf": parts}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    written = "".join(f"<parameter=p{i}>\n1\n</parameter>\n" for i in range(50))
    text = f"<tool_call>\n<function=f>\n{written}</function>\n</tool_call>"
    start = time.process_time()
    assert len(calls(parsed(text * 4, "qwen3_coder", tools=tools))) == 4
    assert time.process_time() - start < 1, "this takes 0.01 s"


def test_the_work_for_all_parameters_of_a_schema_is_bounded():
    options = [{"properties": {f"o{i}_{j}": True for j in range(2000)}} for i in range(60)]
    properties = {f"p{i}": {"$ref": "#/$defs/options", "properties": {f"q{i}": True}} for i in range(140)}
    tools = [
        {
            "name": "f",
            "parameters": {"type": "object", "properties": properties, "$defs": {"options": {"anyOf": options}}},
        }
    ]
    written = "".join(f"<parameter={key}>\n[1]\n</parameter>\n" for key in properties)
    text = f"<tool_call>\n<function=f>\n{written}</function>\n</tool_call>"
    start = time.process_time()
    ((_, arguments),) = calls(parsed(text, "qwen3_coder", tools=[{"type": "function", "function": tools[0]}]))
    assert time.process_time() - start < 0.5, "this takes 0.05 s"
    assert json.loads(arguments) == {key: [1] for key in properties}


def test_the_samples_of_a_request_take_its_schemas_apart_once(monkeypatch):
    seen = []
    of = schemas.Alternatives.of
    monkeypatch.setattr(schemas.Alternatives, "of", lambda self, part: (seen.append(part), of(self, part))[1])
    text = "</think>\n\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    one, *others = TextFormat("qwen3_coder", "think").parsers("<think>", TOOLS, num_samples=3)
    assert not seen
    events = one.feed(text) + one.finish()
    assert seen and any(isinstance(event, CallStart) for event in events)
    seen.clear()
    assert all(other.feed(text) + other.finish() == events for other in others) and not seen


# -- each format ------------------------------------------------------------------------------------------------------


def test_hermes_calls_stream_their_arguments_as_the_model_writes_them():
    (parser,) = TextFormat("hermes").parsers("", TOOLS)
    assert parser.feed('Let me see.\n\n<tool_call>\n{"name": "f", "arg') == [Text("Let me see.")]
    assert parser.feed('uments": {"a": "x}') == [CallStart(0, "f"), CallArguments(0, '{"a": "x}')]
    assert parser.feed('\\"\u4f60"}') == [CallArguments(0, '\\"\u4f60"}')]
    assert parser.feed("}\n</tool_") == []
    first = '\n\n<tool_call>\n{"name": "f", "arguments": {"a": "x}\\"\u4f60"}}\n</tool_call>\n'
    second = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    assert parser.feed("call>\n" + second) == [
        CallEnd(0, True, first),
        CallStart(1, "get_time"),
        CallArguments(1, "{}"),
    ]
    assert parser.finish() == [CallEnd(1, True, second)]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": "x"}}', {"a": "x"}),
        ('{"name": "f", "parameters": {"a": "x"}}', {"a": "x"}),
        ('{\n  "name" : "f",\n  "arguments" : {\n    "a": "x"\n  }\n}', {"a": "x"}),
        ('{"arguments": {"a": "x"}, "name": "f"}', {"a": "x"}),
        ('{"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}', {"a": "x"}),
        ('{"name": "f", "arguments": "{\\"a\\": \\"x\\"}"}', {"a": "x"}),
        ('{"name": "f", "arguments": ""}', {}),
        ('{"name": "f", "arguments": null}', {}),
        ('{"name": "f"}', {}),
        ('{"name": "\\u0066", "arguments": {}}', {}),
        ('{"name": "f", "arguments": {"a": "two\nlines\t\x01"}}', {"a": "two\nlines\t\x01"}),
        ('{"name": "f", "arguments": {"a": "</tool_call>"}}', {"a": "</tool_call>"}),
        ('{"name": "f", "arguments": {"l": [[], [{}], "]}"]}}', {"l": [[], [{}], "]}"]}),
        ('{"name": "f", "arguments": {"a": "x"}, "id": "abc"}', {"a": "x"}),
        ('{"name": "f", "arguments": {"a": "x"}, "id": 5}', {"a": "x"}),
        ('{"name": "f", "arguments": {"a": "x"} , "meta": {"b": [null, "}"]}, "ok": true}', {"a": "x"}),
        ('{"name": "f", "arguments": {"a": "x"}', {"a": "x"}),
        ('{"name": "f", "arguments": {"a": "x"}}}', {"a": "x"}),
    ],
)
def test_json_calls_are_understood_as_models_write_them(written, arguments):
    events = parsed(f"<tool_call>\n{written}\n</tool_call>\nDone", "hermes", step=1)
    ((name, text),) = calls(events)
    assert (name, json.loads(text)) == ("f", arguments)
    assert texts(events) == ["Done"] and completeness(events) == [True]


@pytest.mark.parametrize(
    "text",
    [
        "Use <tool_call> to call.",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "no JSON"}\n</tool_call>',
        '<tool_call>\n{"arguments": {"a": <b>}, "name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "argum',
        "<tool_ca",
        "<tool_call>\n<function=unknown>\n</function>\n</tool_call>",
        "<function=f> is how a call starts",
        "<function=f",
        '{"name": "unknown", "parameters": {}}',
        '{"name": "Bob", "age": 7}',
        '{"answer": 42}',
        '<|python_tag|>print("f")',
        "[TOOL_CALLS] [1, 2]",
        "[TOOL_CALLS]unknown[ARGS]{}",
        "[TOOL_CALLS] f(1)",
    ],
)
@pytest.mark.parametrize("tool_format", FORMATS)
def test_what_is_no_call_of_a_known_tool_is_text(tool_format, text):
    assert parsed(text, tool_format, step=1) == [Text(text)]


@pytest.mark.parametrize("step", [16, None])
def test_a_call_that_must_be_held_back_but_is_too_long_is_text(step):
    text = '<tool_call>{"arguments": {"a": "%s"}, "name": "f"}</tool_call>'
    assert calls(parsed(text % ("x" * 60_000), "hermes", step=step)) == [("f", json.dumps({"a": "x" * 60_000}))]
    assert parsed(text % ("x" * 70_000), "hermes", step=step) == [Text(text % ("x" * 70_000))]


def test_without_tools_a_call_is_text():
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert parsed(text, "hermes", tools=[]) == [Text(text)]


@pytest.mark.parametrize("broken", ['{"a": <b>}', '{"a": [1}', '{"a": "x"]'])
def test_arguments_that_are_not_json_are_passed_on_as_written_up_to_the_end_tag(broken):
    events = parsed(f'<tool_call>\n{{"name": "f", "arguments": {broken}}}</tool_call>Done', "hermes", step=1)
    ((_, text),) = calls(events)
    assert text == broken + "}"
    assert texts(events) == ["Done"] and completeness(events) == [False]
    with pytest.raises(ValueError):
        json.loads(text)


@pytest.mark.parametrize(
    "arguments",
    [r'{"a": "C:\dir"}', '{"a": "x", "n": 1, }', '{"a": "x", "b": True}', '{"x": NaN}', '{"a": {...}}', "{a: 1}"],
)
def test_a_call_whose_brackets_end_but_whose_arguments_are_not_json_is_not_complete(arguments):
    written = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    events = parsed(f"{written}Done", "hermes", step=1)
    assert calls(events) == [("f", arguments)]
    assert events[-2:] == [CallEnd(0, False, written), Text("Done")]


@pytest.mark.parametrize("tool_format", ["hermes", "qwen3_coder", "llama3", "mistral"])
def test_a_call_that_is_cut_off_is_not_valid_json(tool_format):
    whole = {
        "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": "rm -r /tmp',
        "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\nrm -r /tmp",
        "llama3": '{"name": "f", "parameters": {"a": "rm -r /tmp',
        "mistral": '[TOOL_CALLS]f[ARGS]{"a": "rm -r /tmp',
    }
    events = parsed(whole[tool_format], tool_format, step=1)
    assert calls(events) == [("f", '{"a": "rm -r /tmp')]
    assert events[-1] == CallEnd(0, False, whole[tool_format])


def test_qwen3_coder_text_values_stream_as_pieces_of_a_json_string():
    (parser,) = TextFormat("qwen3_coder").parsers("", TOOLS)
    assert parser.feed("Sure.\n\n<tool_call>\n<function=f>\n<parameter=a>\n") == [
        Text("Sure."),
        CallStart(0, "f"),
        CallArguments(0, '{"a": "'),
    ]
    assert parser.feed('say "hi"\n') == [CallArguments(0, 'say \\"hi\\"')]
    assert parser.feed("bye\n</parameter") == [CallArguments(0, "\\nbye")]
    assert parser.feed(">\n<parameter=n>\n1") == [CallArguments(0, '", "n": ')]
    assert parser.feed("2\n</parameter>\n</function>") == [CallArguments(0, "12}")]
    (end,) = parser.feed("\n</tool_call>") + parser.finish()
    assert end.is_complete and end.written.startswith("\n\n<tool_call>") and end.written.endswith("</tool_call>")


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("a", "12", "12"),
        ("a", "", ""),
        ("a", "\n\ntwo\n\n", "\n\ntwo\n\n"),
        ("a", "<a></parameter>\n</a>", "<a></parameter>\n</a>"),
        ("a", '\\n " é 🙂', '\\n " é 🙂'),
        ("n", " 12 ", 12),
        ("n", "twelve", "twelve"),
        ("n", "1" * 5000, "1" * 5000),  # Python reads no longer integers
        ("x", "1", 1),
        ("x", "1.5e3", 1500.0),
        ("x", "NaN", "NaN"),
        ("b", "true", True),
        ("b", "False", False),
        ("o", '{"k": [1,\n2]}', {"k": [1, 2]}),
        ("o", "{'k': 1}", "{'k': 1}"),
        ("o", "[" * 100_000, "[" * 100_000),
        ("l", "[]", []),
        ("s", "null", None),
        ("s", "None", None),
        ("s", "12", "12"),
        ("s", "text", "text"),
        ("u", "12", 12),
        ("u", "1.5", "1.5"),
        ("u", "true", "true"),
        ("e", "p", "p"),
        ("e", "1", 1),
        ("k", "5", "5"),
        ("z", "12", 12),
        ("z", "text", "text"),
        ("unknown", "12", "12"),
    ],
)
def test_qwen3_coder_values_have_the_type_that_the_schema_says(key, written, value):
    text = f"<tool_call>\n<function=f>\n<parameter={key}>\n{written}\n</parameter>\n</function>\n</tool_call>"
    ((_, arguments),) = calls(parsed(text, "qwen3_coder", step=5))
    assert json.loads(arguments) == {key: value}
    assert type(json.loads(arguments)[key]) is type(value)


def test_qwen3_coder_calls_are_read_without_the_outer_tag_or_the_inner_end_tag():
    for text in (
        "<function=f>\n<parameter=n>1</parameter>\n</function>",
        "<tool_call><function=f><parameter=n>1</parameter></tool_call>",
        "<tool_call><function=f><parameter=n>1</parameter></function></tool_call>",
    ):
        assert calls(parsed(text, "qwen3_coder", step=1)) == [("f", '{"n": 1}')]
        assert texts(parsed(text, "qwen3_coder")) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "parameters": {"a": "x"}}; {"name": "get_time", "parameters": {}}',
        '<|python_tag|>{"name": "f", "parameters": {"a": "x"}}\n{"name": "get_time", "parameters": {}}',
        '{"type": "function", "name": "f", "parameters": {"a": "x"}}, {"name": "get_time", "parameters": null}',
    ],
)
def test_llama3_calls_are_read_where_the_answer_starts(text):
    assert calls(parsed(text, "llama3", step=1)) == [("f", '{"a": "x"}'), ("get_time", "{}")]
    assert texts(parsed(text, "llama3")) == []
    assert calls(parsed("As JSON: " + text.removeprefix("<|python_tag|>"), "llama3")) == []


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x"}}, {"name": "get_time", "arguments": {}, "id": "abc123"}]',
        '[TOOL_CALLS][{"arguments": {"a": "x"}, "name": "f"}, {"name": "get_time", "arguments": {}}]',
        '[TOOL_CALLS]f[ARGS]{"a": "x"}[TOOL_CALLS]get_time[ARGS]{}',
        '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": "x"}[TOOL_CALLS]get_time[CALL_ID]abc123deg[ARGS]{}',
        '[TOOL_CALLS]f{"a": "x"}[TOOL_CALLS]get_time{}',
    ],
)
def test_mistral_calls_are_read_as_lists_and_with_tags(text):
    events = parsed("Well,\n" + text, "mistral", step=1)
    assert calls(events) == [("f", '{"a": "x"}'), ("get_time", "{}")]
    assert texts(events) == ["Well,"]


# -- thinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("<|im_start|>assistant\n", "<think>\nHm.\n</think>\n\nHello"),
        ("<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nHello"),
        ("What is <think>?<|im_end|>\n<|im_start|>assistant\n<think>\nH", "m.\n</think>Hello"),
    ],
)
def test_thinking_ends_at_its_tag_whether_the_prompt_or_the_model_starts_it(prompt, text):
    thought = "m." if text.startswith("m") else "Hm."
    assert parsed(text, "hermes", "think", prompt, step=1) == [Thinking(thought), Text("Hello")]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "What does <think> mean?<|im_end|>\n<|im_start|>assistant\n",
        "[INST] What does <think> mean? [/INST]",
    ],
)
def test_text_is_no_thinking_after_a_prompt_with_a_closed_or_mentioned_tag(prompt):
    assert parsed("Hello", "hermes", "think", prompt) == [Text("Hello")]


def test_thinking_that_never_ends_is_thinking_with_its_last_line_breaks():
    assert parsed("<think>\nHm.\n\n", "none", "think") == [Thinking("Hm.\n\n")]


def test_tags_in_the_answer_are_text():
    text = "Models write <think> and </think>.\n"
    assert parsed(text, "none", "think") == [Text(text)]
    assert parsed("<think>x</think>" + text, "none", "think") == [Thinking("x"), Text(text)]


CALLS_OF_F = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>",
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"n": 1}}]',
}


@pytest.mark.parametrize("step", [1, None])
@pytest.mark.parametrize("tool_format", CALLS_OF_F)
def test_a_call_that_is_drafted_in_thinking_is_thinking(tool_format, step):
    call = CALLS_OF_F[tool_format]
    for draft in (f"I may write {call}\nor not", f"{call}", f"First {call}\n{call}", f"No tag {call[:-9]}"):
        events = parsed(f"{draft}\n</think>\n\n{call}", tool_format, "think", "<think>\n", step=step)
        assert events[0] == Thinking(draft)
        assert events[1:] == parsed(call, tool_format)


@pytest.mark.parametrize("step", [1, None])
@pytest.mark.parametrize("tool_format", CALLS_OF_F)
def test_calls_that_end_an_output_whose_thinking_never_ends_are_made(tool_format, step):
    call = CALLS_OF_F[tool_format]
    text = f"I may <tool_call> or\n{call} or\n{call}\n"
    for last in (call, f"{call}\n{call}\n"):
        events = parsed(f"{text}not.\n\n{last}", tool_format, "think", "<think>\n", step=step)
        assert events == [Thinking(f"{text}not."), *parsed(f"\n\n{last}", tool_format)]
    for end in (f"{call} would do.", call[: len(call) // 2], call.replace("f", "unknown")):
        events = parsed(text + end, tool_format, "think", "<think>\n", step=step)
        assert events == [Thinking(text + end)]


def test_thinking_streams_and_holds_back_only_what_may_be_a_call():
    (parser,) = TextFormat("hermes", "think").parsers("<think>\n", TOOLS)
    call = CALLS_OF_F["hermes"]
    assert parser.feed("Hm. ") == [Thinking("Hm. ")]
    assert parser.feed(f"Like {call}\n") == [Thinking("Like ")]
    assert parser.feed("or") == [Thinking(f"{call}\nor")]
    assert parser.feed(f"\n{call}") == []
    assert [type(event) for event in parser.finish()] == [CallStart, CallArguments, CallEnd]


@pytest.mark.parametrize("step", [4, 1000, None])
def test_calls_in_thinking_that_are_too_long_to_hold_back_are_thinking(step):
    def text(num_chars):
        return f'Hm. <tool_call>{{"name": "f", "arguments": {{"a": "{"x" * num_chars}"}}}}</tool_call>'

    assert len(calls(parsed(text(MAX_HELD_CHARS - 100), "hermes", "think", "<think>", step=step))) == 1
    too_long = text(MAX_HELD_CHARS)
    assert parsed(too_long, "hermes", "think", "<think>", step=step) == [Thinking(too_long)]
    (parser,) = TextFormat("hermes", "think").parsers("<think>", TOOLS)
    assert "".join(texts(parser.feed(too_long), Thinking)) == too_long, "the rest of the call is held back"


# -- the telling parts of real templates ------------------------------------------------------------------------------

TEMPLATES = {
    "Qwen3": r"""
For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}""",
    "Qwen3-Coder": r"""
{{- "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n" }}
{{- "</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:" }}
{{- '\n<tool_call>\n<function=' + tool_call.name + '>\n' }}""",
    "Qwen3.5": r"""
{{- '<tool_call>\n<function=' + tool_call.name + '>\n' }}{{- '<parameter=' + args_name + '>\n' }}
{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- else %}{{- '<think>\n' }}{%- endif %}""",
    "Llama 3.1": r"""
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{{- "<|python_tag|>" + tool_call.name + ".call(" }}{{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}""",
    "Mistral 7B v0.3": r"""{{- "[TOOL_CALLS] [" }}{{- ', "id": "' + tool_call.id + '"}' }}{{- "[TOOL_RESULTS] " }}""",
    "Ministral 3": r"""{{- '[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + arguments }}""",
    "SmolLM2": r"""{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}""",
    "DeepSeek-R1": r"""{{'<｜tool▁calls▁begin｜>'}}{% if '</think>' in content %}{{'<｜Assistant｜><think>\n'}}""",
    "GLM-4.5": r"""{{ '\n<tool_call>' + tc.name }}<arg_key>{{ k }}</arg_key>{{ '\n<think></think>' }}""",
}
FOUND = {
    "Qwen3": TextFormat("hermes", "think"),
    "Qwen3-Coder": TextFormat("qwen3_coder", "none"),
    "Qwen3.5": TextFormat("qwen3_coder", "think"),
    "Llama 3.1": TextFormat("llama3", "none"),
    "Mistral 7B v0.3": TextFormat("mistral", "none"),
    "Ministral 3": TextFormat("mistral", "none", has_argument_tags=True),
    "SmolLM2": TextFormat("none", "none"),
    "DeepSeek-R1": TextFormat("none", "think"),
    "GLM-4.5": TextFormat("none", "think"),
}


@pytest.mark.parametrize("model", TEMPLATES)
def test_formats_are_found_in_the_chat_template(model):
    assert TextFormat.detect(TEMPLATES[model]) == FOUND[model]


def test_the_format_of_calls_is_that_of_the_template_for_tools():
    llm = ScriptedLLM("a")
    llm.tokenizer = SimpleNamespace(chat_template={"default": TEMPLATES["SmolLM2"], "tool_use": TEMPLATES["Qwen3"]})
    assert make_server(llm)[0].format == FOUND["Qwen3"]


def test_formats_that_the_operator_names_are_not_searched_for():
    assert TextFormat.detect(TEMPLATES["Qwen3"], "llama3", "none") == TextFormat("llama3", "none")
    assert TextFormat.detect(None) == TextFormat("none", "none")
    with pytest.raises(ValueError, match=r"tool_parser must be auto or one of none, hermes, .* got 'qwen'"):
        TextFormat.detect(None, "qwen")
    with pytest.raises(ValueError, match="reasoning_parser must be auto, none or think, got 'deepseek'"):
        TextFormat.detect(None, reasoning_parser="deepseek")
