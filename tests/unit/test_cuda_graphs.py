"""Capture of CUDA graphs, as far as it can be tested without a GPU."""

import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import Event, Thread, current_thread
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import torch
from torch import nn

from nanovllm import LLM, SamplingParams
from nanovllm.attention.torch_backend import TorchBackend
from nanovllm.distributed import parallel
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.moe import MoEConfig
from nanovllm.messages import Batch
from nanovllm.models.decoder import Decoder
from nanovllm.models.presets import PRESETS
from nanovllm.ops.dispatch import Adder, Kernel, regime_of
from nanovllm.ops.linear.gemm import MAX_TILES, default_gemm_config
from nanovllm.ops.triton_utils import HAVE_TRITON
from nanovllm.runner import model_runner
from nanovllm.runner.cuda_graphs import StepGraphs
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.weights.formats import Plain
from tests.models.tiny import save_tiny


def test_rank_lost_during_a_capture_aborts_collectives_after_the_capture(monkeypatch):
    """NCCL's abort holds a mutex and waits for the graphs. The capture's next collective would wait for that mutex."""

    class Group:
        abort = MagicMock()

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Group, raising=False)
    tp = replace(TensorParallel(0, 2, Group()), peers=MagicMock())
    stopped = Event()
    tp.peers.stop.side_effect = stopped.set
    with tp.capture_lock:
        monitor = Thread(target=tp.abort, args=[MagicMock()])
        monitor.start()
        assert stopped.wait(60)  # at once, as the capture may be waiting for an all-reduce
        monitor.join(0.5)
        assert monitor.is_alive() and not Group.abort.called
    monitor.join(60)
    assert Group.abort.called


def test_all_reduces_and_collectives_stop_before_graphs_are_freed_and_finish_after(monkeypatch):
    """CUDA waits for a graph's kernels before it frees the graph, and blocks other calls. NCCL finishes after that."""
    calls, aborting, freed = [], Event(), Event()

    class Group:
        def abort(self):
            calls.append("collectives")
            aborting.set()
            assert freed.wait(60)

    class SlowThread(Thread):
        def join(self, timeout=None):
            assert aborting.wait(60)  # on a busy machine the thread may start late
            super().join(timeout)

    def free_graphs():
        calls.append("graphs")
        freed.set()

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setattr(parallel, "threading", SimpleNamespace(Thread=SlowThread))
    peers = MagicMock()
    peers.stop.side_effect = lambda: calls.append("all-reduces")
    replace(TensorParallel(0, 2, Group()), peers=peers).abort(free_graphs)
    assert calls == ["all-reduces", "collectives", "graphs"]


def test_start_and_changes_of_weights_and_memory_finish_on_the_device_before_they_return(monkeypatch, tmp_path):
    """Afterwards the caller may generate, or overwrite the tensors that were loaded, in another stream."""
    calls = []

    def recorded(name, original):
        def run(*args):
            calls.append(name)
            return original(*args)

        return run

    for name in ("_allocate", "_move_weights", "_synchronize"):
        monkeypatch.setattr(ModelRunner, name, recorded(name, getattr(ModelRunner, name)))
    monkeypatch.setattr(model_runner, "load_weights", recorded("load_weights", model_runner.load_weights))
    path = save_tiny(tmp_path, "qwen3")
    with LLM(path, device="cpu", max_num_seqs=2, max_model_len=64) as llm:
        for change in (lambda: None, lambda: llm.update_weights(path), lambda: llm.sleep(2), llm.wake_up):
            change()
            assert calls.pop() == "_synchronize"
    event, stream = MagicMock(), MagicMock()
    stream.record_event = lambda: event
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    ModelRunner._synchronize(SimpleNamespace(device=torch.device("cuda", 1), wait=calls.append))
    assert calls[-1] is event


def test_step_has_a_counter_for_each_row_and_kv_head(tmp_path, monkeypatch):
    """Rows with a shared prefix have several splits at any batch size. A graph may have one row more than slots."""
    contexts, prepare = [], TorchBackend.prepare

    def recorded(self, ctx):
        contexts.append(ctx)
        prepare(self, ctx)

    monkeypatch.setattr(TorchBackend, "prepare", recorded)
    with LLM(save_tiny(tmp_path, "qwen3"), device="cpu", max_num_seqs=900, max_model_len=64) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    num_kv_heads = max(kind.kv_heads for kind in contexts[0].kv_kinds)
    assert num_kv_heads > 1 and len(contexts[0].counters) >= 901 * num_kv_heads > MAX_TILES
    assert all(context.counters is contexts[0].counters for context in contexts) and not contexts[0].counters.any()


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("max_num_seqs", [1, 20, 512])
def test_all_gemm_kernels_are_compiled_before_a_capture(tmp_path, monkeypatch, max_num_seqs):
    """Small-batch GEMMs have a kernel for each power of two, and norms of larger batches have one that adds."""
    counts, linear = set(), Plain.linear

    def counted(self, x, *args, **options):
        counts.add(len(x))
        return linear(self, x, *args, **options)

    monkeypatch.setattr(Plain, "linear", counted)
    monkeypatch.setattr(TorchBackend, "compiles_while_loading", True)
    options = dict(max_num_seqs=max_num_seqs, max_model_len=64, max_num_batched_tokens=2048)  # at least 32 prompts
    with LLM(save_tiny(tmp_path, "qwen3"), device="cpu", **options):
        compiled = {default_gemm_config(count, 64, 64, False) for count in counts}
    small = [count for count in range(1, 512) if regime_of(count).kernel is Kernel.GEMM]
    assert {default_gemm_config(count, 64, 64, False) for count in small} <= compiled and {1, 2, 4} <= counts
    assert any(regime_of(count).adder is Adder.NEXT_NORM for count in counts)


def test_steps_run_on_the_gpu_of_the_engine_instead_of_the_thread(monkeypatch):
    """Triton launches kernels and torch records events on the current GPU, which belongs to the calling thread."""
    current, seen = [0], []

    @contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    runner = object.__new__(ModelRunner)
    runner.device, runner.state, runner.graphs, runner.sizes = torch.device("cuda", 1), MagicMock(), None, MagicMock()
    runner.config = runner.forward = MagicMock()
    runner.forward.run.side_effect = lambda *_: seen.append(current[-1]) or MagicMock()
    for name in ("_start_copy_to_host", "_move_weights", "_allocate", "_capture", "_synchronize"):
        setattr(runner, name, MagicMock(side_effect=lambda *_: seen.append(current[-1]) or MagicMock()))
    runner.launch(Batch())
    runner.wake_up(("weights", "kv_cache"), capture=True)
    assert seen == [1] * 6 and current == [0]


def test_one_engine_captures_at_a_time_without_garbage_collection(monkeypatch):
    """Threads that capture share a stream, so kernels of one would be part of the other's graph."""
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    inside, may_finish, captures = Event(), Event(), []

    def capture(run):
        assert not gc.isenabled()
        captures.append(current_thread())
        inside.set()
        assert may_finish.wait(60)
        captures.append(current_thread())
        return None, None

    backend, threads = SimpleNamespace(capturable_prefill=False, shares_prefixes=False), []
    for _ in range(2):
        graphs = object.__new__(StepGraphs)
        graphs.forward, graphs.config = SimpleNamespace(backend=backend), MagicMock()
        graphs.slots, graphs.decode, graphs._capture = torch.zeros(1), {}, capture
        threads.append(Thread(target=graphs.capture))
        threads[-1].start()
    assert inside.wait(60)
    threads[1].join(0.5)
    assert threads[0].is_alive() and threads[1].is_alive() and len(captures) == 1
    may_finish.set()
    for thread in threads:
        thread.join(60)
    first, first_again, second, second_again = captures
    assert first is first_again and second is second_again and first is not second
    assert gc.isenabled()
    gc.disable()  # like some callers
    try:
        graphs.capture()
        assert not gc.isenabled()
    finally:
        gc.enable()


INVALIDATED = RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("error", "end_errors"),
    [("out of memory", [None]), ("out of memory", [INVALIDATED]), (None, [INVALIDATED, RuntimeError("no capture")])],
)
def test_failed_capture_raises_its_error_and_is_ended_and_freed(error, end_errors, monkeypatch):
    """A lost rank, a lack of memory, or another thread that waits for the device make a capture fail.

    Ending it frees NCCL's kernels. It also ends the allocator's capture mode, in which torch would keep much memory.
    """
    num_runs = 0

    def run():
        nonlocal num_runs
        if num_runs and error:
            raise RuntimeError(error)
        num_runs += 1

    graph, allocator, graphs = MagicMock(), MagicMock(), object.__new__(StepGraphs)
    graph.capture_end.side_effect = end_errors
    graphs.pool, graphs.stream, graphs.wait = (0, 7), MagicMock(), MagicMock()
    graphs.forward = SimpleNamespace(model=SimpleNamespace(few_layers=nullcontext))
    graphs.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for name in ("endAllocateToPool", "releasePool"):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", getattr(allocator, name), raising=False)
    with pytest.raises(RuntimeError, match=error or str(INVALIDATED)):
        graphs._capture(run)
    assert [name for name, *_ in graph.method_calls] == ["capture_begin", *["capture_end"] * len(end_errors), "reset"]
    cleanup = [call.endAllocateToPool(1, (0, 7)), call.releasePool(1, (0, 7))]
    assert allocator.mock_calls == (cleanup if INVALIDATED in end_errors else [])


def test_few_layers_has_every_kind_of_layer_and_the_last_one():
    sizes = {"num_layers": 6, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "eos_token_ids": ()}
    full, sliding = "full_attention", "sliding_attention"  # whose kernels differ
    sizes |= {"layer_types": (full, full, full, sliding, sliding, sliding), "sliding_window": 9}
    decoder = Decoder(replace(PRESETS["qwen3-0.6b"], **sizes))
    decoder.layers[2].mlp = nn.Identity()
    layers = decoder.layers
    with decoder.few_layers():
        assert set(decoder.layers) == {layers[0], layers[2], layers[3], layers[5]}
    assert decoder.layers is layers


def test_few_layers_has_a_dense_and_a_sparse_layer():
    moe = MoEConfig(4, 2, 16, norm_topk_prob=True, dense_layers=(0, 2, 3))
    sizes = {"num_layers": 4, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "eos_token_ids": ()}
    decoder = Decoder(replace(PRESETS["qwen3-30b-a3b"], **sizes, moe=moe))
    layers = decoder.layers
    with decoder.few_layers():
        assert set(decoder.layers) == {layers[0], layers[1], layers[3]}
