"""Tests that need a CUDA GPU: graphs, pinned staging, compiled kernels in a whole model."""

import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.residual import Residual
from nanovllm.ops.attention import shared_prefix
from nanovllm.ops.linear.linear import linear
from nanovllm.ops.linear.swiglu import is_swiglu
from nanovllm.ops.norm_rope.reference import rms_norm_torch
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.ops.triton_utils import triton
from tests.engine.reference import load_reference, reference_greedy
from tests.kernels.test_swiglu import operands, swiglu_torch
from tests.models.tiny import TINY, save_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
measures_memory = pytest.mark.skipif(
    os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1",
    reason="measures the GPU's free memory, which other tests change; run pytest -n 0",
)

OPTIONS = {
    "device": "cuda",
    "kvcache_block_size": 16,
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "num_kvcache_blocks": 256,
}


def prompts_of(lengths, vocab_size=131, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]


def greedy(num_tokens):
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def tokens(llm, prompts, params):
    return [out.token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


def assert_likeliest(model, outputs, noise=0.1):
    """Check that each token is the float32 `model`'s likeliest after the previous ones, up to bfloat16 noise."""
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids + output.token_ids])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(output.prompt_token_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert (logits.max(1).values - chosen <= noise * logits.std(1)).all()
        assert (logits.argmax(1) == torch.tensor(output.token_ids)).float().mean() > 0.8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.mark.parametrize("name", TINY)
def test_float32_greedy_tokens_equal_transformers(name, tmp_path):
    path = save_tiny(tmp_path, name)
    model = load_reference(path)
    prompts = prompts_of([1, 5, 15, 16, 17, 40, 64])
    with LLM(path, dtype="float32", max_num_seqs=8, **OPTIONS) as llm:
        assert tokens(llm, prompts, greedy(20)) == [reference_greedy(model, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("name", ["qwen3", "qwen2-moe", "qwen3-next"])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 12, 20])
def test_graph_equals_eager_at_every_batch_size(tmp_path, name, max_num_seqs):
    model = save_tiny(tmp_path, name)
    prompts = prompts_of(range(3, 3 + max_num_seqs))
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=8, ignore_eos=True) for i in range(max_num_seqs)]
    options = dict(dtype="float32", max_num_seqs=max_num_seqs, **OPTIONS)
    with LLM(model, **options) as graph, LLM(model, enforce_eager=True, **options) as eager:
        assert graph.llm_engine.executor.runner.graphs.mixed and not eager.llm_engine.executor.runner.graphs
        for size in range(1, max_num_seqs + 1):
            assert tokens(graph, prompts[:size], params[:size]) == tokens(eager, prompts[:size], params[:size])


def test_schedules_do_not_change_the_tokens(model):
    prompts = prompts_of([3, 20, 47, 100, 33])
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=60, ignore_eos=True) for i in range(5)]
    options = {**OPTIONS, "dtype": "float32", "max_num_seqs": 8}
    with LLM(model, **options) as llm:
        want = tokens(llm, prompts, params)
        assert tokens(llm, prompts, params) == want
    for change in (dict(overlap=0), dict(max_num_batched_tokens=16), dict(num_kvcache_blocks=16), dict(max_num_seqs=2)):
        with LLM(model, **{**options, **change}) as llm:
            assert tokens(llm, prompts, params) == want


@pytest.mark.parametrize("windows", [{}, {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}])
def test_shared_prefixes_do_not_change_the_tokens(tmp_path, windows):
    """40 rows have 200 tokens in common. In layers without a window, one kernel attends to 128 of them for all rows."""
    model = save_tiny(tmp_path, "qwen3", **windows)
    common = prompts_of([200])[0]
    prompts = [common + suffix for suffix in prompts_of([3, 20, 7, 1] * 10, seed=1)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=20, ignore_eos=True) for i in range(len(prompts))]
    options = {**OPTIONS, "dtype": "float32", "max_num_seqs": 40, "num_kvcache_blocks": 1000}
    options["max_num_batched_tokens"] = 10_000  # all prompts start, and therefore finish, together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix, "MIN_SAVED", 1000)
        patch.setattr(shared_prefix, "MIN_TOKENS", 128)
        with LLM(model, **options) as llm:
            got = tokens(llm, prompts, params)
            assert llm.llm_engine.executor.runner.graphs.has_shared_prefixes
    with LLM(model, enable_prefix_caching=False, **options) as llm:
        assert tokens(llm, prompts, params) == got


@pytest.mark.parametrize("name", ["qwen3", "llama-bias", "qwen2-moe"])
@pytest.mark.parametrize("count", [1, 3, 12, 80])
def test_bfloat16_greedy_tokens_are_the_likeliest_up_to_noise(name, count, tmp_path):
    path = save_tiny(tmp_path, name)
    model = load_reference(path)
    prompts = prompts_of(20 + 3 * i % 50 for i in range(count))
    with LLM(path, dtype="bfloat16", max_num_seqs=80, **{**OPTIONS, "num_kvcache_blocks": 600}) as llm:
        outputs = llm.generate(prompts, greedy(40), use_tqdm=False)
    noise = 0.1 if count < 80 else 0.3  # the maximum of 3,200 tokens on a CPU is 0.19
    # Noise changes which experts a token has: in bfloat16, transformers' own model differs by up to 0.7 on a CPU.
    assert_likeliest(model, outputs, 1.0 if "moe" in name else noise)


def test_sampling_options_give_equal_outputs_with_graphs_without_and_on_a_cpu(model):
    """One float32 batch has biases, penalties, masks, and logprobs of sampled tokens and of prompts."""
    requested = [
        dict(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.3, logprobs=3),
        dict(logit_bias={7: 3.0, 130: 2.0}, logprobs=0, top_k=5, temperature=0.8, seed=1),
        dict(allowed_token_ids=range(50, 90), logprobs=2, temperature=1.0, seed=2, logprobs_mode="processed_logprobs"),
        dict(prompt_logprobs=2, n=3, temperature=1.0, seed=3),
        dict(),
    ]
    defaults = dict(temperature=0.0, max_tokens=20, ignore_eos=True)
    params = [SamplingParams(**(defaults | options)) for options in requested]
    prompts = prompts_of([9, 40, 3, 70, 16])
    results = []
    for options in ({}, {"enforce_eager": True}, {"device": "cpu"}):
        options = {**OPTIONS, "dtype": "float32", "max_num_seqs": 12, **options}
        with LLM(model, **options) as llm:
            results.append(llm.generate(prompts, params, use_tqdm=False))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert [x.token_ids for x in a.outputs] == [x.token_ids for x in b.outputs]
            for rows, expected_rows in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
                assert (rows is None) == (expected_rows is None)
                for row, expected in zip(rows or (), expected_rows or (), strict=True):
                    assert (row is None) == (expected is None)
                    if row is not None:
                        assert logprobs_by_token(row) == pytest.approx(logprobs_by_token(expected), abs=1e-3)


def logprobs_by_token(row):
    return {token_id: entry.logprob for token_id, entry in row.items()}


@pytest.mark.parametrize("name", ["qwen3", "qwen2-moe"])
def test_captured_graphs_use_updated_weights(tmp_path, name):
    model, new = (save_tiny(tmp_path / str(seed), name, seed) for seed in range(2))
    prompts = prompts_of([5, 20, 33])
    options = dict(dtype="float32", max_num_seqs=8, **OPTIONS)
    with LLM(new, **options) as llm:
        want = tokens(llm, prompts, greedy(12))
    with LLM(model, **options) as llm:
        before = tokens(llm, prompts, greedy(12))
        graphs = llm.llm_engine.executor.runner.graphs
        assert llm.update_weights(load_file(new / "model.safetensors", device="cuda").items()) == 1
        assert tokens(llm, prompts, greedy(12)) == want != before
        assert llm.llm_engine.executor.runner.graphs is graphs


def test_stream_autocast_and_defaults_of_the_caller_change_nothing(model):
    prompts, options = prompts_of([5, 40, 100]), dict(dtype="float32", max_num_seqs=8, **OPTIONS)
    params = greedy(20), SamplingParams(temperature=1.0, seed=1, max_tokens=20, logprobs=2, prompt_logprobs=2)

    def answers():
        with LLM(model, **options) as llm:
            first = [tokens(llm, prompts, one) for one in params]
            llm.sleep(2)
            llm.wake_up()
            assert [tokens(llm, prompts, one) for one in params] == first
            return first

    want = answers()
    with LLM(model, enforce_eager=True, **options) as llm, torch.cuda.stream(torch.cuda.Stream()):
        assert [tokens(llm, prompts, one) for one in params] == want
    try:
        with torch.cuda.stream(torch.cuda.Stream()), torch.autocast("cuda", dtype=torch.bfloat16):
            torch.set_default_device("cuda")
            torch.set_default_dtype(torch.bfloat16)
            assert answers() == want
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_engines_in_several_threads_start_run_and_wake_up_concurrently(model):
    prompts, options = prompts_of([5, 40, 100]), dict(dtype="float32", max_num_seqs=8, **OPTIONS)

    def answers(_):
        with LLM(model, **options) as llm:
            first = tokens(llm, prompts, greedy(20))
            llm.sleep()
            llm.wake_up()
            return [first, tokens(llm, prompts, greedy(20))]

    want = answers(0)
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(answers, range(6))) == [want] * 6


@pytest.mark.parametrize("overlap", [0, 1])
def test_steps_report_gpu_times_on_request(model, overlap):
    steps = []
    with LLM(model, overlap=overlap, max_num_seqs=8, **OPTIONS) as llm:
        llm.on_step = steps.append
        tokens(llm, prompts_of([5, 9]), greedy(8))
        assert all(step.gpu_seconds is None for step in steps)
        steps.clear()
        llm.time_gpu = True
        seconds = llm.generate(prompts_of([5, 9], seed=1), greedy(8), use_tqdm=False)[0].total_time
    times = [step.gpu_seconds for step in steps if step.batch is not None]
    assert len(times) == 8 and min(times) > 0 and sum(times) < seconds


@measures_memory
def test_sleep_frees_memory_and_wake_up_restores_it():
    prompts = prompts_of([50, 7], 10_000)
    options = dict(load_format="dummy", max_model_len=256, max_num_seqs=8, gpu_memory_utilization=0.4)
    with LLM("qwen3-0.6b", **options) as llm:
        want = tokens(llm, prompts, greedy(16))
        layers = [m for m in llm.llm_engine.executor.runner.model.modules() if isinstance(m, Attention)]
        cache = sum(layer.kv.k_cache.nbytes + layer.kv.v_cache.nbytes for layer in layers)
        weights = sum(param.nbytes for param in llm.llm_engine.executor.runner.model.parameters())
        assert cache > 10 << 30 and weights > 1 << 30
        for level, freed in ((1, cache), (2, cache + weights)):
            awake = torch.cuda.mem_get_info()[0]
            llm.sleep(level)
            assert torch.cuda.mem_get_info()[0] - awake > 0.99 * freed
            llm.wake_up()
            assert abs(torch.cuda.mem_get_info()[0] - awake) < 512 << 20  # the new graphs take other memory
            assert tokens(llm, prompts, greedy(16)) == want


@measures_memory
def test_engine_sleeps_on_while_somebody_else_has_its_memory():
    options = dict(load_format="dummy", max_model_len=256, max_num_seqs=8, gpu_memory_utilization=0.8)
    with LLM("qwen3-0.6b", **options) as llm:
        want = tokens(llm, [[5, 6, 7]], greedy(8))
        for level in (1, 2):
            llm.sleep(level)
            trainer = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.9), dtype=torch.uint8, device="cuda")
            with pytest.raises(RuntimeError, match=r"still sleeps: wake_up lacks .* GiB"):
                llm.wake_up()
            del trainer
            llm.wake_up()
            assert tokens(llm, [[5, 6, 7]], greedy(8)) == want


@measures_memory
def test_engine_sleeps_on_without_room_for_the_counts_of_its_slots():
    with LLM("qwen3-0.6b", load_format="dummy", max_model_len=256, max_num_seqs=2048) as llm:
        runner = llm.llm_engine.executor.runner
        counts, cache = runner.state.sampling.counts.nbytes, runner.pool.num_bytes(runner.sizes)
        assert counts > 500 << 20
        llm.sleep()
        torch.cuda.empty_cache()
        trainer = torch.empty(torch.cuda.mem_get_info()[0] - cache - counts // 2, dtype=torch.uint8, device="cuda")
        with pytest.raises(RuntimeError, match=r"still sleeps: wake_up lacks .* GiB"):
            llm.wake_up()
        del trainer
        llm.wake_up()
        assert len(tokens(llm, [[5, 6, 7]], greedy(8))[0]) == 8


def compiled_kernels(options):
    """Return the names of the kernels that an engine compiles at its start, and of those while requests run."""
    compiled = []
    compile_kernel = triton.JITFunction._do_compile

    def counting(self, *args, **kwargs):
        compiled.append(self.fn.__name__)
        return compile_kernel(self, *args, **kwargs)

    triton.JITFunction._do_compile = counting
    options = dict(load_format="dummy", max_model_len=4096, max_num_seqs=64, num_kvcache_blocks=300, **options)
    with LLM("qwen3-0.6b", **options) as llm:
        at_start = list(compiled)
        for lengths in ([50], [3001], [5, 6, 7], [9] * 37, [2999] + [5] * 20):
            llm.generate(prompts_of(lengths, 10_000), greedy(3), use_tqdm=False)
        for lengths in ([3], [2, 1], [77], [77, 78, 79], [999]):
            params = SamplingParams(max_tokens=3, prompt_logprobs=1)
            llm.generate(prompts_of(lengths, 10_000), params, use_tqdm=False)
        llm.generate(prompts_of([2000], 10_000) * 8, greedy(3), use_tqdm=False)  # shares a prefix
        params = SamplingParams(temperature=1.0, max_tokens=3, logprobs=3, top_k=9, top_p=0.5, presence_penalty=1.0)
        llm.generate(prompts_of([9] * 5, 10_000), params, use_tqdm=False)
        return at_start, compiled[len(at_start) :]


@pytest.mark.parametrize("options", [{}, {"quantization": "fp8"}, {"enforce_eager": True}])
def test_no_kernel_is_compiled_while_requests_run(options):
    """In a process of its own, because this one keeps the kernels that other tests have compiled."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        at_start, later = process.submit(compiled_kernels, options).result()
    assert at_start and not later


def test_real_shapes_run_in_bfloat16():
    prompt = prompts_of([50], 10_000)[0]
    options = dict(load_format="dummy", max_model_len=256, max_num_seqs=4, gpu_memory_utilization=0.4)
    with LLM("qwen3-0.6b", **options) as llm:
        assert len(tokens(llm, [prompt], greedy(16))[0]) == 16


@pytest.mark.parametrize(("rows", "n", "k"), [(2048, 3072, 1024), (1033, 9728, 2560), (2999, 6144, 4096)])
def test_swiglu_of_real_sizes_is_one_kernel(rows, n, k):
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
        pytest.skip("other chips use cuBLAS")
    x, weight = operands(rows, n, k, torch.device("cuda"))
    assert is_swiglu(x, weight)
    got = linear(x, weight, gated=True)
    torch.testing.assert_close(got.float(), swiglu_torch(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [4, 64, 65, 100, 512, 513])
@pytest.mark.parametrize("bias", [False, True])
def test_gemm_with_any_batch_size_is_added_to_the_residual_stream(rows, bias):
    n, k = 1024, 6144
    with torch.device("cuda"), torch.inference_mode():
        torch.manual_seed(0)
        layer = RowParallelLinear(k, n, bias, dtype=torch.bfloat16)
        norm = RMSNorm(n, 1e-6, dtype=torch.bfloat16)
        layer.weight.normal_(0, k**-0.5)
        norm.weight.normal_()
        if bias:
            layer.bias.normal_()
        x, residual = torch.randn(rows, k).bfloat16(), torch.randn(rows, n).bfloat16()
        want = residual.float() + x.float() @ layer.weight.float().t()
        if bias:
            want += layer.bias.float()
        y = Residual(residual, layer.tp).add(layer(x))
        normed, lazy_norm = norm(y)
        if lazy_norm is not None:
            weight, eps = lazy_norm
            normed = rms_norm(normed, weight, eps)
        torch.testing.assert_close(y.complete().float(), want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(normed, rms_norm_torch(y.complete(), norm.weight, 1e-6), rtol=2e-2, atol=1e-2)


@measures_memory
def test_closed_engine_frees_its_memory(model):
    def memory_before_and_after_close():
        llm = LLM(model, max_num_seqs=4, **{**OPTIONS, "num_kvcache_blocks": 4096})
        llm.generate(prompts_of([5]), greedy(4), use_tqdm=False)
        before = torch.cuda.memory_allocated()
        llm.close()
        return before, torch.cuda.memory_allocated()

    memory_before_and_after_close()  # the first engine makes cuBLAS allocate workspaces, which stay
    before, after = memory_before_and_after_close()
    assert before - after > 8 << 20
    assert memory_before_and_after_close()[1] == after
