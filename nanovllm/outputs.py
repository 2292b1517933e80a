"""The results of a request."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, overload


class Logprob(NamedTuple):
    """A token's log-probability (float32, natural logarithm) and its rank; the most likely token's rank is 1."""

    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at some positions: those of the k most likely tokens, then that of the position's own token.

    Args:
        token_ids, logprobs: for each position, k + 1 of them.
        ranks: for each position, the rank of its own token.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    ranks: list[int]

    def at(self, i: int) -> "TokenLogprobs":
        """Return those of position i alone."""
        return TokenLogprobs(self.token_ids[i : i + 1], self.logprobs[i : i + 1], self.ranks[i : i + 1])

    def row(self, i: int, k: int) -> dict[int, Logprob]:
        """Return those of the k most likely tokens and of the own token at position i, by token id.

        A small vocabulary may have fewer.
        """
        token_ids, logprobs = self.token_ids[i], self.logprobs[i]
        row = {token_ids[j]: Logprob(logprobs[j], j + 1) for j in range(min(k, len(token_ids) - 1))}
        row.setdefault(token_ids[-1], Logprob(logprobs[-1], self.ranks[i]))
        return row


# One step's log-probabilities, a position in them, and how many of the most likely tokens were requested.
_Row: TypeAlias = tuple[TokenLogprobs, int, int]


class LogprobRows(Sequence[dict[int, Logprob] | None]):
    """The requested log-probabilities of each token, by token id.

    Reads as a list of dicts. They are made when they are read, because making them costs more than a step. The entry
    of a prompt's first token is None, because nothing predicts it.
    """

    def __init__(self, rows: Iterable[_Row | None] = ()):
        self._rows = list(rows)

    def append(self, step: TokenLogprobs, i: int, k: int) -> None:
        """Add position i of a step's log-probabilities, with the k most likely tokens."""
        self._rows.append((step, i, k))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob] | None: ...

    @overload
    def __getitem__(self, index: slice) -> "LogprobRows": ...

    def __getitem__(self, index: int | slice) -> "dict[int, Logprob] | LogprobRows | None":
        if isinstance(index, slice):
            return LogprobRows(self._rows[index])
        row = self._rows[index]
        if row is None:
            return None
        step, i, k = row
        return step.row(i, k)

    def __reduce__(self) -> tuple:
        """Copy and pickle only these rows: a step's log-probabilities are those of all its requests."""
        return LogprobRows, ([row and (row[0].at(row[1]), 0, row[2]) for row in self._rows],)

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
        index: the sample's number among the request's n samples, from 0.
        text: `token_ids` decoded; "" when the engine has no tokenizer.
        token_ids: the generated tokens, including the one that ended the sample.
        finish_reason: "stop" (end-of-sequence, stop id or string, or a structured output is complete), "length",
            "abort", or None while the sample goes on.
        stop_reason: the stop id or stop string that ended the sample, or why a structured output had to be aborted;
            None for an end-of-sequence token and in all other cases.
        logprobs: the requested log-probabilities of each token, by token id; None if none were requested.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: LogprobRows | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the sampled tokens' log-probabilities; None if none were requested."""
        if self.logprobs is None:
            return None
        return sum(row[token_id].logprob for row, token_id in zip(self.logprobs, self.token_ids, strict=True) if row)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's results; from `stream` and `AsyncLLM`, only what is new since the last output.

    The fields of the first sample can be read as attributes (`out.text`) and by key (`out["text"]`), as in nano-vLLM's
    dicts.

    Args:
        request_id: the id that `add_request` returned.
        prompt: the prompt's text, if it was given as text.
        prompt_token_ids: the prompt's tokens.
        outputs: the samples, in their order; in a stream, those that have something new.
        finished: whether this is the request's last output.
        num_cached_tokens: how many prompt tokens were taken from the prefix cache.
        prompt_logprobs: the requested log-probabilities of each token of the prompt, with None for the first token;
            None if none were requested.
        time_to_first_token, total_time: seconds since the request was added; None until they are known.
        weight_version: version of the weights when this output was made; 0 until `update_weights` is called.
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
        """Return the names that can be read by key, so that `dict(out)`, `"text" in out` and iteration work."""
        return (*RequestOutput.__slots__, "text", "token_ids", "finish_reason", "stop_reason", "logprobs")


@dataclass(frozen=True, slots=True)
class Metric:
    """One of vLLM's metrics."""

    name: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Counters of an engine since it was made, and what it is doing now.

    Args:
        num_running, num_waiting: number of sequences (samples) that have a slot, and that wait for one.
        num_preemptions: how many times a running sequence had to wait again because the KV cache was full.
        num_steps, step_time: number of collected steps, and seconds spent in `step` for them.
        prompt_tokens, cached_tokens: tokens of admitted prompts, and how many of them the prefix cache had.
        generated_tokens: number of sampled tokens.
        kv_usage: fraction of the KV blocks that running sequences hold.
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
        """Fraction of the prompt tokens that the prefix cache had."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def mean_step_time(self) -> float:
        """Seconds that a step takes on average."""
        return self.step_time / self.num_steps if self.num_steps else 0.0

    def as_vllm(self) -> list[Metric]:
        """Return those that vLLM has too, by its names."""
        values = {
            "num_requests_running": self.num_running,
            "num_requests_waiting": self.num_waiting,
            "num_preemptions": self.num_preemptions,
            "kv_cache_usage_perc": self.kv_usage,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generated_tokens,
            "prefix_cache_queries": self.prompt_tokens,
            "prefix_cache_hits": self.cached_tokens,
        }
        return [Metric(f"vllm:{name}", value) for name, value in values.items()]
