"""Sampling parameters: how a request is sampled, when it finishes, and what it returns."""

import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral
from typing import Any

from nanovllm.checks import ABOVE_0, check_fields, is_list, length, number, one_of, plain, shown, within

# What one request may ask for at most, so that none can make unbounded work.
MAX_SAMPLES = 1024
MAX_LOGPROBS = 128
MAX_STOP_IDS = 32  # ids the device can ban per request while min_tokens holds
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 300
MAX_ALLOWED_IDS = 1 << 22
MAX_BAD_WORDS = 1024
MAX_GRAMMAR_CHARS = 1 << 20
MAX_SALT_CHARS = 1024


def _list(name: str, value: Any, what: str, most: int) -> tuple:
    if value is None:
        return ()
    if not is_list(value) and not isinstance(value, set | frozenset):
        raise TypeError(f"{name} must be a list of {what}, got {shown(value)}")
    if (count := length(value)) > most:
        raise ValueError(f"{name} must have at most {most} entries, got {count}")
    return tuple(value)


def _strings(name: str, value: Any, most: int) -> tuple[str, ...]:
    strings = _list(name, [value] if isinstance(value, str) else value, "strings", most)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"{name} must be a list of strings, got the entry {shown(string)}")
        if not 0 < len(string) <= MAX_STOP_CHARS:
            raise ValueError(f"{name} must have strings of 1 to {MAX_STOP_CHARS} characters, got {shown(string)}")
    return tuple(map(plain, strings))


def _token_ids(name: str, value: Any, most: int) -> tuple[int, ...]:
    ids = _list(name, value, "token ids", most)
    # Lists may be long: `number` checks only the entries that can be wrong.
    wrong = tuple(kind for kind in set(map(type, ids)) if kind is bool or not issubclass(kind, Integral))
    suspects = (next(i for i in ids if type(i) in wrong),) if wrong else (min(ids, default=0), max(ids, default=0))
    for token_id in suspects:
        number(f"each id of {name}", token_id, int, 0, 2**31 - 1)
    return tuple(map(int, ids))


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What a structured output must be: exactly one of the following is given.

    Args:
        json: a JSON schema, as a dict or as text. The output has no white space but a space behind commas and colons.
            In a `pattern`, `\\d` and `\\w` match ASCII only and `\\s` matches Unicode, as in JavaScript. Keywords and
            formats that llguidance does not know are refused; `uniqueItems: false`, formats of numbers, `password` and
            `binary` ask nothing and are ignored. An integer has at most 64 bits.
        regex: a regular expression in Rust's notation that the whole output matches. `\\d`, `\\w` and `\\s` match ASCII
            only; `\\p{...}` matches Unicode classes.
        choice: texts of which the output is one.
        grammar: a context-free grammar in Lark's notation, or in GGML's (GBNF). In its regular expressions `\\d`,
            `\\w` and `\\s` match Unicode, as in Python. Its texts never match a special token; in Lark's notation
            `<|name|>` without quotes does.

    The model chooses how a text is split into tokens, also where only one text can follow.

    Raises:
        TypeError, ValueError: naming the argument. Adding a request compiles the schema or grammar. One that is wrong,
            not supported, or takes more than 5 s of CPU time or 1 GiB to compile refuses that request alone. An output
            ends with the finish reason "abort" where a step would take too long: an ambiguous grammar (`s: s s | "a"`)
            after a long text, a regular expression that needs more than 50,000 states, or more than 2,000 rules that
            may go on at the same token, as in an object of about 500 optional properties.
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
        text = "".join(self.choice) if self.choice else getattr(self, given[0])
        if not isinstance(text, str):
            raise TypeError(f"structured_outputs.{given[0]} must be a string, got {shown(text)}")
        if len(text) > MAX_GRAMMAR_CHARS:
            raise ValueError(f"structured_outputs.{given[0]} must have at most {MAX_GRAMMAR_CHARS} characters")


class _FixedDict(dict):
    """A dict that was checked, and therefore stays as it is."""

    def _refuse(self, *args, **kwargs):
        raise TypeError("SamplingParams are frozen: logit_bias cannot be changed; make new ones (dataclasses.replace)")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple:
        return _FixedDict, (dict(self),)


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
        bad_words: texts that the output will not have, as the tokenizer spells them directly behind another text and,
            unless they start with white space, behind a space.
        logprobs: log-probabilities to return for each token: those of so many most likely ones, and the drawn one's.
        prompt_logprobs: the same for the prompt's tokens, always the model's own; these are computed then, not taken
            from the prefix cache.
        logprobs_mode: "raw_logprobs" are the model's own (float32 log-softmax of the logits); "processed_logprobs" are
            those that tokens were drawn with, after all of the above.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: the output follows a JSON schema, a regular expression, a choice or a grammar.
        cache_salt: cached prefixes are those of requests with the same salt only: how long a prompt takes tells nobody
            else that it, or how it begins, has been here before.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.
    """

    temperature: float = within(0, 100, default=1.0)
    max_tokens: int = within(1, 2**31 - 1, default=64)
    ignore_eos: bool = False
    top_k: int = within(0, 2**31 - 1, default=0)
    top_p: float = within(ABOVE_0, 1, default=1.0)
    min_p: float = within(0, 1, default=0.0)
    seed: int | None = within(0, 2**63 - 1, default=None)
    min_tokens: int = within(0, 2**31 - 1, default=0)
    stop_token_ids: SequenceType[int] = ()
    n: int = within(1, MAX_SAMPLES, default=1)
    stop: str | SequenceType[str] = ()
    include_stop_str_in_output: bool = False
    repetition_penalty: float = within(0.01, 100, default=1.0)
    presence_penalty: float = within(-2, 2, default=0.0)
    frequency_penalty: float = within(-2, 2, default=0.0)
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: SequenceType[int] | None = None
    bad_words: SequenceType[str] = ()
    logprobs: int | None = within(0, MAX_LOGPROBS, default=None)
    prompt_logprobs: int | None = within(0, MAX_LOGPROBS, default=None)
    logprobs_mode: str = one_of("raw_logprobs", "processed_logprobs")
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    cache_salt: str | None = None

    def __post_init__(self):
        put = partial(object.__setattr__, self)
        check_fields(self)
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.001, got {shown(self.temperature)}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")
        put("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS))
        put("stop", _strings("stop", self.stop, MAX_STOP_STRINGS))
        put("bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_IDS))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must have at least one token id; None allows all")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(f"logit_bias must be a dict of token ids and numbers, got {shown(self.logit_bias)}")
            if (count := length(self.logit_bias)) > MAX_LOGIT_BIAS:
                raise ValueError(f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {count}")
            ids = _token_ids("logit_bias", tuple(self.logit_bias), MAX_LOGIT_BIAS)
            biases = [number("each bias of logit_bias", bias, float, -100, 100) for bias in self.logit_bias.values()]
            put("logit_bias", _FixedDict(zip(ids, biases, strict=True)))
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise TypeError(f"structured_outputs must be StructuredOutputsParams, got {shown(self.structured_outputs)}")
        if not isinstance(self.cache_salt, str | None):
            raise TypeError(f"cache_salt must be a string or None, got {shown(self.cache_salt)}")
        if self.cache_salt is not None:
            if not 0 < len(self.cache_salt) <= MAX_SALT_CHARS:
                raise ValueError(f"cache_salt must have 1 to {MAX_SALT_CHARS} characters, got {len(self.cache_salt)}")
            put("cache_salt", plain(self.cache_salt))
        for name in ("min_tokens", "allowed_token_ids", "bad_words", "ignore_eos"):
            if self.structured_outputs and getattr(self, name):
                raise ValueError(f"structured_outputs decide what can be drawn and when it ends; {name} must not")

    def for_ranks(self) -> "SamplingParams":
        """What the sampler needs of it, without what only the engine reads and classes of the caller's own."""
        kept = {field.name: getattr(self, field.name) for field in fields(SamplingParams)}
        own = {"stop": (), "bad_words": (), "allowed_token_ids": None, "structured_outputs": None, "cache_salt": None}
        if type(self) is SamplingParams and all(kept[name] == nothing for name, nothing in own.items()):
            return self
        return SamplingParams(**kept | own)

    @property
    def penalises(self) -> bool:
        """Whether the sampler must know which tokens there were."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
