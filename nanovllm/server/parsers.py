"""Finds thinking and tool calls in a model's text while the text arrives."""

from collections.abc import Generator

import regex

from nanovllm.server.events import Event, Text, Thinking

# A part of a parser: it yields to wait for more text.
Waits = Generator[None, None, None]

_THINK = regex.compile(r"\n{0,16}<think>")
_END_THINK = regex.compile("</think>")
_NOTHING = regex.compile("(?!)")


class OutputParser:
    """Turns the text of one sample into events. This class finds no tool calls; its subclasses do.

    The parser is a generator that waits for more text where it cannot decide yet. What it finds depends on the text
    alone, not on the pieces in which the text arrives.

    Args:
        in_thinking: the output starts inside a thinking tag that the prompt has opened.
        finds_thinking: the output may start with a thinking tag.
    """

    def __init__(self, in_thinking: bool = False, finds_thinking: bool = False):
        self._in_thinking, self._finds_thinking = in_thinking, finds_thinking
        # The text that has no event yet starts at `_at`.
        self._text, self._at = "", 0
        # Line breaks held back. They are dropped if a tag follows.
        self._num_newlines = 0
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
        return events

    def _parse(self) -> Waits:
        yield
        if self._in_thinking or (self._finds_thinking and (yield from self._skip(_THINK))):
            yield from self._skip_newlines()
            if (yield from self._pass_until(_END_THINK, Thinking)):
                yield from self._skip(_END_THINK)
                yield from self._skip_newlines()
        yield from self._pass_until(_NOTHING, Text)

    # -- steps of a parser --------------------------------------------------------------------------------------------

    def _match(self, pattern: regex.Pattern) -> Generator[None, None, regex.Match | None]:
        """Match the text that follows as soon as more text cannot change the result. Do not go past it."""
        while True:
            found = pattern.match(self._text, self._at, partial=not self._is_finished)
            if found is None or not found.partial:
                return found
            yield

    def _skip(self, pattern: regex.Pattern) -> Generator[None, None, bool]:
        """Go past what matches the pattern, if the text that follows does."""
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

    def _pass_until(self, tags: regex.Pattern, kind: type[Text | Thinking]) -> Generator[None, None, bool]:
        """Pass text on up to one of `tags`, and return whether there is one."""
        while True:
            found = tags.search(self._text, self._at, partial=not self._is_finished)
            self._pass(found.start() if found else len(self._text), kind)
            if found and not found.partial:
                return True
            if self._is_finished:
                break
            yield
        if self._num_newlines:
            self._events.append(kind("\n" * self._num_newlines))
            self._num_newlines = 0
        return False

    def _pass(self, end: int, kind: type[Text | Thinking]) -> None:
        """Pass text on up to the index `end`, but hold back the line breaks before it."""
        text = self._text[self._at : end]
        kept = text.rstrip("\n")
        if kept:
            self._events.append(kind("\n" * self._num_newlines + kept))
            self._num_newlines = 0
        self._num_newlines += len(text) - len(kept)
        self._at = end
