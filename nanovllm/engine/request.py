"""A request: the samples that were asked for, and what its caller is told of them. No torch here."""

import random
import time
import weakref
from dataclasses import dataclass, field

import xxhash

from nanovllm.engine.detokenizer import Detokenizer, StopStrings, TokenBytes
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """One prompt and its samples.

    Args:
        id: None until it is queued.
        prompt: its text, if it was given as text.
        stream: whether an output has what is new since the one before, instead of everything.
        token_bytes: the bytes of each token; None without a tokenizer, which leaves all text empty.
    """

    id: int | str | None
    prompt: str | None
    params: SamplingParams
    samples: list[Sequence]
    stream: bool
    token_bytes: TokenBytes | None
    added: float = field(default_factory=time.perf_counter)
    time_to_first_token: float | None = None
    consumer: weakref.ref | None = None  # the iterator of a stream

    def __post_init__(self):
        # What the caller knows of each sample: how many tokens, and the end. It changes if this is a stream.
        self.told: list[tuple[int, str | None]] = [(len(seq.prompt_ids), None) for seq in self.samples]
        if self.token_bytes is not None and (self.stream or self.params.stop):
            stops = StopStrings(self.params.stop) if self.params.stop else None
            for seq in self.samples:
                seq.detokenizer = Detokenizer(self.token_bytes, stops, self.params.include_stop_str_in_output)

    def seed_samples(self, seeds: random.Random) -> None:
        """Give each sample its seed: one of its own from `seeds`, or one that follows from the request's."""
        for seq in self.samples:
            if self.params.seed is None:
                seq.seed = seeds.getrandbits(63)
            elif seq.index == 0:
                seq.seed = self.params.seed
            else:
                seq.seed = xxhash.xxh64_intdigest(seq.index.to_bytes(4, "little"), seed=self.params.seed) >> 1

    @property
    def is_finished(self) -> bool:
        return all(seq.finish_reason for seq in self.samples)

    def output(self, weight_version: int) -> RequestOutput:
        """What there is to tell now. A stream is told nothing twice."""
        first, finished = self.samples[0], self.is_finished
        return RequestOutput(
            self.id,
            self.prompt,
            list(first.prompt_ids),
            [self._completion(seq) for seq in self.samples if self._has_news(seq)],
            finished,
            first.num_cached,
            None if self.params.prompt_logprobs is None else first.prompt_logprobs[:],
            self.time_to_first_token,
            time.perf_counter() - self.added if finished else None,
            weight_version,
        )

    def _has_news(self, seq: Sequence) -> bool:
        return not self.stream or self.told[seq.index] != (len(seq.token_ids), seq.finish_reason)

    def _completion(self, seq: Sequence) -> CompletionOutput:
        start, _ = self.told[seq.index]
        if self.stream:
            self.told[seq.index] = len(seq.token_ids), seq.finish_reason
        logprobs = None if self.params.logprobs is None else seq.logprobs[start - len(seq.prompt_ids) :]
        reasons = seq.finish_reason, seq.stop_reason
        return CompletionOutput(seq.index, self._text(seq), seq.token_ids[start:], *reasons, logprobs)

    def _text(self, seq: Sequence) -> str:
        if self.token_bytes is None:
            return ""
        if seq.detokenizer:
            if seq.finish_reason:
                seq.detokenizer.finish()
            return seq.detokenizer.take() if self.stream else seq.detokenizer.text
        token_ids = seq.output_ids
        if seq.finish_reason == "stop" and token_ids[-1] in seq.end_ids and not self.params.include_stop_str_in_output:
            token_ids.pop()
        return self.token_bytes.text(token_ids)
