"""Finds tool calls in a model's text while the text arrives.

A parser is a generator that waits for more text where it cannot decide yet. What it finds depends on the text alone,
not on the pieces in which the text arrives. Once a call's name is known, its arguments are passed on as they come. If
they are not a JSON object after all, the end of the call says so, so that no client runs half a call.

Patterns match a limited number of characters, so that little text is held back and looked at again.
"""

import json
from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import groupby
from typing import Any

import regex

from nanovllm.server.events import CallArguments, CallEnd, CallStart, Event, Text
from nanovllm.server.json_text import read_json
from nanovllm.server.schemas import ToolSchemas, as_json

# A part of a parser yields when it waits for more text. A `Found` returns whether it has found what it looks for.
Found = Generator[None, None, bool]
Wait = Generator[None, None, None]

_NEVER = regex.compile("(?!)")
# The longest text that is held back until it is clear whether it is a call.
MAX_HELD_CHARS = 1 << 16


class OutputParser:
    """Turns the text of one sample into events. This class finds no tool calls; its subclasses do.

    Args:
        tools: the functions that can be called.
    """

    # Tags that may start a call inside other text.
    call_start = _NEVER

    def __init__(self, tools: ToolSchemas):
        self.tools = tools
        self._text = ""
        self._position = 0  # the text that has no event yet starts here
        # Line breaks are held back, and belong to the call if one follows.
        self._num_newlines = 0
        self._num_calls = 0
        # The call that is being read, as the model wrote it: its earlier pieces, of which there is at least one, and
        # the index in `_text` where the rest of it starts. `CallEnd.written` is made of them.
        self._raw: list[str] = []
        self._raw_start = 0
        self._arguments: list[str] = []
        self._is_finished = False
        self._events: list[Event] = []
        self._run = self._parse()
        next(self._run)

    def feed(self, text: str) -> list[Event]:
        """Return the events of the next piece of the text, as far as they are certain."""
        if self._raw:
            self._raw.append(self._text[self._raw_start : self._position])
        self._text = self._text[self._position :] + text
        self._position = self._raw_start = 0
        return self._resume()

    def finish(self) -> list[Event]:
        """Return the events of the text that was held back. No more text comes."""
        self._is_finished = True
        return self._resume()

    def _resume(self) -> list[Event]:
        next(self._run, None)
        events, self._events = self._events, []
        return joined(events)

    def _parse(self) -> Wait:
        """Read text and calls to the end."""
        yield
        yield from self._respond()

    def _respond(self) -> Wait:
        while (yield from self._emit_until(self.call_start, self._emit_text)):
            if not (yield from self._call()):
                self._emit_text(self._text[self._position])
                self._position += 1
        self._emit_newlines()

    def _call(self) -> Found:
        """Read the calls that follow. Return False, and stay, if what follows is no call of a known function."""
        yield from ()  # makes this a generator, as in subclasses
        return False

    # -- steps --------------------------------------------------------------------------------------------------------

    def _match(self, pattern: regex.Pattern) -> Generator[None, None, regex.Match | None]:
        """Match the text that follows, once more text cannot change the result. Do not go past it."""
        while True:
            found = pattern.match(self._text, self._position, partial=not self._is_finished)
            if found is None or not found.partial:
                return found
            yield

    def _skip(self, pattern: regex.Pattern) -> Found:
        """Go past the text that follows if it matches."""
        found = yield from self._match(pattern)
        if found:
            self._position = found.end()
        return found is not None

    def _skip_newlines(self) -> Wait:
        while True:
            kept = self._text[self._position :].lstrip("\n")
            self._position = len(self._text) - len(kept)
            if kept or self._is_finished:
                return
            yield

    def _emit_until(self, tags: regex.Pattern, emit: Callable[[str], None]) -> Found:
        """Emit the text up to what matches `tags`. Return False if the text ended before."""
        while True:
            found = tags.search(self._text, self._position, partial=not self._is_finished)
            end = found.start() if found else len(self._text)
            if end > self._position:
                emit(self._text[self._position : end])
            self._position = end
            if found and not found.partial:
                return True
            if self._is_finished:
                return False
            yield

    # -- events -------------------------------------------------------------------------------------------------------

    def _emit_text(self, text: str) -> None:
        """Emit text, but hold back the line breaks at its end."""
        kept = text.rstrip("\n")
        if kept:
            self._emit_newlines()
            self._events.append(Text(kept))
        self._num_newlines += len(text) - len(kept)

    def _emit_newlines(self) -> None:
        if self._num_newlines:
            self._events.append(Text("\n" * self._num_newlines))
            self._num_newlines = 0

    def _start_call(self, name: str, arguments_start: int) -> None:
        """Start a call whose arguments start at the index `arguments_start`."""
        self._events.append(CallStart(self._num_calls, name))
        self._num_calls += 1
        self._raw = ["\n" * self._num_newlines]
        self._raw_start = self._position
        self._arguments = []
        self._num_newlines = 0
        self._position = arguments_start

    def _emit_arguments(self, text: str) -> None:
        """Emit a piece of the arguments of the newest call."""
        if text:
            self._arguments.append(text)
            self._events.append(CallArguments(self._num_calls - 1, text))

    def _end_call(self) -> Wait:
        """End the newest call with the line breaks that follow it."""
        yield from self._skip_newlines()
        written = "".join(self._raw) + self._text[self._raw_start : self._position]
        self._events.append(CallEnd(self._num_calls - 1, _is_object("".join(self._arguments)), written))
        self._raw, self._arguments = [], []


def joined(events: list[Event]) -> list[Event]:
    """Return the events, with successive pieces of one text joined."""
    if len(events) < 2:
        return events
    whole: list[Event] = []
    for _, group in groupby(events, lambda event: (type(event), getattr(event, "index", None))):
        first, *others = group
        if others and not isinstance(first, CallStart | CallEnd):
            first = replace(first, text=first.text + "".join(getattr(event, "text", "") for event in others))
        whole.append(first)
    return whole


def _is_object(text: str) -> bool:
    try:
        return isinstance(read_json(text), dict)
    except (ValueError, RecursionError):
        return False


# -- calls that are JSON objects --------------------------------------------------------------------------------------

_SPACE = r"\s{0,64}"
_NAME = regex.compile(
    rf'\{{{_SPACE}"name"{_SPACE}:{_SPACE}"([^"\\]{{1,128}})"{_SPACE},'
    rf'{_SPACE}"(?:arguments|parameters)"{_SPACE}:{_SPACE}(?=\{{)'
)
_FIRST_KEY = regex.compile(rf'\{{{_SPACE}"(?:name|type|id|function|arguments|parameters)"')
_AFTER_ARGUMENTS = regex.compile(rf'{_SPACE}(?:,{_SPACE}"|\}})')


class JsonCallParser(OutputParser):
    """Reads calls such as `{"name": "f", "arguments": {...}}`. Subclasses say what stands around them.

    Attributes:
        opening: what stands before the object of a call.
        closing: what stands after it.
        limit: what ends arguments that are not JSON.
    """

    opening = closing = regex.compile("")
    limit = _NEVER

    def _call(self) -> Found:
        return (yield from self._json_call(self.opening))

    def _json_call(self, opening: regex.Pattern) -> Found:
        """Read the object of a call, and what stands around it. Stay if it is no call of a known function."""
        head = yield from self._match(regex.compile(opening.pattern + _NAME.pattern))
        if not head:
            if not (yield from self._buffered_call(opening)):
                return False
        elif head[1] not in self.tools:
            return False
        else:
            self._start_call(head[1], head.end())
            if (yield from self._read_arguments()) and (yield from self._match(_AFTER_ARGUMENTS)):
                yield from self._read_object(JsonObject(is_open=True), lambda text: None)
        yield from self._skip(self.closing)
        yield from self._end_call()
        return True

    def _read_arguments(self) -> Found:
        """Pass an object on as the arguments of the newest call. Return whether it is complete."""
        json_object = JsonObject()
        yield from self._read_object(json_object, self._emit_arguments)
        if json_object.is_broken:
            yield from self._emit_until(self.limit, self._emit_arguments)
        return json_object.is_complete

    def _read_object(self, json_object: "JsonObject", emit: Callable[[str], None]) -> Wait:
        """Read an object up to its end, or to what cannot belong to an object."""
        while True:
            piece, self._position = json_object.read(self._text, self._position)
            emit(piece)
            if json_object.is_broken or json_object.is_complete or self._is_finished:
                return
            yield

    def _buffered_call(self, opening: regex.Pattern) -> Found:
        """Read the object of a call whose keys have another order, or whose arguments are text or missing.

        Its parts can be told apart at its end only, so nothing is emitted before.
        """
        if not (yield from self._match(regex.compile(opening.pattern + _FIRST_KEY.pattern))):
            return False
        before = opening.match(self._text, self._position)
        start = size = before.end() - self._position if before else 0
        json_object = JsonObject()
        pieces = []
        while True:
            piece, end = json_object.read(self._text, self._position + size)
            pieces.append(piece)
            size = end - self._position
            # Even a complete object that is too long is refused: else the result would depend on how the text arrives.
            if size - start > MAX_HELD_CHARS or json_object.is_broken:
                return False
            if json_object.is_complete:
                break
            if self._is_finished:
                return False
            yield
        call = _as_call("".join(pieces))
        if call is None or call[0] not in self.tools:
            return False
        self._start_call(call[0], self._position + size)
        self._emit_arguments(call[1])
        return True


def _as_call(text: str) -> tuple[str, str] | None:
    """Return the name and the arguments, as JSON, of the call that a JSON object describes, or None."""
    try:
        call: Any = read_json(text)
        if isinstance(call.get("function"), dict):
            call = call["function"]
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            arguments = read_json(arguments or "{}")
        arguments = {} if arguments is None else arguments
        name = call.get("name") or call.get("function")
        if isinstance(name, str) and isinstance(arguments, dict):
            return name, json.dumps(arguments, ensure_ascii=False)
    except (ValueError, RecursionError):
        pass
    return None


_CONTROL_CHARACTERS = {code: json.dumps(chr(code))[1:-1] for code in range(32)}
_STRING_CHARACTERS = regex.compile(r'[^"\\]*+')
# Numbers, words such as true, and what separates values. Without `_` and `<`, so that `[TOOL_CALLS]` and tags break an
# object: else an object that is never finished would be read to the end of the text.
_BETWEEN = regex.compile(r"[a-zA-Z0-9\s.,:+-]*+")


class JsonObject:
    """Finds the end of a JSON object while its text arrives. Only strings and brackets are checked.

    Args:
        is_open: the object's first bracket was read before.

    Attributes:
        is_complete: the object's last bracket was read.
        is_broken: the text that follows the part that was read cannot belong to an object.
    """

    def __init__(self, is_open: bool = False):
        self.is_complete = self.is_broken = False
        self._open = ["}"] if is_open else []  # the brackets that must follow
        self._in_string = self._is_escaped = False

    def read(self, text: str, start: int) -> tuple[str, int]:
        """Read on from the index `start`.

        Returns:
            The object's part of the text, with control characters of strings escaped, and the index after it.
        """
        pieces = []
        index = start
        while index < len(text) and not self.is_complete and not self.is_broken:
            end = self._read_string(text, index) if self._in_string else self._read_bracket(text, index)
            piece = text[index:end]
            pieces.append(piece.translate(_CONTROL_CHARACTERS) if self._in_string else piece)
            index = end
        return "".join(pieces), index

    def _read_string(self, text: str, index: int) -> int:
        """Read characters of a string, an escape, or the quote that ends the string. Return the index after it."""
        if self._is_escaped:
            self._is_escaped = False
            return index + 1
        found = _STRING_CHARACTERS.match(text, index)
        if found and found.end() > index:
            return found.end()
        self._is_escaped = text[index] == "\\"
        self._in_string = self._is_escaped
        return index + 1

    def _read_bracket(self, text: str, index: int) -> int:
        """Read a bracket, the quote that starts a string, or what is between them. Return the index after it."""
        found = _BETWEEN.match(text, index)
        if found and found.end() > index:
            return found.end()
        character = text[index]
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._open.append("}" if character == "{" else "]")
        elif self._open and character == self._open[-1]:
            self._open.pop()
            self.is_complete = not self._open
        else:
            self.is_broken = True
            return index
        return index + 1


class HermesParser(JsonCallParser):
    """Reads `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, as Hermes, Qwen2.5 and Qwen3 write it."""

    call_start = regex.compile("<tool_call>")
    opening = regex.compile(rf"<tool_call>{_SPACE}")
    closing = regex.compile(r"[\s}]{0,64}</tool_call>")
    limit = regex.compile("</tool_call>")


class Llama3Parser(JsonCallParser):
    """Reads `{"name": "f", "parameters": {...}}` where the response starts, or after `<|python_tag|>`."""

    call_start = regex.compile(r"<\|python_tag\|>")
    opening = regex.compile(rf"[\s;,]{{0,64}}(?:<\|python_tag\|>)?{_SPACE}")

    def _respond(self) -> Wait:
        while (yield from self._call()):
            pass
        yield from super()._respond()


class MistralParser(JsonCallParser):
    """Reads `[TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]` and `[TOOL_CALLS]f[ARGS]{...}`."""

    call_start = limit = regex.compile(r"\[TOOL_CALLS\]")
    opening = regex.compile(rf"\[TOOL_CALLS\]{_SPACE}\[?{_SPACE}")
    closing = regex.compile(rf"{_SPACE}\]")
    next_opening = regex.compile(rf"{_SPACE},{_SPACE}")
    named = regex.compile(
        rf"\[TOOL_CALLS\]{_SPACE}([\w.-]{{1,128}})(?:\[CALL_ID\]\w{{1,64}})?(?:\[ARGS\])?{_SPACE}(?=\{{)"
    )

    def _call(self) -> Found:
        named = yield from self._match(self.named)
        if named:
            if named[1] not in self.tools:
                return False
            self._start_call(named[1], named.end())
            yield from self._read_arguments()
            yield from self._end_call()
            return True
        if not (yield from self._json_call(self.opening)):
            return False
        while (yield from self._json_call(self.next_opening)):
            pass
        return True


# -- calls that are tags ----------------------------------------------------------------------------------------------


class Qwen3CoderParser(OutputParser):
    """Reads `<tool_call><function=f><parameter=key>value</parameter>...</function></tool_call>`.

    A value is JSON where the function's schema says so, else text. It ends at the end tag that is followed by
    another tag, so a value may have such a tag inside.
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

    def _call(self) -> Found:
        head = yield from self._match(self.function)
        if not head or head[1] not in self.tools:
            return False
        self._start_call(head[1], head.end())
        yield from self._parameters(head[1])
        is_complete = False
        # The client must see that a call without an end tag is not complete.
        for end in (self.end_function, self.end_call):
            if (yield from self._skip(end)) and not is_complete:
                self._emit_arguments("}")
                is_complete = True
        yield from self._end_call()
        return True

    def _parameters(self, name: str) -> Wait:
        self._emit_arguments("{")
        separator = ""
        while parameter := (yield from self._match(self.parameter)):
            self._position = parameter.end()
            yield from self._skip(self.line_break)
            self._emit_arguments(f"{separator}{_json(parameter[1])}: ")
            separator = ", "
            types = self.tools.value_types(name, parameter[1])
            if types == {"string"}:
                yield from self._text_value()
            else:
                yield from self._json_value(types)

    def _text_value(self) -> Wait:
        self._emit_arguments('"')
        if (yield from self._emit_until(self.end_parameter, lambda text: self._emit_arguments(_json(text)[1:-1]))):
            yield from self._skip(self.end_parameter)
            self._emit_arguments('"')

    def _json_value(self, types: set[str]) -> Wait:
        pieces: list[str] = []
        is_complete = yield from self._emit_until(self.end_parameter, pieces.append)
        text = "".join(pieces)
        if is_complete:
            yield from self._skip(self.end_parameter)
            text = as_json(text, types)
        self._emit_arguments(text)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


PARSERS: dict[str, type[OutputParser]] = {
    "none": OutputParser,
    "hermes": HermesParser,
    "qwen3_coder": Qwen3CoderParser,
    "llama3": Llama3Parser,
    "mistral": MistralParser,
}
