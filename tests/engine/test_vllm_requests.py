"""Requests as programs that were written for vLLM make them, and outputs as these read them."""

import copy
import dataclasses
import itertools
import json
import math
import pickle
import re
import time

import jsonschema
import numpy as np
import pytest
import torch

from nanovllm import RequestOutput, RequestOutputKind, SamplingParams, StructuredOutputsParams, TextPrompt
from nanovllm import TokensPrompt as Tokens
from tests.engine.reference import load_reference
from tests.helpers import assert_nothing_held, engine, finish, greedy, prompts_of, sampled
from tests.models.tiny import CHAT_TEMPLATE, save_tiny, save_tiny_with_tokenizer

TEXTS = ["Hello, my name is", "The president of the", "The capital of", "The future of AI is"]
EOS = 1


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_with_tokenizer(tmp_path_factory.mktemp("model"), "qwen3", CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def llm(path):
    with engine(path) as llm:
        yield llm
        assert_nothing_held(llm)


def answers(llm, prompts, params=None, **options) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **options)


def answer(llm, params, prompt="Hello") -> RequestOutput:
    return answers(llm, prompt, params)[0]


# -- prompts ----------------------------------------------------------------------------------------------------------

IDS = [10, 20, 30]


class Series:
    """Like a pandas Series whose first rows were filtered out: an index is a label."""

    ndim, dtype = 1, object

    def __init__(self, values):
        self.rows = {label: value for label, value in enumerate(values, 10)}
        self.shape = (len(values),)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows.values())

    def __getitem__(self, label):
        return self.rows[label]

    def tolist(self):
        return list(self)


@pytest.mark.parametrize(
    "prompts",
    [
        Series(IDS),
        Series([IDS]),
        [Series(IDS)],
        IDS,
        [IDS],
        tuple(IDS),
        np.array(IDS),
        np.array(IDS, dtype=np.uint16),
        np.array([IDS]),
        [np.array(IDS, dtype=np.int32)],
        torch.tensor(IDS),
        torch.tensor([IDS]),
        [torch.tensor(IDS)],
        list(np.array(IDS)),
        Tokens(prompt_token_ids=IDS),
        [Tokens(prompt_token_ids=np.array(IDS))],
        {"prompt_token_ids": IDS, "prompt": "any", "multi_modal_data": None, "mm_processor_kwargs": {}},
    ],
)
def test_each_form_of_token_ids_is_the_same_prompt(llm, prompts):
    (output,) = answers(llm, prompts, greedy(3))
    assert output.prompt_token_ids == IDS and set(map(type, output.prompt_token_ids)) == {int}
    assert output.outputs[0].token_ids == answers(llm, [IDS], greedy(3))[0].outputs[0].token_ids


@pytest.mark.parametrize(
    "prompts",
    [
        TEXTS,
        Series(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        [TextPrompt(prompt=text) for text in TEXTS],
        np.array([{"prompt": text} for text in TEXTS]),
    ],
)
def test_each_form_of_texts_is_the_same_prompts(llm, prompts):
    outputs = answers(llm, prompts, greedy(2))
    assert [output.prompt for output in outputs] == TEXTS
    assert all(type(output.prompt) is str for output in outputs)


def test_a_numpy_array_of_id_lists_of_different_lengths_is_as_many_prompts(llm):
    prompts = np.empty(2, dtype=object)
    prompts[:] = [np.array([1, 2]), [3, 4, 5]]
    assert [output.prompt_token_ids for output in answers(llm, prompts, greedy(1))] == [[1, 2], [3, 4, 5]]


def test_text_next_to_token_ids_is_returned_and_not_tokenized(llm):
    (output,) = answers(llm, {"prompt": "a text", "prompt_token_ids": IDS}, greedy(1))
    assert (output.prompt, output.prompt_token_ids) == ("a text", IDS)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ({}, ValueError, "prompt or prompt_token_ids"),
        ({"prompt": None}, ValueError, "prompt or prompt_token_ids"),
        ({"prompt": 5}, TypeError, "must be text"),
        ({"prompt_token_ids": []}, ValueError, "empty"),
        ("", ValueError, "empty"),
        ({"prompt_token_ids": "text"}, TypeError, "list of token ids"),
        ({"prompt_token_ids": [1.5]}, TypeError, "1.5"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, ValueError, "multi_modal_data"),
        ({"prompt_embeds": np.zeros((2, 2))}, ValueError, "prompt_embeds"),
        ({"prompt": "a", "promt_token_ids": [1]}, ValueError, "promt_token_ids"),
        ({"prompt": "a", "cache_salt": ""}, ValueError, "cache_salt"),
        ([np.array([1, 1000])], ValueError, "1000"),
        ([np.array([[1, 2]])], TypeError, "token ids"),
        (np.array([1, 2], dtype=bool), TypeError, "must be"),
    ],
)
def test_wrong_prompts_are_refused_by_name(llm, prompt, error, words):
    with pytest.raises(error, match=words):
        answers(llm, prompt, greedy(1))
    with pytest.raises((TypeError, ValueError)):
        llm.add_request(prompt, greedy(1))


def test_salt_of_a_prompt_separates_its_cached_prefix(path):
    ids = list(range(40))
    with engine(path) as llm:
        cached = [
            answers(llm, Tokens(prompt_token_ids=ids, cache_salt=salt), greedy(1))[0].num_cached_tokens
            for salt in ("a", "a", "b")
        ]
        assert cached == [0, 32, 0]
        assert answers(llm, ids, greedy(1, cache_salt="b"))[0].num_cached_tokens == 32
        with pytest.raises(ValueError, match="cache_salt"):
            answers(llm, Tokens(prompt_token_ids=ids, cache_salt="a"), greedy(1, cache_salt="b"))


# -- generate and chat ------------------------------------------------------------------------------------------------


def test_parameters_are_one_for_all_or_one_for_each_prompt_or_none(llm):
    many = [SamplingParams(temperature=t, top_p=0.95, max_tokens=3) for t in (0.01, 0.3, 0.7, 0.99)]
    for params in (many, many[0], None):
        assert len(answers(llm, TEXTS, params)) == len(TEXTS)
    with pytest.raises(ValueError, match="sampling_params"):
        answers(llm, TEXTS, many[:3])


@pytest.mark.parametrize("call", ["generate", "chat"])
def test_arguments_of_vllm_are_accepted_without_effect_and_refused_with(llm, call):
    prompts = TEXTS if call == "generate" else [[{"role": "user", "content": text}] for text in TEXTS]

    def run(**options):
        return getattr(llm, call)(prompts, greedy(1), use_tqdm=False, **options)

    for neutral in (
        dict(lora_request=None, priority=None),
        dict(lora_request=[None] * 4, priority=[0] * 4, tokenization_kwargs={}),
        dict(priority=0, mm_processor_kwargs=None),
    ):
        assert len(run(**neutral)) == 4
    assert len(getattr(llm, call)(prompts[0], greedy(1), use_tqdm=False, priority=[0])) == 1
    for name, acting in (
        ("lora_request", object()),
        ("lora_request", [object()] * 4),
        ("priority", 1),
        ("priority", [0, 0, 0, 1]),
        ("priority", [0]),
        ("priority", []),
        ("priority", range(10**30)),
        ("tokenization_kwargs", {"truncation": True}),
        ("mm_processor_kwargs", {"num_crops": 4}),
    ):
        with pytest.raises(ValueError, match=name):
            run(**{name: acting})
    with pytest.raises(TypeError, match="prioritie"):
        run(prioritie=None)


def test_chat_accepts_its_neutral_arguments_of_vllm(llm):
    messages = [{"role": "user", "content": "Hi"}]
    neutral = dict(
        chat_template=None,
        chat_template_content_format="auto",
        add_generation_prompt=True,
        continue_final_message=False,
        tools=None,
        chat_template_kwargs=None,
    )
    (output,) = llm.chat(messages, greedy(2), use_tqdm=False, **neutral)
    assert llm.tokenizer.decode(output.prompt_token_ids) == "<user>Hi<assistant>"
    with pytest.raises(ValueError, match="chat_template_content_format"):
        llm.chat(messages, chat_template_content_format="openai")


# -- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [None, 1000, 126])
def test_output_ends_with_length_at_max_model_len(llm, max_tokens):
    for num_prompt in (5, 127):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, stop=["never"], n=2, seed=1)
        output = answer(llm, params, prompts_of([num_prompt])[0])
        for sample in output.outputs:
            assert len(sample.token_ids) == min(max_tokens or 1000, 128 - num_prompt)
            assert sample.finish_reason == "length"
    with pytest.raises(ValueError, match="prompt has 128 tokens, too many for max_model_len=128"):
        answer(llm, SamplingParams(max_tokens=max_tokens), prompts_of([128])[0])


def test_the_kv_cache_is_a_bound_too(path):
    with engine(path, num_kvcache_blocks=4) as llm:  # 64 tokens
        for max_tokens in (None, 45, 1000):
            output = answer(llm, SamplingParams(max_tokens=max_tokens, ignore_eos=True), prompts_of([20])[0])
            assert (len(output.token_ids), output.finish_reason) == (44, "length")
        with pytest.raises(ValueError, match="max_model_len=64"):
            answer(llm, SamplingParams(max_tokens=None), prompts_of([64])[0])
        assert_nothing_held(llm)


def test_min_tokens_beyond_the_models_length_are_refused(llm):
    with pytest.raises(ValueError, match="min_tokens must be at most 28"):
        answer(llm, SamplingParams(max_tokens=None, min_tokens=29), prompts_of([100])[0])


# -- defaults ---------------------------------------------------------------------------------------------------------


def configured(folder, **generation):
    path = save_tiny(folder, "qwen3")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, **generation}))
    return path


def test_generation_config_is_the_default_of_requests_without_parameters(tmp_path):
    path = configured(tmp_path, temperature=0.0, top_k=20, top_p=0.9, max_new_tokens=7, min_p=None, do_sample=True)
    with engine(path) as llm:
        default = llm.get_default_sampling_params()
        assert default == SamplingParams(temperature=0.0, top_k=20, top_p=0.9, max_tokens=7)
        want = answers(llm, [IDS], default)[0].outputs[0].token_ids
        assert answers(llm, [IDS])[0].outputs[0].token_ids == want
        assert [i for part in llm.stream(IDS) for i in part.token_ids] == want
        llm.add_request(IDS)
        assert finish(llm)[0].token_ids == want
        # Parameters that are given are not mixed with the model's.
        assert len(answers(llm, [IDS], SamplingParams(ignore_eos=True))[0].token_ids) == 64
    with engine(path, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_without_a_generation_config_the_default_is_sampling_params(llm):
    assert llm.get_default_sampling_params() == SamplingParams()
    assert (SamplingParams().temperature, SamplingParams().max_tokens) == (1.0, 64)


def test_a_wrong_generation_config_refuses_only_requests_that_use_it(tmp_path):
    with engine(configured(tmp_path, top_p=1.5)) as llm:
        with pytest.raises(ValueError, match=r"generation_config\.json.*top_p"):
            answers(llm, [IDS])
        assert len(answers(llm, [IDS], greedy(3))[0].token_ids) == 3


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [greedy(4), sampled(4, 1, n=2, logprobs=2, prompt_logprobs=1, stop=["xyz"])])
def test_outputs_are_json(llm, params):
    output = answer(llm, params)
    read = json.loads(json.dumps(dataclasses.asdict(output)))
    assert read["request_id"] == output.request_id and read["prompt_token_ids"] == output.prompt_token_ids
    assert read["metrics"]["num_generation_tokens"] == 4 * params.n
    for sample, wrote in zip(output.outputs, read["outputs"], strict=True):
        assert (wrote["text"], wrote["token_ids"]) == (sample.text, sample.token_ids)
        for row, wrote_row in zip(sample.logprobs or (), wrote["logprobs"] or (), strict=True):
            assert wrote_row == {str(token_id): list(logprob) for token_id, logprob in row.items()}
    assert json.loads(json.dumps(dataclasses.asdict(llm.stream("Hi", params).__next__())))["finished"] is False


def test_request_ids_are_strings(llm):
    assert type(answer(llm, greedy(1)).request_id) is str
    ids = [llm.add_request(IDS, greedy(1), request_id=request_id) for request_id in (10**17, "mine", np.int64(5))]
    assert ids == ["100000000000000000", "mine", "5"]
    with pytest.raises(ValueError, match="request_id 5 belongs"):
        llm.add_request(IDS, greedy(1), request_id=5)
    with pytest.raises(ValueError, match="request_id '5' belongs"):
        llm.add_request(IDS, greedy(1), request_id="5")
    for wrong, error in ((10**5000, ValueError), (True, TypeError), (b"a", TypeError)):
        with pytest.raises(error, match="request_id"):
            llm.add_request(IDS, greedy(1), request_id=wrong)
    numbered = llm.add_request(IDS, greedy(1))
    assert int(numbered) > 10**17 and llm.abort(5) is not None
    assert {output.request_id for output in finish(llm)} == {ids[0], "mine", numbered}


def test_metrics_have_the_times_of_a_request_in_order(llm):
    before, start = time.time(), time.monotonic()
    output = answer(llm, sampled(5, 1, n=3))
    metrics = output.metrics
    assert before <= metrics.arrival_time <= time.time()
    times = [metrics.queued_ts, metrics.scheduled_ts, metrics.first_token_ts, metrics.last_token_ts]
    assert start <= times[0] and times == sorted(times) and times[-1] <= time.monotonic()
    assert output.time_to_first_token == metrics.first_token_latency <= output.total_time
    assert metrics.num_generation_tokens == 15
    parts = list(llm.stream("Hello", greedy(4)))
    assert parts[0].metrics is parts[-1].metrics and parts[-1].metrics.num_generation_tokens == 4
    waiting = llm.add_request(IDS, greedy(1))
    aborted = llm.abort(waiting).metrics
    assert (aborted.scheduled_ts, aborted.first_token_ts, aborted.num_generation_tokens) == (0, 0, 0)


def test_finished_tells_whether_a_sample_has_ended(llm):
    parts = list(llm.stream("Hello", greedy(3)))
    assert [part.outputs[0].finished() for part in parts] == [False] * (len(parts) - 1) + [True]


def test_output_kind_makes_add_request_stream(llm):
    want = answer(llm, greedy(4)).token_ids
    for kind, ends in (
        (RequestOutputKind.CUMULATIVE, [1, 2, 3, 4]),
        (RequestOutputKind.DELTA, [1, 1, 1, 1]),
        (RequestOutputKind.FINAL_ONLY, [4]),
        (None, [4]),
    ):
        llm.add_request("Hello", greedy(4, output_kind=kind))
        outputs = finish(llm)
        assert [len(output.token_ids) for output in outputs] == ends and outputs[-1].finished
        assert answer(llm, greedy(4, output_kind=kind)).token_ids == want
        streamed = list(llm.stream("Hello", greedy(4, output_kind=kind)))
        assert len(streamed) == (1 if kind is RequestOutputKind.FINAL_ONLY else 4)


# -- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logprobs_have_the_own_token_first_and_all_ranks(llm, k, temperature):
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=8, logprobs=k, prompt_logprobs=k)
    for output in answers(llm, TEXTS, params):
        assert output.prompt_logprobs[0] is None
        for rows, token_ids in (
            (output.logprobs, output.token_ids),
            (output.prompt_logprobs[1:], output.prompt_token_ids[1:]),
        ):
            for row, token_id in zip(rows, token_ids, strict=True):
                own = row[token_id]
                assert next(iter(row)) == token_id and len(row) == (k if 0 < own.rank <= k else k + 1)
                assert {entry.rank for entry in row.values()} == {own.rank, *range(1, k + 1)}
                for other, entry in row.items():
                    assert entry.decoded_token == llm.tokenizer.decode([other])
        total = sum(row[i].logprob for row, i in zip(output.logprobs, output.token_ids, strict=True))
        assert output.outputs[0].cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_cumulative_logprob_of_a_stream_is_the_sum_since_its_start(llm, kind):
    rows = answer(llm, greedy(5, logprobs=0)).logprobs
    logprobs = [next(iter(row.values())).logprob for row in rows]
    streamed = list(llm.stream("Hello", greedy(5, logprobs=0, output_kind=kind)))
    got = [output.outputs[0].cumulative_logprob for output in streamed]
    assert got == pytest.approx(list(itertools.accumulate(logprobs)))


def test_texts_of_logprobs_join_to_the_output(llm):
    params = greedy(10, logprobs=2, allowed_token_ids=llm.tokenizer.encode("abc xyz"))
    output = answer(llm, params)
    assert "".join(next(iter(row.values())).decoded_token for row in output.logprobs) == output.text != ""


def test_special_tokens_have_their_names_in_logprobs(llm):
    output = answer(llm, SamplingParams(logprobs=0, logit_bias={EOS: 100}))
    assert output.text == "" and output.logprobs[0][EOS].decoded_token == "</s>"


def test_minus_one_is_all_of_the_vocabulary(llm, path):
    reference, vocab_size = load_reference(path), len(llm.tokenizer)
    params = [greedy(3, logprobs=-1, prompt_logprobs=-1), sampled(3, 1, logprobs=1, prompt_logprobs=0)]
    output, other = answers(llm, [IDS, IDS], params)
    with torch.inference_mode():
        want = reference(torch.tensor([IDS + output.token_ids])).logits[0].log_softmax(-1)
    for row, logprobs in zip([*output.prompt_logprobs[1:], *output.logprobs], want, strict=False):
        assert sorted(row) == list(range(vocab_size))
        assert {entry.rank for entry in row.values()} == set(range(1, vocab_size + 1))
        got = torch.tensor([row[token_id].logprob for token_id in range(vocab_size)])
        torch.testing.assert_close(got, logprobs, atol=1e-4, rtol=0)
    assert max(map(len, [*other.logprobs, *other.prompt_logprobs[1:]])) <= 2
    for copied in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert copied == output and copied.logprobs[0][5].decoded_token is not None
        assert copied.outputs[0].cumulative_logprob == output.outputs[0].cumulative_logprob


def test_rows_of_logprobs_are_added_to_rows_and_to_lists(llm):
    output = answer(llm, greedy(2, logprobs=0, prompt_logprobs=0), {"prompt_token_ids": IDS})
    prompt, rows = output.prompt_logprobs, output.outputs[0].logprobs
    assert prompt + rows == [*prompt, *rows] and type(prompt + rows) is type(rows)
    others = [None]
    assert rows + others == [*rows, None] and others + rows == [None, *rows]
    with pytest.raises(TypeError):
        rows += (None,)


def test_minus_one_is_refused_where_it_would_need_too_much_memory(llm, monkeypatch):
    vocab_size = len(llm.tokenizer)
    for name, params in (("logprobs", greedy(5, logprobs=-1)), ("prompt_logprobs", greedy(1, prompt_logprobs=-1))):
        monkeypatch.setattr("nanovllm.engine.input_processor._MAX_LOGPROB_ENTRIES", 4 * vocab_size)
        with pytest.raises(ValueError, match=f"^{name}=-1 .* at most 4 such tokens, got 5"):
            answer(llm, params)
        monkeypatch.undo()
        monkeypatch.setattr("nanovllm.engine.input_processor._MAX_STEP_LOGPROB_ENTRIES", 7 * vocab_size)
        with pytest.raises(ValueError, match=f"^{name}=-1 .* needs max_num_.*=7 or less"):
            answer(llm, params)
        monkeypatch.undo()


def test_max_logprobs_of_the_engine_bounds_requests(path):
    with engine(path, max_logprobs=2) as llm:
        assert len(answer(llm, greedy(1, logprobs=2, prompt_logprobs=2)).logprobs[0]) == 2
        for wrong in (3, -1):
            for name in ("logprobs", "prompt_logprobs"):
                with pytest.raises(ValueError, match=f"{name} must be at most max_logprobs=2"):
                    answer(llm, greedy(1, **{name: wrong}))


def test_true_asks_for_one_logprob(llm):
    output = answer(llm, greedy(2, logprobs=True, prompt_logprobs=True))
    assert [len(row) for row in output.logprobs] == [1, 1]
    assert all(1 <= len(row) <= 2 for row in output.prompt_logprobs[1:])


# -- texts ------------------------------------------------------------------------------------------------------------


def test_without_detokenize_there_is_no_text(llm):
    plain = answer(llm, greedy(5))
    output = answer(llm, greedy(5, detokenize=False, logprobs=2, prompt_logprobs=2))
    assert output.token_ids == plain.token_ids and output.text == "" != plain.text
    for row in [*output.logprobs, *output.prompt_logprobs[1:]]:
        assert all(entry.decoded_token is None for entry in row.values())
    assert "".join(part.text for part in llm.stream("Hello", greedy(5, detokenize=False))) == ""


def test_spaces_between_special_tokens_change_no_text(llm):
    params = dict(allowed_token_ids=[0, EOS], skip_special_tokens=False)
    texts = [
        answer(llm, sampled(6, 1, spaces_between_special_tokens=spaces, **params)).text for spaces in (True, False)
    ]
    assert texts[0] == texts[1] != "" and " " not in texts[0]


def test_stop_strings_end_the_text_before_or_after_them(llm):
    free = answer(llm, SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)).text
    stop = free[20:23]
    for options in (dict(stop=stop), dict(stop=[stop, "never"]), dict(stop=[stop], include_stop_str_in_output=True)):
        params = SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True, **options)
        output = answer(llm, params)
        end = free.index(stop) + (len(stop) if params.include_stop_str_in_output else 0)
        assert (output.text, output.finish_reason, output.stop_reason) == (free[:end], "stop", stop)
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_stop_ids_end_the_output_whatever_their_order(llm):
    ids = answer(llm, sampled(20, 7)).token_ids
    for stop_ids in (ids[5:7], ids[6:4:-1]):
        output = answer(llm, SamplingParams(seed=7, max_tokens=20, ignore_eos=True, stop_token_ids=stop_ids))
        first = min(ids.index(stop_id) for stop_id in stop_ids)
        assert output.token_ids == ids[: first + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", ids[first])


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_seeds_repeat_and_differ_and_minus_one_is_none(llm):
    def ids(seed):
        return answer(llm, sampled(12, seed)).token_ids

    assert ids(42) == ids(42) != ids(43)
    assert len({tuple(ids(-1)) for _ in range(4)}) == 4
    mixed = answers(llm, ["Hello"] * 4, [sampled(12, seed) for seed in (42, None, 42, 43)])
    assert [output.token_ids for output in mixed[::2]] == [ids(42)] * 2 and mixed[3].token_ids == ids(43)


def test_top_k_of_minus_one_keeps_all_tokens(llm):
    assert answer(llm, sampled(20, 1, top_k=-1)).token_ids == answer(llm, sampled(20, 1)).token_ids


@pytest.mark.parametrize("temperature", [1e-30, 1e-9, 1e-5, 1e-3])
def test_tiny_temperatures_sample_what_is_nearly_greedy(llm, temperature):
    for prompt in TEXTS:
        params = SamplingParams(temperature=temperature, max_tokens=10, ignore_eos=True)
        assert answer(llm, params, prompt).token_ids == answer(llm, greedy(10), prompt).token_ids


@pytest.mark.parametrize("min_tokens", [0, 1, 5])
@pytest.mark.parametrize("end", ["eos", "stop id", "stop string"])
def test_min_tokens_hold_back_every_end(llm, min_tokens, end):
    (letter,) = llm.tokenizer.encode("x")
    end_id = EOS if end == "eos" else letter
    options = {"eos": {}, "stop id": {"stop_token_ids": [letter]}, "stop string": {"stop": ["x"]}}[end]
    output = answer(
        llm, SamplingParams(max_tokens=12, min_tokens=min_tokens, logit_bias={end_id: 100}, seed=1, **options)
    )
    assert (len(output.token_ids), output.finish_reason) == (min_tokens + 1, "stop")
    assert output.stop_reason == {"eos": None, "stop id": letter, "stop string": "x"}[end]
    if end != "stop string":  # which may come and does not end the text
        assert end_id not in output.token_ids[:min_tokens]


def test_output_of_exactly_min_tokens_ends_with_length(llm):
    output = answer(llm, SamplingParams(max_tokens=9, min_tokens=9, logit_bias={EOS: 100}, seed=1))
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (9, "length", None)
    assert EOS not in output.token_ids


def test_ignore_eos_goes_on_to_max_tokens(llm):
    params = SamplingParams(max_tokens=9, ignore_eos=True, logit_bias={EOS: 100})
    output = answer(llm, params)
    assert (output.token_ids, output.finish_reason) == ([EOS] * 9, "length")


def test_bad_words_are_not_in_the_text(llm):
    allowed = llm.tokenizer.encode("ab c")
    for words in (["ab"], ["ab", "c"], ["b a"]):
        params = sampled(60, 3, bad_words=words, allowed_token_ids=allowed)
        assert not any(word in answer(llm, params).text for word in words)


# -- structured outputs -----------------------------------------------------------------------------------------------

EMPLOYEE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "skills": {"type": "array", "items": {"enum": ["go", "c"]}, "minItems": 1, "maxItems": 2},
        "grade": {"type": "string", "pattern": "^[A-D]$"},
    },
    "required": ["name", "age", "skills", "grade"],
    "additionalProperties": False,
}
SQL = """
root ::= "SELECT " column " from " table " where " column " = " number
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
number ::= "1 " | "2 "
"""
IPV4 = r"((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"


def structured(seed=1, max_tokens=110, structured_options=None, **form):
    return SamplingParams(
        seed=seed,
        max_tokens=max_tokens,
        structured_outputs=StructuredOutputsParams(**form),
        **(structured_options or {}),
    )


def test_structured_outputs_next_to_free_ones_follow_their_forms(llm):
    forms = [dict(json=EMPLOYEE), dict(regex=IPV4), dict(choice=["Rust", "C"]), dict(grammar=SQL)]
    free = answer(llm, greedy(20)).token_ids
    outputs = answers(
        llm, ["Give one"] * 8 + ["Hello"], [*[structured(i, **form) for i in (1, 2) for form in forms], greedy(20)]
    )
    assert outputs[-1].token_ids == free
    for i, output in enumerate(outputs[:-1]):
        assert output.finish_reason == "stop"
        match i % 4:
            case 0:
                assert "\n" not in output.text
                jsonschema.validate(json.loads(output.text), EMPLOYEE)
            case 1:
                assert re.fullmatch(IPV4, output.text)
            case 2:
                assert output.text in ("Rust", "C")
            case 3:
                assert re.fullmatch(r"SELECT col_[12]  from table_[12]  where col_[12]  = [12] ", output.text)


CAR = {
    "$defs": {"CarType": {"enum": ["sedan", "SUV", "Truck", "Coupe"], "title": "CarType", "type": "string"}},
    "properties": {
        "brand": {"title": "Brand", "type": "string", "maxLength": 9},
        "car_type": {"$ref": "#/$defs/CarType"},
    },
    "required": ["brand", "car_type"],
    "additionalProperties": False,
    "title": "CarDescription",
    "type": "object",
}
SCORE = {
    "type": "object",
    "properties": {
        "score": {"type": "integer", "multipleOf": 5, "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 10, "maxLength": 20}, "maxItems": 2},
    },
    "required": ["score", "tags"],
    "additionalProperties": False,
    "patternProperties": {"^score$": {"type": "integer", "maximum": 99}},
}
LARK_SQL = """
start: select_statement
select_statement: "SELECT" column "from" table "where" condition
column: "col_1" | "col_2"
table: "table_1" | "table_2"
condition: column "=" number
number: "1" | "2"
"""


@pytest.mark.parametrize("schema", [CAR, SCORE])
def test_references_multiples_and_patterns_of_schemas_are_followed(llm, schema):
    for seed in range(4):
        output = answer(llm, structured(seed, json=schema))
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), schema)


def test_grammars_in_lark_are_followed(llm):
    texts = [sample.text for sample in answer(llm, structured(grammar=LARK_SQL, structured_options={"n": 4})).outputs]
    assert all(re.fullmatch("SELECTcol_[12]fromtable_[12]wherecol_[12]=[12]", text) for text in texts)


def test_parameters_with_a_form_can_be_used_again(llm):
    params = structured(json=EMPLOYEE)
    assert answer(llm, params).text == answer(llm, params).text


def test_lengths_of_strings_are_followed(llm):
    schema = {"type": "object", "properties": {"d": {"type": "string", "minLength": 20, "maxLength": 20}}}
    schema |= {"required": ["d"], "additionalProperties": False}
    for seed in range(3):
        assert len(json.loads(answer(llm, structured(seed, json=schema)).text)["d"]) == 20


def test_not_a_grammar_is_refused(llm):
    with pytest.raises(ValueError, match="structured_outputs"):
        answer(llm, structured(grammar="not a grammar"))


def written(llm, text, **form) -> bool:
    """Return whether a form lets `text` be the output."""
    grammars = llm.llm_engine.input_processor.grammars
    made = grammars.compile(**dataclasses.asdict(StructuredOutputsParams(**form)))
    for token_id in llm.tokenizer.encode(text):
        if made.is_complete or not made.compute_mask()[token_id // 32] >> token_id % 32 & 1:
            return False
        made.accept(token_id)
    return made.error is None and (made.is_complete or bool(made.compute_mask()[EOS // 32] >> EOS % 32 & 1))


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "null"}}}}
STYLES = ['{"a":1,"b":[null,null]}', '{"a": 1, "b": [null, null]}', '{ "a": 1 }', '{"a":\n1}', '{"a": 1, "c": 2}']


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, [False, True, False, False, True]),
        (dict(disable_any_whitespace=True), [True, False, False, False, False]),
        (dict(disable_any_whitespace=False), [True, True, True, True, True]),
        (dict(whitespace_pattern=r"[ ]{0,1}"), [True, True, True, False, True]),
        (dict(whitespace_pattern=r"\n?"), [True, False, False, True, False]),
        (dict(disable_additional_properties=True), [False, True, False, False, False]),
        (dict(disable_any_whitespace=False, disable_additional_properties=True), [True, True, True, True, False]),
    ],
)
def test_options_of_json_are_followed(llm, options, allowed):
    assert [written(llm, text, json=OPEN, **options) for text in STYLES] == allowed


def test_json_object_is_any_object(llm):
    for text, right in (("{}", True), ('{"a": {"b": [1, null]}}', True), ("[1]", False), ("1", False)):
        assert written(llm, text, json_object=True) is right
    form = dict(json_object=True, max_tokens=100)
    outputs = [answer(llm, structured(seed, structured_options=dict(logit_bias={94: 5}), **form)) for seed in range(4)]
    assert all(isinstance(json.loads(o.text), dict) for o in outputs if o.finish_reason == "stop")
    assert all(output.text.startswith("{") for output in outputs)


TAGS = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=weather>", "schema": OPEN | {"additionalProperties": False}, "end": "</f>"},
        {"begin": "<f=", "schema": {"type": "array", "items": {"type": "integer"}}, "end": ""},
        {"begin": "<pad>call", "schema": {"type": "boolean"}, "end": "<pad>"},
    ],
    "triggers": ["<f=w", "<f=", "<pad>"],
}


def test_structural_tags_force_what_follows_a_trigger(llm):
    texts = {
        "": True,
        "any text < f": True,
        'so <f=weather>{"a": 1}</f> and <f=[1, 2] and on': True,
        "<pad>calltrue<pad> and on": True,
        "<f=weather>{}": False,
        "<f=weather>{}</f>": True,
        "<f=wind": False,
        '<f=weather>{"c": 1}</f>': False,
        "<f=x": False,
        "<pad>callx": False,
    }
    assert {text: written(llm, text, structural_tag=json.dumps(TAGS)) for text in texts} == texts
    assert written(llm, "<f=[]", structural_tag=TAGS) and not written(llm, "<f=[1,2]", structural_tag=TAGS)
    compact = dict(structural_tag=TAGS, disable_any_whitespace=True)
    assert written(llm, "<f=[1,2]", **compact) and not written(llm, "<f=[1, 2]", **compact)


def test_an_output_calls_the_functions_of_its_structural_tag(llm):
    (trigger,) = llm.tokenizer.encode("x")
    tag = {"structures": [{"begin": "x[", "schema": {"type": "boolean"}, "end": "]"}], "triggers": ["x"]}
    for bias, pattern in ((100, r"(x\[(true|false)\])+(x(\[\w*)?)?"), (-100, "[^x]+")):
        options = dict(logit_bias={trigger: bias}, ignore_eos=True)
        output = answer(llm, structured(structural_tag=tag, max_tokens=30, structured_options=options))
        assert re.fullmatch(pattern, output.text, re.DOTALL), output.text


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("{", "structured_outputs"),
        ("[]", "structural_tag"),
        ({"structures": [], "triggers": ["<"]}, "structural_tag"),
        ({"structures": [{"begin": "<a>", "schema": {}, "end": ""}], "triggers": ["<b"]}, "trigger of its begin"),
        ({"structures": [{"begin": "<a>", "schema": {}, "end": ""}], "triggers": [""]}, "structural_tag"),
        ({"type": "structural_tag", "format": {"type": "any_text"}}, "structural_tag"),
        ({**TAGS, "at_least_one": True}, "at_least_one"),
    ],
)
def test_wrong_structural_tags_are_refused(llm, tag, words):
    with pytest.raises(ValueError, match=words):
        answer(llm, structured(structural_tag=tag))


@pytest.mark.parametrize("bias", [{EOS: 100.0}, {}])
def test_min_tokens_and_ignore_eos_hold_back_the_end_of_a_structured_output(llm, bias):
    def length(**options):
        output = answer(
            llm, structured(regex="[ab]*", max_tokens=30, structured_options=options | {"logit_bias": bias})
        )
        assert re.fullmatch("[ab]*", output.text)
        return len(output.text)

    if bias:
        assert length() == 0
    for min_tokens in (1, 7):
        assert length(min_tokens=min_tokens) >= min_tokens
        assert not bias or length(min_tokens=min_tokens) == min_tokens
    assert length(ignore_eos=True) == length(ignore_eos=True, min_tokens=3) == 30


def test_complete_structured_output_ends_before_min_tokens_and_with_ignore_eos(llm):
    for options in (dict(min_tokens=20), dict(ignore_eos=True), dict(min_tokens=20, ignore_eos=True)):
        for form in (dict(choice=["yes", "yesterday"]), dict(regex="a{3}b?")):
            output = answer(llm, structured(max_tokens=30, structured_options=options, **form))
            assert output.finish_reason == "stop" and output.text in ("yesterday", "aaab")


def test_a_stop_id_that_alone_may_follow_before_min_tokens_aborts_that_request(llm):
    (b,) = llm.tokenizer.encode("b")
    options = dict(min_tokens=5, stop_token_ids=[b])
    output = answer(llm, structured(regex="aab", structured_options=options))
    assert (output.text, output.finish_reason) == ("aa", "abort") and "min_tokens" in output.stop_reason
    with pytest.raises(ValueError, match="leave no token"):
        answer(llm, structured(regex="b", structured_options=options))
    assert answer(llm, structured(regex="aab", structured_options=dict(stop_token_ids=[b]))).text == "aa"


def test_samples_of_a_structured_request_are_held_back_each(llm):
    output = answer(llm, structured(regex="[ab]*", structured_options=dict(n=4, min_tokens=4)))
    assert all(len(sample.text) >= 4 for sample in output.outputs)
    assert len({sample.text for sample in output.outputs}) > 1


def test_processed_logprobs_of_all_tokens_show_the_mask(llm):
    params = structured(choice=["a", "b"], structured_options=dict(logprobs=-1, logprobs_mode="processed_logprobs"))
    row = answer(llm, params).logprobs[0]
    possible = {token_id for token_id, entry in row.items() if entry.logprob > -math.inf}
    assert possible == set(llm.tokenizer.encode("ab"))


def test_an_assignment_to_parameters_changes_later_requests_only(llm):
    params = llm.get_default_sampling_params()
    params.temperature, params.max_tokens, params.ignore_eos = 0, 5, True
    assert llm.get_default_sampling_params() != params
    stream = llm.stream({"prompt_token_ids": IDS}, params)
    llm.add_request({"prompt_token_ids": IDS}, params)
    params.max_tokens, params.logprobs = 2, 0
    assert sum(len(output.outputs[0].token_ids) for output in stream) == 5
    *_, output = finish(llm)
    assert len(output.outputs[0].token_ids) == 5 and output.outputs[0].logprobs is None
    llm.on_step = lambda *_: setattr(params, "logprobs", None)
    output = answer(llm, params, {"prompt_token_ids": IDS}).outputs[0]
    llm.on_step = None
    assert len(output.token_ids) == len(output.logprobs) == 2
