"""All-reduce and all-to-all through peer memory, on a CPU: ranks are processes that share memory.

Triton's interpreter runs the kernels.
"""

import json
import threading
import time

import pytest
import torch

from nanovllm.distributed import parallel
from nanovllm.ops.comm import collectives, overlapped_all_reduce, peer_memory
from nanovllm.ops.comm.peer_memory import PeerMemory, new_peer_memory
from nanovllm.ops.comm.reference import all_reduce_torch, all_to_all_torch
from nanovllm.ops.triton_utils import HAVE_TRITON
from tests.kernels.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs, tests/gpu/test_tensor_parallel.py tests this"),
]
# One word; tokens of several units or part of one; sizes that return after others; more than one launch sends.
CALLS = [((1, 2), "bfloat16"), ((3, 1030), "float16"), ((1, 4096), "float32"), ((7, 700), "bfloat16")]
CALLS += [((40, 3000), "bfloat16"), ((3, 1030), "float16"), ((2, 500), "float32"), ((40, 3000), "bfloat16")]
CALLS += [((2, 500), "float32"), ((2, 6), "float16"), ((3, 1000), "float32"), ((1, 2), "bfloat16")] * 3
CAPACITY = 64 << 10


def calls(size):
    """Yield each rank's tensor, call by call. Zeros of both signs must not be mistaken for missing words.

    Some weights of norms are float32.
    """
    generator = torch.Generator().manual_seed(0)
    for i, (shape, dtype) in enumerate(CALLS):
        parts = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(size)]
        for rank, part in enumerate(parts):
            part.flatten()[rank :: size + 1] = -0.0
            part[-1] = -0.0
        norm, residual = (torch.randn(size, generator=generator).to(parts[0].dtype) for size in (shape[1], shape))
        yield parts, (norm.float() if i % 4 == 3 else norm, 1e-6), residual


def run_rank(rank, memory, folder):
    peer_memory.CAPACITY = CAPACITY
    peers = PeerMemory(rank, memory)
    outcome = []
    for i, (parts, norm, residual) in enumerate(calls(len(memory))):
        options = norm if i % 2 else None, residual if i % 3 else None
        normed = collectives.all_reduce_triton(parts[rank], peers, *options)
        outcome.append((parts[rank].tolist(), normed.tolist()))
    (folder / f"{rank}.json").write_text(json.dumps(outcome))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_same_all_reduce_and_norm(size, monkeypatch, tmp_path):
    monkeypatch.setattr(peer_memory, "CAPACITY", CAPACITY)
    memory = [new_peer_memory(size, torch.device("cpu")).share_memory_() for _ in range(size)]
    run_ranks(run_rank, (memory, tmp_path), size)
    outcomes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    for i, (parts, norm, residual) in enumerate(calls(size)):
        want, want_normed = all_reduce_torch(parts, norm if i % 2 else None, residual if i % 3 else None)
        got, normed = map(torch.tensor, outcomes[0][i])
        tolerance = 1e-6 if parts[0].dtype == torch.float32 else 1e-2  # the interpreter truncates to bfloat16
        torch.testing.assert_close(got, want.float(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(normed, want_normed.float(), rtol=2 * tolerance, atol=2 * tolerance)
        assert all(outcomes[rank][i] == outcomes[0][i] for rank in range(size))


LOGITS_SHAPES = [(1, 6000), (5, 300), (4, 6000), (5, 300), (2, 12)] * 2


def logits():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in LOGITS_SHAPES:
        yield torch.randn((rows, columns), generator=generator).to(torch.bfloat16)


def run_all_to_all(rank, memory, folder):
    tp = parallel.TensorParallel(rank, len(memory), peers=PeerMemory(rank, memory))
    outcome = []
    for whole in logits():
        part = torch.stack(whole.chunk(tp.size, 1))[rank]
        assert tp.peers.fits_all_to_all(part)
        rows, tokens = tp.rows(len(whole)), torch.zeros(len(whole), dtype=torch.int64)
        tokens[rows] = torch.arange(1, len(whole) + 1)[rows] * 100_000
        outcome.append((tp.all_to_all(part).tolist(), tp.all_gather_rows(tokens).tolist()))
    (folder / f"{rank}.json").write_text(json.dumps(outcome))


def test_every_rank_gets_all_columns_of_its_rows_and_all_tokens(tmp_path):
    size = 3
    memory = [new_peer_memory(size, torch.device("cpu")).share_memory_() for _ in range(size)]
    run_ranks(run_all_to_all, (memory, tmp_path), size)
    for rank in range(size):
        for whole, (got, tokens) in zip(logits(), json.loads((tmp_path / f"{rank}.json").read_text()), strict=True):
            want = all_to_all_torch(list(whole.chunk(size, 1)))[rank]
            assert torch.equal(torch.tensor(got).view(-1, whole.shape[1]), want.float())
            assert tokens == [100_000 * i for i in range(1, len(whole) + 1)]


def run_late(rank, memory):
    tp = parallel.TensorParallel(rank, len(memory), peers=PeerMemory(rank, memory))
    receive = collectives._receive

    def receive_late(*arguments):
        data = receive(*arguments)
        time.sleep(1)  # the words are sent, but the previous region is not reset yet
        return data

    for _ in range(4):
        for late in (False, False, rank == 0):
            collectives._receive = receive_late if late else receive
            tp.all_reduce(torch.ones(1, 300))
        collectives._receive = receive
        tp.all_to_all(torch.ones(1, 600))
        assert tp.all_gather_rows(torch.full((1,), 7 * (rank == 0))).item() == 7


def test_a_rank_without_rows_waits_for_a_late_rank():
    memory = [new_peer_memory(2, torch.device("cpu")).share_memory_() for _ in range(2)]
    run_ranks(run_late, (memory,), 2)


def test_small_contiguous_tensors_of_whole_words_fit():
    two, three = (PeerMemory(0, [new_peer_memory(size, torch.device("cpu"))] * size) for size in (2, 3))
    few, many = torch.zeros(256, 4096, dtype=torch.bfloat16), torch.zeros(1024, 4096, dtype=torch.bfloat16)
    assert two.fits_all_reduce(few) and three.fits_all_reduce(few)
    assert two.fits_all_reduce(many) and not three.fits_all_reduce(many)
    assert not two.fits_all_reduce(torch.zeros(4, 3, dtype=torch.bfloat16))  # a token has half a word
    assert not two.fits_all_reduce(torch.zeros(8, 8)[:, :4])
    assert not two.fits_all_reduce(torch.zeros(8, 8, dtype=torch.int64))


def test_stop_works_whether_or_not_memory_was_made_in_inference_mode():
    with torch.inference_mode():
        peers = PeerMemory(0, [new_peer_memory(2, torch.device("cpu"))] * 2)
    peers.stop()
    assert peers.device_stop.item() == 1


def test_a_stopped_rank_neither_waits_for_others_nor_writes_to_them():
    """Another rank's memory may be gone: a write would break this process's GPU context."""
    memory = [new_peer_memory(2, torch.device("cpu")) for _ in range(2)]
    peers = PeerMemory(0, memory)
    peers.device_stop.fill_(1)
    x = torch.ones(3, 300, dtype=torch.bfloat16)
    collectives.all_reduce_triton(x, peers, (x[0].clone(), 1e-6))
    assert torch.equal(x, torch.ones_like(x))  # without the other rank's part
    collectives.all_to_all_triton(x, peers)
    assert torch.equal(memory[1], new_peer_memory(2, torch.device("cpu")))


@pytest.mark.parametrize("by_host", [True, False])
def test_a_waiting_rank_can_be_stopped(by_host, monkeypatch):
    monkeypatch.setattr(overlapped_all_reduce, "POLL_INTERVAL", 256 if by_host else 1 << 30)
    peers = PeerMemory(0, [new_peer_memory(2, torch.device("cpu")) for _ in range(2)])
    waiting = threading.Thread(target=lambda: collectives.all_reduce_triton(torch.ones(3, 300), peers), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    (peers.host_stop if by_host else peers.device_stop).fill_(1)
    waiting.join(60)
    assert not waiting.is_alive()
    assert peers.device_stop.item() == 1  # later all-reduces need not poll the host


def test_memory_that_cannot_be_shared_leaves_collectives_to_nccl(monkeypatch):
    def refuse(memory):
        raise RuntimeError("this allocator does not share")

    def gather(tp, value, device):
        gathered.append(value)
        return [value, [value[0], ["a handle"]]]

    gathered = []
    monkeypatch.setattr(parallel, "new_peer_memory", lambda *_: torch.zeros(1))
    monkeypatch.setattr(parallel.cuda_ipc, "share", refuse)
    monkeypatch.setattr(parallel.TensorParallel, "all_gather_json", gather)
    monkeypatch.setattr(parallel.TensorParallel, "all_reduce_min", lambda tp, value, device: value)
    tp = parallel.TensorParallel(0, 2)
    assert tp.with_peers(torch.device("cuda")) is tp
    assert gathered[0][1] is None  # the other ranks learn of it and do not wait


@pytest.mark.parametrize("reachable", [("a", "b"), ("a",)])
def test_mapped_memory_is_unmapped_unless_all_ranks_succeed(monkeypatch, reachable):
    class Mapping:
        def __init__(self, handle):
            if handle not in reachable:
                raise RuntimeError("out of reach")
            opened.append(handle)

        def close(self):
            opened.pop()

    opened = []
    monkeypatch.setattr(parallel, "new_peer_memory", lambda *_: torch.zeros(1))
    monkeypatch.setattr(parallel.cuda_ipc, "share", lambda memory: "own")
    monkeypatch.setattr(parallel.cuda_ipc, "Mapping", Mapping)
    gather = lambda tp, value, device: [value, [value[0], "a"], [value[0], "b"]]  # noqa: E731
    monkeypatch.setattr(parallel.TensorParallel, "all_gather_json", gather)
    monkeypatch.setattr(parallel.TensorParallel, "all_reduce_min", lambda tp, value, device: 0)  # another rank failed
    tp = parallel.TensorParallel(0, 3)
    assert tp.with_peers(torch.device("cuda")) is tp
    assert opened == []

    def abort(tp, value, device):
        if opened:
            raise RuntimeError("a rank was lost")
        return value

    monkeypatch.setattr(parallel.TensorParallel, "all_reduce_min", abort)
    with pytest.raises(RuntimeError, match="was lost"):
        tp.with_peers(torch.device("cuda"))
    assert opened == []
    monkeypatch.setattr(parallel.TensorParallel, "all_reduce_min", lambda tp, value, device: value)
    monkeypatch.setattr(parallel, "PeerMemory", lambda rank, memory: len(memory))
    used = tp.with_peers(torch.device("cuda")).peers
    assert (used, opened) == ((3, ["a", "b"]) if len(reachable) == 2 else (None, []))
