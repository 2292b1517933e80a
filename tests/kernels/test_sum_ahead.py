"""Two ranks as processes that share memory, on a CPU: sums whose parts are sent while others are computed.

Triton's interpreter runs the kernels; memory that is moved at once stands for copy engines.
"""

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing

from nanovllm.kernels import sum_ahead
from nanovllm.kernels._triton import HAVE_TRITON
from nanovllm.kernels.rms_norm import rms_norm_torch
from nanovllm.kernels.sum_ahead import INBOX_WORDS, PARTS, SumAhead
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.utils import cuda_ipc, parallel

pytestmark = [
    pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs tests/gpu/test_tensor_parallel.py shows it"),
]
SHAPES = [(256, 64), (300, 48), (257, 64), (1000, 8)]


@pytest.fixture
def copies(monkeypatch):
    replace_copy_engines(monkeypatch.setattr)


def replace_copy_engines(setattr):
    setattr(cuda_ipc, "copy", lambda target, source, num_bytes, stream: ctypes.memmove(target, source, num_bytes))
    setattr(
        cuda_ipc,
        "write",
        lambda address, value, stream: ctypes.memmove(address, ctypes.byref(ctypes.c_int32(value)), 4),
    )
    setattr(torch.cuda, "current_stream", lambda: None)
    setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    setattr(sum_ahead, "LEAST", 256)


def ahead_of(rank, inboxes):
    ahead = SumAhead(inboxes[rank], inboxes[1 - rank].data_ptr(), torch.zeros(1, dtype=torch.int32))
    ahead.stream = SimpleNamespace(wait_stream=lambda stream: None)
    return ahead


def calls(rank):
    """What a rank multiplies, and the norm of the sum."""
    for i, (rows, size) in enumerate(SHAPES * 2):
        generator = torch.Generator().manual_seed(i)
        parts = [torch.randn(rows, size, generator=generator) for _ in range(2)]
        yield parts[rank], sum(parts), (torch.rand(size, generator=generator), 1e-6) if i % 3 else None


def run_rank(rank, inboxes, folder):
    replace_copy_engines(setattr)
    ahead = ahead_of(rank, inboxes)
    ahead.number = (1 << 31) - 4  # the count goes round meanwhile
    tp = parallel.TensorParallel(rank, 2, peers=SimpleNamespace(ahead=ahead, fits=None))
    for i, (own, want, norm) in enumerate(calls(rank)):
        x = torch.full_like(own, float("nan"))
        for rows in ahead.parts(x):
            if rank == i % 2:
                time.sleep(0.02)  # the other waits, and its next sum's parts come early
            x[rows] = own[rows]
        out = tp.all_reduce(x, norm)
        assert torch.equal(x, want) and (out is x) == (norm is None)
        if norm is not None:
            torch.testing.assert_close(out, rms_norm_torch(want, *norm))
    (folder / str(rank)).touch()


def test_both_ranks_get_the_sum_and_its_norm(tmp_path):
    inboxes = [torch.zeros(INBOX_WORDS, dtype=torch.int32).share_memory_() for _ in range(2)]
    torch.multiprocessing.spawn(run_rank, (inboxes, tmp_path), 2)
    assert all((tmp_path / str(rank)).exists() for rank in range(2))


def test_a_row_parallel_layer_sends_its_parts(copies, monkeypatch):
    """Both ranks' one after the other, which is as good as at once: neither waits before both have sent."""
    inboxes = [torch.zeros(INBOX_WORDS, dtype=torch.int32) for _ in range(2)]
    x, residual, weight, bias = torch.randn(300, 32), torch.randn(300, 64), torch.randn(64, 32), torch.randn(64)
    sent = []
    for rank in range(2):
        tp = parallel.TensorParallel(rank, 2, peers=SimpleNamespace(ahead=ahead_of(rank, inboxes)))
        layer = RowParallelLinear(32, 64, bias=True, reduce_results=False, tp=tp)
        layer.weight_loader(layer.weight, weight)
        layer.bias.copy_(bias)
        part = x[:, 16 * rank : 16 * (rank + 1)]
        sent.append((tp, layer(part, residual.clone())))
        assert tp.ahead.number == 1
    for tp, y in sent:
        torch.testing.assert_close(tp.all_reduce(y), residual + x @ weight.t() + bias, rtol=1e-4, atol=1e-4)


def test_a_rank_that_is_told_to_stop_waits_for_none(copies):
    inboxes = [torch.zeros(INBOX_WORDS, dtype=torch.int32) for _ in range(2)]
    ahead, x = ahead_of(0, inboxes), torch.ones(256, 64)
    for _ in ahead.parts(x):
        pass
    waiting = threading.Thread(target=ahead.add, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    ahead.told.fill_(1)
    waiting.join(20)
    assert not waiting.is_alive()


def test_what_fits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert SumAhead.fits(torch.empty(2048, 4096, dtype=torch.bfloat16, device="meta"))
    assert not SumAhead.fits(torch.empty(2040, 4096, dtype=torch.bfloat16, device="meta"))
    assert SumAhead.fits(torch.empty(16384, 4096, dtype=torch.bfloat16, device="meta"))
    assert not SumAhead.fits(torch.empty(16392, 4096, dtype=torch.bfloat16, device="meta"))
    assert not SumAhead.fits(torch.empty(300, 40_000, dtype=torch.bfloat16, device="meta"))
    assert not SumAhead.fits(torch.empty(4096, 8192, dtype=torch.bfloat16, device="meta")[:, :4096])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not SumAhead.fits(torch.empty(16384, 4096, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("num_rows", [256, 257, 300, 511, 16384])
def test_every_row_is_in_one_part(num_rows):
    ahead = SumAhead.__new__(SumAhead)
    ahead.number, ahead._send = 0, lambda *arguments: None
    parts = list(ahead.parts(torch.empty(num_rows, 8)))
    assert len(parts) == PARTS and all(part.stop > part.start for part in parts)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num_rows))
