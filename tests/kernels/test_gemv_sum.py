"""Ranks as processes that share memory: a product of few rows is summed over them in its own launch, on a CPU.

Triton's interpreter runs the kernels.
"""

import json
import threading
import time

import pytest
import torch

from nanovllm.attention import select_backend
from nanovllm.attention.base import PagedKV
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from nanovllm.layers.residual import Residual
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import load_weights
from nanovllm.ops.comm import collectives
from nanovllm.ops.linear import linear
from nanovllm.ops.linear.dispatch import Adder
from nanovllm.ops.linear.gemv import GemvConfig, gemv_triton
from nanovllm.ops.triton_utils import HAVE_TRITON
from nanovllm.utils.context import Context, set_context
from nanovllm.utils.hub import open_model
from nanovllm.weights.formats import Packed
from tests.kernels.ranks import run_ranks
from tests.models.tiny import save_tiny

pytestmark = [
    pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs tests/gpu/test_tensor_parallel.py shows it"),
]
# Rows of x, outputs, inputs, rows of a program, dtype: one word, rows of a unit in part and of several.
CALLS = [
    (1, 2, 8, 2, "bfloat16"),
    (4, 40, 24, 8, "float16"),
    (1, 2100, 16, 64, "bfloat16"),
    (2, 34, 40, 4, "float16"),
    (3, 1030, 8, 64, "float16"),
    (1, 34, 8, 2, "bfloat16"),
    (4, 1026, 8, 32, "bfloat16"),
    (2, 6, 300, 2, "float16"),
]


def new_peer_memory(size):
    return [collectives.new_peer_memory(size, torch.device("cpu")).share_memory_() for _ in range(size)]


def products(size):
    """All ranks' x [rows, inputs] and weights, the bias and residual that they have in common."""
    generator = torch.Generator().manual_seed(0)
    for i, (m, n, k, rows, dtype) in enumerate(CALLS * 2):
        draw = lambda *shape, dtype=dtype: torch.randn(shape, generator=generator).to(getattr(torch, dtype))  # noqa: E731
        x, weights = draw(size, m, k), draw(size, n, k)
        x[-1], weights[:, ::3] = 0, -0.0  # sums of nothing, of either sign, are not taken for what is not there
        bias, residual = draw(n), draw(m, n)
        residual[:, ::3] = -0.0
        if i == 5:
            residual[0, 4], residual[0, 5] = float("nan"), -float("inf")
        yield x, weights, bias if i % 3 else None, residual, GemvConfig(rows, 4)


def run_products(rank, memory, folder):
    peers, receive = collectives.PeerMemory(rank, memory), collectives._receive
    outcome = []

    def receive_late(*arguments):
        data = receive(*arguments)
        time.sleep(0.05)  # others have all of this sum, and go on
        return data

    for i, (x, weights, bias, residual, config) in enumerate(products(peers.size)):
        collectives._receive = receive_late if i % peers.size == rank else receive
        if i % 4 == 1:
            time.sleep(0.1 * rank)
        x, weight = x[rank].clone(), weights[rank].clone()
        out = gemv_triton(x, weight, bias, residual=residual, peers=peers, config=config)
        assert out is residual
        outcome.append(out.view(torch.int16).tolist())
        if i % 3 != 1:  # other sums of the same places between
            same = collectives.all_reduce_triton(torch.full((2, 700 + 400 * (i % 2)), rank + 1.0), peers)
            assert same.eq(sum(range(1, peers.size + 1))).all()
        if i % 5 == 2:
            rows = collectives.rows_of_rank(rank, 2, peers.size)
            got = collectives.all_to_all_triton(torch.full((2, 600), rank + 1.0), peers)
            assert got.shape[0] == rows.stop - rows.start and got[:, ::600].eq(torch.arange(peers.size) + 1).all()
    assert (peers.own == collectives._EMPTY).all()
    (folder / f"{rank}.json").write_text(json.dumps(outcome))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_same_product(size, tmp_path):
    run_ranks(run_products, (new_peer_memory(size), tmp_path), size)
    outcomes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    for i, (x, weights, bias, residual, _) in enumerate(products(size)):
        want = residual.float() + torch.einsum("rmk,rnk->mn", x.float(), weights.float())
        want += 0 if bias is None else bias.float()
        got = torch.tensor(outcomes[0][i], dtype=torch.int16).view(residual.dtype).float()
        torch.testing.assert_close(got, want, rtol=2e-2, atol=5e-2, equal_nan=True)  # it truncates to bfloat16
        assert all(outcomes[rank][i] == outcomes[0][i] for rank in range(size))


def one_product(peers):
    ones = torch.ones(4, 40, dtype=torch.bfloat16)
    return gemv_triton(ones, ones.repeat(10, 1), residual=torch.ones(4, 40, dtype=torch.bfloat16), peers=peers)


def test_a_rank_that_is_told_to_stop_waits_for_none_and_writes_to_none():
    memory = new_peer_memory(2)
    peers = collectives.PeerMemory(0, memory)
    peers.device_stop.fill_(1)
    assert one_product(peers).eq(41).all()  # the others' part is none
    assert torch.equal(memory[1], collectives.new_peer_memory(2, torch.device("cpu")))


def test_a_rank_that_waits_is_told_to_stop():
    peers = collectives.PeerMemory(0, new_peer_memory(2))
    waiting = threading.Thread(target=one_product, args=(peers,), daemon=True)
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()
    peers.stop()
    waiting.join(60)
    assert not waiting.is_alive()


def run_layers(rank, memory, folder):
    """Two rows of products, as in a decoder's layer; the sum is part of the first, and then the norm of the second."""
    linear.is_gemv, choose_adder = lambda x, weight: len(x) <= 4, linear.choose_adder
    tp = TensorParallel(rank, len(memory), peers=collectives.PeerMemory(rank, memory))
    generator = torch.Generator().manual_seed(1)
    row = RowParallelLinear(48, 64, bias=True, dtype=torch.bfloat16, tp=tp)
    column = ColumnParallelLinear(64, {0: Part("up_proj", 20, 0, 20)}, False, torch.bfloat16)
    norm = RMSNorm(64, 1e-6, dtype=torch.bfloat16)
    whole = torch.randn(64, 48, generator=generator).bfloat16() / 7
    row.weight_loader(row.weight, whole)
    for weight in (row.bias, norm.weight, column.weight):
        weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
    outcome = []
    for rows in (1, 4, 2, 5):
        x, residual = (torch.randn(rows, size, generator=generator).bfloat16() for size in (48, 64))
        part = x[:, rank * row.weight.shape[1] :][:, : row.weight.shape[1]].contiguous()
        results = []
        for linear.choose_adder in (choose_adder, lambda *_: Adder.NEXT_NORM):
            y = Residual(residual.clone(), tp) + row(part)
            assert y.is_partial != (linear.choose_adder is choose_adder and rows <= 4)
            results += [column(norm(y)), y.x]
        for got, want in zip(results[:2], results[2:], strict=True):
            torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
        want = residual.float() + x.float() @ whole.float().t() + row.bias.float()
        torch.testing.assert_close(results[1].float(), want, rtol=3e-2, atol=3e-2)
        linear.choose_adder = choose_adder
        y = Residual(residual.clone(), tp) + row(part)
        torch.testing.assert_close(norm(y.sum()) @ column.weight.t(), results[0], rtol=3e-2, atol=5e-2)
        torch.testing.assert_close(residual + row(part).all_reduce(), results[1], rtol=3e-2, atol=3e-2)
        outcome.append([result.tolist() for result in results])
    (folder / f"{rank}.json").write_text(json.dumps(outcome))


def test_layers_give_what_they_give_without_it(tmp_path):
    run_ranks(run_layers, (new_peer_memory(2), tmp_path), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second


def test_what_sums_within_a_product(monkeypatch):
    peers = collectives.PeerMemory(0, new_peer_memory(2))
    x, weight, residual = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((4, 8), (6, 8), (4, 6)))

    def all_reduces(x, weight, residual, peers):
        adder = linear.choose_adder(x, weight, residual, 2, peers)
        assert adder in (Adder.ALL_REDUCE_GEMV, Adder.NEXT_NORM)
        return adder is Adder.ALL_REDUCE_GEMV

    assert not all_reduces(x, weight, residual, peers)  # a CPU
    monkeypatch.setattr(linear, "is_gemv", lambda x, weight: True)
    assert all_reduces(x, weight, residual, peers) and not all_reduces(x, weight, residual, None)
    assert not all_reduces(x, weight[:5], residual[:, :5].contiguous(), peers)  # half a word
    assert not all_reduces(x.repeat(2, 1), weight, residual.repeat(2, 1), peers)
    assert linear.choose_adder(x, weight, residual, 1, None) is Adder.GEMM


def run_model(model):
    """Of the first and last of three tokens the hidden states, summed up, and this rank's logits."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.bind(PagedKV(*torch.zeros(2, 2, 16, layer.num_kv_heads, layer.head_dim).half()))
    ids, numbers = torch.tensor([3, 1, 4]), torch.arange(3)
    backend = select_backend("torch", torch.device("cpu"), layers[0].head_dim, 16, torch.float16)
    one, ends = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    where = dict(slots=one, context_lens=ends[1:], block_tables=torch.ones(1, 1).int(), slot_mapping=16 + numbers)
    where |= dict(backend=backend, kv_heads=(layers[0].num_kv_heads,), num_decode=0, counters=one)
    context = Context(**where, cu_seqlens_q=ends, max_seqlen_q=3, max_context_len=3)
    backend.prepare(context)
    with torch.inference_mode(), set_context(context):
        hidden = model(ids, numbers)[torch.tensor([0, 2])]
        logits = model.compute_logits(hidden)
    return hidden.sum(), logits


def run_decoder(rank, memory, folder, most):
    linear.is_gemv, Packed.supports = lambda x, weight: len(x) <= most, lambda weight: False
    tp = TensorParallel(rank, len(memory), peers=collectives.PeerMemory(rank, memory))
    source = open_model(folder)
    results = []
    for group in (tp, TensorParallel()):
        model = Decoder(source.config, dtype=torch.float16, tp=group)
        load_weights(model, source.weights())
        results.append(run_model(model))
    (hidden, logits), (want_hidden, want_logits) = results
    torch.testing.assert_close(hidden, want_hidden, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(logits, want_logits[tp.rows(2)], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("most", [4, 2])
def test_of_what_a_decoder_gives_some_rows_can_be_taken(tmp_path, most):
    """Summed up by the last product, or by the norm after it."""
    run_ranks(run_decoder, (new_peer_memory(2), save_tiny(tmp_path, "qwen2"), most), 2)
