"""Messages in Anthropic's form: whole ones, and the events of streams."""

from collections.abc import Iterator
from typing import Any

from nanovllm.server.blocks import Block, Blocks, Change, Grown, Started
from nanovllm.server.events import CallArguments, CallEnd, CallStart, Event, Text, Thinking, joined
from nanovllm.server.generation import Piece, SamplePiece
from nanovllm.server.json_text import read_cut_json, read_json

# Clients drop thinking without a signature, and send back what they keep.
_SIGNATURE = "nanovllm"
# For each kind of block: the type of its deltas, and the key of their text.
_DELTAS = {
    Text: ("text_delta", "text"),
    Thinking: ("thinking_delta", "thinking"),
    CallStart: ("input_json_delta", "partial_json"),
}


class MessageWriter:
    """The response to a request, as it grows.

    Args:
        message_id: the response's id.
        model: the model's name in the API.
        max_tokens: how many tokens the client allows.
    """

    def __init__(self, message_id: str, model: str, max_tokens: int):
        self.message_id = message_id
        self.model = model
        self.max_tokens = max_tokens
        self.blocks = Blocks()
        self.num_input = self.num_cached = self.num_output = 0
        self.stop: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}
        # The events of a call that has not ended. Clients may run what they see of a call, so they see whole ones.
        self._call: list[Event] = []
        self._has_started = False

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Add the next piece, and return the events that show it."""
        events = []
        if not self._has_started:
            self._has_started = True
            self.num_input = piece.num_prompt_tokens
            self.num_cached = piece.num_cached_tokens
            events = [{"type": "message_start", "message": self.body()}, {"type": "ping"}]
        for sample in piece.samples:
            self.num_output += len(sample.token_ids)
            changes = [*self.blocks.feed(self._usable(sample))]
            if sample.finish_reason is not None:
                changes += self.blocks.finish()
            events += [event for change in changes for event in _events(change)]
            if sample.finish_reason is not None:
                self.stop = self._stop(sample)
                events.append({"type": "message_delta", "delta": self.stop, "usage": self.usage()})
                events.append({"type": "message_stop"})
        # While a call is held back, a client must see that the response goes on.
        return events or [{"type": "ping"}]

    def body(self) -> dict[str, Any]:
        """Return the message so far."""
        content = [_content(block) for block in self.blocks.all]
        message = {"id": self.message_id, "type": "message", "role": "assistant", "model": self.model}
        return message | {"content": content, **self.stop, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return how many tokens there are. In this API, input tokens do not include the cached ones."""
        return {
            "input_tokens": self.num_input - self.num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.num_cached,
            "output_tokens": self.num_output,
        }

    def _usable(self, sample: SamplePiece) -> Iterator[Event]:
        """Yield the events of a piece. A call comes as a whole, and as text if it is not complete.

        As in Anthropic's API, a call that a token limit has cut off still is one, with its arguments so far.
        """
        for event in sample.events:
            if isinstance(event, CallStart | CallArguments):
                self._call.append(event)
            elif isinstance(event, CallEnd):
                arguments = "".join(part.text for part in self._call if isinstance(part, CallArguments))
                is_cut = sample.finish_reason == "length" and event is sample.events[-1]
                if event.is_complete or (is_cut and _arguments(arguments) is not None):
                    yield from joined(self._call)
                else:
                    yield Text(event.written)
                self._call = []
            else:
                yield event

    def _stop(self, sample: SamplePiece) -> dict[str, str | None]:
        reason = "end_turn"
        sequence = None
        if sample.finish_reason == "tool_calls":
            reason = "tool_use"
        elif sample.finish_reason == "length":
            is_context_full = self.num_output < self.max_tokens
            reason = "model_context_window_exceeded" if is_context_full else "max_tokens"
        elif isinstance(sample.stop_reason, str):
            reason = "stop_sequence"
            sequence = sample.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}


def _events(change: Change) -> list[dict[str, Any]]:
    """Return the events of a change."""
    block = change.block
    if isinstance(change, Started):
        return [{"type": "content_block_start", "index": block.index, "content_block": _content(block)}]
    if isinstance(change, Grown):
        kind, key = _DELTAS[block.kind]
        return [_delta(block, {"type": kind, key: change.text})]
    stop = {"type": "content_block_stop", "index": block.index}
    if block.kind is Thinking:
        return [_delta(block, {"type": "signature_delta", "signature": _SIGNATURE}), stop]
    return [stop]


def _delta(block: Block, delta: dict[str, str]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": block.index, "delta": delta}


def _content(block: Block) -> dict[str, Any]:
    """Return the content block with the text so far."""
    if block.kind is Text:
        return {"type": "text", "text": block.text}
    if block.kind is Thinking:
        # In a stream, the signature comes in an event of its own.
        return {"type": "thinking", "thinking": block.text, "signature": _SIGNATURE if block.pieces else ""}
    return {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name, "input": _arguments(block.text) or {}}


def _arguments(text: str) -> dict[str, Any] | None:
    """Return the arguments of a tool call, or the first of them if they are cut off; None if they are not an object."""
    try:
        arguments = read_json(text)
    except (ValueError, RecursionError):
        try:
            arguments = read_cut_json(text)
        except ValueError:
            return None
    return arguments if isinstance(arguments, dict) else None
