"""A GEMV all-reduces its result in the same launch, on a CPU: ranks are processes that share memory.

Triton's interpreter runs the kernels.
"""

import json
import threading
import time

import pytest
import torch

from nanovllm.attention import select_backend
from nanovllm.checkpoints.loader import load_weights
from nanovllm.checkpoints.model_source import open_model
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear, Shard
from nanovllm.layers.residual import Residual
from nanovllm.models.decoder import Decoder
from nanovllm.ops.attention.paged_cache import PagedKV, PagedRows
from nanovllm.ops.comm import collectives
from nanovllm.ops.comm.peer_memory import EMPTY_WORD, PeerMemory, new_peer_memory
from nanovllm.ops.comm.reference import all_reduce_torch, all_to_all_torch
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.linear import linear
from nanovllm.ops.linear.gemv import GemvConfig, gemv_triton
from nanovllm.ops.linear.reference import linear_torch
from nanovllm.ops.triton_utils import HAVE_TRITON
from nanovllm.utils.context import Context, set_context
from nanovllm.weights.formats import Packed
from tests.kernels.ranks import run_ranks
from tests.models.tiny import save_tiny

pytestmark = [
    pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs, tests/gpu/test_tensor_parallel.py tests this"),
]
# Tokens, outputs, inputs, weight rows per program, dtype. Tokens have one word, part of a unit, or several units.
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


def shared_memory(size):
    return [new_peer_memory(size, torch.device("cpu")).share_memory_() for _ in range(size)]


def calls(size):
    """Yield all ranks' x [tokens, inputs] and weights, and the bias and residual that they share."""
    generator = torch.Generator().manual_seed(0)
    for i, (m, n, k, rows, dtype) in enumerate(CALLS * 2):
        randn = lambda *shape, dtype=dtype: torch.randn(shape, generator=generator).to(getattr(torch, dtype))  # noqa: E731
        x, weights = randn(size, m, k), randn(size, n, k)
        x[-1], weights[:, ::3] = 0, -0.0  # zeros of either sign must not be mistaken for missing words
        bias, residual = randn(n), randn(m, n)
        residual[:, ::3] = -0.0
        if i == 5:
            residual[0, 4], residual[0, 5] = float("nan"), -float("inf")
        yield x, weights, bias if i % 3 else None, residual, GemvConfig(rows, 4)


def run_calls(rank, memory, folder):
    peers, receive = PeerMemory(rank, memory), collectives._receive
    outcome = []

    def receive_late(*arguments):
        data = receive(*arguments)
        time.sleep(0.05)  # the other ranks finish this all-reduce and continue
        return data

    for i, (x, weights, bias, residual, config) in enumerate(calls(peers.size)):
        collectives._receive = receive_late if i % peers.size == rank else receive
        if i % 4 == 1:
            time.sleep(0.1 * rank)
        x, weight = x[rank].clone(), weights[rank].clone()
        out = gemv_triton(x, weight, bias, residual=residual, peers=peers, config=config)
        assert out is residual
        outcome.append(out.view(torch.int16).tolist())
        if i % 3 != 1:  # other collectives use the same words in between
            same = collectives.all_reduce_triton(torch.full((2, 700 + 400 * (i % 2)), rank + 1.0), peers)
            assert same.eq(sum(range(1, peers.size + 1))).all()
        if i % 5 == 2:
            rows = collectives.rows_of_rank(rank, 2, peers.size)
            parts = [torch.full((2, 600), other + 1.0) for other in range(peers.size)]
            got = collectives.all_to_all_triton(parts[rank], peers)
            assert got.shape[0] == rows.stop - rows.start and torch.equal(got, all_to_all_torch(parts)[rank])
    assert (peers.local_words == EMPTY_WORD).all()
    (folder / f"{rank}.json").write_text(json.dumps(outcome))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_all_reduced_reference(size, tmp_path):
    run_ranks(run_calls, (shared_memory(size), tmp_path), size)
    outcomes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    for i, (x, weights, bias, residual, _) in enumerate(calls(size)):
        parts = [linear_torch(part.float(), weight) for part, weight in zip(x, weights, strict=True)]
        addend = residual.float() if bias is None else residual.float() + bias.float()
        want, _ = all_reduce_torch(parts, residual=addend)
        got = torch.tensor(outcomes[0][i], dtype=torch.int16).view(residual.dtype).float()
        # The interpreter truncates to bfloat16.
        torch.testing.assert_close(got, want, rtol=2e-2, atol=5e-2, equal_nan=True)
        assert all(outcomes[rank][i] == outcomes[0][i] for rank in range(size))


def one_gemv(peers):
    ones = torch.ones(4, 40, dtype=torch.bfloat16)
    return gemv_triton(ones, ones.repeat(10, 1), residual=torch.ones(4, 40, dtype=torch.bfloat16), peers=peers)


def test_a_stopped_rank_neither_waits_for_others_nor_writes_to_them():
    memory = shared_memory(2)
    peers = PeerMemory(0, memory)
    peers.device_stop.fill_(1)
    assert one_gemv(peers).eq(41).all()  # without the other rank's part
    assert torch.equal(memory[1], new_peer_memory(2, torch.device("cpu")))


def test_a_waiting_rank_can_be_stopped():
    peers = PeerMemory(0, shared_memory(2))
    waiting = threading.Thread(target=one_gemv, args=(peers,), daemon=True)
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()
    peers.stop()
    waiting.join(60)
    assert not waiting.is_alive()


def run_layers(rank, memory, folder):
    """Run two linear layers as in a decoder layer: the first or the norm of the second all-reduces."""
    linear.is_gemv, choose_adder = lambda x, weight: len(x) <= 4, linear.choose_adder
    tp = TensorParallel(rank, len(memory), peers=PeerMemory(rank, memory))
    generator = torch.Generator().manual_seed(1)
    row = RowParallelLinear(48, 64, bias=True, dtype=torch.bfloat16, tp=tp)
    column = ColumnParallelLinear(64, {0: Shard("up_proj", total=20, start=0, size=20)}, False, torch.bfloat16)
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
        for linear.choose_adder in (choose_adder, lambda *args, **options: Adder.NEXT_NORM):
            y = Residual(residual.clone(), tp).add(row(part))
            assert y.is_pending != (linear.choose_adder is choose_adder and rows <= 4)
            results += [column(norm(y)), y.x]
        for got, want in zip(results[:2], results[2:], strict=True):
            torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
        want = residual.float() + x.float() @ whole.float().t() + row.bias.float()
        torch.testing.assert_close(results[1].float(), want, rtol=3e-2, atol=3e-2)
        linear.choose_adder = choose_adder
        y = Residual(residual.clone(), tp).add(row(part))
        torch.testing.assert_close(norm(y.complete()) @ column.weight.t(), results[0], rtol=3e-2, atol=5e-2)
        torch.testing.assert_close(residual + row(part).all_reduce(), results[1], rtol=3e-2, atol=3e-2)
        outcome.append([result.tolist() for result in results])
    (folder / f"{rank}.json").write_text(json.dumps(outcome))


def test_layers_give_the_same_with_and_without_the_fused_all_reduce(tmp_path):
    run_ranks(run_layers, (shared_memory(2), tmp_path), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second


def test_only_small_batches_of_whole_words_fuse_the_all_reduce(monkeypatch):
    peers = PeerMemory(0, shared_memory(2))
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
    assert linear.choose_adder(x, weight, residual, 1, None) is Adder.LINEAR


def run_model(model):
    """Return the hidden states of the first and last of three tokens, and this rank's logits."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.bind(PagedKV(*torch.zeros(2, 2, 16, layer.num_kv_heads, layer.head_dim).half()))
    ids, numbers = torch.tensor([3, 1, 4]), torch.arange(3)
    backend = select_backend("torch", torch.device("cpu"), layers[0].head_dim, 16, torch.float16)
    one, ends = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    where = dict(rows=PagedRows(torch.ones(1, 1).int(), one, ends[1:]), slot_mapping=16 + numbers)
    where |= dict(backend=backend, kv_kinds=(layers[0].kv.kind,), num_decode=0, counters=one)
    context = Context(**where, cu_seqlens_q=ends, max_seqlen_q=3, max_context_len=3)
    backend.prepare(context)
    with torch.inference_mode(), set_context(context):
        hidden = model(ids, numbers)[torch.tensor([0, 2])]
        logits = model.compute_logits(hidden)
    return hidden.complete(), logits


def run_decoder(rank, memory, folder, max_tokens):
    linear.is_gemv, Packed.supports = lambda x, weight: len(x) <= max_tokens, lambda weight: False
    tp = TensorParallel(rank, len(memory), peers=PeerMemory(rank, memory))
    source = open_model(folder)
    results = []
    for group in (tp, TensorParallel()):
        model = Decoder(source.config, dtype=torch.float16, tp=group)
        load_weights(model, source.weights())
        results.append(run_model(model))
    (hidden, logits), (want_hidden, want_logits) = results
    torch.testing.assert_close(hidden, want_hidden, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(logits, want_logits[tp.rows(2)], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("max_tokens", [4, 2])
def test_some_tokens_of_a_decoder_s_output_can_be_selected(tmp_path, max_tokens):
    """The last GEMV all-reduces, or the norm after it does."""
    run_ranks(run_decoder, (shared_memory(2), save_tiny(tmp_path, "qwen2"), max_tokens), 2)
