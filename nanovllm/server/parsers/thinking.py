"""Separates a model's thinking from its response while the text arrives."""

from dataclasses import replace

import regex

from nanovllm.server.events import CallArguments, CallEnd, CallStart, Event, Text, Thinking
from nanovllm.server.parsers.output_parser import MAX_HELD_CHARS, OutputParser, Reader
from nanovllm.server.schemas import ToolSchemas

_THINK = regex.compile(r"\n{0,16}<think>")
_END_THINK = regex.compile("</think>")


class ThinkingParser(OutputParser):
    """Reads thinking, and then a response with a parser of its own.

    All text before `</think>` is thinking, and calls that the model drafts there are not made. But models may forget
    the tag. So if it never comes, calls that end the output are made. They are held back until then. A second parser
    finds them: it reads the thinking as if it were a response.

    Args:
        parser: the class of the parser of responses.
        tools: as in `OutputParser`.
        is_open: the prompt has opened the thinking. Otherwise the output may start with `<think>`.
    """

    def __init__(self, parser: type[OutputParser], tools: ToolSchemas, is_open: bool):
        self._parser_class = parser
        self._is_open = is_open
        self._draft_parser = parser(tools)
        # The thinking that has no event yet, and the events of the calls at its start.
        self._held = ""
        self._calls: list[CallStart | CallArguments | CallEnd] = []
        super().__init__(tools)

    def _parse(self) -> Reader[None]:
        if self._is_open or (yield from self._skip(_THINK)):
            yield from self._skip_newlines()
            if (yield from self._emit_until(_END_THINK, self._hold_thinking)):
                self._pass_thinking(len(self._held.rstrip("\n")))
                yield from self._skip(_END_THINK)
                yield from self._skip_newlines()
            else:
                self._make_drafted_calls()
        yield from self._respond()

    def _hold_thinking(self, text: str) -> None:
        """Pass thinking on, but hold back the calls at its end, up to a number of characters."""
        while text:
            num_chars = MAX_HELD_CHARS - len(self._held)
            piece = text[:num_chars]
            text = text[num_chars:]
            self._held += piece
            self._read_drafts(self._draft_parser.feed(piece))
            if len(self._held) == MAX_HELD_CHARS:
                self._pass_thinking(MAX_HELD_CHARS)
                self._draft_parser = self._parser_class(self.tools)
                self._calls = []

    def _read_drafts(self, events: list[Event]) -> None:
        """Hold calls back. Pass thinking on up to the end of a text that follows them."""
        for event in events:
            if isinstance(event, Text | Thinking):
                num_chars = sum(len(call.written) for call in self._calls if isinstance(call, CallEnd))
                self._pass_thinking(num_chars + len(event.text))
                self._calls = []
            else:
                self._calls.append(event)

    def _make_drafted_calls(self) -> None:
        """Make the calls at the end of an output that is all thinking, if they are complete."""
        self._read_drafts(self._draft_parser.finish())
        if self._calls and all(call.is_complete for call in self._calls if isinstance(call, CallEnd)):
            first = self._calls[0].index
            self._events += [replace(call, index=call.index - first) for call in self._calls]
        else:
            self._pass_thinking(len(self._held))

    def _pass_thinking(self, num_chars: int) -> None:
        """Pass on the first characters of the thinking that is held back."""
        if num_chars:
            self._events.append(Thinking(self._held[:num_chars]))
        self._held = self._held[num_chars:]

    def _respond(self) -> Reader[None]:
        parser = self._parser_class(self.tools)
        while True:
            self._events += parser.feed(self._text[self._position :])
            self._position = len(self._text)
            if self._is_finished:
                self._events += parser.finish()
                return
            yield
