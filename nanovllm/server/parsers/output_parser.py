"""Finds tool calls in a model's text while the text arrives.

A parser is a generator that waits for more text where it cannot decide yet. What it finds depends on the text alone,
not on the pieces in which the text arrives. Once a call's name is known, its arguments are passed on as they come. If
they are not a JSON object after all, the end of the call says so, so that no client runs half a call.

Patterns match a limited number of characters, so that little text is held back and looked at again.
"""

from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

import regex

from nanovllm.server.events import CallArguments, CallEnd, CallStart, Event, Text, joined
from nanovllm.server.json_text import read_json
from nanovllm.server.schemas import ToolSchemas

T = TypeVar("T")
# A part of a parser, which returns a T. A yield asks for more text.
Reader: TypeAlias = Generator[None, None, T]

NEVER = regex.compile("(?!)")
SPACE = r"\s{0,64}"
# The longest text that is held back until it is clear whether it is a call.
MAX_HELD_CHARS = 1 << 16


class OutputParser:
    """Turns the text of one sample into events. This class finds no tool calls; its subclasses do.

    Args:
        tools: the functions that can be called.
    """

    # Tags that may start a call inside other text.
    call_start = NEVER

    def __init__(self, tools: ToolSchemas):
        self.tools = tools
        self._text = ""
        self._position = 0  # the text that has no event yet starts here
        # Line breaks are held back, and belong to the call if one follows.
        self._num_newlines = 0
        self._num_calls = 0
        # The open call as the model wrote it, for `CallEnd.written`: its earlier pieces (None if no call is open), and
        # where the rest of it starts in `_text`.
        self._written: list[str] | None = None
        self._written_start = 0
        self._arguments: list[str] = []
        self._is_finished = False
        self._events: list[Event] = []
        self._run = self._parse()

    def feed(self, text: str) -> list[Event]:
        """Return the events of the next piece of the text, as far as they are certain."""
        if self._written is not None:
            self._written.append(self._text[self._written_start : self._position])
        self._text = self._text[self._position :] + text
        self._position = self._written_start = 0
        return self._resume()

    def finish(self) -> list[Event]:
        """Return the events of the text that was held back. No more text comes."""
        self._is_finished = True
        return self._resume()

    def _resume(self) -> list[Event]:
        next(self._run, None)
        events, self._events = self._events, []
        return joined(events)

    def _parse(self) -> Reader[None]:
        """Read the whole output."""
        yield from self._respond()

    def _respond(self) -> Reader[None]:
        """Read text and calls to the end."""
        while (yield from self._emit_until(self.call_start, self._emit_text)):
            if not (yield from self._call()):
                self._emit_text(self._text[self._position])
                self._position += 1
        self._emit_newlines()

    def _call(self) -> Reader[bool]:
        """Read the calls that follow. Return False, and stay, if what follows is no call of a known function."""
        yield from ()  # makes this a generator, as in subclasses
        return False

    # -- steps --------------------------------------------------------------------------------------------------------

    def _match(self, pattern: regex.Pattern) -> Reader[regex.Match | None]:
        """Wait until more text cannot change the result, and return the match at this place, or None. Do not move."""
        while True:
            found = pattern.match(self._text, self._position, partial=not self._is_finished)
            if found is None or not found.partial:
                return found
            yield

    def _skip(self, pattern: regex.Pattern) -> Reader[bool]:
        """Go past the text that follows if it matches."""
        found = yield from self._match(pattern)
        if found:
            self._position = found.end()
        return found is not None

    def _skip_newlines(self) -> Reader[None]:
        while True:
            kept = self._text[self._position :].lstrip("\n")
            self._position = len(self._text) - len(kept)
            if kept or self._is_finished:
                return
            yield

    def _emit_until(self, tags: regex.Pattern, emit: Callable[[str], None]) -> Reader[bool]:
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
        self._written = ["\n" * self._num_newlines]
        self._written_start = self._position
        self._arguments = []
        self._num_newlines = 0
        self._position = arguments_start

    def _emit_arguments(self, text: str) -> None:
        """Emit a piece of the arguments of the newest call."""
        if text:
            self._arguments.append(text)
            self._events.append(CallArguments(self._num_calls - 1, text))

    def _end_call(self) -> Reader[None]:
        """End the newest call with the line breaks that follow it."""
        yield from self._skip_newlines()
        written = "".join(self._written or ()) + self._text[self._written_start : self._position]
        self._events.append(CallEnd(self._num_calls - 1, _is_object("".join(self._arguments)), written))
        self._written = None
        self._arguments = []


def _is_object(text: str) -> bool:
    try:
        return isinstance(read_json(text), dict)
    except (ValueError, RecursionError):
        return False
