"""Models with recurrent layers: their state belongs to slots, and takes part of the memory for the KV cache.

Nothing here but the multimodal checkpoint depends on the kind of layer: a new kind is one more parameter of `model`.
"""

import logging

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from nanovllm import SamplingParams
from nanovllm.runner import model_runner
from tests.engine.reference import load_reference, reference_greedy
from tests.helpers import assert_nothing_held, engine, finish, greedy, prompts_of, sampled, tokens
from tests.models.tiny import fill_randomly, save_tiny, tiny_model


@pytest.fixture(scope="module", params=["qwen3.5"])
def model(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), request.param)


def pool_of(llm):
    return llm.llm_engine.executor.runner.pool


def test_new_sequences_ignore_what_their_slots_hold(model):
    prompts = prompts_of([1, 2, 3, 5, 70])
    with engine(model) as llm:
        want = tokens(llm, prompts, greedy(8))
        with torch.inference_mode():
            for tensor in pool_of(llm).slot_tensors:
                tensor[:, :8].fill_(float("nan"))  # not the snapshots
        assert tokens(llm, prompts, greedy(8)) == want


def test_outputs_of_a_stream_wait_for_all_logprobs_of_the_prompt(model):
    """The second sample starts from a snapshot, and has a token before the first one has scored the prompt."""
    (prompt,) = prompts_of([110])
    with engine(model, max_num_batched_tokens=512) as llm:
        for _ in range(3):
            sampling = greedy(4, n=2, prompt_logprobs=1)
            lengths = [len(out.prompt_logprobs) for out in llm.stream(prompt, sampling)]
            assert lengths == [110] * len(lengths) and lengths


def test_slot_of_an_aborted_request_serves_the_next_one(model):
    first, second = prompts_of([20, 7])
    with engine(model) as llm:
        (want,) = tokens(llm, [second], greedy(20))
    with engine(model, max_num_seqs=1) as llm:
        request_id = llm.add_request(first, greedy(40))
        llm.add_request(second, greedy(20))
        for _ in range(6):
            llm.step()
        llm.abort(request_id)
        (out,) = finish(llm)
        assert out.token_ids == want
        assert_nothing_held(llm)


def test_cached_prefixes_continue_from_snapshots_as_if_computed(model):
    """Blocks have 16 tokens, and snapshots of a sequence are at least 4 blocks apart."""
    shared, tails = prompts_of([130])[0], prompts_of([20, 30, 7, 90])
    prompts = [shared + tail for tail in tails]
    with engine(model, enable_prefix_caching=False, max_model_len=512) as llm:
        want = [tokens(llm, [prompt], greedy(70))[0] for prompt in prompts]
    with engine(model, max_model_len=512) as llm:
        cold, diverging, cached, long = (llm.generate([prompt], greedy(70), use_tqdm=False)[0] for prompt in prompts)
        equal = llm.generate([prompts[0]], greedy(70), use_tqdm=False)[0]
        turn = prompts[0] + want[0]
        (second_turn,) = llm.generate([turn + tails[2]], greedy(70), use_tqdm=False)
        assert llm.metrics().num_snapshots > 0
        assert_nothing_held(llm)
    assert [out.token_ids for out in (cold, diverging, cached, long)] == want and equal.token_ids == want[0]
    # The second prompt takes a snapshot where it leaves the first one's blocks.
    assert [out.num_cached_tokens for out in (cold, diverging, cached, long, equal)] == [0, 0, 128, 128, 144]
    assert second_turn.num_cached_tokens >= 144 + 64
    with engine(model, enable_prefix_caching=False, max_model_len=512) as llm:
        assert tokens(llm, [turn + tails[2]], greedy(70)) == [second_turn.token_ids]


def test_requests_given_at_once_start_from_the_first_ones_snapshot(model):
    shared = prompts_of([160])[0]
    prompts = [[*shared, i] for i in range(5)]
    with engine(model, enable_prefix_caching=False, max_model_len=256) as llm:
        want = tokens(llm, prompts, greedy(8))
    with engine(model, max_model_len=256) as llm:
        outs = llm.generate(prompts, greedy(8), use_tqdm=False)
    assert [out.token_ids for out in outs] == want
    assert [out.num_cached_tokens for out in outs] == [0, 160, 160, 160, 160]


def test_preempted_sequences_resume_from_snapshots(model):
    prompts = prompts_of([40, 41, 42, 43])
    with engine(model, max_model_len=256) as llm:
        want = tokens(llm, prompts, greedy(150))
    with engine(model, num_kvcache_blocks=30, max_model_len=256) as llm:
        assert tokens(llm, prompts, greedy(150)) == want
        assert llm.metrics().num_preemptions > 0


def test_weight_updates_and_resets_forget_snapshots(model):
    prompt = prompts_of([100])[0]
    with engine(model) as llm:
        for forget in (lambda: None, llm.reset_prefix_cache, lambda: llm.update_weights(model)):
            forget()
            (out,) = llm.generate([prompt], greedy(2), use_tqdm=False)
            assert out.num_cached_tokens == 0
            (out,) = llm.generate([prompt], greedy(2), use_tqdm=False)
            assert out.num_cached_tokens == 96


def test_samples_of_a_request_do_not_depend_on_the_schedule(model):
    prompt = prompts_of([70])[0]

    def samples(**options):
        with engine(model, **options) as llm:
            (out,) = llm.generate([prompt], sampled(12, seed=3, n=3), use_tqdm=False)
            return [sample.token_ids for sample in out.outputs]

    want = samples()
    assert len(set(map(tuple, want))) == 3
    assert samples(max_num_batched_tokens=9) == samples(max_num_seqs=1) == want


def test_prompt_logprobs_equal_transformers(model):
    prompt = prompts_of([70])[0]
    with torch.inference_mode():
        want = load_reference(model)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with engine(model, max_num_batched_tokens=33) as llm:
        (out,) = llm.generate([prompt], greedy(1, prompt_logprobs=0), use_tqdm=False)
    got = [entry[token_id].logprob for entry, token_id in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)]
    expected = [want[i, token_id].item() for i, token_id in enumerate(prompt[1:])]
    assert got == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_the_state_and_requests_go_on_after_waking_up(model, level):
    prompts, params = prompts_of([20, 3]), [greedy(30), SamplingParams(seed=1, max_tokens=30, ignore_eos=True)]
    with engine(model) as llm:
        want = tokens(llm, prompts, params)
        ids = [llm.add_request(*pair) for pair in zip(prompts, params, strict=True)]
        for _ in range(8):
            llm.step()
        state = [StorageWeakRef(tensor.untyped_storage()) for tensor in pool_of(llm).slot_tensors]
        llm.sleep(level)
        assert state and all(storage.expired() for storage in state)
        llm.wake_up()
        outputs = {out.request_id: out.token_ids for out in finish(llm)}
        assert [outputs[request_id] for request_id in ids] == want


@pytest.mark.parametrize(("num_blocks", "size"), [(None, 1), (60, 1), (60, 2)])
def test_fewer_sequences_run_if_their_state_needs_half_of_the_memory(model, monkeypatch, caplog, num_blocks, size):
    prompts = prompts_of([5, 40, 17, 9, 70])
    with engine(model, tensor_parallel_size=size) as llm:
        want = tokens(llm, prompts, greedy(12))
        slot_bytes = pool_of(llm).slot_bytes
    # Half of the memory holds three running slots and the scratch slot. Only rank 0 has so little.
    monkeypatch.setattr(model_runner, "CPU_CACHE_BYTES", 2 * 4 * slot_bytes)
    caplog.set_level(logging.INFO)
    with engine(model, num_kvcache_blocks=num_blocks, tensor_parallel_size=size) as llm:
        scheduler = llm.llm_engine.scheduler
        assert len(scheduler.free_slots) == 3
        assert caplog.text.count("3 sequences run at once") == 1
        assert scheduler.block_manager.num_blocks == (num_blocks or min(24, 4 * slot_bytes // pool_of(llm).block_bytes))
        assert all(tensor.shape[1] == 4 for tensor in pool_of(llm).slot_tensors)
        ids = [llm.add_request(prompt, greedy(12)) for prompt in prompts]
        outputs, most = {}, 0
        while llm.has_unfinished():
            outputs |= {out.request_id: out.token_ids for out in llm.step()}
            most = max(most, llm.metrics().num_running)
        assert most == 3 and [outputs[request_id] for request_id in ids] == want


def test_recurrent_state_may_be_bfloat16(model):
    prompts = prompts_of([5, 70])
    with engine(model) as llm:
        want = llm.generate(prompts, greedy(12, logprobs=0), use_tqdm=False)
    with engine(model, state_dtype="bfloat16") as llm:
        assert torch.bfloat16 in [tensor.dtype for tensor in pool_of(llm).slot_tensors]
        for got, exact in zip(llm.generate(prompts, greedy(12, logprobs=0), use_tqdm=False), want, strict=True):
            assert got.token_ids[0] == exact.token_ids[0]
            first, exact_first = (next(iter(out.logprobs[0].values())).logprob for out in (got, exact))
            assert first == pytest.approx(exact_first, abs=0.2)
    with pytest.raises(ValueError, match="state_dtype must be one of the strings float32, bfloat16, got 'float16'"):
        engine(model, state_dtype="float16")


def test_text_of_a_multimodal_checkpoint_is_loaded_and_updated_without_its_other_parts(tmp_path):
    text = tiny_model("qwen3.5").config.to_dict()
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=56)
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    whole = fill_randomly(Qwen3_5ForConditionalGeneration(config).eval(), seed=3)
    whole.save_pretrained(tmp_path)
    prompts = prompts_of([5, 40])
    want = [reference_greedy(whole, prompt, 10) for prompt in prompts]
    weights = {**whole.state_dict(), "mtp.fc.weight": torch.zeros(2, 2)}
    assert any(name.startswith("model.visual.") for name in weights)
    with engine(tmp_path) as llm:
        assert tokens(llm, prompts, greedy(10)) == want
        others = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        llm.update_weights(others.items())
        assert tokens(llm, prompts, greedy(10)) == [[0] * 10] * 2
        llm.update_weights(weights.items())
        assert tokens(llm, prompts, greedy(10)) == want
        with pytest.raises(ValueError, match=r"model\.language_model\.extra\.weight, which the model does not have"):
            llm.update_weights([*weights.items(), ("model.language_model.extra.weight", torch.zeros(1))])
