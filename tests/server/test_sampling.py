"""The fields of requests that say how to sample."""

import json
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from nanovllm import RequestOutputKind, SamplingParams
from nanovllm.server.errors import ApiError
from nanovllm.server.options import ServerOptions
from nanovllm.server.sampling import SamplingFields


def params_of(body, defaults=None, **options):
    """Return the sampling parameters of a request's body."""
    fields = SamplingFields.model_validate(body)
    llm = SimpleNamespace(get_default_sampling_params=lambda: defaults or SamplingParams())
    state = SimpleNamespace(llm=llm, options=ServerOptions(**options))
    return fields.to_params(state, max_tokens=9)


def test_every_field_reaches_the_parameters():
    body = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 3,
        "stop": "x",
        "stop_token_ids": [4],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "allowed_token_ids": [1, 2],
        "bad_words": ["y"],
        "skip_special_tokens": False,
        "cache_salt": "s",
        "logit_bias": {"3": 1.5},
    }
    expected = SamplingParams(**{**body, "logit_bias": {3: 1.5}}, max_tokens=9, output_kind=RequestOutputKind.DELTA)
    assert params_of(body) == expected


def test_open_fields_are_the_models_defaults_and_null_is_open():
    defaults = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1, max_tokens=5)
    params = params_of({"top_k": -1, "temperature": None}, defaults)
    assert (params.temperature, params.top_p, params.min_p, params.repetition_penalty) == (0.6, 0.95, 0.1, 1.1)
    assert (params.top_k, params.max_tokens) == (0, 9)


def test_structured_outputs_become_parameters():
    schema = {"type": "object", "properties": {}}
    params = params_of({"structured_outputs": {"json": schema}})
    assert json.loads(params.structured_outputs.json) == schema


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": "1"}, "temperature"),
        ({"n": True}, "n\n"),
        ({"n": 1.5}, "n\n"),
        ({"stop": 5}, "stop"),
        ({"store": True}, "store is not supported, except at the value False; got True"),
        ({"service_tier": "flex"}, "service_tier is not supported, except at the value 'auto', 'default'"),
        ({"use_beam_search": True}, "use_beam_search is not supported"),
        ({"guided_json": {}}, "guided_json is not supported, except at the value null"),
        ({"structured_outputs": {"xml": "a"}}, "xml"),
        ({"stream_options": {}}, "stream_options needs stream=true"),
    ],
)
def test_wrong_types_and_unsupported_fields_are_named(body, message):
    with pytest.raises(ValidationError, match=message):
        params_of(body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"min_tokens": 10}, "min_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, None),
        ({"logit_bias": {"1": 1000}}, None),
    ],
)
def test_wrong_values_are_refused_with_their_field(body, param):
    with pytest.raises(ApiError) as caught:
        params_of(body, max_n=8)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_fields_without_effect_are_dropped():
    plain = params_of({})
    body = {"user": "me", "store": False, "metadata": None, "service_tier": "auto", "prompt_cache_key": "k"}
    assert params_of(body) == plain
