"""Ranks as processes that share memory: each gets the sum, to the last bit the same. In the interpreter, on a CPU."""

from contextlib import nullcontext

import pytest
import torch
import torch.multiprocessing

from nanovllm.kernels import all_reduce
from nanovllm.kernels._triton import HAVE_TRITON
from nanovllm.utils import parallel

pytestmark = [
    pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs tests/gpu/test_tensor_parallel.py shows it"),
]
# Numbers of elements: one word, several programs, a part of one, sizes that come back after others, of both protocols.
CALLS = [(2, "bfloat16"), (1030, "float16"), (4096, "float32"), (700, "bfloat16"), (70_000, "bfloat16")]
CALLS += [(1030, "float16"), (5000, "float32"), (140_000, "float32"), (70_002, "float16"), (80_000, "bfloat16")]


def run_rank(rank, memory, results):
    peers = all_reduce.PeerMemory(rank, memory)
    generator = torch.Generator().manual_seed(0)
    sums = []
    for n, dtype in CALLS:
        summands = [torch.randn(n, generator=generator).to(getattr(torch, dtype)) for _ in memory]
        own = summands[rank].view(2, -1)  # rows of any length, as of a hidden size that is odd
        sums.append(all_reduce.all_reduce_triton(own, peers).flatten().tolist())
    results.put((rank, sums))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_same_sum(size):
    memory = [all_reduce.new_memory(size, torch.device("cpu")).share_memory_() for _ in range(size)]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = torch.multiprocessing.spawn(run_rank, (memory, results), size, join=False)
    sums = dict(results.get(timeout=120) for _ in range(size))
    while not ranks.join(60):  # returns when any rank ends
        pass
    generator = torch.Generator().manual_seed(0)
    for i, (n, dtype) in enumerate(CALLS):
        want = sum(torch.randn(n, generator=generator).to(getattr(torch, dtype)).float() for _ in range(size))
        tolerance = 1e-6 if dtype == "float32" else 1e-2  # the interpreter truncates to bfloat16
        torch.testing.assert_close(torch.tensor(sums[0][i]), want, rtol=tolerance, atol=tolerance)
        assert all(sums[rank][i] == sums[0][i] for rank in range(size))


def test_what_fits():
    peers = all_reduce.PeerMemory(0, [all_reduce.new_memory(2, torch.device("cpu"))] * 2)
    most = all_reduce.SIMPLE.max_bytes // 2
    assert peers.fits(torch.zeros(most, dtype=torch.bfloat16))
    assert not peers.fits(torch.zeros(most + 2, dtype=torch.bfloat16))
    assert not peers.fits(torch.zeros(3, dtype=torch.bfloat16))
    assert not peers.fits(torch.zeros(8, 8)[:, :4])


def test_sums_end_whatever_mode_their_memory_was_made_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with torch.inference_mode():  # a caller's own
        peers = all_reduce.PeerMemory(0, [all_reduce.new_memory(2, torch.device("cpu"))] * 2)
    peers.end()
    assert peers.stop.item() == 1


def test_memory_that_cannot_be_shared_leaves_the_sums_to_nccl(monkeypatch):
    def refuse(memory):
        raise RuntimeError("this allocator does not share")

    def gather(tp, value, device):
        told.append(value)
        return [value, [value[0], ["a handle"]]]

    told = []
    monkeypatch.setattr(parallel, "new_memory", lambda *_: torch.zeros(1))
    monkeypatch.setattr(parallel, "share_memory", refuse)
    monkeypatch.setattr(parallel.TensorParallel, "all_gather_json", gather)
    monkeypatch.setattr(parallel.TensorParallel, "all_reduce_min", lambda tp, value, device: value)
    tp = parallel.TensorParallel(0, 2)
    assert tp.with_peers(torch.device("cuda")) is tp
    assert told[0][1] is None  # the others are told, and don't wait
