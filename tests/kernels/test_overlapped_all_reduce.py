"""All-reduces overlapped with computation, on a CPU: two ranks are processes that share memory.

Triton's interpreter runs the kernels; a thread replaces each copy engine.
"""

import ctypes
import queue
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from nanovllm.distributed import parallel
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.residual import Residual
from nanovllm.ops.comm import cuda_ipc, overlapped_all_reduce
from nanovllm.ops.comm.overlapped_all_reduce import MIN_TOKENS, NUM_SLICES, OverlappedAllReduce, inbox_words
from nanovllm.ops.comm.peer_memory import PeerMemory, new_peer_memory
from nanovllm.ops.comm.reference import all_reduce_torch
from nanovllm.ops.dispatch import mixed_capture_sizes
from nanovllm.ops.triton_utils import HAVE_TRITON
from tests.kernels.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs, tests/gpu/test_tensor_parallel.py tests this"),
]
SHAPES = [(256, 64), (300, 48), (257, 64), (1000, 8)]
LARGEST = 300 * 64 * 4


class CopyEngine:
    """Replace a CUDA stream: run what is queued, in order, a moment later."""

    def __init__(self):
        self.work = queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            do, *arguments = self.work.get()
            time.sleep(0.005)
            do(*arguments)
            self.work.task_done()

    def wait_stream(self, stream):
        self.waits = True


def copy(target, source, num_bytes, stream):
    assert stream.waits, "the copy does not wait for the computation"
    stream.waits = False
    stream.work.put((ctypes.memmove, target, source, num_bytes))


def write(address, value, stream):
    stream.work.put((lambda: ctypes.memmove(address, ctypes.byref(ctypes.c_int32(value)), 4),))


@pytest.fixture
def engines(monkeypatch):
    replace_engines(monkeypatch.setattr)


def replace_engines(setattr):
    setattr(cuda_ipc, "copy", copy)
    setattr(cuda_ipc, "write", write)
    setattr(torch.cuda, "current_stream", lambda: None)
    setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    setattr(overlapped_all_reduce, "MIN_BYTES", 256)
    setattr(overlapped_all_reduce, "MIN_TOKENS", 256)
    setattr(overlapped_all_reduce, "POLL_INTERVAL", 64)


def new_inboxes(largest=LARGEST):
    return [torch.zeros(2 * largest // 4 + NUM_SLICES, dtype=torch.int32).share_memory_() for _ in range(2)]


def overlapped_of(rank, inboxes):
    host_stop, device_stop = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    overlapped = OverlappedAllReduce(inboxes[rank], inboxes[1 - rank].data_ptr(), host_stop, device_stop)
    overlapped.stream = CopyEngine()
    return overlapped


def tp_of(rank, overlapped):
    peers = SimpleNamespace(overlapped=overlapped, fits_all_reduce=lambda x: False)
    return parallel.TensorParallel(rank, 2, peers=peers)


def calls(rank):
    """Yield a rank's tensor, both ranks' tensors, and the norm."""
    for i, (rows, size) in enumerate(SHAPES * 2):
        generator = torch.Generator().manual_seed(i)
        parts = [torch.randn(rows, size, generator=generator) for _ in range(2)]
        yield parts[rank], parts, (torch.rand(size, generator=generator), 1e-6) if i % 3 else None


def run_rank(rank, inboxes, folder):
    replace_engines(setattr)
    overlapped = overlapped_of(rank, inboxes)
    overlapped.number = (1 << 31) - 4  # the counter wraps around during the test
    tp, wait = tp_of(rank, overlapped), overlapped_all_reduce._wait_for_slice

    def wait_late(*arguments):
        wait(*arguments)
        time.sleep(0.002)  # the other rank has finished and sends slices of the next tensor

    for i, (own, parts, norm) in enumerate(calls(rank)):
        overlapped_all_reduce._wait_for_slice = wait_late if rank == i % 2 else wait
        x = torch.full_like(own, float("nan"))
        for tokens in overlapped.slices(x):
            if rank == i % 2:
                time.sleep(0.02)  # the other rank waits
            x[tokens] = own[tokens]
        out = tp.all_reduce(x, norm)
        want, want_normed = all_reduce_torch(parts, norm)
        assert torch.equal(x, want) and (out is x) == (norm is None) and overlapped.pending is None
        if norm is not None:
            torch.testing.assert_close(out, want_normed)
    overlapped.stream.work.join()
    (folder / str(rank)).touch()


def test_both_ranks_get_the_all_reduce_and_its_norm(tmp_path):
    run_ranks(run_rank, (new_inboxes(), tmp_path), 2)
    assert all((tmp_path / str(rank)).exists() for rank in range(2))


def test_a_row_parallel_layer_overlaps_large_all_reduces(engines):
    """The ranks run one after the other, because neither waits before both have sent."""
    inboxes = new_inboxes(2100 * 64 * 4)
    x, residual, weight, bias = torch.randn(2100, 32), torch.randn(2100, 64), torch.randn(64, 32), torch.randn(64)
    sent = []
    for rank in range(2):
        tp = tp_of(rank, overlapped_of(rank, inboxes))
        layer = RowParallelLinear(32, 64, bias=True, tp=tp)
        layer.weight_loader(layer.weight, weight)
        layer.bias.copy_(bias)
        part = x[:, 16 * rank : 16 * (rank + 1)]
        _ = Residual(residual[:2048].clone(), tp).add(layer(part[:2048]))
        assert tp.overlapped.number == 0 and tp.overlapped.pending is None
        sent.append(Residual(residual.clone(), tp).add(layer(part)))
        assert tp.overlapped.number == 1
    for y in sent:
        torch.testing.assert_close(y.complete(), residual + x @ weight.t() + bias, rtol=1e-4, atol=1e-4)


def test_a_tensor_that_is_never_added_is_forgotten(engines, monkeypatch):
    """As the hidden states of a step that computes logits of some tokens only."""
    inboxes, x = new_inboxes(), torch.ones(256, 64)
    overlapped = overlapped_of(0, inboxes)
    for _ in overlapped.slices(x):
        pass
    rows = torch.ones(2, 64)
    monkeypatch.setattr(parallel, "all_reduce_triton", lambda x, peers, norm, residual: x)
    tp = parallel.TensorParallel(0, 2, peers=SimpleNamespace(overlapped=overlapped, fits_all_reduce=lambda x: True))
    assert tp.all_reduce(rows) is rows and overlapped.pending is None
    overlapped.stream.work.join()


def test_a_stopped_rank_neither_waits_nor_sends(engines):
    inboxes = new_inboxes()
    overlapped, x = overlapped_of(0, inboxes), torch.ones(256, 64)
    for _ in overlapped.slices(x):
        pass
    waiting = threading.Thread(target=overlapped.finish, args=(x,), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    overlapped.host_stop.fill_(1)
    waiting.join(60)
    assert not waiting.is_alive() and overlapped.device_stop.item() == 1
    overlapped.stream.work.join()
    inboxes[1].zero_()
    for _ in overlapped.slices(x):
        pass
    overlapped.stream.work.join()
    assert not inboxes[1].any()


def test_large_aligned_tensors_fit_unless_captured(monkeypatch):
    def fits(rows, size, dtype=torch.bfloat16):
        return overlapped.fits(torch.empty(rows, size, dtype=dtype, device="meta"))

    overlapped = OverlappedAllReduce.__new__(OverlappedAllReduce)
    overlapped.capacity = 128 << 20
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fits(2049, 4096) and not fits(2048, 8192) and not fits(2049, 2048)
    assert fits(16384, 4096) and not fits(16385, 4096)
    assert not fits(4096, 4097)
    assert not overlapped.fits(torch.empty(4096, 8192, dtype=torch.bfloat16, device="meta")[:, :4096])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not fits(16384, 4096)
    # Captured steps never overlap, and neither does their warm-up.
    assert max(mixed_capture_sizes(1 << 20)) < MIN_TOKENS


def test_an_inbox_is_as_large_as_the_largest_all_reduce_needs():
    assert inbox_words(8 << 20) == 0
    assert inbox_words(16384 * 4096 * 2) == 64 * 2**20 + NUM_SLICES
    assert inbox_words(1 << 40) == 128 * 2**20 + NUM_SLICES
    start = len(new_peer_memory(2, torch.device("cpu")))
    memory = [new_peer_memory(2, torch.device("cpu"), 16 << 20) for _ in range(2)]
    peers = PeerMemory(0, memory)
    assert peers.overlapped.capacity == 16 << 20 and not memory[0][start:].any()
    assert peers.overlapped.other_inbox == memory[1][start:].data_ptr()
    peers.close()
    assert peers.overlapped is None
    assert PeerMemory(0, [memory[0][:start]] * 2).overlapped is None


@pytest.mark.parametrize("num_tokens", [256, 257, 300, 511, 2049, 16384])
def test_every_token_is_in_one_slice(num_tokens):
    overlapped = OverlappedAllReduce.__new__(OverlappedAllReduce)
    overlapped.number, overlapped._send = 0, lambda *arguments: None
    slices = list(overlapped.slices(torch.empty(num_tokens, 8)))
    assert len(slices) == NUM_SLICES and all(part.stop > part.start for part in slices)
    assert [token for part in slices for token in range(part.start, part.stop)] == list(range(num_tokens))
