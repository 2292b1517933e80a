"""A request: its samples, and what its caller has received of them. No torch here."""

import random
import time
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any

import xxhash

from nanovllm.checks import number, plain, shown
from nanovllm.engine.detokenizer import Detokenizer, StopStrings, TokenBytes
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams


def check_request_id(request_id: Any) -> str:
    """Return a request id that a caller chose as Python's str. Raise TypeError if it cannot be one.

    Subclasses could run the caller's code when a step looks an id up.
    """
    if not isinstance(request_id, Integral | str) or isinstance(request_id, bool):
        raise TypeError(f"request_id must be a string or an integer, got {shown(request_id)}")
    if isinstance(request_id, str):
        return plain(request_id)
    return str(number("request_id", request_id, int, -(2**63), 2**63 - 1))


@dataclass(eq=False)
class Request:
    """One prompt and its samples.

    Args:
        chosen_id: the id that the caller chose; None numbers the request when it is queued.
        prompt: the prompt's text, if it was given as text.
        stream: whether to return outputs before the end; `params.output_kind` says what they contain.
        token_bytes: the bytes of each token; None leaves all text empty.
        all_token_bytes: the same with special tokens, for the texts in log-probabilities.

    Attributes:
        id: set when the request is queued.
        is_delta: whether each output has what is new since the last one, instead of everything.
        created: when this object was made, by `time.monotonic`: the request is then ready to be queued.
        metrics: times and counts so far.
        consumer: refers weakly to the iterator of a stream, and abandons the request when that is garbage-collected.
        delivered: for each sample of a stream of deltas, what its caller has received: the number of tokens, those of
            the prompt included, and the finish reason.
    """

    chosen_id: str | None
    prompt: str | None
    params: SamplingParams
    samples: list[Sequence]
    stream: bool
    token_bytes: TokenBytes | None
    all_token_bytes: TokenBytes | None = None
    id: str = field(init=False, default="")
    created: float = field(init=False, default_factory=time.monotonic)
    metrics: RequestMetrics = field(init=False)
    consumer: weakref.ref | None = field(init=False, default=None)

    def __post_init__(self):
        self.metrics = RequestMetrics(arrival_time=time.time())
        kind = self.params.output_kind
        self.stream = self.stream and kind is not RequestOutputKind.FINAL_ONLY
        self.is_delta = self.stream and kind is not RequestOutputKind.CUMULATIVE
        self.delivered: list[tuple[int, str | None]] = [(len(seq.prompt_ids), None) for seq in self.samples]
        if self.token_bytes is not None and (self.stream or self.params.stop):
            stops = StopStrings(self.params.stop) if self.params.stop else None
            for seq in self.samples:
                seq.detokenizer = Detokenizer(self.token_bytes, stops, self.params.include_stop_str_in_output)
        if self.all_token_bytes is not None:
            for seq in self.samples:
                seq.logprobs.set_texts(self.all_token_bytes.text_of)
                seq.prompt_logprobs.set_texts(self.all_token_bytes.text_of)

    def mark_queued(self, request_id: str) -> None:
        """Set the request's id and the time at which it is queued, which is now."""
        self.metrics.queued_ts = time.monotonic()
        self.id = request_id
        for seq in self.samples:
            seq.request_id = request_id

    def seed_samples(self, seeds: random.Random) -> None:
        """Set the seed of each sample: a new one from `seeds`, or one that follows from the request's seed."""
        for seq in self.samples:
            if self.params.seed is None:
                seq.seed = seeds.getrandbits(63)
            elif seq.index == 0:
                seq.seed = self.params.seed
            else:
                seq.seed = xxhash.xxh64_intdigest(seq.index.to_bytes(4, "little"), seed=self.params.seed) >> 1

    @property
    def has_consumer(self) -> bool:
        """Whether an iterator of `LLM.stream` takes the outputs."""
        return self.consumer is not None

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether some logprobs of the prompt are still missing.

        Only the first sample computes them. The other samples may have output tokens before that.
        """
        first = self.samples[0]
        return first.num_prompt_logprobs is not None and len(first.prompt_logprobs) < len(first.prompt_ids)

    @property
    def is_finished(self) -> bool:
        return all(seq.finish_reason for seq in self.samples)

    def mark_first_token(self, now: float) -> None:
        """Set the time, by `time.monotonic`, at which the first token is known."""
        self.metrics.first_token_ts = now
        self.metrics.first_token_latency = now - self.created

    def take_output(self, weight_version: int, now: float | None = None) -> RequestOutput:
        """Return the results so far; of a stream of deltas, only those that no earlier call returned.

        Args:
            now: the time, by `time.monotonic`; None looks at the clock.
        """
        now = time.monotonic() if now is None else now
        first = self.samples[0]
        finished = self.is_finished
        metrics = self.metrics
        metrics.last_token_ts = now
        metrics.scheduled_ts = first.scheduled_ts
        metrics.num_generation_tokens = sum(len(seq.token_ids) - len(seq.prompt_ids) for seq in self.samples)
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[self._take_completion(seq) for seq in self.samples if self._has_new_output(seq)],
            finished=finished,
            num_cached_tokens=first.num_cached,
            prompt_logprobs=None if self.params.prompt_logprobs is None else first.prompt_logprobs,
            time_to_first_token=metrics.first_token_latency or None,
            total_time=now - self.created if finished else None,
            weight_version=weight_version,
            metrics=metrics,
        )

    @cached_property
    def _prompt_token_ids(self) -> list[int]:
        """The prompt's tokens for all outputs: copied once, because a prompt may be long and have many outputs."""
        return list(self.samples[0].prompt_ids)

    def _has_new_output(self, seq: Sequence) -> bool:
        return not self.is_delta or self.delivered[seq.index] != (len(seq.token_ids), seq.finish_reason)

    def _take_completion(self, seq: Sequence) -> CompletionOutput:
        start = len(seq.prompt_ids)
        if self.is_delta:
            start, _ = self.delivered[seq.index]
            self.delivered[seq.index] = len(seq.token_ids), seq.finish_reason
        return CompletionOutput(
            index=seq.index,
            text=self._take_text(seq),
            token_ids=seq.token_ids[start:],
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            logprobs=None if self.params.logprobs is None else seq.logprobs[start - len(seq.prompt_ids) :],
            cumulative_logprob=None if self.params.logprobs is None else seq.cumulative_logprob,
        )

    def _take_text(self, seq: Sequence) -> str:
        if self.token_bytes is None:
            return ""
        if seq.detokenizer:
            if seq.finish_reason:
                seq.detokenizer.finish()
            if not self.stream:
                return seq.detokenizer.text
            new = seq.detokenizer.take()
            return new if self.is_delta else seq.detokenizer.taken
        token_ids = seq.output_ids
        if seq.finish_reason == "stop" and token_ids[-1] in seq.stop_ids and not self.params.include_stop_str_in_output:
            token_ids.pop()
        return self.token_bytes.text(token_ids)
