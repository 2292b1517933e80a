"""Bad arguments are refused by name before anything is allocated."""

import copy
import dataclasses
import json
import pickle
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from nanovllm import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from nanovllm.checks import number
from nanovllm.config import Config
from nanovllm.sampling_params import MAX_ALLOWED_IDS


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", "hot", TypeError),
        ("max_tokens", 0, ValueError),
        ("max_tokens", 1.5, TypeError),
        ("max_tokens", True, TypeError),
        ("top_k", -2, ValueError),
        ("top_k", -1.0, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.01, ValueError),
        ("min_p", 2, ValueError),
        ("seed", -(2**63) - 1, ValueError),
        ("logprobs", -2, ValueError),
        ("prompt_logprobs", False, TypeError),
        ("min_tokens", 65, ValueError),
        ("min_tokens", -1, ValueError),
        ("stop_token_ids", "12", TypeError),
        ("stop_token_ids", [1, -1], ValueError),
        ("stop_token_ids", [1] * 33, ValueError),
        ("ignore_eos", 1, TypeError),
    ],
)
def test_sampling_params_are_checked(name, value, error):
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tensor_parallel_size", 0, ValueError),
        ("max_model_len", "4096", TypeError),
        ("max_model_len", 1, ValueError),
        ("max_num_seqs", True, TypeError),
        ("max_num_batched_tokens", 0, ValueError),
        ("gpu_memory_utilization", 1.5, ValueError),
        ("kvcache_block_size", 48, ValueError),
        ("kvcache_block_size", 8, ValueError),
        ("num_kvcache_blocks", 0, ValueError),
        ("dtype", "int8", ValueError),
        ("device", "tpu", ValueError),
        ("attention_backend", "best", ValueError),
        ("load_format", "pickle", ValueError),
        ("enforce_eager", "no", TypeError),
        ("overlap", 2, ValueError),
        ("overlap", True, TypeError),
        ("overlap", 1.0, TypeError),
        ("dtype", ["float32"], TypeError),
        ("dtype", np.zeros(2), TypeError),
        ("device", torch.device("cpu"), TypeError),
        ("device", 0, TypeError),
        ("tokenizer", 5, TypeError),
        ("tokenizer", "", ValueError),
        ("revision", 5, TypeError),
        ("download_dir", 5, TypeError),
        ("logprobs_mode", "raw_logits", ValueError),
        ("max_logprobs", -2, ValueError),
        ("distributed_executor_backend", "ray", ValueError),
        ("model", 5, TypeError),
    ],
)
def test_config_is_checked(name, value, error):
    with pytest.raises(error, match=name):
        Config(**{name: value})


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match=r"no option max_sequences; the options are model, .*max_num_seqs"):
        LLM(max_sequences=4)


def test_unknown_arguments_of_the_async_engine_raise_and_are_not_shown():
    with pytest.raises(TypeError, match=r"no option max_concurrent;.* max_concurrent_requests") as caught:
        AsyncLLM(max_concurrent="a secret")
    assert "secret" not in str(caught.value)


class Stubborn:
    def __repr__(self):
        raise RuntimeError("no repr")


class Wordy:
    def __repr__(self):
        return "x" * 1_000_000


HUGE = [
    ["x"] * 1_000_000,
    "x" * 6_000_000,
    {i: "x" for i in range(100_000)},
    10**5000,
    Wordy(),
    Stubborn(),
    range(10**12),
]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_errors_of_sampling_params_are_short(name):
    for value in HUGE:
        with pytest.raises((TypeError, ValueError)) as caught:
            SamplingParams(**{name: value})
        assert name in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_errors_of_a_config_are_short(name):
    for value in HUGE:
        if name in ("model", "tokenizer", "revision", "download_dir") and isinstance(value, str):
            continue  # a name, which is looked up later
        with pytest.raises((TypeError, ValueError)) as caught:
            Config(**{name: value})
        assert name in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("ids", [range(10**12), range(10**30), [0] * (MAX_ALLOWED_IDS + 1)])
def test_too_many_ids_are_refused_before_they_are_read(ids):
    for name in ("allowed_token_ids", "stop_token_ids"):
        with pytest.raises(ValueError, match=f"{name} must have at most"):
            SamplingParams(**{name: ids})


@pytest.mark.parametrize("kind", [int, np.int64])
def test_long_lists_of_ids_are_not_checked_one_by_one(monkeypatch, kind):
    checked = []

    def counted(name, value, *bounds):
        checked.append(name)
        return number(name, value, *bounds)

    monkeypatch.setattr("nanovllm.sampling_params.number", counted)
    ids = SamplingParams(allowed_token_ids=[kind(i) for i in range(50_000)]).allowed_token_ids
    assert ids == tuple(range(50_000)) and set(map(type, ids)) == {int}
    for wrong, error in ((-1, ValueError), (2**31, ValueError), (True, TypeError), (1.0, TypeError), ("1", TypeError)):
        with pytest.raises(error, match=f"each id of allowed_token_ids .* got {wrong!r}"):
            SamplingParams(allowed_token_ids=[kind(i) for i in range(50_000)] + [wrong])
    assert checked.count("each id of allowed_token_ids") <= 12


def test_none_is_an_empty_list_of_sampling_params():
    assert SamplingParams(stop=None, stop_token_ids=None, bad_words=None) == SamplingParams()


def test_checked_logit_bias_cannot_be_changed():
    params = SamplingParams(logit_bias={5: 1})
    for change in (
        lambda bias: bias.update({6: "x"}),
        lambda bias: bias.__setitem__(5, 1e9),
        lambda bias: bias.setdefault(6, 1),
        lambda bias: bias.pop(5),
    ):
        with pytest.raises(TypeError, match="logit_bias was checked and cannot be changed"):
            change(params.logit_bias)
    assert dataclasses.asdict(params)["logit_bias"] == {5: 1.0} and json.dumps(params.logit_bias) == '{"5": 1.0}'
    for same in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), dataclasses.replace(params)):
        assert same == params
        with pytest.raises(TypeError):
            same.logit_bias[5] = 2.0


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_an_assignment_to_params_is_checked_as_an_argument_is():
    params = SamplingParams(max_tokens=8)
    params.stop, params.seed, params.top_k, params.temperature, params.best_of = "x", -1, -1, 1e-9, None
    assert params == SamplingParams(max_tokens=8, stop="x", temperature=1e-9) and not hasattr(params, "best_of")
    before = params.clone()
    for name, value, message in [
        ("max_tokens", 0, "max_tokens must be from 1"),
        ("min_tokens", 9, "min_tokens must be at most max_tokens=8, got 9"),
        ("logit_bias", {"a": 1}, "each id of logit_bias must be"),
        ("detokenize", False, "stop strings need detokenize=True"),
        ("best_of", 3, "best_of is an option of vLLM"),
        ("tempreature", 0, "tempreature"),
    ]:
        with pytest.raises((TypeError, ValueError, AttributeError), match=message):
            setattr(params, name, value)
        assert params == before
    with pytest.raises(TypeError, match="unhashable"):
        hash(params)


def test_characters_to_compile_are_those_of_the_form_and_its_white_space():
    assert StructuredOutputsParams(choice=["ab", "c"]).num_chars == 3
    assert StructuredOutputsParams(json_object=True, whitespace_pattern=" ?").num_chars == 2


def test_a_subclass_of_params_may_have_arguments_and_attributes_of_its_own():
    class Tagged(SamplingParams):
        def __init__(self, tag, **arguments):
            super().__init__(**arguments)
            self.tag = tag

    params = Tagged("a", max_tokens=8)
    params.max_tokens, params.tag = 5, "b"
    copied = params.clone()
    assert (type(copied), copied.max_tokens, copied.tag, copied == params) == (Tagged, 5, "b", True)
    assert params.for_ranks() == SamplingParams(max_tokens=5)
    with pytest.raises(ValueError, match="max_tokens must be from 1"):
        params.max_tokens = 0


def test_struct_fields_name_the_arguments_of_a_copy():
    params = SamplingParams(stop="x", logit_bias={5: 1}, stop_token_ids=[3], seed=4)
    assert SamplingParams(**{name: getattr(params, name) for name in params.__struct_fields__}) == params


def test_a_schema_of_shared_dicts_is_not_written_whole():
    schema = {"type": "integer"}
    for _ in range(40):  # a text of 10**13 characters
        schema = {"anyOf": [schema, schema]}
    named = {"k" * 100_000: 1}  # a text of 1 GB
    for shared in (schema, {"anyOf": [named] * 10_000}):
        with pytest.raises(ValueError, match=r"structured_outputs\.json must have at most"):
            StructuredOutputsParams(json=shared)


def test_a_deep_schema_takes_no_longer_than_a_flat_one():
    schema = {"enum": list(range(60_000))}
    for _ in range(900):
        schema = {"not": schema}
    start = time.process_time()
    with suppress(ValueError):  # Python may refuse its depth
        StructuredOutputsParams(json=schema)
    assert time.process_time() - start < 0.5, "this takes 0.02 s"


def test_a_schema_that_json_cannot_express_is_refused():
    endless = {}
    endless["not"] = endless
    for schema in (endless, {"enum": [object()]}, {"const": type("T" * 10**6, (), {})()}):
        with pytest.raises(ValueError, match=r"structured_outputs\.json is not a schema") as caught:
            StructuredOutputsParams(json=schema)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("pattern", [np.array([1, 2]), torch.tensor([1, 2]), ["a"]])
def test_white_space_that_is_no_text_is_refused(pattern):
    with pytest.raises(TypeError, match=r"structured_outputs\.whitespace_pattern must be a string"):
        StructuredOutputsParams(json={}, whitespace_pattern=pattern)


def test_a_schema_that_is_neither_a_dict_nor_text_is_refused():
    with pytest.raises(TypeError, match=r"structured_outputs\.json must be a dict or a string, got <class"):
        StructuredOutputsParams(json=dict)


def test_unknown_options_of_long_names_are_cut():
    with pytest.raises(TypeError, match="there is no option xxx") as caught:
        LLM(**{"x" * 1_000_000: 1})
    assert len(str(caught.value)) < 2000


def test_negative_seeds_are_seeds_but_for_minus_one():
    assert SamplingParams(seed=-1).seed is None
    seeds = [SamplingParams(seed=seed).seed for seed in (-2, -3, -(2**63))]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**63 for seed in seeds)


def test_changes_of_a_copy_are_checked_together_in_any_order():
    params = SamplingParams(stop=["a"], bad_words=["b"])
    assert params.clone(min_tokens=100, max_tokens=200) == params.clone(max_tokens=200, min_tokens=100)
    assert params.clone(detokenize=False, stop=()) == SamplingParams(bad_words=["b"], detokenize=False)
    choice = StructuredOutputsParams(choice=["a"])
    assert params.clone(structured_outputs=choice, bad_words=()).structured_outputs is choice
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens=5, got 9"):
        params.clone(min_tokens=9, max_tokens=5)
    with pytest.raises((TypeError, ValueError), match="temperature"):
        params.clone(temperature=-1)
