"""Finds thinking and tool calls in a model's text while the text arrives.

A parser is a generator that waits for more text where it cannot decide yet. What it finds depends on the text alone,
not on the pieces in which the text arrives. Once a call's name is known, its arguments are passed on as they come. If
they are not JSON after all, they are passed on as the model wrote them, so that no client runs half a call.

Patterns match a limited number of characters, so that little text is held back and looked at again.
"""

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import regex

from nanovllm.server.events import CallArguments, CallStart, Event, Text, Thinking
from nanovllm.server.schemas import type_name, value_types

# A part of a parser: it yields to wait for more text, and returns whether it found what it looks for.
Finds = Generator[None, None, bool]
Waits = Generator[None, None, None]
Kind = type[Text | Thinking]

_THINK = regex.compile(r"\n{0,16}<think>")
_END_THINK = regex.compile("</think>")
_LATE_END_THINK = regex.compile(r"\s{0,16}</think>")
_NEVER = regex.compile("(?!)")
# JSON objects of calls that must be complete to be understood are no longer than this.
_MAX_HELD_CHARS = 1 << 16


class OutputParser:
    """Turns the text of one sample into events. This class finds no tool calls; its subclasses do.

    Args:
        tools: JSON schemas of the parameters of the functions that can be called, by name.
        in_thinking: the output starts inside a thinking tag that the prompt has opened.
        finds_thinking: the output may start with a thinking tag.
    """

    # Tags that may start a call inside other text.
    call_start = _NEVER

    def __init__(self, tools: Mapping[str, Any], in_thinking: bool = False, finds_thinking: bool = False):
        self.tools, self.in_thinking, self.finds_thinking = tools, in_thinking, finds_thinking
        # The text that has no event yet starts at the index `_at`.
        self._text, self._at = "", 0
        # Line breaks are held back, and dropped if a tag follows.
        self._num_newlines = 0
        self._num_calls = 0
        self._is_finished = False
        self._events: list[Event] = []
        self._run = self._parse()
        next(self._run)

    def feed(self, text: str) -> list[Event]:
        """Return the events of the next piece of the text, as far as they are certain."""
        self._text, self._at = self._text[self._at :] + text, 0
        return self._resume()

    def finish(self) -> list[Event]:
        """Return the events of the text that was held back. No more text comes."""
        self._is_finished = True
        return self._resume()

    def _resume(self) -> list[Event]:
        next(self._run, None)
        events, self._events = self._events, []
        return joined(events)

    def _parse(self) -> Waits:
        yield
        if self.in_thinking or (self.finds_thinking and (yield from self._skip(_THINK))):
            yield from self._think()
        yield from self._answer()

    def _think(self) -> Waits:
        """Read thinking. A call also ends it, because models forget the end tag or write it behind the call."""
        yield from self._skip_newlines()
        tags = regex.compile(f"</think>|{self.call_start.pattern}")
        while (yield from self._pass_until(tags, lambda text: self._pass(text, Thinking))):
            if (yield from self._skip(_END_THINK)):
                yield from self._skip_newlines()
                return
            if (yield from self._call()):
                yield from self._skip(_LATE_END_THINK)
                yield from self._skip_newlines()
                return
            self._pass_one(Thinking)
        self._pass_newlines(Thinking)

    def _answer(self) -> Waits:
        """Read text and calls to the end."""
        while (yield from self._pass_until(self.call_start, lambda text: self._pass(text, Text))):
            if (yield from self._call()):
                yield from self._skip_newlines()
            else:
                self._pass_one(Text)
        self._pass_newlines(Text)

    def _call(self) -> Finds:
        """Read the calls that follow. Return False, and stay, if what follows is no call of a known function."""
        yield from ()
        return False

    # -- steps --------------------------------------------------------------------------------------------------------

    def _match(self, pattern: regex.Pattern) -> Generator[None, None, regex.Match | None]:
        """Match the text that follows, once more text cannot change the result. Do not go past it."""
        while True:
            found = pattern.match(self._text, self._at, partial=not self._is_finished)
            if found is None or not found.partial:
                return found
            yield

    def _skip(self, pattern: regex.Pattern) -> Finds:
        """Go past the text that follows if it matches."""
        found = yield from self._match(pattern)
        if found:
            self._at, self._num_newlines = found.end(), 0
        return found is not None

    def _skip_newlines(self) -> Waits:
        while True:
            kept = self._text[self._at :].lstrip("\n")
            self._at = len(self._text) - len(kept)
            if kept or self._is_finished:
                return
            yield

    def _pass_until(self, tags: regex.Pattern, pass_on: Callable[[str], None]) -> Finds:
        """Pass text on up to what matches `tags`. Return False if the text ended before."""
        while True:
            found = tags.search(self._text, self._at, partial=not self._is_finished)
            end = found.start() if found else len(self._text)
            if end > self._at:
                pass_on(self._text[self._at : end])
            self._at = end
            if found and not found.partial:
                return True
            if self._is_finished:
                return False
            yield

    # -- events -------------------------------------------------------------------------------------------------------

    def _pass(self, text: str, kind: Kind) -> None:
        """Pass text on, but hold back the line breaks at its end."""
        kept = text.rstrip("\n")
        if kept:
            self._pass_newlines(kind)
            self._events.append(kind(kept))
        self._num_newlines += len(text) - len(kept)

    def _pass_one(self, kind: Kind) -> None:
        self._pass(self._text[self._at], kind)
        self._at += 1

    def _pass_newlines(self, kind: Kind) -> None:
        if self._num_newlines:
            self._events.append(kind("\n" * self._num_newlines))
            self._num_newlines = 0

    def _start(self, name: str) -> None:
        self._events.append(CallStart(self._num_calls, name))
        self._num_calls += 1
        self._num_newlines = 0

    def _pass_arguments(self, text: str) -> None:
        """Pass on a piece of the arguments of the newest call."""
        if text:
            self._events.append(CallArguments(self._num_calls - 1, text))


def joined(events: list[Event]) -> list[Event]:
    """Return the events with neighbouring pieces of the same text in one."""
    if len(events) < 2:
        return events
    whole: list[Event] = []
    for _, group in groupby(events, lambda event: (type(event), getattr(event, "index", None))):
        first, *others = group
        if others and not isinstance(first, CallStart):
            first = replace(first, text=first.text + "".join(getattr(event, "text", "") for event in others))
        whole.append(first)
    return whole


# -- calls that are JSON objects --------------------------------------------------------------------------------------

_SPACE = r"\s{0,64}"
_NAME = regex.compile(
    rf'\{{{_SPACE}"name"{_SPACE}:{_SPACE}"([^"\\]{{1,128}})"{_SPACE},'
    rf'{_SPACE}"(?:arguments|parameters)"{_SPACE}:{_SPACE}(?=\{{)'
)
_FIRST_KEY = regex.compile(rf'\{{{_SPACE}"(?:name|type|id|function|arguments|parameters)"')
_OTHER_KEYS = rf'(?:{_SPACE},{_SPACE}"\w{{1,16}}"{_SPACE}:{_SPACE}"[^"\\]{{0,64}}"){{0,4}}'
_CLOSE = regex.compile(rf"{_OTHER_KEYS}{_SPACE}\}}")


class JsonCallParser(OutputParser):
    """Reads calls such as `{"name": "f", "arguments": {...}}`. Subclasses say what stands around them.

    Attributes:
        opening: what stands before the object of a call.
        closing: what stands behind it.
        limit: what ends arguments that are not JSON.
    """

    opening = closing = regex.compile("")
    limit = _NEVER

    def _call(self) -> Finds:
        if not (yield from self._json_call(self.opening)):
            return False
        yield from self._skip(self.closing)
        return True

    def _json_call(self, opening: regex.Pattern) -> Finds:
        """Read the object of a call, and what stands before it. Stay if it is no call of a known function."""
        head = yield from self._match(regex.compile(opening.pattern + _NAME.pattern))
        if not head:
            return (yield from self._whole_call(opening))
        name = head[1]
        if name not in self.tools:
            return False
        self._at = head.end()
        self._start(name)
        if (yield from self._arguments()):
            yield from self._skip(_CLOSE)
        return True

    def _arguments(self) -> Finds:
        """Pass an object on as the arguments of the newest call. Return whether it is complete."""
        json_object = JsonObject()
        while True:
            piece, self._at = json_object.read(self._text, self._at)
            self._pass_arguments(piece)
            if json_object.is_broken:
                yield from self._pass_until(self.limit, self._pass_arguments)
            if json_object.is_broken or json_object.is_complete or self._is_finished:
                return json_object.is_complete
            yield

    def _whole_call(self, opening: regex.Pattern) -> Finds:
        """Read the object of a call whose keys have another order, or whose arguments are text or missing."""
        if not (yield from self._match(regex.compile(opening.pattern + _FIRST_KEY.pattern))):
            return False
        before = opening.match(self._text, self._at)
        start = size = before.end() - self._at if before else 0
        json_object, pieces = JsonObject(), []
        while True:
            piece, end = json_object.read(self._text, self._at + size)
            pieces.append(piece)
            size = end - self._at
            # The length is checked first, so that it does not matter in which pieces the text arrives.
            if size - start > _MAX_HELD_CHARS or json_object.is_broken:
                return False
            if json_object.is_complete:
                break
            if self._is_finished:
                return False
            yield
        call = _as_call("".join(pieces))
        if call is None or call[0] not in self.tools:
            return False
        self._at += size
        self._start(call[0])
        self._pass_arguments(call[1])
        return True


def _as_call(text: str) -> tuple[str, str] | None:
    """Return the name and the arguments, as JSON, of the call that a JSON object describes, or None."""
    try:
        call: Any = json.loads(text)
        if isinstance(call.get("function"), dict):
            call = call["function"]
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        arguments = {} if arguments is None else arguments
        name = call.get("name") or call.get("function")
        if isinstance(name, str) and isinstance(arguments, dict):
            return name, json.dumps(arguments, ensure_ascii=False)
    except (ValueError, RecursionError):
        pass
    return None


_CONTROL_CHARACTERS = {code: json.dumps(chr(code))[1:-1] for code in range(32)}
_OF_STRING = regex.compile(r'[^"\\]*+')
_BETWEEN = regex.compile(r"[\w\s.,:+-]*+")


class JsonObject:
    """Finds the end of a JSON object while its text arrives. Only strings and brackets are checked.

    Attributes:
        is_complete: the object's last bracket was read.
        is_broken: the text that follows the part that was read cannot belong to an object.
    """

    def __init__(self):
        self.is_complete = self.is_broken = False
        self._open: list[str] = []  # the brackets that must follow
        self._in_string = self._is_escaped = False

    def read(self, text: str, start: int) -> tuple[str, int]:
        """Read on from the index `start`.

        Returns:
            The object's part of the text, with control characters of strings escaped, and the index behind it.
        """
        pieces, at = [], start
        while at < len(text) and not self.is_complete and not self.is_broken:
            end = self._read_string(text, at) if self._in_string else self._read_bracket(text, at)
            piece = text[at:end]
            pieces.append(piece.translate(_CONTROL_CHARACTERS) if self._in_string else piece)
            at = end
        return "".join(pieces), at

    def _read_string(self, text: str, at: int) -> int:
        """Read characters of a string, an escape, or the quote that ends the string. Return the index behind."""
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        found = _OF_STRING.match(text, at)
        if found and found.end() > at:
            return found.end()
        self._is_escaped = text[at] == "\\"
        self._in_string = self._is_escaped
        return at + 1

    def _read_bracket(self, text: str, at: int) -> int:
        """Read a bracket, the quote that starts a string, or what is between them. Return the index behind."""
        found = _BETWEEN.match(text, at)
        if found and found.end() > at:
            return found.end()
        character = text[at]
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._open.append("}" if character == "{" else "]")
        elif self._open and character == self._open[-1]:
            self._open.pop()
            self.is_complete = not self._open
        else:
            self.is_broken = True
            return at
        return at + 1


class HermesParser(JsonCallParser):
    """Reads `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, as Hermes, Qwen2.5 and Qwen3 write it."""

    call_start = regex.compile("<tool_call>")
    opening = regex.compile(rf"<tool_call>{_SPACE}")
    closing = regex.compile(r"[\s}]{0,64}</tool_call>")
    limit = regex.compile("</tool_call>")


class Llama3Parser(JsonCallParser):
    """Reads `{"name": "f", "parameters": {...}}` where the response starts, or behind `<|python_tag|>`."""

    call_start = regex.compile(r"<\|python_tag\|>")
    opening = regex.compile(rf"[\s;,]{{0,64}}(?:<\|python_tag\|>)?{_SPACE}")

    def _answer(self) -> Waits:
        while (yield from self._call()):
            pass
        if self._num_calls:
            yield from self._skip_newlines()
        yield from super()._answer()


class MistralParser(JsonCallParser):
    """Reads `[TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]` and `[TOOL_CALLS]f[ARGS]{...}`."""

    call_start = limit = regex.compile(r"\[TOOL_CALLS\]")
    opening = regex.compile(rf"\[TOOL_CALLS\]{_SPACE}\[?{_SPACE}")
    closing = regex.compile(rf"{_SPACE}\]")
    next_opening = regex.compile(rf"{_SPACE},{_SPACE}")
    named = regex.compile(
        rf"\[TOOL_CALLS\]{_SPACE}([\w.-]{{1,128}})(?:\[CALL_ID\]\w{{1,64}})?(?:\[ARGS\])?{_SPACE}(?=\{{)"
    )

    def _call(self) -> Finds:
        named = yield from self._match(self.named)
        if named:
            if named[1] not in self.tools:
                return False
            self._at = named.end()
            self._start(named[1])
            yield from self._arguments()
            return True
        if not (yield from self._json_call(self.opening)):
            return False
        while (yield from self._json_call(self.next_opening)):
            pass
        yield from self._skip(self.closing)
        return True


# -- calls that are tags ----------------------------------------------------------------------------------------------


class Qwen3CoderParser(OutputParser):
    """Reads `<tool_call><function=f><parameter=key>value</parameter>...</function></tool_call>`.

    A value is JSON where the function's schema says so, else text. It ends at the end tag behind which another tag
    follows, so a value may have such a tag inside.
    """

    call_start = regex.compile("<tool_call>|<function=")
    function = regex.compile(
        rf"(?:<tool_call>{_SPACE})?<function=([^>\s]{{1,128}})>{_SPACE}(?=<parameter=|</function>|</tool_call>)"
    )
    parameter = regex.compile(rf"{_SPACE}<parameter=([^>\n]{{1,256}})>")
    line_break = regex.compile(r"\n")
    end_parameter = regex.compile(rf"\n?</parameter>(?={_SPACE}(?:<parameter=|</function>|</tool_call>))")
    end_function = regex.compile(rf"{_SPACE}</function>")
    end_call = regex.compile(rf"{_SPACE}</tool_call>")

    def _call(self) -> Finds:
        head = yield from self._match(self.function)
        if not head or head[1] not in self.tools:
            return False
        self._at = head.end()
        self._start(head[1])
        yield from self._parameters(head[1])
        is_complete = False
        # The client must see that a call without an end tag is not complete.
        for end in (self.end_function, self.end_call):
            if (yield from self._skip(end)) and not is_complete:
                self._pass_arguments("}")
                is_complete = True
        return True

    def _parameters(self, name: str) -> Waits:
        self._pass_arguments("{")
        separator = ""
        while parameter := (yield from self._match(self.parameter)):
            self._at = parameter.end()
            yield from self._skip(self.line_break)
            self._pass_arguments(f"{separator}{_json(parameter[1])}: ")
            separator = ", "
            types = value_types(self.tools[name], parameter[1])
            if types == {"string"}:
                yield from self._text_value()
            else:
                yield from self._json_value(types)

    def _text_value(self) -> Waits:
        self._pass_arguments('"')
        if (yield from self._pass_until(self.end_parameter, lambda text: self._pass_arguments(_json(text)[1:-1]))):
            yield from self._skip(self.end_parameter)
            self._pass_arguments('"')

    def _json_value(self, types: set[str]) -> Waits:
        pieces: list[str] = []
        is_complete = yield from self._pass_until(self.end_parameter, pieces.append)
        text = "".join(pieces)
        if is_complete:
            yield from self._skip(self.end_parameter)
            text = _as_value(text, types)
        self._pass_arguments(text)


_PYTHON_VALUES = {"True": ("true", "boolean"), "False": ("false", "boolean"), "None": ("null", "null")}


def _as_value(text: str, types: set[str]) -> str:
    """Return the JSON of a parameter's value, of one of the types if it can be."""
    value, kind = _PYTHON_VALUES.get(text.strip(), ("", ""))
    if kind in types:
        return value
    try:
        kind = type_name(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return _json(text)
    fits = kind in types or (kind == "integer" and "number" in types)
    return text.strip() if fits or "string" not in types else _json(text)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


PARSERS: dict[str, type[OutputParser]] = {
    "none": OutputParser,
    "hermes": HermesParser,
    "qwen3_coder": Qwen3CoderParser,
    "llama3": Llama3Parser,
    "mistral": MistralParser,
}
