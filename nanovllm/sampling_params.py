"""Sampling parameters: how a request is sampled, when it finishes, and what it returns."""

import re
from collections.abc import Mapping
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Integral
from typing import TYPE_CHECKING, Any

from nanovllm.checks import (
    ABOVE_0,
    check_fields,
    length,
    number,
    one_of,
    plain,
    shown,
    string_list,
    token_id_list,
    within,
)
from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.vllm_options import NEUTRAL_SAMPLING, accept_neutral

# Limits of a request, so that none can make unbounded work.
MIN_TEMPERATURE = 1e-3  # below it, but for 0, logits could overflow
MAX_SAMPLES = 1024
MAX_TOKENS = 2**31 - 1
MAX_LOGPROBS = 128  # or all of the vocabulary
MAX_STOP_IDS = 32  # as many ids can be banned on the device until a request has min_tokens
MAX_STOP_STRINGS = 64
MAX_LOGIT_BIAS = 300
MAX_ALLOWED_IDS = 1 << 22
MAX_BAD_WORDS = 1024
MAX_BAD_CHARS = 1 << 16  # characters of all bad words: each word is split into tokens in several ways
MAX_SALT_CHARS = 1024
# A token id as text, as JSON has it for a key.
_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _as_id(key: Any) -> Any:
    """Return a token id that is written as text, as in JSON, or what else `key` is."""
    return int(key) if isinstance(key, str) and _ID.fullmatch(key) else key


def _refuse_change(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("logit_bias was checked and cannot be changed; assign another dict to it")


_REFUSE_CHANGE: Any = _refuse_change


class _FrozenDict(dict):
    """A dict that was checked and cannot be changed."""

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _REFUSE_CHANGE

    def __reduce__(self) -> tuple:
        return _FrozenDict, (dict(self),)


def _biases(logit_bias: Any) -> _FrozenDict:
    if not isinstance(logit_bias, Mapping):
        raise TypeError(f"logit_bias must be a dict of token ids and numbers, got {shown(logit_bias)}")
    if (count := length(logit_bias)) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {count}")
    ids = token_id_list("logit_bias", tuple(logit_bias), MAX_LOGIT_BIAS)
    biases = [number("each bias of logit_bias", bias, float, -100, 100) for bias in logit_bias.values()]
    return _FrozenDict(zip(ids, biases, strict=True))


def _salt(cache_salt: Any) -> str:
    if not isinstance(cache_salt, str):
        raise TypeError(f"cache_salt must be a string or None, got {shown(cache_salt)}")
    if not 0 < len(cache_salt) <= MAX_SALT_CHARS:
        raise ValueError(f"cache_salt must have 1 to {MAX_SALT_CHARS} characters, got {len(cache_salt)}")
    return plain(cache_salt)


# Parameters that the sampler does not read, and their values without effect.
_ENGINE_ONLY: dict[str, Any] = {
    "stop": (),
    "bad_words": (),
    "allowed_token_ids": None,
    "structured_outputs": None,
    "cache_salt": None,
    "output_kind": None,
}


class RequestOutputKind(Enum):
    """The content of a stream's outputs: everything so far, the new part, or everything at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


# Other values that mean the same: (name, alias, meaning).
_ALIASES: tuple[tuple[str, Any, Any], ...] = (
    ("top_k", -1, 0),
    ("seed", -1, None),
    ("logprobs", True, 1),
    ("prompt_logprobs", True, 1),
)


@accept_neutral(NEUTRAL_SAMPLING)
@dataclass(frozen=not TYPE_CHECKING, slots=True)  # `_assign` replaces what `frozen` forbids
class SamplingParams:
    """The parameters of one request. They are checked when they are made, and all together at each assignment.

    A request takes a copy, so an assignment changes those that come later.

    The order is: logit_bias -> penalties -> allowed_token_ids, bad_words, structured_outputs, min_tokens ->
    temperature -> top_k -> top_p -> min_p -> sample. vLLM's other arguments are accepted at values without effect.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy). What is between 0 and 0.001 counts as
            0.001.
        max_tokens: largest number of tokens to generate. None, and what is beyond the engine's `max_model_len`, goes up
            to that length.
        ignore_eos: go on past the model's end-of-sequence tokens. A structured output goes on as long as something
            else can follow.
        top_k: keep the k most likely tokens; 0 and -1 keep all. It also keeps tokens as likely as the last of them.
        top_p: keep the most likely tokens until their probability reaches top_p, in (0, 1]. It also keeps tokens as
            likely as the last of them.
        min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
        seed: makes sampling repeatable whatever else runs in the batch; None and -1 derive one from the engine's. Other
            negative ones count from 2^63 backwards.
        min_tokens: before this many tokens, end-of-sequence and stop ids are not sampled and stop strings are ignored.
            A structured output may be complete before. `ignore_eos` lets end-of-sequence ids be sampled at any time.
        stop_token_ids: up to 32 ids that end the request; the id itself is kept in `token_ids`.
        n: number of samples, which share the blocks of the prompt. Sample i of a seeded request is repeatable too.
        stop: strings that end the request as soon as the text has one of them; the text ends before it.
        include_stop_str_in_output: the text ends after the stop string, or after the stop id's text, instead.
        repetition_penalty: divides positive logits of tokens that are in the prompt or the output, and multiplies
            negative ones (arXiv:1909.05858); from 0.01 to 100, and 1 changes nothing.
        presence_penalty: is subtracted from the logits of tokens that are in the output, in [-2, 2].
        frequency_penalty: is subtracted once for each time that the token is in the output, in [-2, 2].
        logit_bias: numbers in [-100, 100] to add to the logits of up to 300 token ids.
        allowed_token_ids: the only tokens that can be sampled.
        bad_words: texts that the output will not have, as the tokenizer spells them directly after another text and,
            unless they start with white space, after a space; up to 1024, with 65536 characters together. A sequence
            for which they leave no token ends with finish_reason "abort"; only its last token may complete a bad word.
        logprobs: how many of the most likely tokens to return log-probabilities of, for each sampled token, besides
            its own: up to 128; -1 is the whole vocabulary, True is 1.
        prompt_logprobs: the same for the prompt's tokens, always in "raw_logprobs" mode. The prompt is computed for
            them, not taken from the prefix cache.
        logprobs_mode: "raw_logprobs" are the model's own (float32 log-softmax of the logits); "processed_logprobs" are
            those of the distribution that is sampled from, after all of the above; at temperature 0, after all but
            top_k, top_p and min_p. None is the engine's mode.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: no supported tokenizer puts spaces there, so both values give the same text.
        detokenize: make text; False leaves it empty, and `Logprob.decoded_token` None.
        structured_outputs: the output follows a JSON schema, a regular expression, a choice or a grammar.
        output_kind: what the outputs of a stream have; None is DELTA. `generate` of `LLM` returns whole results.
        cache_salt: share cached prefixes only with requests of the same salt, so that nobody else can learn from
            response times which prompts were here before.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what would be right.
    """

    temperature: float = within(0, 100, default=1.0)
    max_tokens: int | None = within(1, MAX_TOKENS, default=64, optional=True)
    ignore_eos: bool = False
    top_k: int = within(0, 2**31 - 1, default=0)
    top_p: float = within(ABOVE_0, 1, default=1.0)
    min_p: float = within(0, 1, default=0.0)
    seed: int | None = within(-(2**63), 2**63 - 1, default=None)
    min_tokens: int = within(0, MAX_TOKENS, default=0)
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
    logprobs: int | None = within(-1, MAX_LOGPROBS, default=None)
    prompt_logprobs: int | None = within(-1, MAX_LOGPROBS, default=None)
    logprobs_mode: str | None = one_of("raw_logprobs", "processed_logprobs", default=None)
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    cache_salt: str | None = None
    output_kind: RequestOutputKind | None = None
    detokenize: bool = True
    spaces_between_special_tokens: bool = True

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self):
        for name, alias, meaning in _ALIASES:
            value = getattr(self, name)
            # Check the type, because 1.0 equals True and -1.0 equals -1: `check_fields` must refuse them.
            kind = bool if alias is True else Integral
            if isinstance(value, kind) and value == alias:
                self._set(name, meaning)
        check_fields(self)
        if self.seed is not None and self.seed < 0:
            self._set("seed", self.seed + 2**63)
        if 0 < self.temperature < MIN_TEMPERATURE:
            self._set("temperature", MIN_TEMPERATURE)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")
        self._set("stop_token_ids", token_id_list("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS))
        self._set("stop", string_list("stop", self.stop, MAX_STOP_STRINGS))
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        self._set("bad_words", string_list("bad_words", self.bad_words, MAX_BAD_WORDS))
        if (num_chars := sum(map(len, self.bad_words))) > MAX_BAD_CHARS:
            raise ValueError(f"bad_words must have at most {MAX_BAD_CHARS} characters together, got {num_chars}")
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", token_id_list("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_IDS))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must have at least one token id; None allows all")
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        if self.cache_salt is not None:
            self._set("cache_salt", _salt(self.cache_salt))
        if not isinstance(self.output_kind, RequestOutputKind | None):
            raise TypeError(f"output_kind must be a RequestOutputKind or None, got {shown(self.output_kind)}")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise TypeError(f"structured_outputs must be StructuredOutputsParams, got {shown(self.structured_outputs)}")
        if self.structured_outputs is not None:
            for name in ("allowed_token_ids", "bad_words"):
                if getattr(self, name):
                    raise ValueError(f"{name} cannot be used with structured_outputs, which choose the tokens")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_optional(cls, **arguments: Any) -> "SamplingParams":
        """Make parameters from arguments of which None is the default, and whose `logit_bias` may have ids as text.

        `max_tokens=None` keeps its own meaning.
        """
        given: dict[str, Any] = {}
        for name, value in arguments.items():
            if value is not None or name == "max_tokens":
                given[name] = value
        biases = given.get("logit_bias")
        if isinstance(biases, Mapping):
            given["logit_bias"] = {_as_id(key): bias for key, bias in biases.items()}
            if len(given["logit_bias"]) < len(biases):
                raise ValueError("logit_bias must have each token id once, got one as a text and as a number")
        return cls(**given)

    def clone(self, **changes: Any) -> "SamplingParams":
        """Return a copy, with `changes` assigned to it. Raise TypeError or ValueError if one is wrong."""
        # `copy` would take three times as long, and lose attributes of a subclass.
        copied = object.__new__(type(self))
        for name in _NAMES if type(self) is SamplingParams else [field.name for field in fields(self)]:
            object.__setattr__(copied, name, getattr(self, name))
        if hasattr(self, "__dict__"):
            vars(copied).update(vars(self))
        _assign(copied, changes)
        return copied

    def for_ranks(self) -> "SamplingParams":
        """Return the parameters that the sampler needs, without those that only the engine reads.

        Other ranks do not know subclasses of the caller's program, so the result is never one.
        """
        if type(self) is SamplingParams and all(getattr(self, name) == unset for name, unset in _ENGINE_ONLY.items()):
            return self
        values = {name: getattr(self, name) for name in _NAMES}
        return SamplingParams(**values | _ENGINE_ONLY)

    @property
    def __struct_fields__(self) -> tuple[str, ...]:
        """The names of all parameters. Programs that copy vLLM's parameters read them here."""
        return _NAMES

    @property
    def penalizes(self) -> bool:
        """Whether the sampler must know which tokens there were."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


_NAMES = tuple(field.name for field in fields(SamplingParams))


def _assign(params: SamplingParams, changes: dict[str, Any]) -> None:
    """Set parameters. Raise TypeError or ValueError if one is wrong, alone or next to the others."""
    known = {name: value for name, value in changes.items() if name in _NAMES or name in NEUTRAL_SAMPLING}
    if known:
        checked = SamplingParams(**{name: getattr(params, name) for name in _NAMES} | known)
        changes = changes | {name: getattr(checked, name, None) for name in known}
    for name, value in changes.items():
        if name not in NEUTRAL_SAMPLING:
            object.__setattr__(params, name, value)


SamplingParams.__setattr__ = lambda self, name, value: _assign(self, {name: value})


def copy_params(params: Any) -> Any:
    """Return a copy of parameters that their caller may change while a request runs. Anything else stays as it is."""
    return params.clone() if isinstance(params, SamplingParams) else params
