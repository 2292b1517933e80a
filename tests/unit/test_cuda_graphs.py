"""What can be shown of captures without a GPU."""

import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import Event, Thread, current_thread
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.attention.torch_ref import TorchBackend
from nanovllm.distributed import parallel
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.messages import Batch
from nanovllm.ops.dispatch import Adder, Kernel, regime_of
from nanovllm.ops.linear.gemm import MAX_TILES, default_gemm_config
from nanovllm.ops.triton_utils import HAVE_TRITON
from nanovllm.runner import model_runner
from nanovllm.runner.cuda_graphs import StepGraphs
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.weights.formats import Plain
from tests.models.tiny import save_tiny


def test_a_rank_lost_in_a_capture_ends_collectives_after_it(monkeypatch):
    """NCCL's end holds a mutex and waits for the graphs; the capture's next collective would wait for the mutex."""

    class Group:
        abort = MagicMock()

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Group, raising=False)
    tp, told = replace(TensorParallel(0, 2, Group()), peers=MagicMock()), Event()
    tp.peers.stop.side_effect = told.set
    with tp.capturing:
        monitor = Thread(target=tp.abort, args=[MagicMock()])
        monitor.start()
        assert told.wait(60)  # the capture may be waiting for a sum
        monitor.join(0.5)
        assert monitor.is_alive() and not Group.abort.called
    monitor.join(60)
    assert Group.abort.called


def test_sums_and_collectives_are_told_to_end_before_graphs_are_freed_and_end_after(monkeypatch):
    """CUDA frees a graph once its kernels have ended, and does nothing else meanwhile; NCCL ends after that."""
    told, ending, freed = [], Event(), Event()

    class Group:
        def abort(self):
            told.append("collectives")
            ending.set()
            assert freed.wait(60)

    class BusyThread(Thread):
        def join(self, timeout=None):
            assert ending.wait(60)  # it may begin late where there is much else to run
            super().join(timeout)

    def free_graphs():
        told.append("graphs")
        freed.set()

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setattr(parallel, "threading", SimpleNamespace(Thread=BusyThread))
    peers = MagicMock()
    peers.stop.side_effect = lambda: told.append("sums")
    replace(TensorParallel(0, 2, Group()), peers=peers).abort(free_graphs)
    assert told == ["sums", "collectives", "graphs"]


def test_what_comes_before_steps_has_ended_when_they_may_begin_in_another_stream(monkeypatch, tmp_path):
    """Zeros of the cache, copies of weights: a caller may generate, or overwrite his weights, in another stream."""
    calls = []

    def note(name, original):
        def run(*args):
            calls.append(name)
            return original(*args)

        return run

    for name in ("_allocate", "_move_weights", "_synchronize"):
        monkeypatch.setattr(ModelRunner, name, note(name, getattr(ModelRunner, name)))
    monkeypatch.setattr(model_runner, "load_weights", note("load_weights", model_runner.load_weights))
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


def test_a_step_has_a_counter_for_each_row_and_kv_head(tmp_path, monkeypatch):
    """Rows with a shared prefix have several parts however many they are; a graph may have a row more than slots."""
    contexts, prepare = [], TorchBackend.prepare
    monkeypatch.setattr(TorchBackend, "prepare", lambda self, ctx: contexts.append(ctx) or prepare(self, ctx))
    with LLM(save_tiny(tmp_path, "qwen3"), device="cpu", max_num_seqs=900, max_model_len=64) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    (num_kv_heads,) = contexts[0].kv_heads
    assert num_kv_heads > 1 and len(contexts[0].counters) >= 901 * num_kv_heads > MAX_TILES
    assert all(context.counters is contexts[0].counters for context in contexts) and not contexts[0].counters.any()


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("max_num_seqs", [1, 20, 512])
def test_no_kernel_of_a_product_is_left_to_be_compiled_in_a_capture(tmp_path, monkeypatch, max_num_seqs):
    """Products of some rows have a kernel for each power of two, norms of more one that adds; prompts have rows too."""
    counts, linear = set(), Plain.linear

    def counted(self, x, *args, **options):
        counts.add(len(x))
        return linear(self, x, *args, **options)

    monkeypatch.setattr(Plain, "linear", counted)
    monkeypatch.setattr(TorchBackend, "name", "triton")  # whose kernels are compiled first
    options = dict(max_num_seqs=max_num_seqs, max_model_len=64, max_num_batched_tokens=2048)  # of at least 32 prompts
    with LLM(save_tiny(tmp_path, "qwen3"), device="cpu", **options):
        compiled = {default_gemm_config(count, 64, 64, False) for count in counts}
    small = [count for count in range(1, 512) if regime_of(count).kernel is Kernel.GEMM]
    assert {default_gemm_config(count, 64, 64, False) for count in small} <= compiled and {1, 2, 4} <= counts
    assert any(regime_of(count).adder is Adder.NEXT_NORM for count in counts)


def test_steps_run_on_the_engine_s_gpu_whatever_the_thread_s_is(monkeypatch):
    """Triton launches on the current GPU, and events are recorded there: a thread that calls may have another one."""
    current, seen = [0], []

    @contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    runner = object.__new__(ModelRunner)
    runner.device, runner.state, runner.graphs, runner.num_blocks = torch.device("cuda", 1), MagicMock(), None, 1
    runner.forward = MagicMock()
    runner.forward.run.side_effect = lambda *_: seen.append(current[-1]) or MagicMock()
    for name in ("_send", "_move_weights", "_allocate", "_capture", "_synchronize"):
        setattr(runner, name, MagicMock(side_effect=lambda *_: seen.append(current[-1]) or MagicMock()))
    runner.launch(Batch())
    runner.wake_up()
    assert seen == [1] * 6 and current == [0]


def test_one_engine_captures_at_a_time_and_nothing_is_collected_meanwhile(monkeypatch):
    """Threads that capture share a stream: what one launches would be part of the other's graph."""
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    inside, go_on, both = Event(), Event(), []

    def capture(run):
        assert not gc.isenabled()
        both.append(current_thread())
        inside.set()
        assert go_on.wait(60)
        both.append(current_thread())
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
    assert threads[0].is_alive() and threads[1].is_alive() and len(both) == 1
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert [both[0]] * 2 == both[:2] and [both[2]] * 2 == both[2:] and len(set(both)) == 2
    assert gc.isenabled()
    gc.disable()  # as a caller may have
    try:
        graphs.capture()
        assert not gc.isenabled()
    finally:
        gc.enable()


SPOILT = RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("error", "ends"),
    [("out of memory", [None]), ("out of memory", [SPOILT]), (None, [SPOILT, RuntimeError("no capture")])],
)
def test_a_capture_that_fails_is_ended_and_freed(error, ends, monkeypatch):
    """A rank that is lost or out of memory in a capture, a thread that waits for the device: the error is told.

    Nothing holds NCCL's kernels then, and torch's allocator knows of no capture, for which it would keep much memory.
    """

    def run():
        if run.calls and error:
            raise RuntimeError(error)
        run.calls += 1

    run.calls = 0
    graph, allocator, graphs = MagicMock(), MagicMock(), object.__new__(StepGraphs)
    graph.capture_end.side_effect = ends
    graphs.pool, graphs.stream, graphs.wait = (0, 7), MagicMock(), MagicMock()
    graphs.forward = SimpleNamespace(model=SimpleNamespace(few_layers=nullcontext))
    graphs.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for name in ("endAllocateToPool", "releasePool"):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", getattr(allocator, name), raising=False)
    with pytest.raises(RuntimeError, match=error or str(SPOILT)):
        graphs._capture(run)
    assert [name for name, *_ in graph.method_calls] == ["capture_begin", *["capture_end"] * len(ends), "reset"]
    told = [call.endAllocateToPool(1, (0, 7)), call.releasePool(1, (0, 7))]
    assert allocator.mock_calls == (told if SPOILT in ends else [])
