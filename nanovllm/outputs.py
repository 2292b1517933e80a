"""The results of a request."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from struct import Struct
from typing import Any, NamedTuple, overload

import numpy as np


class Logprob(NamedTuple):
    """A token's log-probability (float32, natural logarithm), its rank, and its text.

    The most likely token's rank is 1. A token of a part of a character has replacement characters as its text; without
    a tokenizer, or without `detokenize`, the text is None.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


# A position's log-probabilities in bytes: the id, rank and log-probability of its own token, then the id and the
# log-probability of each of the most likely tokens. All are words of 32 bits.
_OWN = Struct("=iif")
_LIKELY = Struct("=if")
_MANY_IDS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class TokenLogprobs:
    """Log-probabilities of a step at some positions.

    Args:
        packed: the bytes of each position, one after the other.
        num_bytes: number of bytes of a position.
    """

    packed: bytes
    num_bytes: int

    @classmethod
    def pack(cls, token_ids: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray) -> "TokenLogprobs":
        """Copy log-probabilities out of arrays.

        Args:
            token_ids, logprobs: those of the k most likely tokens, then the position's own: [positions, k + 1].
            ranks: for each position, the rank of its own token.
        """
        num_positions, num_tokens = token_ids.shape
        words = np.empty((num_positions, 1 + 2 * num_tokens), dtype=np.int32)
        floats = words.view(np.float32)
        words[:, 0] = token_ids[:, -1]
        words[:, 1] = ranks
        floats[:, 2] = logprobs[:, -1]
        words[:, 3::2] = token_ids[:, :-1]
        floats[:, 4::2] = logprobs[:, :-1]
        return cls(words.tobytes(), words.shape[1] * words.itemsize)

    def row(self, i: int, k: int) -> bytes:
        """Return a copy of the bytes of position i, with the k most likely tokens, or all if there are fewer."""
        start = i * self.num_bytes
        size = min(_OWN.size + k * _LIKELY.size, self.num_bytes)
        return self.packed[start : start + size]


def own_logprob(row: bytes) -> float:
    """Return the log-probability of a position's own token from its row of `TokenLogprobs`."""
    return _OWN.unpack_from(row)[2]


class LogprobRows(Sequence[dict[int, Logprob] | None]):
    """The requested log-probabilities of each token, by token id; the token's own are the first of its dict.

    Reads as a list of dicts. They are made when they are read, because making them costs more than a step. The entry
    of a prompt's first token is None, because nothing predicts it. `copy.deepcopy`, and with it `dataclasses.asdict`,
    makes a list of dicts.

    Args:
        rows: the bytes that each dict is made of. They are copies, so that a kept output does not keep the
            log-probabilities of all requests of its steps.
        texts: the texts of tokens by id, or a function that returns the text of a token; None for no texts.
    """

    def __init__(
        self,
        rows: Iterable[bytes | None] = (),
        texts: dict[int, str | None] | Callable[[int], str | None] | None = None,
    ):
        self._rows = list(rows)
        self._texts = {} if texts is None else texts

    def append(self, row: bytes) -> None:
        """Add a row of a step's `TokenLogprobs`."""
        self._rows.append(row)

    def set_texts(self, text_of: Callable[[int], str | None]) -> None:
        """Set the function that returns the text of a token."""
        self._texts = text_of

    def text(self, token_id: int) -> str | None:
        """Return the text of a token, or None if it is not known."""
        return self._texts.get(token_id) if isinstance(self._texts, dict) else self._texts(token_id)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob] | None: ...

    @overload
    def __getitem__(self, index: slice) -> "LogprobRows": ...

    def __getitem__(self, index: int | slice) -> "dict[int, Logprob] | LogprobRows | None":
        if isinstance(index, slice):
            return LogprobRows(self._rows[index], self._texts)
        row = self._rows[index]
        if row is None:
            return None
        own, rank, logprob = _OWN.unpack_from(row)
        found = {own: Logprob(logprob, rank, self.text(own))}
        for rank, (token_id, logprob) in enumerate(_LIKELY.iter_unpack(row[_OWN.size :]), 1):
            found[token_id] = Logprob(logprob, rank, self.text(token_id))
        return found

    def __reduce__(self) -> tuple:
        """Pickle the texts of the rows' tokens in place of the function that returns them."""
        return LogprobRows, (self._rows, self._known_texts())

    def with_texts(self, token_ids: Iterable[int]) -> "LogprobRows":
        """Return these rows with the texts of more tokens, which pickling keeps too."""
        more = {token_id: self.text(token_id) for token_id in token_ids}
        return LogprobRows(self._rows, self._known_texts() | more)

    def _known_texts(self) -> dict[int, str | None]:
        """Return the texts that are known by id, or those of the rows' tokens if a function returns them."""
        if isinstance(self._texts, dict):
            return self._texts
        return {token_id: self._texts(token_id) for token_id in self._distinct_ids()}

    def _distinct_ids(self) -> Iterable[int]:
        """Return the ids of all tokens in the rows."""
        rows_by_size: dict[int, list[bytes]] = {}
        for row in filter(None, self._rows):
            rows_by_size.setdefault(len(row), []).append(row)
        parts = [np.empty(0, np.int32)]
        for rows in rows_by_size.values():
            words = np.frombuffer(b"".join(rows), np.int32).reshape(len(rows), -1)
            own_ids = words[:, 0]
            likely_ids = words[:, 3::2].ravel()
            parts += [own_ids, likely_ids]
        token_ids = np.concatenate(parts)
        # A count of each id is fast for many, and a set for few.
        if len(token_ids) > _MANY_IDS:
            return np.flatnonzero(np.bincount(token_ids)).tolist()
        return set(token_ids.tolist())

    def __deepcopy__(self, memo: dict) -> list[dict[int, Logprob] | None]:
        return list(self)

    def __add__(self, other: Any) -> Any:
        """Return these rows and more rows, or a list if the others are a list."""
        if isinstance(other, list):
            return list(self) + other
        if not isinstance(other, LogprobRows):
            return NotImplemented
        has_same_texts = self._texts == other._texts
        texts = self._texts if has_same_texts else self._known_texts() | other._known_texts()
        return LogprobRows(self._rows + other._rows, texts)

    def __radd__(self, other: Any) -> Any:
        return other + list(self) if isinstance(other, list) else NotImplemented

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
        stop_reason: the stop id or stop string that ended the sample, or why its grammar or its bad words had it
            aborted; None for an end-of-sequence token and in all other cases.
        logprobs: the requested log-probabilities of each token, by token id; None if none were requested.
        cumulative_logprob: sum of the log-probabilities of the sample's tokens so far, also of those that earlier
            outputs of a stream had; None if none were requested.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: LogprobRows | None = None
    cumulative_logprob: float | None = None

    def finished(self) -> bool:
        """Whether the sample has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times and counts of a request. The outputs of a stream share one object, which changes as the request goes on.

    Args:
        num_generation_tokens: number of tokens that the samples have together.
        arrival_time: when the request was ready to be queued (tokenized, and its grammar compiled), in seconds since
            the epoch.
        queued_ts, scheduled_ts, first_token_ts, last_token_ts: when it was queued, its first sample was first given a
            slot, its first token was known, and its last output was made: by `time.monotonic`, 0 until then.
        first_token_latency: seconds from when the request was ready to be queued to its first token; 0 until then.
    """

    num_generation_tokens: int = 0
    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's results; from `stream` and `AsyncLLM`, only what is new since the last output.

    The fields of the first sample can be read as attributes (`out.text`) and by key (`out["text"]`), as in nano-vLLM's
    dicts. They are empty if an output of a stream has nothing new of this sample.

    `json.dumps(dataclasses.asdict(output))` is JSON; a `Logprob` is a list in it. Only "processed_logprobs" of
    tokens that cannot be sampled are -Infinity, which JSON does not have.

    Args:
        request_id: the id that `add_request` returned, a string.
        prompt: the prompt's text, if it was given as text or as a conversation.
        prompt_token_ids: the prompt's tokens, in a list that all outputs of a stream share.
        outputs: the samples, in their order; in a stream, those that have something new.
        finished: whether this is the request's last output.
        num_cached_tokens: how many prompt tokens were taken from the prefix cache.
        prompt_logprobs: the requested log-probabilities of each token of the prompt, with None for the first token;
            None if none were requested. All outputs of a stream share them.
        time_to_first_token, total_time: seconds since the request was ready to be queued: tokenized, and its grammar
            compiled. None until they are known.
        weight_version: version of the weights when this output was made; 0 until `update_weights` is called.
        metrics: times and counts, by vLLM's names.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: LogprobRows | None = None
    time_to_first_token: float | None = None
    total_time: float | None = None
    weight_version: int = 0
    metrics: RequestMetrics | None = None

    @property
    def _first(self) -> CompletionOutput:
        """The first sample; an empty one if this output has nothing of it."""
        if self.outputs and self.outputs[0].index == 0:
            return self.outputs[0]
        return CompletionOutput(index=0, text="", token_ids=[], finish_reason=None)

    @property
    def text(self) -> str:
        return self._first.text

    @property
    def token_ids(self) -> list[int]:
        return self._first.token_ids

    @property
    def finish_reason(self) -> str | None:
        return self._first.finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self._first.stop_reason

    @property
    def logprobs(self) -> LogprobRows | None:
        return self._first.logprobs

    def __getitem__(self, key: str) -> Any:
        if key in self.keys():
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> tuple[str, ...]:
        """Return the names that can be read by key, so that `dict(out)`, `"text" in out` and iteration work."""
        return (*RequestOutput.__slots__, "text", "token_ids", "finish_reason", "stop_reason", "logprobs")


def merge_deltas(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Merge two successive outputs of a stream that have only what is new."""
    samples = {sample.index: sample for sample in first.outputs}
    for new in second.outputs:
        old = samples.get(new.index)
        samples[new.index] = new if old is None else _merge_samples(old, new)
    return replace(second, outputs=[samples[index] for index in sorted(samples)])


def _merge_samples(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    logprobs = None
    if old.logprobs is not None and new.logprobs is not None:
        logprobs = old.logprobs + new.logprobs
    return replace(new, text=old.text + new.text, token_ids=old.token_ids + new.token_ids, logprobs=logprobs)


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
        num_free_slots: number of further sequences that could run, as far as slots limit them.
        num_snapshots: number of cached prefixes whose recurrent state is kept (hybrid models).
        num_free_snapshots: number of slots for further ones. If none is free, the longest unused snapshot is replaced.
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
    num_free_slots: int = 0
    num_snapshots: int = 0
    num_free_snapshots: int = 0

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
