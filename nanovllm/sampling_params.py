"""What a request asks of the sampler, when it ends, and what it wants to be told."""

import json
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

# What one request may ask for at most, so that none can make unbounded work.
MAX_SAMPLES = 1024
MAX_LOGPROBS = 128
MAX_STOP_IDS = 32  # ids the device can ban per request while min_tokens holds
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 300
MAX_BAD_WORDS = 1024
MAX_GRAMMAR_CHARS = 1 << 20


def _number(name: str, value: Any, kind: type, low: float, high: float, what: str) -> int | float:
    """`value` as Python's own int or float: numpy's narrow ones would wrap around in sums."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    if not (low <= value <= high):  # NaN fails this too
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return int(value) if kind is Integral else float(value)


def _list(name: str, value: Any, what: str, most: int) -> tuple:
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, SequenceType | set | frozenset):
        raise TypeError(f"{name} must be a list of {what}, got {value!r}")
    if len(value) > most:
        raise ValueError(f"{name} must have at most {most} entries, got {len(value)}")
    return tuple(value)


def _strings(name: str, value: Any, most: int) -> tuple[str, ...]:
    strings = _list(name, (value,) if isinstance(value, str) else value, "strings", most)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"{name} must be a list of strings, got the entry {string!r}")
        if not 0 < len(string) <= MAX_STOP_CHARS:
            raise ValueError(f"{name} must have strings of 1 to {MAX_STOP_CHARS} characters, got {string[:40]!r}")
    return strings


def _token_ids(name: str, value: Iterable[Any]) -> tuple[int, ...]:
    return tuple(_number(name, i, Integral, 0, 2**31 - 1, "a list of token ids of at least 0") for i in value)


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What a structured output must be: exactly one of the following is given.

    Args:
        json: a JSON schema, as a dict or as text. The output has no white space but a space behind commas and colons.
        regex: a regular expression that the whole output matches.
        choice: texts of which the output is one.
        grammar: a context-free grammar in Lark's notation, or in GGML's (GBNF).

    Raises:
        TypeError, ValueError: naming the argument. Whether the schema or grammar means something is found out when a
            request is added, and refuses that request alone.
    """

    json: str | dict | None = None
    regex: str | None = None
    choice: SequenceType[str] | None = None
    grammar: str | None = None

    def __post_init__(self):
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise ValueError(f"structured_outputs needs exactly one of json, regex, choice and grammar, got {given}")
        if isinstance(self.json, Mapping):
            try:
                object.__setattr__(self, "json", json.dumps(self.json))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"structured_outputs.json is not a schema that JSON can express: {error}") from None
        if self.choice is not None:
            object.__setattr__(self, "choice", _strings("structured_outputs.choice", self.choice, MAX_GRAMMAR_CHARS))
            if not self.choice:
                raise ValueError("structured_outputs.choice must have at least one text")
            return
        text = getattr(self, given[0])
        if not isinstance(text, str):
            raise TypeError(f"structured_outputs.{given[0]} must be a string, got {text!r}")
        if len(text) > MAX_GRAMMAR_CHARS:
            raise ValueError(f"structured_outputs.{given[0]} must have at most {MAX_GRAMMAR_CHARS} characters")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Frozen, and checked when it is made.

    The order is: logit_bias -> penalties -> allowed_token_ids, bad_words, structured_outputs, min_tokens ->
    temperature -> top_k -> top_p -> min_p -> draw.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        max_tokens: most tokens to generate.
        ignore_eos: go on past the model's end-of-sequence tokens.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
        seed: makes the draws repeatable whatever else runs in the batch; None draws a seed from the engine's.
        min_tokens: end-of-sequence and stop ids cannot be drawn before this many tokens, nor do stop strings count.
        stop_token_ids: up to 32 ids that end the request; the id itself is kept in `token_ids`.
        n: samples to draw; they share the blocks of the prompt. Sample i of a seeded request is repeatable too.
        stop: strings that end the request as soon as the text has one of them; the text ends before it.
        include_stop_str_in_output: the text ends after the stop string, or after the stop id's text, instead.
        repetition_penalty: divides positive logits of tokens that prompt or output have, and multiplies negative ones
            (arXiv:1909.05858); above 0, and 1 changes nothing.
        presence_penalty: is subtracted from the logits of tokens that the output has, in [-2, 2].
        frequency_penalty: is subtracted for each time that the output has the token, in [-2, 2].
        logit_bias: numbers in [-100, 100] to add to the logits of up to 300 token ids.
        allowed_token_ids: no other token can be drawn.
        bad_words: texts that the output will not have, as the tokenizer spells them at the start of a text and behind
            a space.
        logprobs: log-probabilities to return for each token: those of so many most likely ones, and the drawn one's.
        prompt_logprobs: the same for the prompt's tokens, always the model's own; these are computed then, not taken
            from the prefix cache.
        logprobs_mode: "raw_logprobs" are the model's own (float32 log-softmax of the logits); "processed_logprobs" are
            those that tokens were drawn with, after all of the above.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: the output follows a JSON schema, a regular expression, a choice or a grammar.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    stop_token_ids: SequenceType[int] = ()
    n: int = 1
    stop: str | SequenceType[str] = ()
    include_stop_str_in_output: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: SequenceType[int] | None = None
    bad_words: SequenceType[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: str = "raw_logprobs"
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self):
        number, put = self._number, self._put
        number("temperature", Real, 0, 100, "a number from 0 to 100")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.001, got {self.temperature!r}")
        number("max_tokens", Integral, 1, 2**31 - 1, "an integer of at least 1")
        number("top_k", Integral, 0, 2**31 - 1, "an integer of at least 0 (0 keeps all)")
        number("top_p", Real, math.ulp(0.0), 1, "a number above 0 and up to 1")
        number("min_p", Real, 0, 1, "a number from 0 to 1")
        number("min_tokens", Integral, 0, self.max_tokens, "an integer from 0 to max_tokens")
        number("n", Integral, 1, MAX_SAMPLES, f"an integer from 1 to {MAX_SAMPLES}")
        number("repetition_penalty", Real, 0.01, 100, "a number from 0.01 to 100")
        number("presence_penalty", Real, -2, 2, "a number from -2 to 2")
        number("frequency_penalty", Real, -2, 2, "a number from -2 to 2")
        if self.seed is not None:
            number("seed", Integral, 0, 2**63 - 1, "None or an integer from 0 to 2**63 - 1")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                number(name, Integral, 0, MAX_LOGPROBS, f"None or an integer from 0 to {MAX_LOGPROBS}")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        ids = _list("stop_token_ids", self.stop_token_ids, "token ids", MAX_STOP_IDS)
        put("stop_token_ids", _token_ids("stop_token_ids", ids))
        put("stop", _strings("stop", self.stop, MAX_STOP_STRINGS))
        put("bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        if self.allowed_token_ids is not None:
            ids = _list("allowed_token_ids", self.allowed_token_ids, "token ids", 1 << 22)
            if not ids:
                raise ValueError("allowed_token_ids must have at least one token id; None allows all")
            put("allowed_token_ids", _token_ids("allowed_token_ids", ids))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(f"logit_bias must be a dict of token ids and numbers, got {self.logit_bias!r}")
            if len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise ValueError(f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}")
            ids = _token_ids("logit_bias", self.logit_bias)
            values = (_number("logit_bias", v, Real, -100, 100, "-100 to 100") for v in self.logit_bias.values())
            put("logit_bias", dict(zip(ids, values, strict=True)))
        if self.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise ValueError(
                f"logprobs_mode must be 'raw_logprobs' or 'processed_logprobs', got {self.logprobs_mode!r}"
            )
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputsParams):
                raise TypeError(f"structured_outputs must be StructuredOutputsParams, got {self.structured_outputs!r}")
            for name in ("min_tokens", "allowed_token_ids", "bad_words", "ignore_eos"):
                if getattr(self, name):
                    raise ValueError(f"structured_outputs decide what can be drawn and when it ends; {name} must not")

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _number(self, name: str, kind: type, low: float, high: float, what: str) -> None:
        self._put(name, _number(name, getattr(self, name), kind, low, high, what))

    @property
    def penalises(self) -> bool:
        """Whether the sampler must know which tokens there were."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
