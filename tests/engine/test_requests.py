"""Tests the options of requests as a user sees them, with tiny random models on a CPU."""

import copy
import dataclasses
import gc
import json
import math
import pickle
import random
import sys
import types
from itertools import pairwise

import jsonschema
import pytest
import torch

from nanovllm import LLM, RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.models.presets import PRESETS
from nanovllm.outputs import TokenLogprobs
from tests.engine.reference import load_reference
from tests.helpers import assert_nothing_held, engine, finish, greedy, prompts_of, sampled, tokens
from tests.models.tiny import save_tiny

VOCAB = 131


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def reference(model):
    return load_reference(model)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A tiny random model with SmolLM2's tokenizer, so that it speaks, if not sense."""
    from nanovllm.checkpoints.model_source import open_model

    tokenizer = open_model(None).tokenizer()
    path = save_tiny(tmp_path_factory.mktemp("speaking"), "qwen3", vocab_size=len(tokenizer), eos_token_id=2)
    tokenizer.save_pretrained(path)
    return path


# -- n samples --------------------------------------------------------------------------------------------------------


def test_n_samples_differ_and_share_the_blocks_of_the_prompt(model):
    prompt = prompts_of([64])[0]
    with engine(model, num_kvcache_blocks=24) as llm:  # 3 shared and 2 for each; 8 times 5 would not fit
        out = llm.generate([prompt], sampled(8, seed=5, n=8), use_tqdm=False)[0]
        assert [sample.index for sample in out.outputs] == list(range(8))
        assert len({tuple(sample.token_ids) for sample in out.outputs}) > 4
        assert llm.metrics().num_preemptions == 0
        assert llm.metrics().cached_tokens == 7 * 48  # the last block is computed by each, as its last token must be
        assert llm.metrics().kv_usage == 0
        again = llm.generate([prompt], sampled(8, seed=5, n=3), use_tqdm=False)[0]
        assert [s.token_ids for s in again.outputs] == [s.token_ids for s in out.outputs[:3]]
        assert tokens(llm, [prompt], sampled(8, seed=5))[0] == out.outputs[0].token_ids == out.token_ids


# -- logits -----------------------------------------------------------------------------------------------------------


def reference_tokens(reference, prompt, num_tokens, **options):
    ids = torch.tensor([prompt])
    options |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": num_tokens}
    out = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("variant", [{}, {"max_num_batched_tokens": 8}, {"num_kvcache_blocks": 8}, {"overlap": 0}])
def test_repetition_penalty_equals_transformers(model, reference, variant):
    prompts = prompts_of([5, 20, 33])
    want = [reference_tokens(reference, prompt, 30, repetition_penalty=1.8) for prompt in prompts]
    with engine(model, **variant) as llm:
        plain = tokens(llm, prompts, greedy(30))
        got = tokens(llm, [*prompts, *prompts], [greedy(30, repetition_penalty=1.8)] * 3 + [greedy(30)] * 3)
    assert got == want + plain and want != plain


def test_presence_and_frequency_penalties_equal_their_definition(model, reference):
    prompt, presence, frequency = prompts_of([9])[0], 1.5, 0.7
    ids = list(prompt)
    for _ in range(25):
        with torch.inference_mode():
            logits = reference(torch.tensor([ids])).logits[0, -1]
        times = torch.bincount(torch.tensor(ids[len(prompt) :], dtype=torch.int64), minlength=VOCAB)
        ids.append(int((logits - presence * (times > 0) - frequency * times).argmax()))
    with engine(model) as llm:
        params = greedy(25, presence_penalty=presence, frequency_penalty=frequency)
        assert tokens(llm, [prompt], params)[0] == ids[len(prompt) :] != tokens(llm, [prompt], greedy(25))[0]


def test_logit_bias_and_allowed_ids_do_not_reach_the_next_request_in_a_slot(model):
    prompt = prompts_of([7])[0]
    with engine(model, max_num_seqs=2) as llm:
        plain = tokens(llm, [prompt], greedy(10))[0]
        assert tokens(llm, [prompt], greedy(10, logit_bias={17: 100.0}))[0] == [17] * 10
        assert plain[0] not in tokens(llm, [prompt], greedy(10, logit_bias={plain[0]: -100}))[0]
        allowed = [3, 64, 130]
        assert set(tokens(llm, [prompt], sampled(40, seed=1, allowed_token_ids=allowed))[0]) == set(allowed)
        assert tokens(llm, [prompt] * 4, greedy(10)) == [plain] * 4  # the slots' next owners have none of it


def test_samples_with_all_options_follow_the_processed_softmax(model, reference):
    """Chi-square of 2,000 first tokens over 6 allowed ids; the 99.9% bound for 5 degrees of freedom is 20.5."""
    prompt, allowed = prompts_of([12])[0], [5, 9, 40, 77, 100, 130]
    options = dict(allowed_token_ids=allowed, logit_bias={9: 1.0, 77: -0.5}, repetition_penalty=1.3)
    params = SamplingParams(temperature=0.9, max_tokens=1, n=1000, seed=1, **options)
    with engine(model, max_num_seqs=64) as llm:
        outs = llm.generate([prompt] * 2, [params, SamplingParams(**{**vars_of(params), "seed": 2})], use_tqdm=False)
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0, -1]
    logits = logits.clone()
    logits[9] += 1.0
    logits[77] -= 0.5
    seen = torch.tensor(sorted(set(prompt)))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
    expected = (logits[allowed] / 0.9).softmax(-1).double() * 2000
    drawn = [sample.token_ids[0] for out in outs for sample in out.outputs]
    counts = torch.tensor([drawn.count(token_id) for token_id in allowed]).double()
    assert counts.sum() == 2000 and ((counts - expected) ** 2 / expected).sum() < 20.5


def vars_of(params):
    return {name: getattr(params, name) for name in params.__slots__}


# -- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"max_num_batched_tokens": 9}, {"num_kvcache_blocks": 8}])
def test_logprobs_equal_transformers(model, reference, variant):
    prompts = prompts_of([1, 6, 40, 33])
    params = [greedy(12, logprobs=3, prompt_logprobs=2), sampled(20, 1, logprobs=0), greedy(9, prompt_logprobs=0)]
    params.append(sampled(30, 2, logprobs=5, prompt_logprobs=1))
    with engine(model, **variant) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        outputs += llm.generate(prompts, params, use_tqdm=False)  # with a warm prefix cache
        assert llm.generate(prompts, greedy(5), use_tqdm=False)[0].logprobs is None
    for output, prompt, asked in zip(outputs, prompts * 2, params * 2, strict=True):
        with torch.inference_mode():
            want = reference(torch.tensor([prompt + output.token_ids])).logits[0].log_softmax(-1)
        if asked.prompt_logprobs is not None:
            check_rows(output.prompt_logprobs[1:], prompt[1:], want, asked.prompt_logprobs)
            assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
        else:
            assert output.prompt_logprobs is None
        if asked.logprobs is None:
            assert output.logprobs is None and output.outputs[0].cumulative_logprob is None
            continue
        check_rows(output.logprobs, output.token_ids, want[len(prompt) - 1 :], asked.logprobs)
        total = sum(row[token].logprob for row, token in zip(output.logprobs, output.token_ids, strict=True))
        assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def check_rows(rows, token_ids, want, k):
    assert len(rows) == len(token_ids)
    for row, token_id, logprobs in zip(rows, token_ids, want, strict=False):
        assert k <= len(row) <= k + 1
        assert {*logprobs.topk(k).indices.tolist(), token_id} == set(row)
        for key, (logprob, rank, _) in row.items():
            assert logprob == pytest.approx(logprobs[key].item(), abs=2e-4)
            assert rank == (logprobs > logprobs[key]).sum() + 1


def held_bytes(objects, seen=None):
    """Return the size of objects and of all that they refer to, but for types, modules and functions."""
    seen = set() if seen is None else seen
    total = 0
    for item in objects:
        if id(item) not in seen and not isinstance(item, type | types.ModuleType | types.FunctionType):
            seen.add(id(item))
            total += sys.getsizeof(item) + held_bytes(gc.get_referents(item), seen)
    return total


def test_outputs_and_copies_of_logprobs_hold_nothing_of_other_requests(model):
    with engine(model) as llm:
        params = greedy(10, logprobs=3, prompt_logprobs=2)
        (alone,) = llm.generate([[4, 5, 6]], params, use_tqdm=False)
        among = llm.generate([[4, 5, 6]] * 8, params, use_tqdm=False)[3]
    assert held_bytes([among]) < 1.1 * held_bytes([alone])
    for copied in (pickle.loads(pickle.dumps(among)), copy.deepcopy(among)):
        assert copied == among and copied.prompt_logprobs[0] is None
        assert copied.outputs[0].cumulative_logprob == among.outputs[0].cumulative_logprob
    assert len(pickle.dumps(among)) < 1.1 * len(pickle.dumps(alone))


def test_logprobs_of_the_whole_vocabulary_do_not_enlarge_those_of_other_requests(model, monkeypatch):
    """In a step of 512 rows the arrays would take a gigabyte."""
    pack, widths = TokenLogprobs.pack, []

    def spy(token_ids, logprobs, ranks):
        widths.append(token_ids.shape[1])
        return pack(token_ids, logprobs, ranks)

    monkeypatch.setattr(TokenLogprobs, "pack", spy)
    with engine(model) as llm:
        params = [greedy(10, logprobs=k, prompt_logprobs=k) for k in (0, -1, 3)]
        outputs = llm.generate(prompts_of([5, 6, 7]), params, use_tqdm=False)
    assert {*widths} == {1, VOCAB + 1, 5}
    for output, sizes in zip(outputs, ({1}, {VOCAB}, {3, 4}), strict=True):
        assert {len(row) for row in [*output.logprobs, *output.prompt_logprobs[1:]]} <= sizes


def test_logprobs_cover_a_vocabulary_smaller_than_k(tmp_path):
    with engine(save_tiny(tmp_path, "qwen3", vocab_size=50)) as llm:
        out = llm.generate([[2, 3]], sampled(3, logprobs=128, prompt_logprobs=60), use_tqdm=False)[0]
    for row in [*out.outputs[0].logprobs, *out.prompt_logprobs[1:]]:
        assert sorted(row) == list(range(50))
        assert sum(math.exp(value.logprob) for value in row.values()) == pytest.approx(1, abs=1e-5)


def test_processed_logprobs_are_those_of_the_sampled_distribution(model, reference):
    prompt = prompts_of([10])[0]
    options = dict(top_k=4, logit_bias={3: 2.0}, frequency_penalty=0.5, logprobs=6, logprobs_mode="processed_logprobs")
    params = SamplingParams(temperature=0.5, seed=3, max_tokens=15, ignore_eos=True, **options)
    with engine(model) as llm:
        raw, out = llm.generate([prompt] * 2, [greedy(15, logprobs=6), params], use_tqdm=False)
    assert all(sum(math.exp(x.logprob) for x in row.values()) < 0.999 for row in raw.logprobs)
    ids = list(prompt)
    for token_id, row in zip(out.token_ids, out.logprobs, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([ids])).logits[0, -1]
        logits = logits + 2.0 * (torch.arange(VOCAB) == 3)
        logits = logits - 0.5 * torch.bincount(torch.tensor(ids[len(prompt) :], dtype=torch.int64), minlength=VOCAB)
        top = (logits / 0.5).topk(4)
        want = dict(zip(top.indices.tolist(), top.values.log_softmax(-1).tolist(), strict=True))
        assert {k: x.logprob for k, x in row.items() if x.logprob > -math.inf} == pytest.approx(want, abs=1e-3)
        assert token_id in want
        ids.append(token_id)


def test_processed_logprobs_exclude_stop_ids_before_min_tokens(model):
    eos, options = 1, dict(max_tokens=6, min_tokens=4, logprobs=1, logprobs_mode="processed_logprobs")
    params = SamplingParams(temperature=1.0, seed=1, logit_bias={eos: 30.0}, **options)
    with engine(model) as llm:
        (out,) = llm.generate(prompts_of([10]), params, use_tqdm=False)
    assert len(out.token_ids) == 5 and out.token_ids[-1] == eos
    for row in out.logprobs[:4]:  # the biased token would push them below -20
        assert eos not in row and all(x.logprob > -10 for x in row.values())


# -- text -------------------------------------------------------------------------------------------------------------


def test_stop_strings_are_found_across_token_borders(speaking):
    with engine(speaking) as llm:
        params = SamplingParams(temperature=1.0, seed=4, max_tokens=60, ignore_eos=True)
        free = llm.generate(["Hello"], params, use_tqdm=False)[0]
        for length in (1, 3, 8):
            middle = len(free.text) // 2
            stop = free.text[middle : middle + length]
            end = free.text.index(stop)
            options = {**vars_of(params), "stop": [stop, "never this one"]}
            cut = llm.generate(["Hello"], SamplingParams(**options), use_tqdm=False)[0]
            assert cut.text == free.text[:end] and (cut.finish_reason, cut.stop_reason) == ("stop", stop)
            assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
            options["include_stop_str_in_output"] = True
            assert llm.generate(["Hello"], SamplingParams(**options), use_tqdm=False)[0].text == free.text[:end] + stop
        assert finish(llm) == []  # a step was in flight
        assert llm.metrics().kv_usage == 0


def test_stop_id_is_reported_and_its_text_is_optional(speaking):
    with engine(speaking) as llm:
        free = llm.generate(["Hello"], greedy(12), use_tqdm=False)[0]
        stop = free.token_ids[5]
        first = free.token_ids.index(stop)
        out = llm.generate(["Hello"], greedy(12, stop_token_ids=[stop]), use_tqdm=False)[0]
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)
        assert out.token_ids == free.token_ids[: first + 1]
        assert out.text == llm.tokenizer.decode(out.token_ids[:-1])
        params = greedy(12, stop_token_ids=[stop], include_stop_str_in_output=True)
        assert llm.generate(["Hello"], params, use_tqdm=False)[0].text == llm.tokenizer.decode(out.token_ids)


def test_increments_of_a_stream_join_to_the_whole_output(speaking):
    texts = ["日本語 and 🎉🎉 emoji: 👩‍👩‍👧", "plain"]
    with engine(speaking) as llm:
        for seed, text in enumerate(texts * 3):
            # Ids of real text among those drawn: characters of several tokens.
            ids = llm.tokenizer.encode(text)
            params = sampled(50, seed, allowed_token_ids=ids, logprobs=0, n=2)
            whole = llm.generate([text], params, use_tqdm=False)[0]
            parts = list(llm.stream(text, params))
            assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
            for want in whole.outputs:
                mine = [sample for part in parts for sample in part.outputs if sample.index == want.index]
                assert [i for sample in mine for i in sample.token_ids] == want.token_ids
                assert [row for sample in mine for row in sample.logprobs] == want.logprobs
                assert "".join(sample.text for sample in mine) == want.text == llm.tokenizer.decode(want.token_ids)
                shown, known = "", []
                for sample in mine[:-1]:  # of a character that is not whole yet nothing is shown, and all before it is
                    shown, known = shown + sample.text, known + sample.token_ids
                    assert llm.tokenizer.decode(known) in (shown, shown + "\ufffd")
                assert mine[-1].finish_reason == "length"


def test_outputs_of_a_stream_share_the_prompt_but_not_with_the_engine(model):
    """Copies of a long prompt would take the engine's thread longer than the rest of the step."""
    prompt, params = prompts_of([40])[0], greedy(8, prompt_logprobs=1)
    with engine(model) as llm:
        (want,) = llm.generate([prompt], params, use_tqdm=False)
        stream = llm.stream(prompt, params)
        outputs = [next(stream)]
        assert outputs[0].prompt_token_ids == prompt and outputs[0].prompt_logprobs == want.prompt_logprobs
        outputs[0].prompt_token_ids.clear()
        outputs += stream
    assert all(output.prompt_token_ids is outputs[0].prompt_token_ids for output in outputs)
    assert all(output.prompt_logprobs is outputs[0].prompt_logprobs for output in outputs)
    assert [token_id for output in outputs for token_id in output.token_ids] == want.token_ids


def test_stream_reports_the_end_of_each_sample_once(model):
    with engine(model) as llm:
        parts = list(llm.stream([5, 6, 7], SamplingParams(n=4, seed=3, max_tokens=30, stop_token_ids=range(30))))
        assert sorted(s.index for part in parts for s in part.outputs if s.finish_reason) == [0, 1, 2, 3]
        assert all(sample.token_ids for part in parts for sample in part.outputs)


def test_stream_ends_when_its_request_ends_elsewhere(model):
    with engine(model) as llm:
        stream = llm.stream([1, 2, 3], greedy(50))
        llm.abort(next(stream).request_id)
        assert list(stream) == []
        stream = llm.stream([1, 2, 3], greedy(5))
        first = next(stream)
        while llm.has_unfinished():
            assert llm.step() == []
        assert sum(len(output.token_ids) for output in [first, *stream]) == 5
        stream = llm.stream([1, 2, 3], greedy(5))
        first = next(stream).request_id
        llm.abort(first)
        llm.add_request([7, 8], greedy(3), request_id=first)
        assert list(stream) == []
        assert [out.prompt_token_ids for out in finish(llm)] == [[7, 8]]
        stream = llm.stream([1, 2, 3], greedy(50))
        next(stream)
        llm.close()
        assert llm.metrics().num_running == llm.metrics().num_waiting == 0
        with pytest.raises(RuntimeError, match="closed"):
            list(stream)


def test_step_leaves_the_outputs_of_an_iterator_to_it(model):
    with engine(model) as llm:
        (want,) = tokens(llm, [[5, 6, 7]], greedy(20))
        other = llm.add_request([8, 9], greedy(30))
        stream = llm.stream([5, 6, 7], greedy(20))
        got = list(next(stream).token_ids)
        outputs = finish(llm)  # ends both requests, although the iterator has outputs that nobody has taken
        assert [output.request_id for output in outputs] == [other]
        for output in stream:
            got += output.token_ids
        assert got == want
        assert_nothing_held(llm)


def test_abort_returns_the_pieces_that_nobody_has_taken(model):
    with engine(model) as llm:
        (want,) = tokens(llm, [[5, 6, 7]], greedy(20))
        request_id = llm.add_request([5, 6, 7], greedy(20), stream=True)
        llm.generate([[8, 9]], greedy(6), use_tqdm=False)  # runs steps of both
        output = llm.abort(request_id)
        assert output.finished and len(output.token_ids) >= 5 and output.token_ids == want[: len(output.token_ids)]
        assert finish(llm) == []
        assert_nothing_held(llm)


def test_id_of_a_waiting_output_is_refused(model):
    with engine(model) as llm:
        llm.add_request([9, 9, 9], greedy(1), request_id=2)
        llm.generate([[2] * 5], greedy(4), use_tqdm=False)  # number 0; the output of 2 waits from now on
        with pytest.raises(ValueError, match="whose output waits"):
            llm.add_request([1], greedy(1), request_id=2)
        outputs = llm.generate([[i] * 5 for i in (2, 3, 4)], greedy(4), use_tqdm=False)
        assert [out.prompt_token_ids for out in outputs] == [[i] * 5 for i in (2, 3, 4)]
        assert [out.request_id for out in llm.step()] == ["2"]
        assert_nothing_held(llm)


def test_outputs_of_iterators_that_nobody_reads_are_merged(speaking):
    params = greedy(40, logprobs=1)
    with engine(speaking) as llm:
        (want,) = llm.generate(["one"], params, use_tqdm=False)
        for kind in (None, RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE):
            iterator = llm.stream("one", params.clone(output_kind=kind))
            llm.add_request("two", greedy(60))
            while llm.has_unfinished():
                llm.step()
            assert len(llm.llm_engine.core.outputs) == 1
            (output,) = iterator
            assert output.finished and output.outputs[0] == want.outputs[0]


def test_interleaved_streams_are_whole_and_a_closed_one_holds_nothing(speaking):
    with engine(speaking) as llm:
        want = [llm.generate([text], greedy(20), use_tqdm=False)[0].text for text in ("one", "two")]
        one, two = llm.stream("one", greedy(20)), llm.stream("two", greedy(20))
        texts = ["", ""]
        for a, b in zip(one, two, strict=True):
            texts[0] += a.text
            texts[1] += b.text
        assert texts == want
        left = llm.stream("three", greedy(50))
        next(left)
        left.close()
        assert llm.metrics().num_running == 0  # at once
        assert finish(llm) == []
        assert_nothing_held(llm)


def test_unread_streams_hold_nothing_and_return_no_output(model):
    with engine(model) as llm:
        stream = llm.stream([1, 2, 3], greedy(40))
        next(stream)
        tokens(llm, [[4, 5, 6]], greedy(20))  # what is new of the stream meanwhile waits for it
        stream.close()
        llm.stream([1, 2, 3], greedy(40))
        assert llm.metrics().num_running == llm.metrics().num_waiting == 0
        assert finish(llm) == []
        assert_nothing_held(llm)


@pytest.mark.parametrize("where", [(Request, "take_output"), (Scheduler, "schedule"), (Scheduler, "_append")])
def test_stream_may_be_garbage_collected_anywhere_in_a_step(model, where, monkeypatch):
    """A stream that is left in a cycle of references ends when Python's collector finds it."""
    want = getattr(*where)

    def collect_before(*args):
        gc.collect()
        return want(*args)

    with engine(model) as llm:
        llm.add_request([5], greedy(20), stream=True)
        for i in range(4):
            cycle = [llm.stream([1, 2, i], greedy(40))]
            next(cycle[0])
            cycle.append(cycle)
        del cycle
        monkeypatch.setattr(*where, collect_before)
        outputs = finish(llm)
        assert sum(len(output.token_ids) for output in outputs if output.request_id == "0") >= 16
        assert_nothing_held(llm)


def test_stream_collected_during_its_last_output_returns_none(model, monkeypatch):
    output = Request.take_output

    def collect_before(request, *args):
        if request.is_finished:
            gc.collect()
        return output(request, *args)

    monkeypatch.setattr(Request, "take_output", collect_before)
    with engine(model) as llm:
        cycle = [llm.stream([1, 2, 3], greedy(2))]
        next(cycle[0])
        cycle.append(cycle)
        del cycle
        last = None
        while llm.has_unfinished():
            last = llm.step()
        assert last == []


def test_bad_words_never_appear(speaking):
    with engine(speaking) as llm:
        spellings = [llm.tokenizer.encode(text) for text in ("xyzzy", " xyzzy", " plugh", "ok")]
        assert [len(ids) > 1 for ids in spellings] == [True, True, True, False]
        options = dict(allowed_token_ids=sorted({i for ids in spellings for i in ids}))

        def found(out):
            ids = out.token_ids
            return [any(ids[i : i + len(s)] == s for i in range(len(ids))) for s in spellings]

        free, without = (
            llm.generate(["Hello"], [sampled(100, 9, **options, **more)], use_tqdm=False)[0]
            for more in ({}, {"bad_words": ["xyzzy", "plugh", "ok"]})
        )
        assert sum(found(free)) > 1 and not any(found(without)) and len(without.token_ids) == 100


def test_a_request_whose_bad_words_leave_no_token_ends_and_says_so(speaking):
    with engine(speaking) as llm:
        (word,), (twice, _) = llm.tokenizer.encode(" ok"), llm.tokenizer.encode(" ok ok")
        assert word == twice
        options = dict(max_tokens=6, allowed_token_ids=[word, 2], logit_bias={word: 50.0}, temperature=0.0)
        with pytest.raises(ValueError, match="min_tokens, allowed_token_ids and bad_words leave no token"):
            llm.add_request("Hello", SamplingParams(bad_words=["ok"], min_tokens=4, **options))
        for min_tokens in (0, 1, 4):
            params = SamplingParams(bad_words=["ok ok"], min_tokens=min_tokens, logprobs=1, **options)
            (output,) = llm.generate("Hello", params)
            if min_tokens < 2:
                assert (output.token_ids, output.finish_reason) == ([word, 2], "stop")
            else:
                assert (output.token_ids, output.finish_reason) == ([word], "abort")
                assert output.outputs[0].stop_reason == "bad_words leave no token that could be sampled next"
            assert len(output.outputs[0].logprobs) == len(output.token_ids)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_a_structured_output_that_min_tokens_blocks_ends_before_the_blocked_token(speaking, mode):
    with engine(speaking, logprobs_mode=mode) as llm:
        (end,) = llm.tokenizer.encode("!", add_special_tokens=False)
        params = SamplingParams(
            structured_outputs=StructuredOutputsParams(regex="ok!"),
            stop_token_ids=[end],
            min_tokens=10,
            max_tokens=20,
            logprobs=1,
        )
        other = llm.generate("Hello", greedy(9))[0].token_ids
        outputs = llm.generate(["Hello"] * 2, [params, greedy(9)])
    (sample,) = outputs[0].outputs
    assert (sample.text, sample.finish_reason) == ("ok", "abort")
    assert sample.stop_reason == "min_tokens forbids all tokens that the grammar lets follow"
    assert len(sample.logprobs) == len(sample.token_ids) and math.isfinite(sample.cumulative_logprob)
    assert outputs[1].token_ids == other


def test_special_tokens_are_in_the_text_only_if_not_skipped(speaking):
    with engine(speaking) as llm:
        eos = llm.tokenizer.eos_token_id
        params = greedy(3, allowed_token_ids=[eos])
        assert llm.generate(["Hello"], params, use_tqdm=False)[0].text == ""
        out = llm.generate(["Hello"], greedy(3, allowed_token_ids=[eos], skip_special_tokens=False), use_tqdm=False)[0]
        assert out.text == llm.tokenizer.eos_token * 3


# -- structured outputs -----------------------------------------------------------------------------------------------


def structured(**what):
    return dict(structured_outputs=StructuredOutputsParams(**what))


def random_schema(rng, depth=0):
    kinds = ["integer", "boolean", "enum", "string", "const"] + ["object", "array"] * (depth < 2)
    match rng.choice(kinds):
        case "integer":
            return {"type": "integer", "minimum": rng.randrange(10), "maximum": rng.randrange(10, 1000)}
        case "boolean":
            return {"type": "boolean"}
        case "enum":
            return {"enum": rng.sample(["red", "green", 1, 2.5, None, True, "ünï"], 3)}
        case "const":
            return {"const": rng.choice(["a", 7, {"k": [1]}])}
        case "string":
            return {"type": "string", "minLength": 1, "maxLength": rng.randrange(1, 6)}
        case "array":
            count = rng.randrange(3)
            return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": count, "maxItems": count + 1}
        case "object":
            names = rng.sample(["name", "age", "tags", "ok", "x y"], rng.randrange(1, 4))
            properties = {name: random_schema(rng, depth + 1) for name in names}
            return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def test_outputs_of_50_random_schemas_are_valid_and_do_not_change_others(speaking):
    rng = random.Random(0)
    schemas = [{"type": "object", "properties": {"v": random_schema(rng)}, "required": ["v"]} for _ in range(50)]
    for schema in schemas:
        schema["additionalProperties"] = False
    options = dict(temperature=0.8, max_tokens=400)
    params = [SamplingParams(seed=i, **structured(json=s), **options) for i, s in enumerate(schemas)]
    plain = prompts_of([5, 9], 49152)
    with engine(speaking, max_model_len=512, max_num_seqs=12) as llm:
        want = tokens(llm, plain, greedy(30))
        outputs = llm.generate([*plain, *["A JSON object:"] * 50], [*[greedy(30)] * 2, *params], use_tqdm=False)
        assert llm.metrics().kv_usage == 0
    assert [out.token_ids for out in outputs[:2]] == want
    for schema, out in zip(schemas, outputs[2:], strict=True):
        assert out.finish_reason == "stop", out.text
        jsonschema.validate(json.loads(out.text), schema)


def test_regex_choice_grammar_and_n(speaking):
    import re

    with engine(speaking) as llm:
        out = llm.generate(["Hi"], SamplingParams(seed=1, n=3, **structured(regex=r"[a-c]{2}-\d{3}")), use_tqdm=False)[
            0
        ]
        assert all(re.fullmatch(r"[a-c]{2}-\d{3}", sample.text) for sample in out.outputs)
        choice = ["yes", "no", 'say "maybe"']
        outs = llm.generate(["Hi"] * 9, SamplingParams(**structured(choice=choice)), use_tqdm=False)
        assert {out.text for out in outs} <= set(choice)
        for grammar in ('start: "(" start2 ")"\nstart2: "[]" | "x"', 'root ::= "(" two ")"\ntwo ::= "[]" | "x"'):
            outs = llm.generate(["Hi"] * 8, SamplingParams(**structured(grammar=grammar)), use_tqdm=False)
            assert {out.text for out in outs} <= {"(x)", "([])"}


@pytest.mark.parametrize(
    "what",
    [
        dict(json="{"),
        dict(json={"type": "nonsense"}),
        dict(regex="("),
        dict(regex=r"[^\s\S]"),  # matches nothing
        dict(grammar="start: unknown"),
    ],
)
def test_a_bad_schema_fails_alone(speaking, what):
    with engine(speaking) as llm:
        request_id = llm.add_request("Hello", greedy(5))
        with pytest.raises(ValueError, match="structured_outputs"):
            llm.add_request("Hello", SamplingParams(**structured(**what)))
        assert [(out.request_id, len(out.token_ids)) for out in finish(llm)] == [(request_id, 5)]


def test_a_tokenizer_of_more_tokens_than_the_model_is_served(speaking, tmp_path):
    path = save_tiny(tmp_path, "qwen3", vocab_size=49000, eos_token_id=2)
    with engine(speaking) as llm:
        llm.tokenizer.save_pretrained(path)
    with engine(path) as llm:
        params = SamplingParams(**structured(choice=["yes", "no"]))
        assert llm.generate(["Hello"], params, use_tqdm=False)[0].text in ("yes", "no")


def test_a_grammar_that_cannot_be_followed_to_its_end_does_not_look_complete(speaking):
    rules = "\n".join(f'r{i}: "a{i}" z' for i in range(2500))
    grammar = f'start: ("b" | "c") y\ny: {" | ".join(f"r{i}" for i in range(2500))}\n{rules}\nz: /[a-z]/\n'
    with engine(speaking) as llm:
        params = SamplingParams(max_tokens=30, **structured(grammar=grammar))
        for out in (llm.generate(["Hi"], params, use_tqdm=False)[0], [*llm.stream("Hi", params)][-1]):
            assert out.finished and out.outputs[0].finish_reason == "abort"
            assert "Current row has" in out.outputs[0].stop_reason
        assert len(tokens(llm, ["Hi"], greedy(5))[0]) == 5


def test_many_choices_for_many_samples_are_read_once(speaking):
    choice = [f"{i} apples / +?\n" for i in range(5000)]
    with engine(speaking, max_num_seqs=64) as llm:
        out = llm.generate(["Hi"], SamplingParams(n=100, seed=3, **structured(choice=choice)), use_tqdm=False)[0]
    assert all(sample.text in choice and sample.finish_reason == "stop" for sample in out.outputs)
    assert len({sample.text for sample in out.outputs}) > 30
    with pytest.raises(ValueError, match="choice must have at most 1048576 characters"):
        StructuredOutputsParams(choice=["x" * 1000] * 1100)


# -- chat -------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ t['function']['name'] }}</tool>{% endfor %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if not loop.last or not continue_final_message %}"
    "</{{ m['role'] }}>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def test_chat_uses_the_template_and_its_options(speaking):
    messages = [{"role": "user", "content": "Hello"}]
    with engine(speaking) as llm:
        llm.tokenizer.chat_template = TEMPLATE
        out = llm.chat(messages, greedy(4), use_tqdm=False)[0]
        assert llm.tokenizer.decode(out.prompt_token_ids) == "<user>Hello</user><assistant>"
        assert len(llm.chat([messages] * 3, greedy(4), use_tqdm=False)) == 3
        tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
        prompt = llm.chat_prompts(messages, tools=tools, enable_thinking=False)[0]
        assert llm.tokenizer.decode(prompt) == "<tool>search</tool><user>Hello</user><assistant><think></think>"
        messages.append({"role": "assistant", "content": "Once upon"})
        prompt = llm.chat_prompts(messages, continue_final_message=True)[0]
        assert llm.tokenizer.decode(prompt) == "<user>Hello</user><assistant>Once upon"
        with pytest.raises(TypeError, match="truncation"):
            llm.chat(messages, truncation=True)
        for wrong in ("Hello", [], [["Hello"]], [{"content": "x"}], 5):
            with pytest.raises(TypeError, match="messages"):
                llm.chat(wrong)
        llm.tokenizer.chat_template = None
        with pytest.raises(ValueError, match="chat template"):
            llm.chat(messages)


def test_attributes_of_a_stream_s_outputs_are_those_of_the_first_sample(speaking):
    with engine(speaking) as llm:
        params = sampled(20, n=3, seed=7, stop=["e", "o"], logprobs=1)
        (want,) = llm.generate(["Hello"], params.clone(output_kind=RequestOutputKind.FINAL_ONLY), use_tqdm=False)
        outputs = list(llm.stream("Hello", params))
    lengths = [len(sample.token_ids) for sample in want.outputs]
    assert lengths[0] < max(lengths), "the first sample must end before the others"
    assert "".join(output.text for output in outputs) == want.text
    assert [token_id for output in outputs for token_id in output.token_ids] == want.outputs[0].token_ids


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_metrics_and_outputs_report_times_and_counts(speaking):
    with engine(speaking, log_steps=True) as llm:
        first = llm.generate(["some words " * 20], greedy(5), use_tqdm=False)[0]
        second = llm.generate(["some words " * 20], greedy(5), use_tqdm=False)[0]
        assert first.prompt == "some words " * 20 and first.finished and first.weight_version == 0
        assert 0 < first.time_to_first_token < first.total_time < 60
        assert first.num_cached_tokens == 0 < second.num_cached_tokens
        metrics = llm.metrics()
        prompt_tokens = len(first.prompt_token_ids)
        assert (metrics.prompt_tokens, metrics.generated_tokens) == (2 * prompt_tokens, 10)
        assert metrics.cached_tokens == second.num_cached_tokens
        assert metrics.cache_hit_rate == second.num_cached_tokens / (2 * prompt_tokens)
        assert (metrics.num_running, metrics.num_waiting, metrics.kv_usage) == (0, 0, 0)
        assert metrics.num_steps >= 10 and 0 < metrics.mean_step_time < 60
        llm.add_request([5] * 20, greedy(5))
        llm.step()
        assert llm.metrics().num_running == 1 and llm.metrics().kv_usage > 0


def test_steps_are_logged_only_with_log_steps(model, caplog):
    with caplog.at_level("INFO", "nanovllm"):
        with engine(model) as llm:
            tokens(llm, prompts_of([5]), greedy(3))
        assert not any("step" in record.message for record in caplog.records)
        with engine(model, log_steps=True) as llm:
            tokens(llm, prompts_of([5]), greedy(3))
    steps = [record.message.split(":")[0] for record in caplog.records if "decode rows" in record.message]
    assert steps == ["step 1", "step 2", "step 3"]


@pytest.mark.parametrize("overlap", [0, 1])
def test_on_step_receives_each_batch_and_its_times(model, overlap):
    steps = []
    with engine(model, overlap=overlap) as llm:
        assert llm.on_step is None
        llm.on_step = steps.append
        tokens(llm, prompts_of([5, 9]), greedy(3))
        llm.on_step = None
        tokens(llm, prompts_of([5]), greedy(3))
    batches = [step.batch for step in steps if step.batch is not None]
    assert [batch.num_tokens for batch in batches] == [5 + 9, 2, 2]
    assert [batch.num_decode for batch in batches] == [0, 2, 2]
    assert len(steps) == len(batches) + overlap  # the last call only collects
    for name in ("launch", "collect", "update"):
        assert sum(phase.name == name for step in steps for phase in step.phases) == len(batches)
    for step in steps:
        assert step.phases[0].name == "schedule" and step.gpu_seconds is None
        assert all(one.end == other.start for one, other in pairwise(step.phases))
        assert 0 <= step.wait_seconds < step.seconds
    assert all(one.phases[-1].end <= other.phases[0].start for one, other in pairwise(steps))


def test_wrong_types_of_on_step_and_time_gpu_are_refused_when_they_are_set(model):
    with engine(model) as llm:
        with pytest.raises(TypeError, match="on_step must be a function or None, got 5"):
            llm.on_step = 5
        with pytest.raises(TypeError, match="time_gpu must be a bool, got 'x'"):
            llm.time_gpu = "x"
        assert llm.on_step is None and llm.time_gpu is False


def test_error_in_on_step_reaches_the_caller_and_loses_no_output(model):
    def fail(step):
        raise OSError("no space left")

    prompt = prompts_of([5])[0]
    with engine(model, overlap=0) as llm:
        expected = tokens(llm, [prompt], greedy(1))
        request_id = llm.add_request(prompt, greedy(1))
        llm.on_step = fail
        with pytest.raises(OSError, match="no space left"):
            llm.step()
        llm.on_step = None
        (output,) = llm.step()
        assert output.request_id == request_id and [output.outputs[0].token_ids] == expected
        assert tokens(llm, [prompt], greedy(1)) == expected


@pytest.mark.parametrize("call", ["abort", "step"])
def test_generate_returns_what_a_callback_has_ended_or_received(model, call):
    prompts = prompts_of([5, 9])
    with engine(model, overlap=0) as llm:
        expected = tokens(llm, prompts, greedy(4))
        ids = []

        def callback(step):
            if call == "step" and llm.on_step:
                llm.on_step = None
                finish(llm)
                llm.on_step = callback
            elif call == "abort" and len(ids) < 1 and step.batch:
                ids.append(next(iter(llm.llm_engine.core.requests)))
                llm.abort(ids[0])

        llm.on_step = callback
        outputs = llm.generate(prompts, greedy(4), use_tqdm=False)
    found = [output.outputs[0].token_ids for output in outputs]
    assert all(output.finished for output in outputs)
    if call == "abort":
        assert outputs[0].outputs[0].finish_reason == "abort"
        assert found == [expected[0][: len(found[0])], expected[1]]
    else:
        assert found == expected


def test_request_ids_are_chosen_by_the_caller_or_numbered(model):
    with engine(model) as llm:
        assert llm.add_request([1], greedy(2), request_id="mine") == "mine"
        for wrong, error in (("mine", ValueError), (1.5, TypeError), (True, TypeError)):
            with pytest.raises(error, match="request_id"):
                llm.add_request([1], greedy(2), request_id=wrong)
        other = llm.add_request([1], greedy(2))
        assert {out.request_id for out in finish(llm)} == {"mine", other}


def test_requests_beyond_max_num_waiting_are_refused(model):
    with engine(model, max_num_waiting=3) as llm:
        for _ in range(3):
            llm.add_request([1], greedy(2))
        with pytest.raises(ValueError, match="max_num_waiting=3"):
            llm.add_request([1], greedy(2))
        assert len(finish(llm)) == 3
        with pytest.raises(ValueError, match="max_num_waiting=3"):
            llm.generate([[1]] * 4, greedy(2), use_tqdm=False)
        with pytest.raises(ValueError, match="n must be at most max_num_waiting=3, got 4"):
            llm.add_request([1], greedy(2, n=4))
        assert llm.metrics().num_waiting == 0 and not llm.has_unfinished()


def test_skip_tokenizer_init_gives_ids_and_no_text(speaking):
    with engine(speaking, skip_tokenizer_init=True) as llm:
        out = llm.generate([[5, 6, 7]], greedy(4), use_tqdm=False)[0]
        assert len(out.token_ids) == 4 and out.text == "" and out.prompt_token_ids == [5, 6, 7]
        assert "tokenizer" not in vars(llm)
        for prompt, params in (("Hello", greedy(4)), ([5], greedy(4, stop=["x"]))):
            with pytest.raises(ValueError, match="tokenizer"):
                llm.generate([prompt], params)


def test_token_ids_out_go_in_unchanged_over_turns(speaking):
    with engine(speaking, max_model_len=256) as llm:
        ids = [5, 6, 7]
        for turn in range(4):
            out = llm.generate([ids], sampled(20, turn), use_tqdm=False)[0]
            assert out.prompt_token_ids == ids
            ids = ids + out.token_ids
        assert out.num_cached_tokens > 0


def test_abort_fuzz_returns_every_block(model):
    rng = random.Random(0)
    kinds = [{}, dict(n=3), dict(logprobs=2), dict(prompt_logprobs=1), dict(repetition_penalty=1.5)]
    with engine(model, num_kvcache_blocks=20, max_num_batched_tokens=24) as llm:
        ids, outputs = [], []
        for _ in range(300):
            if rng.random() < 0.3:
                params = sampled(rng.randrange(1, 40), **rng.choice(kinds))
                ids.append(llm.add_request(prompts_of([rng.randrange(1, 60)])[0], params, stream=rng.random() < 0.3))
            if ids and rng.random() < 0.3:
                llm.abort(rng.choice(ids))  # also finished ones, and twice
            outputs += llm.step()
        outputs += finish(llm)
        assert_nothing_held(llm)
        for out in outputs:
            assert all(sample.finish_reason in ("length", None) for sample in out.outputs)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        (dict(n=0), ValueError, "n "),
        (dict(n=1025), ValueError, "n "),
        (dict(stop=[""]), ValueError, "stop"),
        (dict(stop=[5]), TypeError, "stop"),
        (dict(stop=["x"] * 65), ValueError, "stop"),
        (dict(stop_token_ids=b"ab"), TypeError, "stop_token_ids"),
        (dict(repetition_penalty=0), ValueError, "repetition_penalty"),
        (dict(presence_penalty=2.1), ValueError, "presence_penalty"),
        (dict(frequency_penalty=math.nan), ValueError, "frequency_penalty"),
        (dict(logit_bias={1: 101}), ValueError, "logit_bias"),
        (dict(logit_bias={-1: 1}), ValueError, "logit_bias"),
        (dict(logit_bias=[1]), TypeError, "logit_bias"),
        (dict(logit_bias=dict.fromkeys(range(301), 1)), ValueError, "logit_bias"),
        (dict(allowed_token_ids=[]), ValueError, "allowed_token_ids"),
        (dict(allowed_token_ids="5"), TypeError, "allowed_token_ids"),
        (dict(logprobs=129), ValueError, "logprobs"),
        (dict(logprobs=False), TypeError, "logprobs"),
        (dict(prompt_logprobs=-2), ValueError, "prompt_logprobs"),
        (dict(logprobs_mode="raw"), ValueError, "logprobs_mode"),
        (dict(bad_words=[""]), ValueError, "bad_words"),
        (dict(bad_words=["a" * 1024] * 65), ValueError, "bad_words must have at most 65536 characters together"),
        (dict(skip_special_tokens=1), TypeError, "skip_special_tokens"),
        (dict(cache_salt=5), TypeError, "cache_salt"),
        (dict(cache_salt=""), ValueError, "cache_salt"),
        (dict(structured_outputs={"json": {}}), TypeError, "structured_outputs"),
        (dict(structured_outputs=StructuredOutputsParams(regex="a"), bad_words=["b"]), ValueError, "bad_words"),
    ],
)
def test_each_bound_names_the_parameter(options, error, names):
    with pytest.raises(error, match=names):
        SamplingParams(**options)


@pytest.mark.parametrize("what", [{}, dict(json={}, regex="a"), dict(choice=[]), dict(regex=5), dict(json={"a": {1}})])
def test_structured_outputs_params_are_checked(what):
    with pytest.raises((TypeError, ValueError), match="structured_outputs"):
        StructuredOutputsParams(**what)


@pytest.mark.parametrize("name", ["allowed_token_ids", "logit_bias", "stop_token_ids"])
def test_ids_outside_the_vocabulary_fail_alone(model, name):
    with engine(model) as llm:
        value = {VOCAB: 1.0} if name == "logit_bias" else [VOCAB]
        with pytest.raises(ValueError, match=name):
            llm.add_request([1], SamplingParams(**{name: value}))
        with pytest.raises(ValueError, match="no token"):
            llm.add_request([1], SamplingParams(min_tokens=2, allowed_token_ids=[1]))  # the only one ends it
        assert len(tokens(llm, [[1]], greedy(3))[0]) == 3


def test_a_prompt_that_cannot_fit_is_not_even_tokenized(speaking):
    with engine(speaking) as llm:
        for length in (2000, 1 << 20):
            with pytest.raises(ValueError, match="max_model_len=128"):
                llm.add_request("ab " * length)


def test_half_a_character_is_refused_alone(speaking):
    half = "an emoji's \ud83d"  # as JSON can spell it, and command lines that are not UTF-8 have
    with engine(speaking) as llm:
        for add in (
            lambda: llm.generate(half),
            lambda: llm.chat([{"role": "user", "content": half}]),
            lambda: llm.generate("Hi", SamplingParams(bad_words=[half])),
        ):
            with pytest.raises(ValueError, match=r"a lone surrogate, '.ud83d'"):
                add()
        assert not llm.has_unfinished()


def test_dummy_models_have_no_text(monkeypatch):
    shallow = dataclasses.replace(PRESETS["qwen3-0.6b"], num_layers=2)  # 28 layers only take longer to draw
    monkeypatch.setitem(PRESETS, "qwen3-0.6b", shallow)
    with LLM(
        "qwen3-0.6b", load_format="dummy", device="cpu", max_model_len=32, max_num_seqs=1, dtype="bfloat16"
    ) as llm:
        assert llm.generate([[1]], greedy(2), use_tqdm=False)[0].text == ""


def random_request(rng):
    options = dict(
        temperature=rng.choice([0.0, 0.7, 1.0]),
        max_tokens=rng.randrange(1, 40),
        seed=rng.randrange(100),
        n=rng.choice([1, 1, 3]),
    )
    for name, values in {
        "ignore_eos": [True],
        "top_k": [3, 10],
        "top_p": [0.5],
        "min_p": [0.1],
        "repetition_penalty": [0.8, 1.5],
        "presence_penalty": [0.5],
        "frequency_penalty": [-0.3, 0.6],
        "logit_bias": [{5: 3.0, 9: -2.0}],
        "logprobs": [0, 3],
        "prompt_logprobs": [0, 2],
        "logprobs_mode": ["processed_logprobs"],
        "stop": [["e", " th"], ["zz"]],
        "include_stop_str_in_output": [True],
        "skip_special_tokens": [False],
        "min_tokens": [1],
        "structured_outputs": [
            StructuredOutputsParams(regex="[a-z ]{1,30}"),
            StructuredOutputsParams(choice=["yes", "no"]),
        ],
        "allowed_token_ids": [list(range(200, 900))],
        "bad_words": [["the", "and so"]],
    }.items():
        if rng.random() < 0.15:
            options[name] = rng.choice(values)
    if "structured_outputs" in options:
        options = {
            k: v for k, v in options.items() if k not in ("min_tokens", "allowed_token_ids", "bad_words", "ignore_eos")
        }
    prompt = rng.choice([[7] * 20, [], [300, 301] * 25]) + [
        rng.randrange(200, 49152) for _ in range(rng.randrange(1, 30))
    ]
    return prompt, SamplingParams(**options)


PRESSED = [
    dict(num_kvcache_blocks=9, max_num_batched_tokens=16, max_num_seqs=5),
    dict(num_kvcache_blocks=9, overlap=0, max_num_seqs=4),
    dict(max_num_batched_tokens=8, max_num_seqs=8, enable_prefix_caching=False),
]


@pytest.fixture(scope="module")
def mixed_requests(speaking):
    """Return random requests, and the output of each when it is alone."""
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(25)]
    with engine(speaking, overlap=0) as llm:
        return requests, [llm.generate([prompt], params, use_tqdm=False)[0] for prompt, params in requests]


@pytest.mark.parametrize("place", range(len(PRESSED)))
def test_mixed_requests_under_pressure_give_the_outputs_of_a_quiet_engine(speaking, mixed_requests, place):
    """Requests with random options, some streamed, arrive over time. Each gives the output of when it is alone."""
    requests, alone = mixed_requests
    rng, got, streamed = random.Random(place), {}, set()
    with engine(speaking, **PRESSED[place]) as llm:
        waiting = list(enumerate(requests))
        while waiting or llm.has_unfinished():
            if waiting and rng.random() < 0.4:
                i, request = waiting.pop(0)
                stream = rng.random() < 0.4
                llm.add_request(*request, request_id=str(i), stream=stream)
                streamed |= {str(i)} if stream else set()
            for out in llm.step():
                got.setdefault(out.request_id, []).append(out)
        assert_nothing_held(llm)
        assert "num_kvcache_blocks" not in PRESSED[place] or llm.metrics().num_preemptions > 0
    for i, want in enumerate(alone):
        outputs = got[str(i)]
        assert [out.finished for out in outputs] == [False] * (len(outputs) - 1) + [True]
        for sample in want.outputs:
            parts = [part for out in outputs for part in out.outputs if part.index == sample.index]
            assert "".join(part.text for part in parts) == sample.text
            assert [token_id for part in parts for token_id in part.token_ids] == sample.token_ids
            assert (parts[-1].finish_reason, parts[-1].stop_reason) == (sample.finish_reason, sample.stop_reason)
            same_logprobs([row for part in parts for row in part.logprobs or ()], sample.logprobs or ())
        same_logprobs(outputs[-1].prompt_logprobs or (), want.prompt_logprobs or ())


def same_logprobs(rows, wanted):
    assert len(rows) == len(wanted)
    for row, want in zip(rows, wanted, strict=True):
        assert (row is None) == (want is None)
        for token_id, logprob in (want or {}).items():
            assert row[token_id].logprob == pytest.approx(logprob.logprob, abs=1e-3)


@pytest.mark.parametrize("kind", [str, int])
def test_ids_do_not_run_the_caller_s_code_in_steps(model, kind):
    class Id(kind):
        armed = False

        def __hash__(self):
            assert not self.armed
            return kind.__hash__(self)

        __eq__ = __str__ = __repr__ = lambda self, *_: pytest.fail("called")

    mine = Id(7)
    with engine(model) as llm:
        request_id = llm.add_request([1, 2], greedy(5), request_id=mine)
        other = llm.add_request([3], greedy(9), request_id="other")
        Id.armed = True
        assert type(request_id) is str
        assert {out.request_id for out in finish(llm)} == {request_id, other}


def test_parameters_of_endless_length_are_refused(model):
    with engine(model) as llm, pytest.raises(ValueError, match="sampling_params has 9223372036854775807 entries for 1"):
        llm.generate([[1]], range(2**70))
