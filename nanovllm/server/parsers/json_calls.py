"""Formats whose tool calls are JSON objects."""

import json
from collections.abc import Callable
from typing import Any

import regex

from nanovllm.server.json_text import read_json
from nanovllm.server.parsers.json_object import JsonObject
from nanovllm.server.parsers.output_parser import MAX_HELD_CHARS, NEVER, SPACE, OutputParser, Reader

_NAME = regex.compile(
    rf'\{{{SPACE}"name"{SPACE}:{SPACE}"([^"\\]{{1,128}})"{SPACE},'
    rf'{SPACE}"(?:arguments|parameters)"{SPACE}:{SPACE}(?=\{{)'
)
_FIRST_KEY = regex.compile(rf'\{{{SPACE}"(?:name|type|id|function|arguments|parameters)"')
_AFTER_ARGUMENTS = regex.compile(rf'{SPACE}(?:,{SPACE}"|\}})')


class JsonCallParser(OutputParser):
    """Reads calls such as `{"name": "f", "arguments": {...}}`. Subclasses say what stands around them.

    Attributes:
        opening: what stands before the object of a call.
        closing: what stands after it.
        limit: what ends arguments that are not JSON.
    """

    opening = closing = regex.compile("")
    limit = NEVER

    def _call(self) -> Reader[bool]:
        return (yield from self._json_call(self.opening))

    def _json_call(self, opening: regex.Pattern) -> Reader[bool]:
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

    def _read_arguments(self) -> Reader[bool]:
        """Pass an object on as the arguments of the newest call. Return whether it is complete."""
        json_object = JsonObject()
        yield from self._read_object(json_object, self._emit_arguments)
        if json_object.is_broken:
            yield from self._emit_until(self.limit, self._emit_arguments)
        return json_object.is_complete

    def _read_object(self, json_object: JsonObject, emit: Callable[[str], None]) -> Reader[None]:
        """Read an object up to its end, or to what cannot belong to an object."""
        while True:
            piece, self._position = json_object.read(self._text, self._position)
            emit(piece)
            if json_object.is_broken or json_object.is_complete or self._is_finished:
                return
            yield

    def _buffered_call(self, opening: regex.Pattern) -> Reader[bool]:
        """Read the object of a call whose keys have another order, or whose arguments are text or missing.

        Its parts can be told apart at its end only, so nothing is emitted before.
        """
        if not (yield from self._match(regex.compile(opening.pattern + _FIRST_KEY.pattern))):
            return False
        before = opening.match(self._text, self._position)
        # Both count from `_position`, because `feed` moves the text.
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


class HermesParser(JsonCallParser):
    """Reads `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, as Hermes, Qwen2.5 and Qwen3 write it."""

    call_start = regex.compile("<tool_call>")
    opening = regex.compile(rf"<tool_call>{SPACE}")
    closing = regex.compile(r"[\s}]{0,64}</tool_call>")
    limit = regex.compile("</tool_call>")


class Llama3Parser(JsonCallParser):
    """Reads `{"name": "f", "parameters": {...}}` where the response starts, or after `<|python_tag|>`."""

    call_start = regex.compile(r"<\|python_tag\|>")
    opening = regex.compile(rf"[\s;,]{{0,64}}(?:<\|python_tag\|>)?{SPACE}")

    def _respond(self) -> Reader[None]:
        while (yield from self._call()):
            pass
        yield from super()._respond()


class MistralParser(JsonCallParser):
    """Reads `[TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]` and `[TOOL_CALLS]f[ARGS]{...}`."""

    call_start = limit = regex.compile(r"\[TOOL_CALLS\]")
    opening = regex.compile(rf"\[TOOL_CALLS\]{SPACE}\[?{SPACE}")
    closing = regex.compile(rf"{SPACE}\]")
    next_opening = regex.compile(rf"{SPACE},{SPACE}")
    named = regex.compile(
        rf"\[TOOL_CALLS\]{SPACE}([\w.-]{{1,128}})(?:\[CALL_ID\]\w{{1,64}})?(?:\[ARGS\])?{SPACE}(?=\{{)"
    )

    def _call(self) -> Reader[bool]:
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
