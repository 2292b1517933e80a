"""Response objects of OpenAI's responses API: whole ones, and the events of streams."""

from itertools import count
from typing import Any

from nanovllm.server.blocks import Block, Blocks, Change, Grown, Started
from nanovllm.server.errors import ApiError
from nanovllm.server.events import CallStart, Text, Thinking
from nanovllm.server.generation import Piece

# For each kind of block: the name of its text in the types of events, and the text's key in its "done" event.
_NAMES = {
    Text: ("output_text", "text"),
    Thinking: ("reasoning_text", "text"),
    CallStart: ("function_call_arguments", "arguments"),
}
_ID_PREFIXES = {Text: "msg", Thinking: "rs", CallStart: "fc"}


class ResponseWriter:
    """The response to a request, as it grows.

    Args:
        fields: those that do not change.
    """

    def __init__(self, fields: dict[str, Any]):
        self.fields = fields
        self.blocks = Blocks()
        self.num_input = self.num_cached = self.num_output = 0
        self.finish_reason: str | None = None
        self.has_failed = False
        self._numbers = count()

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Add the next piece, and return the events that show it."""
        events = []
        if not self.num_input:
            self.num_input = piece.num_prompt_tokens
            self.num_cached = piece.num_cached_tokens
            events.append(self._event("response.created", response=self.body()))
            events.append(self._event("response.in_progress", response=self.body()))
        for sample in piece.samples:
            self.num_output += len(sample.token_ids)
            self.finish_reason = sample.finish_reason
            changes = [*self.blocks.feed(sample.events)]
            if sample.finish_reason is not None:
                changes += self.blocks.finish()
            events += [event for change in changes for event in self._events(change)]
            if sample.finish_reason is not None:
                events.append(self._event(f"response.{self.status}", response=self.body()))
        return events

    def failed(self, error: ApiError) -> dict[str, Any]:
        """Return the event of an error in the midst of a response."""
        self.has_failed = True
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        body = self.body() | {"status": "failed", "error": {"code": code, "message": error.message}}
        return self._event("response.failed", response=body)

    @property
    def status(self) -> str:
        if self.finish_reason is None:
            return "in_progress"
        has_calls = any(block.kind is CallStart for block in self.blocks.all)
        is_complete = self.finish_reason == ("tool_calls" if has_calls else "stop")
        return "completed" if is_complete else "incomplete"

    def body(self) -> dict[str, Any]:
        """Return the response so far."""
        return self.fields | {
            "status": self.status,
            # The API has no reason for a call that the model or a stop string has left incomplete.
            "incomplete_details": {"reason": "max_output_tokens"} if self.finish_reason == "length" else None,
            "output": [_item(block, self._item_status(block)) for block in self.blocks.all],
            "usage": self._usage() if self.finish_reason else None,
        }

    def _item_status(self, block: Block) -> str:
        if block.kind is CallStart:
            return "completed" if block.is_complete else "incomplete"
        is_cut = (self.has_failed or self.finish_reason == "length") and block is self.blocks.all[-1]
        return "incomplete" if is_cut else "completed"

    def _usage(self) -> dict[str, Any]:
        """Return how many tokens there are. Those of thinking are estimated from its fraction of all characters."""
        num_chars = sum(len(block.text) for block in self.blocks.all)
        num_thinking_chars = sum(len(block.text) for block in self.blocks.all if block.kind is Thinking)
        thinking_fraction = num_thinking_chars / max(1, num_chars)
        return {
            "input_tokens": self.num_input,
            "input_tokens_details": {"cached_tokens": self.num_cached, "cache_write_tokens": 0},
            "output_tokens": self.num_output,
            "output_tokens_details": {"reasoning_tokens": round(thinking_fraction * self.num_output)},
            "total_tokens": self.num_input + self.num_output,
        }

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _events(self, change: Change) -> list[dict[str, Any]]:
        """Return the events of a change."""
        block = change.block
        if isinstance(change, Started):
            return self._start(block)
        if isinstance(change, Grown):
            name, _ = _NAMES[block.kind]
            return [self._event(f"response.{name}.delta", **_address(block), **_logprobs(block), delta=change.text)]
        return self._finish(block)

    def _start(self, block: Block) -> list[dict[str, Any]]:
        item = _item(block, "in_progress")
        if block.kind is CallStart:
            return [self._event("response.output_item.added", output_index=block.index, item=item)]
        item["content"] = []  # the next event adds the part
        return [
            self._event("response.output_item.added", output_index=block.index, item=item),
            self._event("response.content_part.added", **_address(block), part=_part(block)),
        ]

    def _finish(self, block: Block) -> list[dict[str, Any]]:
        name, key = _NAMES[block.kind]
        events = [self._event(f"response.{name}.done", **_address(block), **_logprobs(block), **{key: block.text})]
        if block.kind is not CallStart:
            events.append(self._event("response.content_part.done", **_address(block), part=_part(block)))
        item = _item(block, self._item_status(block))
        return [*events, self._event("response.output_item.done", output_index=block.index, item=item)]


def _item_id(block: Block) -> str:
    return f"{_ID_PREFIXES[block.kind]}_{block.id}"


def _address(block: Block) -> dict[str, Any]:
    """Return the fields of an event that say which item it belongs to, and which part of the item."""
    address: dict[str, Any] = {"item_id": _item_id(block), "output_index": block.index}
    if block.kind is not CallStart:
        address["content_index"] = 0
    return address


def _logprobs(block: Block) -> dict[str, list]:
    """Return the log-probabilities that events of texts must have: none."""
    return {"logprobs": []} if block.kind is Text else {}


def _part(block: Block) -> dict[str, Any]:
    """Return the only part of a message or of thinking."""
    if block.kind is Thinking:
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _item(block: Block, status: str) -> dict[str, Any]:
    """Return the output item with the text so far."""
    item: dict[str, Any] = {"id": _item_id(block), "status": status}
    if block.kind is CallStart:
        call = {"type": "function_call", "call_id": f"call_{block.id}", "name": block.name, "arguments": block.text}
        return item | call
    if block.kind is Thinking:
        return item | {"type": "reasoning", "summary": [], "content": [_part(block)]}
    return item | {"type": "message", "role": "assistant", "content": [_part(block)]}
