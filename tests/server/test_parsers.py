"""Parsers find thinking and tool calls in text, however it is split into pieces."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.server.events import CallArguments, CallStart, Text, Thinking
from nanovllm.server.formats import TextFormat
from nanovllm.server.parsers import joined

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
    "z": {},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "$defs": {"word": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "get_time"}},
]


def parsed(text, tool_format="none", reasoning="none", prompt="", step=None, tools=TOOLS):
    """Return the joined events of a text that arrives in pieces of `step` characters, or whole."""
    parser = TextFormat(tool_format, reasoning).parser(prompt, tools)
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


# -- any text ---------------------------------------------------------------------------------------------------------

FRAGMENTS = """<think> </think> <tool_call> </tool_call> <function=f> <function=g> <function= </function> <parameter=a>
<parameter=n> <parameter=s> </parameter> <parameter [TOOL_CALLS] [ARGS] [CALL_ID] [TOOL_CALLS]f[ARGS] <|python_tag|>
{"name":"f","arguments":{ {"name":"f","parameters":{ {"name":"g","arguments":{ "name":"f" "arguments": "arguments":"{}"
{"arguments": { } [ ] " \\ , : ; < é 你 🙂 null 12 {} }} "} f a""".split()
FRAGMENTS += ["\n", "\n\n", " ", "\\n", "x y"]
# Whole calls in each format, so that what follows a call is reached as well.
WHOLE = [
    '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>',
    "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>",
    '{"name": "f", "parameters": {"a": "x"}}',
    '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x"}}]',
    '[TOOL_CALLS]f[ARGS]{"a": "x"}',
]
any_text = st.lists(st.sampled_from(FRAGMENTS) | st.sampled_from(WHOLE) | st.text(max_size=3), max_size=20).map("".join)


@pytest.mark.parametrize("tool_format", FORMATS)
@settings(max_examples=150, deadline=None)
@given(any_text, st.lists(st.integers(1, 9), min_size=1, max_size=10), st.sampled_from(["", "<think>\n"]))
def test_any_split_of_a_text_gives_the_same_events(tool_format, text, sizes, prompt):
    parser = TextFormat(tool_format, "think").parser(prompt, TOOLS)
    events, at, i = [], 0, 0
    while at < len(text):
        size = sizes[i % len(sizes)]
        events += parser.feed(text[at : at + size])
        at, i = at + size, i + 1
    events += parser.finish()
    assert joined(events) == parsed(text, tool_format, "think", prompt)


@pytest.mark.parametrize("tool_format", FORMATS)
@settings(max_examples=150, deadline=None)
@given(any_text)
def test_text_without_a_call_is_returned_whole_and_other_text_in_order(tool_format, text):
    events = parsed(text, tool_format)
    shown = "".join(texts(events))
    if not calls(events):
        assert shown == text
    rest = iter(text)
    assert all(character in rest for character in shown), "the shown text is not a part of the whole"


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


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "\n" * 200_000,
        "<think>" * 30_000,
        "<tool_call>" * 20_000,
        "<tool_call>{" * 20_000,
        '<tool_call>{"name": "f", "arguments": {' + "[" * 200_000,
        '<tool_call>{"arguments": ' + "[" * 200_000,
        "<function=f><parameter=a>" + "</parameter>\n" * 15_000,
        "<function=f><parameter=o>" + "[" * 200_000 + "</parameter></function>",
        '{"name": "f", "parameters": {"a": "' + "\\\n" * 100_000,
        "[TOOL_CALLS]" * 15_000,
        "[TOOL_CALLS]" + " " * 200_000,
    ],
    ids=lambda text: f"{text[:24]!r}",
)
def test_a_hostile_text_takes_linear_time(tool_format, text):
    start = time.process_time()
    parsed(text, tool_format, "think", step=4)
    assert time.process_time() - start < 10, "50,000 pieces take a fraction of a second in linear time"
