"""What a request gives back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Logprob(NamedTuple):
    """A token's log-probability (float32, natural logarithm) and its rank, 1 being the most likely token's."""

    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of some tokens: each one's own, last in its row, and before it the k most likely ones'.

    Args:
        token_ids, logprobs: k + 1 each, for each token.
        ranks: the token's own.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    ranks: list[int]

    def alone(self, i: int) -> "TokenLogprobs":
        """Those of token i without the others'."""
        return TokenLogprobs(self.token_ids[i : i + 1], self.logprobs[i : i + 1], self.ranks[i : i + 1])

    def row(self, i: int, k: int) -> dict[int, Logprob]:
        """Those of token i and of the k most likely ones, by token id; a small vocabulary may have fewer."""
        token_ids, logprobs = self.token_ids[i], self.logprobs[i]
        row = {token_ids[j]: Logprob(logprobs[j], j + 1) for j in range(min(k, len(token_ids) - 1))}
        row.setdefault(token_ids[-1], Logprob(logprobs[-1], self.ranks[i]))
        return row


class LogprobRows(Sequence):
    """For each token the log-probabilities that were asked for, by token id.

    Reads as a list of dicts, which are made when they are looked at: making them costs more than a step. A
    prompt's first token, which nothing predicts, has None.
    """

    def __init__(self, rows: list[tuple[TokenLogprobs, int, int] | None] = ()):
        self._rows = list(rows)

    def append(self, part: TokenLogprobs, i: int, k: int) -> None:
        """Add token i of `part` with its k most likely ones."""
        self._rows.append((part, i, k))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int | slice) -> "dict[int, Logprob] | LogprobRows | None":
        if isinstance(place, slice):
            return LogprobRows(self._rows[place])
        row = self._rows[place]
        return None if row is None else row[0].row(*row[1:])

    def __reduce__(self) -> tuple:
        """Copies and pickles have these rows alone: a part holds those of all requests of its step."""
        return LogprobRows, ([row and (row[0].alone(row[1]), 0, row[2]) for row in self._rows],)

    def __add__(self, other: "LogprobRows") -> "LogprobRows":
        return LogprobRows(self._rows + other._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample.

    Args:
        index: which of the request's n samples.
        text: `token_ids` decoded; "" when the engine has no tokenizer.
        token_ids: what was generated, the token that ended it included.
        finish_reason: "stop" (end-of-sequence, stop id or string, or a structured output is complete), "length",
            "abort", or None while it goes on.
        stop_reason: the stop id or stop string that ended it, or why a structured output had to be aborted; None for an
            end-of-sequence token and all else.
        logprobs: for each token those asked for, by token id; None if none were.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: LogprobRows | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum over the drawn tokens; None if no logprobs were asked for."""
        if self.logprobs is None:
            return None
        return sum(row[token_id].logprob for row, token_id in zip(self.logprobs, self.token_ids, strict=True))


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's results; from `stream` and `AsyncLLM`, what is new since the one before.

    The fields of the first of `outputs` read as attributes (`out.text`) and, as nano-vLLM's dicts do, by key
    (`out["text"]`).

    Args:
        request_id: the id `add_request` gave it.
        prompt: the prompt's text, if it was given as text.
        prompt_token_ids: what went in.
        outputs: the samples, in their order; in a stream, those that have something new.
        finished: whether this is the last there is of the request.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        prompt_logprobs: None for the first token, then for each token those asked for; None if none were.
        time_to_first_token, total_time: seconds since the request was added; None as long as unknown.
        weight_version: of the weights when the request ended; 0 until `update_weights` was called.
    """

    request_id: int | str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: LogprobRows | None = None
    time_to_first_token: float | None = None
    total_time: float | None = None
    weight_version: int = 0

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[0].stop_reason

    @property
    def logprobs(self) -> LogprobRows | None:
        return self.outputs[0].logprobs

    def __getitem__(self, key: str) -> Any:
        if key in self.keys():
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> tuple[str, ...]:
        """The names that read by key, so that `dict(out)`, `"text" in out` and iteration work as a dict's."""
        return (*RequestOutput.__slots__, "text", "token_ids", "finish_reason", "stop_reason", "logprobs")


@dataclass(frozen=True, slots=True)
class Metrics:
    """What an engine has done since it was made, and what it is doing.

    Args:
        num_running, num_waiting: sequences (samples) that have a slot, and that wait for one.
        num_preemptions: times a running sequence was sent back to wait because the KV cache was full.
        num_steps, step_time: steps collected, and seconds spent in `step` for them in all.
        prompt_tokens, cached_tokens: tokens of admitted prompts, and how many of them the prefix cache had.
        generated_tokens: tokens drawn.
        kv_usage: share of the KV blocks that running sequences hold.
    """

    num_running: int
    num_waiting: int
    num_preemptions: int
    num_steps: int
    step_time: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    kv_usage: float

    @property
    def cache_hit_rate(self) -> float:
        """Share of the prompt tokens that the prefix cache had."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def mean_step_time(self) -> float:
        """Seconds."""
        return self.step_time / self.num_steps if self.num_steps else 0.0
