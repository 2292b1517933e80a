"""Tests the engine as a user sees it, with tiny random models on a CPU."""

import gc
import os
import random
import signal
import weakref
from array import array
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from nanovllm import SamplingParams
from nanovllm.checkpoints.weight_files import read_shapes
from nanovllm.engine import interrupts
from nanovllm.models.decoder import Decoder
from nanovllm.ops.inputs.step_rows import StepRows
from tests.engine.reference import load_reference, reference_greedy
from tests.helpers import assert_nothing_held, engine, finish, greedy, prompts_of, tokens
from tests.models.tiny import TINY, fill_randomly, save_tiny, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    path = save_tiny(tmp_path, name)
    model = load_reference(path)
    prompts = prompts_of([1, 5, 15, 16, 17, 40, 64, 101])
    with engine(path) as llm:
        assert tokens(llm, prompts, greedy(20)) == [reference_greedy(model, prompt, 20) for prompt in prompts]


def test_text_of_a_mistral3_checkpoint_is_loaded_and_updated_without_its_other_parts(tmp_path):
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    text = tiny_model("ministral3").config.to_dict()
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    whole = fill_randomly(Mistral3ForConditionalGeneration(config).eval(), seed=3)
    whole.save_pretrained(tmp_path)
    names = set(read_shapes(tmp_path))
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight", "vision_tower.ln_pre.weight"} < set(
        names
    )
    prompts = prompts_of([5, 40])
    want = [reference_greedy(whole, prompt, 10) for prompt in prompts]
    with engine(tmp_path) as llm:
        assert tokens(llm, prompts, greedy(10)) == want
        weights = whole.state_dict()  # with other names
        llm.update_weights((name, torch.zeros_like(tensor)) for name, tensor in weights.items())
        assert tokens(llm, prompts, greedy(10)) == [[0] * 10] * 2
        llm.update_weights(weights.items())
        assert tokens(llm, prompts, greedy(10)) == want


VARIANTS = {
    "chunked": dict(max_num_batched_tokens=8),
    "synchronous": dict(overlap=0),
    "uncached": dict(enable_prefix_caching=False),
    "preempted": dict(num_kvcache_blocks=10),
    "chunked and preempted": dict(max_num_batched_tokens=9, num_kvcache_blocks=10),
    "one at a time": dict(max_num_seqs=1),
    "large blocks": dict(kvcache_block_size=64),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory, request):
    """Return a model, prompts, their parameters, and the tokens that they give."""
    model = save_tiny(tmp_path_factory.mktemp("work"), request.param)
    shared = prompts_of([33], seed=1)[0]
    prompts = prompts_of([3, 20, 70]) + [shared + own for own in prompts_of([1, 7, 15, 16], seed=2)]
    params = [greedy(30), *(SamplingParams(temperature=1.0, seed=i, max_tokens=40 + i, top_k=20) for i in range(6))]
    with engine(model) as llm:
        return model, prompts, params, tokens(llm, prompts, params)


@pytest.mark.parametrize("work", ["qwen3", "qwen2-moe", "qwen3-next", "olmo3"], indirect=True, scope="module")
@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_do_not_depend_on_the_schedule(work, name):
    """The first layer of olmo3 has a window."""
    model, prompts, params, want = work
    with engine(model, **VARIANTS[name]) as llm:
        assert tokens(llm, prompts, params) == want
        assert tokens(llm, prompts, params) == want  # now with a warm prefix cache
        if "preempted" in name:
            assert llm.metrics().num_preemptions > 0
        assert_nothing_held(llm)


def test_cached_tokens_are_reported(model):
    prompt = prompts_of([40])[0]
    with engine(model) as llm:
        first = llm.generate([prompt], greedy(1), use_tqdm=False)[0]
        second = llm.generate([prompt], greedy(1), use_tqdm=False)[0]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert first.token_ids == second.token_ids


def test_a_salt_keeps_cached_prefixes_apart(model):
    with engine(model) as llm:
        tokens, cached = [], []
        for salt in (None, "one", "two", "one", "\ud800", "\ud800", None):
            (out,) = llm.generate(
                [[7] * 40], SamplingParams(temperature=0, max_tokens=4, cache_salt=salt), use_tqdm=False
            )
            tokens.append(out.token_ids)
            cached.append(out.num_cached_tokens)
        assert [count > 0 for count in cached] == [False, False, False, True, False, True, True]
        assert tokens == tokens[:1] * 7


def test_outputs_read_as_dicts_and_attributes(model):
    with engine(model) as llm:
        out = llm.generate(prompts_of([4]), greedy(3), use_tqdm=False)[0]
    assert out["token_ids"] == out.token_ids and len(out.token_ids) == 3
    assert out["text"] == out.text
    assert out.finish_reason == "length"
    assert dict(out)["prompt_token_ids"] == prompts_of([4])[0]
    assert "text" in out and "nothing" not in out and list(out) == list(out.keys()) == list(dict(out))
    with pytest.raises(KeyError):
        out["nothing"]


def test_a_seeded_request_does_not_depend_on_its_neighbors(model):
    prompt, params = prompts_of([9])[0], SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True)
    with engine(model) as llm:
        alone = tokens(llm, [prompt], params)[0]
        crowd = prompts_of([5, 30, 2], seed=3)
        among = tokens(llm, [*crowd, prompt], [SamplingParams(max_tokens=16)] * 3 + [params])[-1]
    assert alone == among


def test_no_global_random_state_is_touched(model):
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    with engine(model) as llm:
        llm.generate(prompts_of([5]), SamplingParams(), use_tqdm=False)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_autocast_of_the_caller_does_not_change_the_outputs(model, dtype):
    def answers():
        with engine(model, dtype=dtype) as llm:
            llm.sleep()
            llm.wake_up()
            out = llm.generate(prompts_of([5, 40]), greedy(20, logprobs=1, prompt_logprobs=1), use_tqdm=False)
            return [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in out]

    plain = answers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert answers() == plain


def test_engine_sleeps_on_while_the_device_has_too_little_memory(model):
    prompts = prompts_of([5, 40])
    with engine(model) as llm:
        want = tokens(llm, prompts, greedy(5))
        llm.sleep(2)
        runner = llm.llm_engine.executor.runner
        with (
            patch.object(runner, "lacking_memory", return_value=3 << 29),
            pytest.raises(RuntimeError, match=r"still sleeps: wake_up lacks 1.50 GiB of device memory; free it"),
        ):
            llm.wake_up()
        assert llm.is_sleeping()
        llm.wake_up()
        assert tokens(llm, prompts, greedy(5)) == want


def test_default_device_of_the_caller_does_not_change_the_outputs(model):
    def answers():
        with engine(model) as llm:
            runner = llm.llm_engine.executor.runner
            staging = [*runner.token_ring, *runner.state.staging.buffers]
            assert all(buffer.device.type == "cpu" for buffer in staging)  # only there it can be pinned
            llm.update_weights(model)
            out = llm.generate(prompts_of([5, 40]), greedy(20, logprobs=1, prompt_logprobs=1), use_tqdm=False)
            return [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in out]

    plain = answers()
    torch.set_default_device("meta")  # where nothing can be read
    try:
        assert answers() == plain
    finally:
        torch.set_default_device(None)


def test_unseeded_requests_differ_and_the_engine_s_seed_repeats_them(model):
    prompts = prompts_of([5]) * 2
    params = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    with engine(model, seed=3) as llm:
        first = tokens(llm, prompts, params)
    with engine(model, seed=3) as llm:
        assert tokens(llm, prompts, params) == first
    assert first[0] != first[1]


def test_stop_ids_end_a_request_only_after_min_tokens(model):
    prompt = prompts_of([6])
    with engine(model) as llm:
        free = tokens(llm, prompt, greedy(12))[0]
        stop = free[4]
        first = free.index(stop)
        out = llm.generate(prompt, greedy(12, stop_token_ids=[stop]), use_tqdm=False)[0]
        assert out.token_ids == free[: first + 1] and out.finish_reason == "stop"
        out = llm.generate(prompt, greedy(12, stop_token_ids=[stop], min_tokens=8), use_tqdm=False)[0]
        assert len(out.token_ids) > 8 and stop not in out.token_ids[:8]


def test_no_step_stays_in_flight_after_the_last_request_ends_early(model):
    """A stop id ends the last request while the step after it runs already."""
    prompt = prompts_of([6])
    with engine(model) as llm:
        stop = tokens(llm, prompt, greedy(8))[0][3]
        assert llm.generate(prompt, greedy(20, stop_token_ids=[stop]), use_tqdm=False)[0].finish_reason == "stop"
        assert not llm.has_unfinished() and llm.metrics().kv_usage == 0


def test_bad_requests_are_refused_alone(model):
    good = prompts_of([5])[0]
    with engine(model, num_kvcache_blocks=5) as llm:
        want = tokens(llm, [good], greedy(4))
        bad = [
            ([], greedy(4), ValueError, "empty"),
            ([1, 131], greedy(4), ValueError, "131"),
            ([1, -1], greedy(4), ValueError, "-1"),
            ([1, 2.0], greedy(4), TypeError, "2.0"),
            ([1, True], greedy(4), TypeError, "True"),
            ([131, "a"], greedy(4), TypeError, "'a'"),
            (5, greedy(4), TypeError, "int"),
            ([1] * 128, greedy(20), ValueError, "max_model_len"),
            ([1] * 80, greedy(20), ValueError, "max_model_len=80"),
            ([1], "greedy", TypeError, "sampling_params"),
            ([1], SamplingParams(stop_token_ids=[131]), ValueError, "stop_token_ids"),
        ]
        for prompt, params, error, words in bad:
            with pytest.raises(error, match=words):
                llm.generate([good, prompt], [greedy(4), params], use_tqdm=False)
            assert not llm.has_unfinished()
        with pytest.raises(ValueError, match="sampling_params"):
            llm.generate([good, good], [greedy(4)])
        assert tokens(llm, [good], greedy(4)) == want
        assert llm.generate([]) == []


def test_max_model_len_is_what_the_cache_holds(model, caplog):
    with engine(model, num_kvcache_blocks=5) as llm:
        assert llm.max_model_len == 80 and "max_model_len is 80 in place of 128" in caplog.text
        outputs = llm.generate([[1] * 70] * 2, [greedy(20), greedy(None)], use_tqdm=False)
    assert [(len(out.token_ids), out.finish_reason) for out in outputs] == [(10, "length")] * 2


def test_max_model_len_beyond_the_models_positions_is_lowered_with_a_warning(model, caplog):
    with engine(model, max_model_len=9000) as llm:
        assert llm.max_model_len == 512 and "max_model_len is 512 in place of 9000" in caplog.text
    caplog.clear()
    with engine(model, max_model_len=None) as llm:
        assert llm.max_model_len == 512 and not caplog.text


def test_aborted_request_returns_partial_output_and_others_finish(model):
    with engine(model) as llm:
        ids = [llm.add_request(prompt, greedy(10)) for prompt in prompts_of([5, 6, 7])]
        for _ in range(4):
            llm.step()
        partial = llm.abort(ids[1])
        assert partial.finish_reason == "abort" and 0 < len(partial.token_ids) < 10
        assert llm.abort(ids[1]) is None and llm.abort(10**9) is None
        for wrong in ([ids[0]], float(ids[0]), None, bool(ids[0])):
            with pytest.raises(TypeError, match="request_id must be"):
                llm.abort(wrong)
        # Requests that were added before are not lost to a generate in between.
        llm.generate(prompts_of([3]), greedy(30), use_tqdm=False)
        done = finish(llm)
        assert sorted(out.request_id for out in done) == [ids[0], ids[2]]
        assert llm.metrics().kv_usage == 0


def test_engine_reports_the_cause_after_a_failed_step(model, monkeypatch):
    llm = engine(model)

    def broken(batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llm.llm_engine.executor, "launch", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        llm.generate(prompts_of([5]), greedy(6), use_tqdm=False)
    with pytest.raises(RuntimeError, match=r"has failed.*out of memory"):
        llm.generate(prompts_of([5]), greedy(6), use_tqdm=False)


def test_error_of_a_failed_step_is_raised_even_if_closing_fails(model, caplog):
    with (
        engine(model) as llm,
        patch.multiple(llm.llm_engine.executor, launch=lambda batch: 1 / 0, close=lambda: [].pop()),
    ):
        with pytest.raises(ZeroDivisionError):
            tokens(llm, [[1, 2]], greedy(3))
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            tokens(llm, [[1, 2]], greedy(3))
    assert "closing the engine failed, too: IndexError" in caplog.text


def test_a_second_thread_is_refused_and_harms_nobody(model):
    prompts = [prompts_of([9] * 6, seed=i) for i in range(4)]
    with engine(model) as llm:
        want = [tokens(llm, some, greedy(30)) for some in prompts]

        def use(i):
            try:
                return [tokens(llm, prompts[i], greedy(30)) for _ in range(3)] == [want[i]] * 3
            except RuntimeError as error:
                return "another thread is using the engine" in str(error)

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(use, range(4)))
        stream = llm.stream([1, 2, 3], greedy(30))
        next(stream)
        with ThreadPoolExecutor(1) as threads:  # one after the other they may
            assert threads.submit(tokens, llm, prompts[0], greedy(30)).result() == want[0]
            with llm.llm_engine.guard.lock, pytest.raises(RuntimeError, match="another thread"):
                threads.submit(llm.generate, prompts[0], greedy(30)).result()
            for call, argument in ((llm.abort, 0), (next, llm.stream([1, 2, 3], greedy(30)))):
                with llm.llm_engine.guard.lock, pytest.raises(RuntimeError, match="another thread"):
                    threads.submit(call, argument).result()
            executor = llm.llm_engine.executor
            sleep = executor.sleep

            def sleep_while_others_call(level):
                for call in (llm.generate, llm.add_request, llm.stream):
                    with pytest.raises(RuntimeError, match="another thread"):
                        threads.submit(call, [1, 2, 3]).result()
                sleep(level)

            with patch.object(executor, "sleep", sleep_while_others_call):
                llm.sleep()
            llm.wake_up()
        assert sum(len(output.token_ids) for output in stream) == 29
        assert finish(llm) == [] and llm.metrics().kv_usage == 0


def test_closing_one_engine_does_not_affect_another(model):
    one, two = engine(model), engine(model)
    prompt = prompts_of([8])
    assert tokens(one, prompt, greedy(5)) == tokens(two, prompt, greedy(5))
    one.close()
    one.close()
    with pytest.raises(RuntimeError, match="closed"):
        one.generate(prompt)
    assert len(tokens(two, prompt, greedy(5))[0]) == 5
    two.close()


def test_request_larger_than_the_kv_cache_is_refused(model):
    with pytest.raises(ValueError, match="max_model_len=32"), engine(model, num_kvcache_blocks=2) as llm:
        llm.generate([[1] * 40], greedy(4))


def test_kv_cache_that_cannot_be_allocated_raises_with_its_option(model, monkeypatch):
    def zeros(*shape, **options):
        if "dtype" in options and len(shape[0] if isinstance(shape[0], tuple) else shape) == 4:
            raise RuntimeError("can't allocate memory")
        return make(*shape, **options)

    make = torch.zeros
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match="num_kvcache_blocks=9000 is more than can be allocated"):
        engine(model, num_kvcache_blocks=9000)
    with pytest.raises(RuntimeError, match=r"^can't allocate memory"):
        engine(model)


def test_a_call_within_on_step_leaves_the_outer_call_its_thread(model):
    refused, inner = [], []
    with engine(model) as llm, ThreadPoolExecutor(1) as threads:

        def on_step(stats):
            llm.on_step = None
            inner.extend(tokens(llm, [[7]], greedy(2)))
            refused.append(threads.submit(llm.generate, [[8]], greedy(2), use_tqdm=False).exception())

        llm.on_step = on_step
        assert len(tokens(llm, [[1, 2]], greedy(9))[0]) == 9
        assert len(inner[0]) == 2 and "another thread is using the engine" in str(refused[0])
        assert len(threads.submit(tokens, llm, [[8]], greedy(2)).result()[0]) == 2


def test_an_engine_that_cannot_be_made_leaves_no_model_even_while_its_error_is_kept(model):
    def decoders():
        return {id(each) for each in gc.get_objects() if isinstance(each, Decoder)}

    before = decoders()
    with pytest.raises(ValueError, match="more than can be allocated") as kept:
        engine(model, num_kvcache_blocks=10**9)
    assert kept and decoders() <= before


def test_a_failed_step_gives_the_memory_back_while_the_engine_and_its_error_are_kept(model, monkeypatch):
    llm = engine(model)
    runner = weakref.ref(llm.llm_engine.executor.runner)

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner().model, "compute_logits", fail)
    with pytest.raises(RuntimeError, match="out of memory") as kept:
        llm.generate([[5, 6]], greedy(2), use_tqdm=False)
    monkeypatch.undo()
    gc.collect()
    assert runner() is None and kept
    with pytest.raises(RuntimeError, match=r"the engine has failed; make a new one: RuntimeError.'out of memory"):
        llm.generate([[5, 6]])


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


@pytest.mark.parametrize(("handler", "error"), [(signal.default_int_handler, KeyboardInterrupt), (stop, Stop)])
def test_an_interrupt_leaves_a_usable_engine(model, handler, error):
    before = signal.signal(signal.SIGINT, handler)
    try:
        check_interrupt(model, error)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM])
def test_an_alarm_or_sigterm_leaves_a_usable_engine(model, number):
    """Timeouts are often made so, and clusters announce the end of a job."""
    before = signal.signal(number, stop)
    try:
        check_interrupt(model, Stop, number)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def test_an_alarm_while_the_handlers_are_changed_leaves_them_as_they_were(monkeypatch):
    def set_and_ring(number, handler):
        monkeypatch.undo()
        signal.signal(number, handler)
        signal.raise_signal(signal.SIGALRM)

    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGALRM, stop)
    try:
        monkeypatch.setattr(interrupts, "signal", SimpleNamespace(**{**vars(signal), "signal": set_and_ring}))
        with pytest.raises(Stop), interrupts.DeferInterrupts():
            pytest.fail("the alarm came before")
        assert signal.getsignal(signal.SIGINT) is before[0]
    finally:
        signal.signal(signal.SIGALRM, before[1])


def check_interrupt(model, error, number=signal.SIGINT):
    prompts, params = prompts_of([9, 20, 3]), greedy(30)
    with engine(model) as llm:
        want = tokens(llm, prompts, params)
        executor, count = llm.llm_engine.executor, 0
        launch = executor.launch

        def launch_and_interrupt(batch):
            nonlocal count
            count += 1
            if count == 7:
                os.kill(os.getpid(), number)  # in the middle of a step
            launch(batch)

        executor.launch = launch_and_interrupt
        with pytest.raises(error):
            tokens(llm, prompts, params)
        assert count == 7
        assert tokens(llm, prompts, params) == want
        assert llm.metrics().kv_usage == 0


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        (np.array([1.0, 2.0]), None),
        (np.array(1), None),
        (torch.tensor([[1.0, 2.0]]), None),
        (torch.tensor([[[1, 2]]]), None),
        ((ids for ids in [[1]]), None),
        (None, None),
        (5, None),
        (b"text", None),
        ([[1]], {"temperature": 1}),
        ([[1]], "greedy"),
    ],
)
def test_generate_refuses_arguments_of_wrong_types(model, prompts, params):
    with engine(model) as llm:
        with pytest.raises(TypeError, match="must be"):
            llm.generate(prompts, params, use_tqdm=False)
        assert not llm.has_unfinished()


@pytest.mark.parametrize("name", ["chunked", "uncached", "preempted"])
def test_padded_steps_give_the_same_tokens(model, name, monkeypatch):
    """Rows and tokens of padding, and decode rows attended as prompts of one token."""
    prompts, params = prompts_of([3, 33, 16, 40, 7]), greedy(12)
    with engine(model, **VARIANTS[name]) as llm:
        want = tokens(llm, prompts, params)
        runner = llm.llm_engine.executor.runner

        def padded(batch):
            sizes = len(batch.rows) + 2, batch.num_tokens + 5
            rows = StepRows.split(torch.from_numpy(runner.state.pack(batch, *sizes)), *sizes)
            result = runner.forward.step(rows, 0, sizes[1], runner.max_model_len)
            return result._replace(tokens=result.tokens[: len(batch.rows)])

        monkeypatch.setattr(runner.forward, "run", padded)
        llm.reset_prefix_cache()
        assert tokens(llm, prompts, params) == want


def test_a_prompt_may_be_any_sequence_of_ids(model):
    with engine(model) as llm:
        want = tokens(llm, [[5, 6, 7]], greedy(3))
        for prompt in (range(5, 8), (5, 6, 7), array("i", [5, 6, 7])):
            assert tokens(llm, prompt, greedy(3)) == tokens(llm, [prompt], (greedy(3),)) == want


@pytest.mark.parametrize("max_tokens", [np.int8(127), np.int32(2**31 - 1)])
def test_narrow_numpy_integers_do_not_wrap_around_a_limit(model, max_tokens):
    with engine(model) as llm:
        llm.add_request([3, 4], greedy(5))
        llm.add_request([3] * 60, greedy(max_tokens))
        assert [len(out.token_ids) for out in finish(llm)] == [5, 68]


def test_broken_tokenizer_is_refused_at_the_start_unless_it_is_skipped(tmp_path):
    path = save_tiny(tmp_path, "qwen3")
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer of .* cannot be read"):
        engine(path)
    with engine(path, skip_tokenizer_init=True) as llm:
        assert len(llm.generate([3, 4], greedy(2), use_tqdm=False)[0].token_ids) == 2
