"""Two GPUs return the tokens of one, all-reduce in each other's memory, and raise clear errors when a rank is lost."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.executor.ranks import make_group, rank_device
from nanovllm.ops.dispatch import GEMV_MAX_PRODUCTS, Adder
from nanovllm.ops.linear.linear import choose_adder, linear_all_reduce
from nanovllm.ops.norm_rope.reference import rms_norm_torch
from nanovllm.runner.cuda_graphs import StepGraphs
from tests.distributed.test_tensor_parallel import SCRIPT
from tests.gpu.test_gpu import OPTIONS, greedy, measures_memory, prompts_of, tokens
from tests.helpers import all_end, rank_pids
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

TINY_OPTIONS = {**OPTIONS, "dtype": "float32", "max_num_seqs": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2")  # a vocabulary that 2 does not divide


@pytest.fixture(scope="module")
def want(model):
    with LLM(model, **TINY_OPTIONS) as llm:
        return tokens(llm, *mixture())


def small_batch_gemms_that_differ_from_nccl(tp, device):
    """Run small-batch GEMMs with a fused all-reduce, 30 in a row with other all-reduces between.

    Return those whose results are not what NCCL's all-reduce gives.
    """
    wrong, shapes = [], [(4096, 2048), (4096, 6144), (1024, 1024), (2, 64), (1078, 96)]
    for i in range(40):
        (n, k), dtype = shapes[i % 5], (torch.bfloat16, torch.float16)[i % 3 % 2]
        rows = min(1 + i % 4, max(1, GEMV_MAX_PRODUCTS // (n * k)))  # with more, GEMM runs instead
        own, common = (torch.Generator(device).manual_seed(seed) for seed in (1000 + 2 * i + tp.rank, i))
        x, weight = (torch.randn(size, k, generator=own, device=device).to(dtype) for size in (rows, n))
        bias, residual = (torch.randn(size, generator=common, device=device).to(dtype) for size in ((n,), (rows, n)))
        weight /= k**0.5
        want = x.float() @ weight.float().t()
        tp.group.allreduce([want]).wait()
        want += bias.float() + residual.float()
        residuals = residual.repeat(30, 1, 1)
        torch.cuda.synchronize()
        fits = choose_adder(x, weight, residual, 2, tp.peers) is Adder.ALL_REDUCE_GEMV
        for j, out in enumerate(residuals):
            linear_all_reduce(x, weight, bias, out, tp.peers)
            if j % 7 == i % 7:
                fits = fits and tp.all_reduce(torch.full((3, 700), tp.rank + 1.0, device=device)).eq(3).all()
        theirs = [torch.empty_like(residuals) for _ in range(2)]
        tp.group.allgather([theirs], [residuals]).wait()
        same = torch.equal(*theirs) and residuals.eq(residuals[0]).all()
        if not (fits and same and torch.allclose(residuals[0].float(), want, rtol=2e-2, atol=5e-2)):
            wrong.append(("gemm", rows, n, k, dtype))
    return wrong


def compare_collectives_with_nccl(rank, folder):
    """Write to a file how this rank's collectives differ from NCCL's, for small and large tensors in mixed order."""
    device = rank_device("cuda", rank)
    tp = TensorParallel(rank, 2, make_group(rank, 2, dist.FileStore(str(folder / "store"), 2), "cuda"))
    tp = tp.with_peers(device, 256 << 20)
    generator, wrong = torch.Generator().manual_seed(0), []
    weight = torch.full((4096,), 0.5, device=device)
    weights = {dtype: weight.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    # A kernel reads the weights before it waits for the kernel before it, so they must be there.
    torch.cuda.synchronize()
    for i in range(200):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
        rows = int(torch.randint(1, (20, 600, 9000)[i % 7 % 3], (), generator=generator))
        size = (1, 37, 512, 2048)[i % 5 % 4]
        seed = torch.Generator(device).manual_seed(2 * i + rank)
        x = torch.randn(rows, 2 * size, generator=seed, device=device).to(dtype)
        want = x.to(torch.float32, copy=True)
        tp.group.allreduce([want]).wait()
        norm, residual = (weights[dtype][: 2 * size], 1e-6) if i % 2 else None, None
        if tp.overlapped.fits(x):
            own, x = x, torch.empty_like(x)
            for part in tp.overlapped.slices(x):
                x[part] = own[part]
        elif i % 4 < 2:
            residual = torch.randn(x.shape, generator=torch.Generator(device).manual_seed(i), device=device).to(dtype)
            want += residual
        out = tp.all_reduce(x, norm, residual)
        right = torch.allclose(x.float(), want, rtol=1e-2, atol=1e-5)
        if norm is not None:
            right = right and torch.allclose(out.float(), rms_norm_torch(x, *norm).float(), rtol=2e-2, atol=1e-3)
        if not right:
            wrong.append((i, rows, size))
    through_nccl = replace(tp, peers=None)
    for i, (rows, columns) in enumerate([(1, 75_968), (2, 75_968), (7, 30), (256, 75_968), (1, 30)] * 3):
        seed = torch.Generator(device).manual_seed(2 * i + rank)
        x, share = torch.randn(rows, columns, generator=seed, device=device).bfloat16(), tp.rows(rows)
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        tokens[share] = torch.arange(rows, device=device)[share] + 100_000
        if not (tp.peers.fits_all_to_all(x) and torch.equal(tp.all_to_all(x), through_nccl.all_to_all(x))):
            wrong.append(("exchange", rows, columns))
        if not torch.equal(tp.all_gather_rows(tokens), torch.arange(rows, device=device) + 100_000):
            wrong.append(("merge", rows))
    wrong += small_batch_gemms_that_differ_from_nccl(tp, device)
    (folder / str(rank)).write_text(f"{tp.peers is not None} {tp.overlapped.number > 0} {wrong}")
    tp.abort(lambda: None)
    tp.close()


def test_collectives_give_the_results_of_nccl(tmp_path):
    torch.multiprocessing.spawn(compare_collectives_with_nccl, (tmp_path,), 2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["True True []"] * 2


def mixture():
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=60, ignore_eos=True) for i in range(5)]
    return prompts_of([3, 20, 47, 100, 33]), params


def noise_and_agreement(judge, outputs):
    """Compare the tokens of `outputs` with the likeliest tokens according to `judge`.

    Return the largest gap between their log-probabilities, and how often they are equal.
    """
    prompts = [output.prompt_token_ids + output.token_ids for output in outputs]
    behind = []
    for output, scored in zip(
        outputs, judge.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False), strict=True
    ):
        start = len(output.prompt_token_ids)
        for token_id, row in zip(output.token_ids, scored.prompt_logprobs[start:], strict=True):
            behind.append(max(x.logprob for x in row.values()) - row[token_id].logprob)
    return max(behind), sum(gap == 0 for gap in behind) / len(behind)


@measures_memory
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b", "qwen3.5-9b", "qwen3-30b-a3b", "qwen3.5-35b-a3b"])
def test_bfloat16_greedy_tokens_equal_those_of_one_gpu_except_for_noise(name):
    options = dict(load_format="dummy", max_model_len=1024, max_num_seqs=100, gpu_memory_utilization=0.7)
    prompts, sizes = prompts_of([100 + i % 7 for i in range(100)], 10_000), (1, 3, 64, 100)
    with LLM(name, tensor_parallel_size=2, **options) as two:
        assert two.llm_engine.executor.runner.tp.peers is not None
        outputs = [output for size in sizes for output in two.generate(prompts[:size], greedy(24), use_tqdm=False)]
    with LLM(name, **options) as one:
        own = [output for size in sizes for output in one.generate(prompts[:size], greedy(24), use_tqdm=False)]
        # Steps with few and with many sequences differ by this much on one GPU.
        noise, usual = noise_and_agreement(one, own)
        gap, agreement = noise_and_agreement(one, outputs)
    assert (gap < 2 * noise + 0.1, agreement > usual - 0.1) == (True, True), (gap, noise, agreement, usual)


def test_engines_on_two_gpus_answer_whichever_gpu_is_current(model, want):
    """A thread starts with the first GPU, and a program may change its current GPU between two calls."""
    torch.cuda.set_device(1)
    try:
        with LLM(model, **TINY_OPTIONS) as second, ThreadPoolExecutor(1) as other:
            assert second.llm_engine.executor.runner.device.index == 1
            torch.cuda.set_device(0)
            with LLM(model, **TINY_OPTIONS) as first:
                for gpu in (0, 1):
                    torch.cuda.set_device(gpu)
                    for llm in (first, second):
                        assert tokens(llm, *mixture()) == want
                        assert other.submit(tokens, llm, *mixture()).result() == want
                        llm.sleep(2)
                        llm.wake_up()
                        assert torch.cuda.current_device() == gpu
            torch.cuda.set_device(1)
            llm = AsyncLLM(model, **TINY_OPTIONS)
            assert llm.llm_engine.executor.runner.device.index == 1
            llm.close()
    finally:
        torch.cuda.set_device(0)


@pytest.mark.parametrize("name", ["qwen2-moe", "qwen3-moe", "qwen3-next", "qwen3.5", "qwen3.5-moe"])
def test_experts_and_recurrent_state_on_two_ranks_give_the_tokens_of_one(tmp_path, name):
    path = save_tiny(tmp_path, name)
    with LLM(path, **TINY_OPTIONS) as one, LLM(path, tensor_parallel_size=2, **TINY_OPTIONS) as two:
        assert tokens(two, *mixture()) == tokens(one, *mixture())


@pytest.mark.parametrize(
    "change",
    [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 16}, {"num_kvcache_blocks": 16}, {"overlap": 0}],
    ids=str,
)
def test_schedules_do_not_change_the_tokens(model, want, change):
    with LLM(model, tensor_parallel_size=2, **{**TINY_OPTIONS, **change}) as llm:
        assert tokens(llm, *mixture()) == want
        # Now with cached prefixes.
        assert tokens(llm, *mixture()) == want
        pids = rank_pids()
        start = time.monotonic()
    assert len(pids) == 1 and all_end(pids)
    assert time.monotonic() - start < 5


def test_two_gpus_with_fp8_keys_and_values_give_the_tokens_of_one(model):
    options = {**TINY_OPTIONS, "kv_cache_dtype": "fp8"}
    with LLM(model, **options) as llm:
        want = tokens(llm, *mixture())
    with LLM(model, tensor_parallel_size=2, **options) as llm:
        assert tokens(llm, *mixture()) == want


def test_a_killed_rank_raises_a_clear_error_in_seconds(model, want):
    memory = torch.cuda.mem_get_info()[0]
    with LLM(model, tensor_parallel_size=2, **TINY_OPTIONS) as llm:
        (pid,) = rank_pids()
        llm.add_request(mixture()[0][0], SamplingParams(max_tokens=200, ignore_eos=True))
        for _ in range(20):
            llm.step()
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"rank 1 .* signal 9"):
            while llm.has_unfinished():
                llm.step()
        assert time.monotonic() - start < 10
    assert all_end([pid])
    assert memory - torch.cuda.mem_get_info()[0] < 1 << 30
    # This process's GPU still works.
    with LLM(model, tensor_parallel_size=2, **TINY_OPTIONS) as llm:
        assert tokens(llm, *mixture()) == want


@pytest.mark.parametrize("what", ["rank 1 is killed", "rank 0 is out of memory"])
def test_a_failure_while_graphs_are_captured_raises_a_clear_error_in_seconds(model, want, monkeypatch, what):
    """By then graphs that only the capturing thread has contain NCCL's kernels."""
    capture, pids = StepGraphs._capture, []

    def fail(self, run):
        def failing():
            result = run()
            if torch.cuda.is_current_stream_capturing() and len(self.decode) == 1:
                pids.extend(rank_pids())
                if what == "rank 0 is out of memory":
                    raise torch.OutOfMemoryError(what)
                os.kill(pids[0], signal.SIGKILL)
                # The monitor notices it meanwhile.
                time.sleep(1)
            return result

        return capture(self, failing)

    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(StepGraphs, "_capture", fail)
        with pytest.raises(RuntimeError, match=r"rank 1 .* signal 9|rank 0 is out of memory"):
            LLM(model, tensor_parallel_size=2, **TINY_OPTIONS)
    # Starting an engine compiles kernels.
    assert time.monotonic() - start < 120
    assert len(pids) == 1 and all_end(pids)
    # This process's GPU still works.
    with LLM(model, tensor_parallel_size=2, **TINY_OPTIONS) as llm:
        assert tokens(llm, *mixture()) == want


def test_closed_engines_leave_no_memory(model):
    """Memory that other processes had mapped is freed too."""
    left = []
    for _ in range(2):
        with LLM(model, tensor_parallel_size=2, **TINY_OPTIONS):
            pass
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[1] - left[0] < 1 << 20


@measures_memory
@pytest.mark.parametrize(
    ("what", "message"),
    [("killed", r"rank 1 .* signal 9"), ("out of memory", r"rank 1 failed:\n(.|\n)*OutOfMemoryError")],
)
def test_a_rank_lost_in_a_long_prompt_raises_a_clear_error_in_seconds(what, message):
    """Copies to the lost rank may be under way."""
    options = dict(load_format="dummy", enforce_eager=True, gpu_memory_utilization=0.5, enable_prefix_caching=False)
    prompts, hog = prompts_of([4000] * 16, 10_000), None
    with LLM("qwen3-8b", tensor_parallel_size=2, **options) as llm:
        (pid,) = rank_pids()
        assert llm.llm_engine.executor.runner.tp.overlapped is not None
        if what == "killed":
            threading.Timer(0.4, os.kill, (pid, signal.SIGKILL)).start()
        else:
            hog = torch.empty(torch.cuda.mem_get_info(1)[0] - (200 << 20), dtype=torch.uint8, device="cuda:1")
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=message):
            tokens(llm, prompts, greedy(2))
        assert time.monotonic() - start < 10
        del hog
        torch.cuda.empty_cache()
    assert all_end([pid])
    # This process's GPU still works.
    assert torch.ones(8, device="cuda").sum().item() == 8


def test_under_torchrun_every_rank_has_the_results(model, want, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    with LLM(model, **TINY_OPTIONS) as llm:
        one = tokens(llm, prompts_of([3, 20]), greedy(12))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(path), str(model), json.dumps(TINY_OPTIONS), json.dumps(prompts_of([3, 20]))]
    environment = dict(os.environ, PYTHONPATH=os.getcwd())
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("tokens")]
    assert [json.loads(line.split(" ", 1)[1]) for line in lines] == [one] * 2
