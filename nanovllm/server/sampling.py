"""The fields of a request that say how to sample, which several endpoints share."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanovllm import SamplingParams, StructuredOutputsParams
from nanovllm.checks import shown
from nanovllm.sampling_params import MAX_LOGIT_BIAS, RequestOutputKind
from nanovllm.server.body import Body
from nanovllm.server.errors import ApiError
from nanovllm.server.state import ServerState

# Fields of OpenAI's and vLLM's clients, and their values that change no response. Null changes none either.
ANY = object()
ONLY_NULL = ()
NEUTRAL: dict[str, Any] = {
    "user": ANY,
    "safety_identifier": ANY,
    "metadata": ANY,
    "prompt_cache_key": ANY,
    "prompt_cache_options": ANY,
    "prompt_cache_retention": ANY,
    "prediction": ANY,  # only makes a response faster
    "request_id": ANY,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "truncate_prompt_tokens": ONLY_NULL,
    "prompt_logprobs": ONLY_NULL,
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "guided_json": ONLY_NULL,
    "guided_regex": ONLY_NULL,
    "guided_choice": ONLY_NULL,
    "guided_grammar": ONLY_NULL,
}


class StreamOptions(BaseModel):
    """Options of a streamed response.

    Args:
        include_usage: send one more event, with the numbers of tokens.
        continuous_usage_stats: with `include_usage`, each event has the numbers so far.
        include_obfuscation: ignored; only an API across the internet needs it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(BaseModel):
    """The fields of `StructuredOutputsParams`, which checks them."""

    model_config = ConfigDict(extra="forbid")
    json_: str | dict | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | dict | None = None

    def to_params(self) -> StructuredOutputsParams:
        """Return the checked parameters."""
        return StructuredOutputsParams(
            **{field.alias or name: getattr(self, name) for name, field in StructuredOutputs.model_fields.items()}
        )


class SamplingFields(Body):
    """Fields that the bodies of chat completions, completions and responses share. None is the default of each.

    Their types are checked here, and their values by `SamplingParams`.

    Attributes:
        NEUTRAL: fields that have no effect, and their values that are accepted. Subclasses may have more.
    """

    NEUTRAL: ClassVar[dict[str, Any]] = NEUTRAL
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=MAX_LOGIT_BIAS)
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        """Drop fields that have no effect. Refuse them at values that would have one."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            accepted = cls.NEUTRAL.get(name)
            if accepted is None or name in cls.model_fields:
                kept[name] = value
            elif accepted is not ANY and value is not None and value not in accepted:
                values = ", ".join(map(repr, accepted)) or "null"
                raise ValueError(f"{name} is not supported, except at the value {values}; got {shown(value)}")
        return kept

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a streamed response ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each event of a streamed response has the numbers of tokens so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def to_params(
        self, state: ServerState, names: Mapping[str, str] = MappingProxyType({}), **overrides: Any
    ) -> SamplingParams:
        """Return the sampling parameters of a request. What it leaves open is the model's default.

        Args:
            names: for errors, the request's name of each argument of `SamplingParams` that it names otherwise.
            overrides: arguments of `SamplingParams` that replace these fields or are not among them, such as
                `logprobs`. `max_tokens=None` means up to `max_model_len`. None of others has no effect.

        Raises:
            ApiError: a value is wrong.
        """
        given: dict[str, Any] = {"output_kind": RequestOutputKind.DELTA}
        given |= _given({name: getattr(self, name) for name in _PARAMS})
        if self.structured_outputs is not None:
            given["structured_outputs"] = _checked(self.structured_outputs.to_params, {})
        given |= _given(overrides)
        n = given.get("n", 1)
        if not 1 <= n <= state.options.max_n:
            raise ApiError(400, f"n must be from 1 to {state.options.max_n}, got {shown(n)}", param="n")
        defaults = state.llm.get_default_sampling_params()
        base = {name: getattr(defaults, name) for name in _DEFAULTS}
        return _checked(SamplingParams.from_optional, names, **base | given)


# The fields that are arguments of SamplingParams of the same name.
_PARAMS = (
    "max_tokens",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "cache_salt",
)
# The arguments for which a model's generation config has values.
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not None, and `max_tokens`, for which None is a value."""
    return {name: value for name, value in arguments.items() if value is not None or name == "max_tokens"}


def _checked(make: Any, names: Mapping[str, str], **arguments: Any) -> Any:
    """Return `make(**arguments)`. Its TypeError or ValueError becomes an ApiError, with the request's `names`."""
    try:
        return make(**arguments)
    except (TypeError, ValueError) as error:
        name, _, fault = str(error).partition(" ")
        sent = names.get(name, name)
        raise ApiError(400, f"{sent} {fault}", param=sent if name in arguments else None) from None
