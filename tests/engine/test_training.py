"""Tests what training loops need: update the weights in place, give memory back and take it again."""

import gc
import os
import random
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from nanovllm import SamplingParams
from nanovllm.checkpoints.model_source import open_model
from nanovllm.executor.processes import RankProcesses
from nanovllm.layers.attention import Attention
from nanovllm.layers.rotary_embedding import rope_frequencies
from tests.engine.reference import load_reference, reference_greedy
from tests.helpers import BLOCK, engine, finish, greedy, prompts_of, tokens
from tests.models.fp8 import blocks, save_fp8
from tests.models.test_gguf import write_gguf
from tests.models.tiny import save_tiny, tiny_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAMILIES = ["qwen3", "qwen2-tied", "llama-bias", "qwen2-moe", "qwen3-next", "olmo3", "phi3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two sets of weights of each model."""
    folder = tmp_path_factory.mktemp("models")
    return {name: [save_tiny(folder / str(seed), name, seed) for seed in range(2)] for name in FAMILIES}


@pytest.fixture(scope="module", params=[1, 2])
def shared_engine(models, request):
    with engine(models["qwen3"][0], tensor_parallel_size=request.param) as llm:
        yield llm


@pytest.fixture
def llm(models, shared_engine):
    """An engine of one rank, and then of two, with the first weights of qwen3. Other tests have used it before."""
    shared_engine.wake_up()
    shared_engine.update_weights(models["qwen3"][0])
    return shared_engine


def weights_of(path):
    return load_file(path / "model.safetensors").items()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [1, 2])
def test_updated_weights_are_those_of_a_fresh_load(models, name, size):
    """The update may be one call or come in parts, and experts may have the names of transformers' modules."""
    old, new = models[name]
    prompts = prompts_of([5, 20, 33])
    parts = weights_of(new)
    if name == "qwen2-moe":
        parts = tiny_model(name, seed=1).state_dict().items()
        assert {key for key, _ in weights_of(new)} != {key for key, _ in parts}
    with engine(new) as llm:
        want = tokens(llm, prompts, greedy(12))
    with engine(old, tensor_parallel_size=size) as llm:
        before = tokens(llm, prompts, greedy(12))
        assert before != want
        assert llm.update_weights(weights_of(new)) == 1 == llm.weight_version
        outputs = llm.generate(prompts, greedy(12), use_tqdm=False)
        assert [out.token_ids for out in outputs] == want
        assert [(out.weight_version, out.num_cached_tokens) for out in outputs] == [(1, 0)] * 3
        assert llm.update_weights(old) == 2  # a folder
        assert tokens(llm, prompts, greedy(12)) == before
        request_id = llm.add_request(prompts[0], greedy(30))
        llm.step()
        llm.start_weight_update()
        load_one_by_one(parts, llm.load_weights)
        assert llm.weight_version == 2
        assert llm.finish_weight_update() == llm.weight_version == 3
        assert [out.request_id for out in finish(llm)] == [request_id]
        outputs = llm.generate(prompts, greedy(12), use_tqdm=False)
        assert [(out.token_ids, out.weight_version) for out in outputs] == [(ids, 3) for ids in want]
        if size == 1:
            llm.update_weights(old)
            assert llm.update_weights((k, v.requires_grad_()) for k, v in weights_of(new)) == 5
            assert tokens(llm, prompts, greedy(12)) == want


def load_one_by_one(weights, load, count=None):
    """Give tensors to `load`, each in a call of its own, in random order. Return those after the first `count`."""
    weights = list(weights)
    random.Random(0).shuffle(weights)
    for name, tensor in weights[:count]:
        load([(name, tensor.clone())])
    return [] if count is None else weights[count:]


def test_a_tied_config_with_a_head_of_its_own_runs_and_updates_as_transformers_loads_it(models, tmp_path, llm):
    tied, size = models["qwen3"][1], llm.config.tensor_parallel_size
    own = save_tiny(tmp_path, "qwen3")
    weights = load_file(own / "model.safetensors")
    weights[HEAD] = weights[EMBEDDING].flip(0).contiguous()
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    prompts = prompts_of([5, 33])
    want = {}
    for path in (own, tied):
        reference = load_reference(path)
        want[path] = [reference_greedy(reference, prompt, 12) for prompt in prompts]
    assert not torch.equal(load_reference(own).lm_head.weight, load_reference(own).model.embed_tokens.weight)
    with engine(own, tensor_parallel_size=size) as untied:
        assert tokens(untied, prompts, greedy(12)) == want[own]
        untied.update_weights(tied)
        assert tokens(untied, prompts, greedy(12)) == want[tied]
        untied.update_weights(weights.items())
        assert tokens(untied, prompts, greedy(12)) == want[own]
    same = {**weights, HEAD: weights[EMBEDDING]}
    llm.update_weights(same.items())
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        llm.update_weights(own)
    llm.update_weights(tied)
    assert tokens(llm, prompts, greedy(12)) == want[tied]


@pytest.mark.parametrize("row", [0, -1])  # of the first rank, and of the last one
def test_an_update_with_values_that_are_not_finite_is_refused_by_all_ranks(models, llm, row):
    good = dict(weights_of(models["qwen3"][1]))
    name = "model.layers.1.self_attn.v_proj.weight"
    bad = good[name].clone()
    bad[row] = float("nan")
    with pytest.raises(ValueError, match=f"the tensor {name} has values that are NaN or infinite"):
        llm.update_weights({**good, name: bad}.items())
    llm.update_weights(good.items())
    assert tokens(llm, [[5, 6]], greedy(9)) == tokens_of_new(models)


def test_a_refused_update_keeps_nothing_of_its_caller(models, llm):
    def update():
        weights = dict(weights_of(models["qwen3"][1]))
        first = next(iter(weights))
        weights[first] = weights[first][:3]
        kept.extend(map(weakref.ref, weights.values()))
        with pytest.raises(ValueError, match="has shape"):
            llm.update_weights(weights.items())

    kept = []
    update()
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    llm.update_weights(models["qwen3"][1])


def tokens_of_new(models):
    """Return the tokens that a fresh engine with the second weights of qwen3 gives after [5, 6]."""
    with engine(models["qwen3"][1]) as fresh:
        return tokens(fresh, [[5, 6]], greedy(9))


@pytest.mark.parametrize("size", [1, 2])
def test_weights_that_are_not_finite_are_not_loaded(models, tmp_path, size):
    path = save_tiny(tmp_path, "llama-bias")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, -1] = float("inf")  # of the last rank alone
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    error = ValueError if size == 1 else (ValueError, RuntimeError)  # of whichever rank is heard first
    with pytest.raises(error, match=r"the tensor model\.layers\.1\.mlp\.down_proj\.weight has values that are NaN"):
        engine(path, tensor_parallel_size=size)


def test_no_rank_waits_for_the_others_when_an_update_fails_after_its_last_tensor(models, llm):
    new = models["qwen3"][1]

    def weights():
        yield from weights_of(new)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.update_weights(weights())
    llm.update_weights(new)
    assert tokens(llm, [[5, 6]], greedy(9)) == tokens_of_new(models)


@pytest.mark.parametrize("order", ["as in the file", "scales last"])
def test_weights_of_an_update_may_come_in_one_buffer(tmp_path, order):
    """On a CPU an FP8 weight waits for its scales, to be dequantized."""
    path, _ = save_fp8(tmp_path, "qwen3", blocks(32))
    weights = dict(weights_of(path))
    names = sorted(weights, key=lambda name: "scale" in name) if order == "scales last" else list(weights)
    buffer = torch.empty(max(tensor.nbytes for tensor in weights.values()), dtype=torch.uint8)

    def in_one_buffer():
        for name in names:
            tensor = weights[name]
            yield name, buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    prompts = prompts_of([5, 20])
    with engine(path) as llm:
        want = tokens(llm, prompts, greedy(12))
        assert llm.update_weights(in_one_buffer()) == 1
        assert tokens(llm, prompts, greedy(12)) == want


def test_an_update_cannot_start_another(models):
    path = models["qwen3"][1]

    def nested():
        yield from list(weights_of(path))[:1]
        llm.update_weights(path)

    with engine(models["qwen3"][0]) as llm:
        with pytest.raises(RuntimeError, match="update_weights is running"):
            llm.update_weights(nested())
        assert llm.update_weights(path) == 1


class Wrapper(torch.Tensor):
    """A tensor whose data is another tensor, like a DTensor."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("no data")

    def full_tensor(self):
        raise AssertionError("this is the caller's to call: all ranks must")


class Refusing(torch.Tensor):
    """A tensor that does not let others read it in the usual ways."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"no {function}")


def freed(tensor, num_bytes):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(num_bytes)
    return tensor


# Functions that make a tensor whose bytes cannot be read, and what the error says.
WITHOUT_DATA = {
    Wrapper: r"weight is a Wrapper, which has no plain data \(give its \.full_tensor\(\)\)",
    FakeTensorMode().from_tensor: "weight is a FakeTensor, which has no plain data;",
    lambda tensor: torch.nested.nested_tensor([tensor], layout=torch.jagged): "weight is a NestedTensor, which has no",
    lambda tensor: torch.nested.nested_tensor([tensor]): "weight is a nested tensor without a shape",
    lambda tensor: torch.nn.UninitializedParameter(): "weight is a UninitializedParameter without a shape",
    lambda tensor: freed(tensor, 0): "weight has lost its memory",
    lambda tensor: freed(tensor, 4): "weight has lost its memory",
}


def test_engine_runs_again_after_a_refused_update_and_a_good_one(models, llm, monkeypatch):
    old, new = models["qwen3"]
    good = dict(weights_of(new))
    first = next(iter(good))
    bad = [
        ({k: v for k, v in good.items() if k != first}.items(), ValueError, "lacks 1 tensors"),
        ([*good.items(), ("model.extra", torch.zeros(2))], ValueError, "model.extra"),
        ([*good.items(), (first, good[first])], ValueError, "twice"),
        ({**good, first: good[first][:-1]}.items(), ValueError, first),
        ({**good, first: good[first].long()}.items(), ValueError, "dtype"),
        ({**good, first: good[first].to(torch.float8_e4m3fn)}.items(), ValueError, "dtype"),
        ({**good, first: good[first].to(torch.complex64)}.items(), ValueError, "real numbers"),
        ({**good, first: good[first].to("meta")}.items(), ValueError, f"{first} is on meta"),
        ({**good, first: good[first].to_sparse()}.items(), ValueError, "it must be a dense tensor"),
        *(({**good, first: change(good[first])}.items(), ValueError, match) for change, match in WITHOUT_DATA.items()),
        ([good[first]], TypeError, "pairs"),
        (good, TypeError, "dict"),
        (5, TypeError, "int"),
        ("nowhere", ValueError, "nowhere"),
    ]
    want, version = tokens_of_new(models), llm.weight_version
    with monkeypatch.context() as patch:
        # These errors are the caller's: the engine raises them without waiting for a rank to be found lost.
        patch.setattr(RankProcesses, "wait_for_failure", lambda _: pytest.fail("waited for a lost rank"))
        for weights, error, match in bad:
            with pytest.raises(error, match=match):
                llm.update_weights(weights)
    with pytest.raises(RuntimeError, match="update_weights failed"):
        llm.generate([[5]])
    with pytest.raises(ZeroDivisionError):  # the caller's own error
        llm.update_weights((name, tensor / (1 // 0)) for name, tensor in good.items())
    assert llm.weight_version == version
    assert llm.update_weights(good.items()) == version + 1
    assert tokens(llm, [[5, 6]], greedy(9)) == want
    for unusual in (lambda tensor: torch._neg_view(-tensor), lambda tensor: tensor.as_subclass(Refusing)):
        llm.update_weights(old)
        llm.update_weights((name, unusual(tensor)) for name, tensor in good.items())
        assert tokens(llm, [[5, 6]], greedy(9)) == want


OTHER_MODELS = {
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "scaling": dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    "heads": dict(num_attention_heads=4, num_key_value_heads=1, head_dim=32),
    "eps": dict(rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
@pytest.mark.parametrize("is_gguf", [False, True])
def test_an_update_from_another_model_of_the_same_shapes_is_refused(tmp_path, kind, is_gguf):
    options = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    options |= dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-6)
    path = save_tiny(tmp_path / "model", "llama", **options)

    def checkpoint(name, **changed):
        if not is_gguf:
            return save_tiny(tmp_path / name, "llama", seed=1, **changed)
        metadata = {"llama__rope__scaling__factor": 2.0} if kind == "scaling" and name == "other" else {}
        return write_gguf(tmp_path / f"{name}.gguf", tiny_model("llama", seed=1, **changed), **metadata)

    match = (
        "RoPE" if kind in ("theta", "scaling") else {"heads": "num_heads is 4", "eps": "rms_norm_eps is 0.001"}[kind]
    )
    with engine(path) as llm:
        want = tokens(llm, [[5, 6]], greedy(9))
        with pytest.raises(ValueError, match=f"the checkpoint's {match}.*the model's is"):
            llm.update_weights(checkpoint("other", **options | OTHER_MODELS[kind]))
        assert tokens(llm, [[5, 6]], greedy(9)) == want  # nothing was overwritten
        assert llm.update_weights(checkpoint("same", **options)) == 1
        assert tokens(llm, [[5, 6]], greedy(9)) != want


def test_an_update_from_a_gguf_file_of_the_same_scaled_rope_is_accepted(tmp_path):
    path, model = save_tiny(tmp_path, "llama3"), tiny_model("llama3", seed=1)
    source = open_model(path).config
    scaled, _ = rope_frequencies(source.head_dim, source.rope_theta, source.rope_scaling)
    plain, _ = rope_frequencies(source.head_dim, source.rope_theta)
    file = write_gguf(tmp_path / "new.gguf", model, extra=[("rope_freqs.weight", plain / scaled)])
    other = write_gguf(tmp_path / "other.gguf", model, extra=[("rope_freqs.weight", 1.1 * plain / scaled)])
    with engine(path) as llm:
        with pytest.raises(ValueError, match="the checkpoint's RoPE"):
            llm.update_weights(other)
        assert llm.update_weights(file) == 1


def test_errors_of_an_update_with_long_names_are_short(models):
    name, good = "x" * 1_000_000, torch.zeros(2)
    with engine(models["qwen3"][0]) as llm:
        for weights in ([(name, good)], [(name, good.int())], [(name, good.to("meta"))], [(name,)], [name]):
            for call in (lambda weights=weights: llm.update_weights(weights), lambda: llm.generate([[1]])):
                with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
                    call()
                assert len(str(caught.value)) < 1000


def test_generate_is_refused_while_weights_are_updated(models):
    old, new = models["qwen3"]
    prompt = prompts_of([40])[0]

    def weights(llm):
        for name, tensor in weights_of(new):
            with pytest.raises(RuntimeError, match="update_weights is running"):
                llm.generate([prompt], greedy(1), use_tqdm=False)
            yield name, tensor

    with engine(new) as llm:
        want = tokens(llm, [prompt], greedy(9))
    with engine(old) as llm:
        llm.update_weights(weights(llm))
        assert tokens(llm, [prompt], greedy(9)) == want


def test_update_completes_before_an_interrupt_is_raised(models):
    old, new = models["qwen3"]

    def weights():
        os.kill(os.getpid(), signal.SIGINT)
        yield from weights_of(new)

    with engine(new) as llm:
        want = tokens(llm, [[5, 6]], greedy(9))
    with engine(old) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.update_weights(weights())
        assert llm.weight_version == 1 and tokens(llm, [[5, 6]], greedy(9)) == want


def test_running_requests_go_on_with_the_new_weights(models):
    old, new = models["qwen3"]
    prompt = prompts_of([20])[0]
    with engine(old) as llm:
        llm.add_request(prompt, greedy(30))
        for _ in range(8):
            llm.step()
        llm.update_weights(weights_of(new))
        out = finish(llm)[0]
        assert llm.metrics().kv_usage == 0
    with engine(old) as llm:
        begin = tokens(llm, [prompt], greedy(30))[0]
    same = next(i for i in range(30) if out.token_ids[i] != begin[i])
    with engine(new) as llm:
        rest = tokens(llm, [prompt + out.token_ids[:same]], greedy(30 - same))[0]
    assert 5 < same < 12 and out.token_ids[same:] == rest and out.weight_version == 1


def test_prompt_logprobs_that_an_update_interrupts_are_all_of_the_new_weights(models):
    old, new = models["qwen3"]
    (prompt,) = prompts_of([99])
    params = greedy(1, prompt_logprobs=0)
    with engine(new) as llm:
        (want,) = llm.generate([prompt], params, use_tqdm=False)
    with engine(old, max_num_batched_tokens=32, max_num_seqs=2) as llm:
        llm.add_request(prompt, params)
        llm.step()
        llm.step()
        llm.update_weights(weights_of(new))
        (out,) = finish(llm)
    got, expected = ([next(iter(row.values())).logprob for row in each.prompt_logprobs[1:]] for each in (out, want))
    assert got == pytest.approx(expected, abs=1e-3) and len(got) == 98


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_the_cache_and_requests_go_on_after_waking_up(llm, level):
    prompts, params = prompts_of([20, 3]), [greedy(30), SamplingParams(seed=1, max_tokens=30, ignore_eos=True)]
    want = tokens(llm, prompts, params)
    ids = [llm.add_request(*pair) for pair in zip(prompts, params, strict=True)]
    for _ in range(8):
        llm.step()
    llm.sleep(level)
    layers = [m for m in llm.llm_engine.executor.runner.model.modules() if isinstance(m, Attention)]
    assert layers and all(layer.kv is None for layer in layers)
    for use in (llm.step, lambda: llm.generate([[5]]), lambda: llm.add_request([5])):
        with pytest.raises(RuntimeError, match="asleep"):
            use()
    llm.wake_up()
    outputs = {out.request_id: out.token_ids for out in finish(llm)}
    assert [outputs[request_id] for request_id in ids] == want
    assert tokens(llm, prompts, params) == want
    with pytest.raises(ValueError, match="level"):
        llm.sleep(3)


def test_engine_refuses_to_generate_until_an_update_in_parts_is_whole(models, llm):
    old, new = models["qwen3"]
    with pytest.raises(RuntimeError, match="no weight update is open"):
        llm.load_weights(list(weights_of(new))[:1])
    with pytest.raises(RuntimeError, match="no weight update is open"):
        llm.finish_weight_update()
    want, version = tokens_of_new(models), llm.weight_version
    assert tokens(llm, [[5, 6]], greedy(9)) != want
    llm.start_weight_update()
    (first,) = load_one_by_one(weights_of(new), llm.load_weights, count=-1)
    for use in (llm.step, lambda: llm.add_request([5]), lambda: llm.generate([[5]])):
        with pytest.raises(RuntimeError, match="a weight update is open"):
            use()
    with pytest.raises(ValueError, match=f"lacks 1 tensors: {first[0]}"):
        llm.finish_weight_update()
    with pytest.raises(RuntimeError, match=r"update_weights failed.*lacks 1 tensors"):
        llm.generate([[5]])
    faults = [([first], "twice"), ([("model.x", first[1])], "model.x"), ([(first[0], first[1][:-1])], first[0])]
    for bad, match in faults:
        llm.start_weight_update()
        llm.load_weights([first])
        with pytest.raises(ValueError, match=match):
            llm.load_weights(bad)
        with pytest.raises(RuntimeError, match="no weight update is open"):
            llm.load_weights([first])
        with pytest.raises(RuntimeError, match="update_weights failed"):
            llm.generate([[5]])
    with pytest.raises(TypeError, match="weights must be pairs"):
        llm.start_weight_update()
        llm.load_weights(str(old))
    # An open update starts again.
    llm.start_weight_update()
    llm.load_weights([first])
    llm.start_weight_update()
    load_one_by_one(weights_of(new), llm.load_weights)
    llm.finish_weight_update()
    assert tokens(llm, [[5, 6]], greedy(9)) == want
    assert llm.weight_version == version + 1


def test_update_through_the_path_of_vllm_may_have_all_weights_in_one_call(models):
    """verl counts the names that the call returns, and then generates."""
    old, new = models["qwen3"]
    with engine(new) as llm:
        want = tokens(llm, [[5, 6]], greedy(9))
    with engine(old) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        assert model.load_weights(weights=iter(weights_of(new))) == {name for name, _ in weights_of(new)}
        assert tokens(llm, [[5, 6]], greedy(9)) == want


@pytest.mark.parametrize("finish_with", ["reset_prefix_cache", "generate"])
def test_update_through_the_path_of_vllm_is_finished_by_the_next_call(models, finish_with):
    """TRL sends each parameter to `load_weights` of vLLM's model and resets the prefix cache; verl just goes on."""
    old, new = models["qwen3"]
    with engine(new) as llm:
        want = tokens(llm, [[5, 6]], greedy(9))
    with engine(old) as llm:
        load = llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights
        for version in (1, 2):
            load_one_by_one(weights_of(new), load)
            assert llm.weight_version == version - 1
            if finish_with == "reset_prefix_cache":
                assert llm.reset_prefix_cache() and llm.weight_version == version
            assert tokens(llm, [[5, 6]], greedy(9)) == want and llm.weight_version == version
        load_one_by_one(weights_of(old), load, count=-1)
        with pytest.raises(ValueError, match="lacks 1 tensors"):
            llm.generate([[5]]) if finish_with == "generate" else llm.reset_prefix_cache()
        with pytest.raises(RuntimeError, match="update_weights failed"):
            llm.generate([[5]])
        load_one_by_one(weights_of(new), load)
        assert tokens(llm, [[5, 6]], greedy(9)) == want


def test_whole_update_after_one_through_the_path_of_vllm_that_broke_off(models):
    old, new = models["qwen3"]
    with engine(new) as llm:
        want = tokens(llm, [[5, 6]], greedy(9))
    with engine(old) as llm:
        load = llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights
        load_one_by_one(weights_of(old), load, count=-1)
        assert llm.update_weights(weights_of(new)) == 1
        assert tokens(llm, [[5, 6]], greedy(9)) == want


def test_update_through_the_path_of_vllm_while_the_kv_cache_sleeps(models):
    old, new = models["qwen3"]
    with engine(new) as llm:
        want = tokens(llm, [[5, 6]], greedy(9))
    with engine(old) as llm:
        llm.sleep(level=2)
        with pytest.raises(RuntimeError, match="the engine is asleep"):
            llm.update_weights(new)
        llm.wake_up(tags=["weights"])
        load_one_by_one(weights_of(new), llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights)
        llm.reset_prefix_cache()
        assert llm.weight_version == 1 and llm.is_sleeping()
        with pytest.raises(NotImplementedError, match="reload_weights"):
            llm.collective_rpc("reload_weights")
        with pytest.raises(RuntimeError, match=r"asleep \(kv_cache\)"):
            llm.generate([[5]])
        llm.wake_up(tags=["kv_cache"])
        assert tokens(llm, [[5, 6]], greedy(9)) == want


def test_sleep_wake_up_and_reset_can_be_called_in_any_order_and_state(models, llm):
    parts = [None, ["weights"], ["kv_cache"], ["kv_cache", "weights"], []]
    rng = random.Random(llm.config.tensor_parallel_size)
    want = tokens(llm, [[5, 6]], greedy(9))
    assert not llm.is_sleeping()
    asleep = set()
    for _ in range(24):
        choice = rng.randrange(4)
        if choice == 0:
            level = rng.choice([1, 2])
            llm.sleep(level)
            asleep |= {"kv_cache"} if level == 1 else {"kv_cache", "weights"}
        elif choice == 1:
            assert llm.reset_prefix_cache() is True
        elif choice == 2:
            tags = rng.choice(parts)
            llm.wake_up(tags=tags)
            asleep -= set(["weights", "kv_cache"] if tags is None else tags)
        elif not asleep:
            assert tokens(llm, [[5, 6]], greedy(9)) == want
        assert llm.is_sleeping() == bool(asleep)
    llm.wake_up()
    llm.start_weight_update()
    llm.sleep(2)
    llm.reset_prefix_cache()
    llm.wake_up()
    llm.load_weights(weights_of(models["qwen3"][0]))
    llm.finish_weight_update()
    assert tokens(llm, [[5, 6]], greedy(9)) == want
    for tags, error in [("weights", TypeError), (["kv"], ValueError), (range(10**30), TypeError)]:
        with pytest.raises(error, match="tags must be None or a list of weights and kv_cache"):
            llm.wake_up(tags=tags)


KEEPS_ITS_HEAP = """
import os, sys
from tests.helpers import engine

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

llm = engine(sys.argv[1], num_kvcache_blocks=1500)
sizes = [resident()]
for method in (llm.sleep, llm.wake_up, llm.close):
    method()
    sizes.append(resident())
print(*sizes)
"""


def test_sleep_and_close_return_the_memory_of_a_cpu_to_the_system(models):
    # glibc's largest thresholds: the KV cache is on the heap, whose end is never returned by itself.
    heap = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    command = [sys.executable, "-c", KEEPS_ITS_HEAP, models["qwen3"][0]]
    environment = os.environ | heap | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    made, asleep, awake, closed = map(int, done.stdout.split())
    cache_bytes = 1500 * BLOCK * 4 * 32 * 4 * 2 * 2  # of blocks of 4 heads of 32 floats, K and V in 2 layers
    assert made - asleep > cache_bytes * 0.9 and awake - closed > cache_bytes * 0.9


def test_a_closed_engine_neither_sleeps_nor_updates(models):
    with engine(models["qwen3"][0]) as llm:
        pass
    for use in (llm.sleep, llm.wake_up, llm.reset_prefix_cache, llm.start_weight_update):
        with pytest.raises(RuntimeError, match="closed"):
            use()
