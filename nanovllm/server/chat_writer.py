"""Chat completions in OpenAI's form: whole ones, and chunks of streams."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.outputs import LogprobRows
from nanovllm.server.events import CallArguments, CallEnd, CallStart, Text, Thinking
from nanovllm.server.generation import Piece, SamplePiece
from nanovllm.server.streaming import LONG_LOGPROBS, LongEvent, check_num_logprobs, json_logprob

_CHUNK = "chat.completion.chunk"


@dataclass(frozen=True)
class Form:
    """The fields that all chunks of a response share, and which log-probabilities and usage they show.

    A whole response uses it too.

    Args:
        request_id: the response's id.
        model: the model's name in the API.
        num_top: how many of the most likely tokens to show for each token; None shows no log-probabilities.
        bytes_of: returns a token's bytes.
        has_usage: whether a stream ends with a chunk that has the usage.
        continuous_usage: whether its other chunks have the usage so far.
    """

    request_id: str
    model: str
    num_top: int | None
    bytes_of: Callable[[int], bytes]
    has_usage: bool = False
    continuous_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def logprobs_per_token(self) -> int:
        """How many log-probabilities a token has: its own and the most likely ones."""
        return 0 if self.num_top is None else self.num_top + 1

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a response or a chunk, as `kind` says, without its usage."""
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def logprobs(self, token_ids: Iterable[int], rows: LogprobRows | None) -> Iterator[dict[str, Any]]:
        """Yield the log-probabilities of some tokens; none if they are not to be shown."""
        if self.num_top is not None and rows is not None:
            for token_id, row in zip(token_ids, rows, strict=True):
                yield self._token(token_id, row or {})

    def _token(self, token_id: int, row: dict) -> dict[str, Any]:
        most_likely = sorted(row.items(), key=lambda entry: entry[1].rank)[: self.num_top]
        shown = self._entry(token_id, row[token_id].logprob)
        shown["top_logprobs"] = [self._entry(top_id, top.logprob) for top_id, top in most_likely]
        return shown

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelling = self.bytes_of(token_id)
        text = spelling.decode(errors="replace")
        return {"token": text, "logprob": json_logprob(logprob), "bytes": list(spelling)}


class Usage:
    """Counts the tokens of a response."""

    def __init__(self):
        self.num_prompt = self.num_cached = self.num_generated = 0

    def add(self, piece: Piece) -> None:
        """Count the tokens of a piece."""
        self.num_prompt, self.num_cached = piece.num_prompt_tokens, piece.num_cached_tokens
        self.num_generated += sum(len(sample.token_ids) for sample in piece.samples)

    def fields(self) -> dict[str, Any]:
        """Return the counts in OpenAI's form."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


class WholeResponse:
    """Collects the pieces of a response."""

    def __init__(self, form: Form):
        self.form = form
        self.usage = Usage()
        self.choices: dict[int, _Choice] = {}

    def add(self, piece: Piece) -> None:
        """Add the next piece. Raise ApiError if the response has too many log-probabilities."""
        self.usage.add(piece)
        check_num_logprobs(self.num_logprobs)
        for sample in piece.samples:
            self.choices.setdefault(sample.index, _Choice(sample.index)).add(sample)

    @property
    def num_logprobs(self) -> int:
        """How many log-probabilities the response has so far."""
        return self.usage.num_generated * self.form.logprobs_per_token

    def body(self) -> dict[str, Any]:
        """Return the response. Its log-probabilities are iterators, for `long_response`."""
        choices = [self.choices[index].body(self.form) for index in sorted(self.choices)]
        return self.form.body("chat.completion", choices) | {"usage": self.usage.fields()}


class _Choice:
    """One sample of a whole response."""

    def __init__(self, index: int):
        self.index = index
        self.text, self.thinking = "", ""
        self.calls: list[dict[str, Any]] = []
        self.pieces: list[SamplePiece] = []

    def add(self, sample: SamplePiece) -> None:
        self.pieces.append(sample)
        for event in sample.events:
            if isinstance(event, Text):
                self.text += event.text
            elif isinstance(event, Thinking):
                self.thinking += event.text
            elif isinstance(event, CallStart):
                self.calls.append(_call(event.name))
            elif isinstance(event, CallArguments):
                self.calls[event.index]["function"]["arguments"] += event.text

    def body(self, form: Form) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.thinking:
            message |= _thinking(self.thinking)
        if self.calls:
            message |= {"content": self.text or None, "tool_calls": self.calls}
        last = self.pieces[-1]
        logprobs = None
        if form.num_top is not None:
            tokens = (token for piece in self.pieces for token in form.logprobs(piece.token_ids, piece.logprobs))
            logprobs = {"content": tokens, "refusal": None}
        return {
            "index": self.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }


class ChunkWriter:
    """Turns the pieces of a response into the chunks of a stream."""

    def __init__(self, form: Form):
        self.form = form
        self.usage = Usage()
        # For each sample that has started, the tokens' log-probabilities that no chunk has had yet.
        self.pending: dict[int, list[dict[str, Any]]] = {}

    def count(self, piece: Piece) -> None:
        """Count the tokens of the next piece. Then ask for the chunks of each of its samples."""
        self.usage.add(piece)

    def takes_long(self, piece: Piece) -> bool:
        """Return whether `chunks` of all samples takes milliseconds, because of their log-probabilities."""
        return sum(map(self._num_logprobs, piece.samples)) > LONG_LOGPROBS

    def last(self) -> list[dict[str, Any]]:
        """Return the chunk with the usage, if the stream ends with one."""
        if not self.form.has_usage:
            return []
        return [self.form.body(_CHUNK, []) | {"usage": self.usage.fields()}]

    def chunks(self, sample: SamplePiece) -> list[dict[str, Any]]:
        """Return the chunks of a sample's next piece. Raise ApiError if they have too many log-probabilities."""
        index = sample.index
        chunks = []
        check_num_logprobs(self._num_logprobs(sample))
        if index not in self.pending:
            chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
        logprobs = [*self.pending.get(index, ()), *self.form.logprobs(sample.token_ids, sample.logprobs)]
        for event in sample.events:
            if not isinstance(event, CallEnd):
                chunks.append(self._chunk(index, _delta(event), logprobs))
                logprobs = []
        if sample.finish_reason is not None:
            ending = {"finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason}
            chunks.append(self._chunk(index, {}, logprobs, ending))
            logprobs = []
        if self._are_many(logprobs):  # their text is held back, as it may be a call
            chunks.append(self._chunk(index, {"content": ""}, logprobs))
            logprobs = []
        self.pending[index] = logprobs
        return chunks

    def _num_logprobs(self, sample: SamplePiece) -> int:
        """Return how many log-probabilities the next chunks of a sample have."""
        num_tokens = len(self.pending.get(sample.index, ())) + len(sample.token_ids)
        return num_tokens * self.form.logprobs_per_token

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Sequence[dict] = (), ending: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        content = {"content": list(logprobs), "refusal": None} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": content, "finish_reason": None}
        chunk = self.form.body(_CHUNK, [choice | (ending or {})])
        if self.form.has_usage:
            chunk["usage"] = self.usage.fields() if self.form.continuous_usage else None
        return LongEvent(chunk) if self._are_many(logprobs) else chunk

    def _are_many(self, logprobs: Sequence[dict]) -> bool:
        return len(logprobs) * self.form.logprobs_per_token > LONG_LOGPROBS


def _delta(event: Text | Thinking | CallStart | CallArguments) -> dict[str, Any]:
    if isinstance(event, Text):
        return {"content": event.text}
    if isinstance(event, Thinking):
        return _thinking(event.text)
    if isinstance(event, CallStart):
        return {"tool_calls": [{"index": event.index, **_call(event.name)}]}
    return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


def _thinking(text: str) -> dict[str, str]:
    """Return thinking under both names that clients read."""
    return {"reasoning_content": text, "reasoning": text}


def _call(name: str) -> dict[str, Any]:
    """Return a tool call with a new id and no arguments yet."""
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": {"name": name, "arguments": ""}}
