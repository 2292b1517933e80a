"""Layers on several ranks: these run one after another, rank 0 last, and a fake group gives it the others' tensors."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanovllm.arithmetic import ceil_div
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from nanovllm.layers.layer import Layer
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GateUpParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Residual
from nanovllm.layers.rotary_embedding import RotaryEmbedding, rope_table
from nanovllm.layers.whole_qk_norm import WholeQKNorm
from nanovllm.ops.attention.paged_cache import KVKind
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.inputs.step_rows import StepInputs, StepRows
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.runner.forward import plan_state_rows
from nanovllm.runner.state_pool import StatePool, StateSizes
from nanovllm.utils.context import get_context
from nanovllm.weights.formats import Plain
from nanovllm.weights.parameter import make_parameter
from tests.helpers import wait_until
from tests.kernels.ranks import run_ranks


@dataclass(frozen=True)
class FakeRank(TensorParallel):
    sent: dict = field(default_factory=dict)

    def _all_tensors(self, x):
        """Store `x`. Return the tensors of all ranks on rank 0, None on the others."""
        self.sent[self.rank] = x
        return [self.sent[rank] for rank in range(self.size)] if self.rank == 0 else None

    def all_reduce(self, x, norm=None, residual=None):
        tensors = self._all_tensors(x.clone())
        if tensors:
            torch.sum(torch.stack(tensors), 0, out=x)
        if residual is not None:
            x += residual
        if norm is None:
            return x
        weight, eps = norm
        return rms_norm(x, weight, eps)

    def all_to_all(self, x):
        tensors = self._all_tensors(x)
        return torch.cat(tensors, -1)[self.rows(len(x))] if tensors else x[:0]


def ranks(size):
    sent = {}
    return [FakeRank(rank, size, sent=sent) for rank in reversed(range(size))]


def computed(normed):
    """Apply a lazy norm."""
    if normed.norm is None:
        return normed.x
    weight, eps = normed.norm
    return rms_norm(normed.x, weight, eps)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocabulary_that_ranks_do_not_divide_is_split_by_embedding_and_head(size):
    vocab, dim = 13, 6  # 2 and 4 do not divide it
    full, ids, x = torch.randn(vocab, dim), torch.tensor([0, 3, 4, 7, 8, 12]), torch.randn(5, dim)
    for tp in ranks(size):
        embedding = VocabParallelEmbedding(vocab, dim, tp=tp)
        embedding.weight.weight_loader(embedding.weight, full)
        embedded = embedding(ids)
    torch.testing.assert_close(embedded, full[ids])
    for tp in ranks(size):
        head = ParallelLMHead(vocab, dim, tp=tp)
        head.weight.weight_loader(head.weight, full)
        assert head.weight.shape[0] == ceil_div(vocab, size)
        logits = head(x)
    torch.testing.assert_close(logits, (x @ full.T)[tp.rows(len(x))])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_first_norm_all_reduces_the_embeddings_once(size):
    vocab, dim = 13, 6
    full, ids = torch.randn(vocab, dim), torch.tensor([0, 3, 4, 7, 8, 12])
    for tp in ranks(size):
        embedding = VocabParallelEmbedding(vocab, dim, tp=tp)
        embedding.weight.weight_loader(embedding.weight, full)
        norm = RMSNorm(dim, 1e-6)
        norm.weight.copy_(torch.arange(dim))
        residual = embedding.residual(ids)
        assert residual.is_pending == (size > 1)
        selected = residual[torch.tensor([5, 0])]
        normed = computed(norm(residual))
    want = rms_norm(full[ids], torch.arange(float(dim)), 1e-6)
    torch.testing.assert_close(normed, want)
    torch.testing.assert_close(residual.x, full[ids])
    torch.testing.assert_close(computed(norm(residual)), want)  # without another all-reduce
    if size == 1:
        torch.testing.assert_close(computed(norm(selected)), want[[5, 0]])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("adder", [Adder.LINEAR, Adder.NEXT_NORM])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lazy_gemm_plus_residual_is_the_sum_with_any_adder(monkeypatch, size, adder, zeros, bias):
    """Either the GEMM or the next norm adds. A GEMM without bias may get a bias of zeros."""
    monkeypatch.setattr(Plain, "choose_adder", lambda *args: adder)
    monkeypatch.setattr(Plain, "wants_zero_bias", lambda *args: zeros)
    torch.manual_seed(0)
    x, before, weight, offset = torch.randn(5, 8), torch.randn(5, 6), torch.randn(6, 8), torch.randn(6)
    norm = RMSNorm(6, 1e-6)
    norm.weight.copy_(torch.arange(6))
    for tp in ranks(size):
        row = RowParallelLinear(8, 6, bias, tp=tp)
        row.weight.weight_loader(row.weight, weight)
        if bias:
            row.bias.weight_loader(row.bias, offset)
        columns = slice(8 // size * tp.rank, 8 // size * (tp.rank + 1))
        residual = Residual(before.clone(), tp).add(row(x[:, columns]))
        assert (residual.base is not None) == (adder is Adder.NEXT_NORM)
        normed = computed(norm(residual))
    want = F.linear(x, weight, offset if bias else None) + before
    torch.testing.assert_close(residual.complete(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normed, rms_norm(want, torch.arange(6.0), 1e-6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_sharded_mlp_equals_the_whole_mlp(size, bias):
    torch.manual_seed(0)  # with some other seeds, sums cancel and leave mostly rounding errors
    hidden, inner = 6, 8
    gate, up, down = torch.randn(inner, hidden), torch.randn(inner, hidden), torch.randn(hidden, inner)
    gate_bias, up_bias, down_bias = torch.randn(inner), torch.randn(inner), torch.randn(hidden)
    x, residual = torch.randn(2, 3, hidden)
    for tp in ranks(size):
        merged = GateUpParallelLinear(hidden, inner, bias, tp=tp)
        row = RowParallelLinear(inner, hidden, bias, tp=tp)
        for i, weight in enumerate((gate, up)):
            merged.weight.weight_loader(merged.weight, weight, i)
        row.weight.weight_loader(row.weight, down)
        if bias:
            merged.bias.weight_loader(merged.bias, gate_bias, 0)
            merged.bias.weight_loader(merged.bias, up_bias, 1)
            row.bias.weight_loader(row.bias, down_bias)
        gated = merged(x)
        whole, added = row(gated).all_reduce(), Residual(residual.clone(), tp).add(row(gated)).complete()
    biases = (gate_bias, up_bias, down_bias) if bias else (None, None, None)
    expected = F.linear(F.silu(F.linear(x, gate, biases[0])) * F.linear(x, up, biases[1]), down, biases[2])
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(added, residual + expected)


@pytest.mark.parametrize(("size", "kv_heads"), [(1, 2), (2, 2), (4, 2), (4, 1), (2, 4), (8, 2)])
def test_sharded_qkv_splits_or_replicates_kv_heads(size, kv_heads):
    hidden, heads, dim = 5, 8, 3
    full = {"q": torch.randn(heads * dim, hidden), "k": torch.randn(kv_heads * dim, hidden)}
    full["v"] = -full["k"]
    x = torch.randn(2, hidden)
    q, k, v = ((x @ full[i].T).unflatten(-1, (-1, dim)) for i in "qkv")
    expected = torch.cat([q, k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)], -1)
    got = []
    for rank in range(size):
        layer = QKVParallelLinear(hidden, dim, heads, kv_heads, tp=TensorParallel(rank, size))
        for shard_id, weight in full.items():
            layer.weight.weight_loader(layer.weight, weight, shard_id)
        local = layer(x).unflatten(-1, (-1, dim))
        q, k, v = local.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], 1)
        group = layer.num_heads // layer.num_kv_heads
        got.append(torch.cat([q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)], -1))
    torch.testing.assert_close(torch.cat(got, 1), expected)


def run_standalone(rank, folder):
    """Use the layers like nano-vLLM's users: positional sizes, the process's default group, plain tensors."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    full, ids, x = torch.arange(78.0).view(13, 6), torch.tensor([12, 0, 7]), torch.arange(18.0).view(3, 6)
    embedding, head, row = VocabParallelEmbedding(13, 6), ParallelLMHead(13, 6), RowParallelLinear(6, 13)
    for layer in (embedding, head, row):
        param = layer.weight
        assert isinstance(param, torch.nn.Parameter)
        param.weight_loader(param, full)
    assert torch.equal(embedding(ids), full[ids])
    torch.testing.assert_close(head(x), (x @ full.T)[:2] if rank == 0 else (x @ full.T)[2:])
    shard = x[:, 3 * rank : 3 * (rank + 1)].contiguous()
    torch.testing.assert_close(row(shard).all_reduce(), x @ full.T)
    for dtype in (torch.float8_e4m3fn, torch.int16, torch.complex64):
        given = torch.full((2, 3), 2.0 - rank).to(dtype)
        assert torch.equal(row.tp.broadcast(given).real.float(), torch.full((2, 3), 2.0))
    assert gloo_threads()
    torch.distributed.destroy_process_group()
    # Layers still exist, but a thread of the group could abort the process at its exit.
    assert wait_until(lambda: not gloo_threads())


def gloo_threads():
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names.append((task / "comm").read_text())
    return [name for name in names if "gloo" in name]


def test_layers_work_without_an_engine_in_a_group_of_two(tmp_path):
    run_ranks(run_standalone, (str(tmp_path),), 2)


def test_head_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias=True is not supported"):
        ParallelLMHead(13, 6, bias=True)
    assert ParallelLMHead(13, 6, False).weight.shape == (13, 6)


def test_sizes_that_ranks_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide the model's num_attention_heads=8"):
        QKVParallelLinear(4, 2, 8, 4, tp=TensorParallel(0, 3))
    for size, kv_heads in ((4, 6), (6, 4)):
        with pytest.raises(ValueError, match=f"tensor_parallel_size={size} .* num_key_value_heads={kv_heads}"):
            QKVParallelLinear(4, 2, 12, kv_heads, tp=TensorParallel(0, size))
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 does not divide .* intermediate_size=6"):
        GateUpParallelLinear(4, 6, tp=TensorParallel(0, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16, "attention_factor": 1.5},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    ],
)
def test_scaled_rope_tables_equal_those_of_transformers(options):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    options = options | {"original_max_position_embeddings": 128}
    config = LlamaConfig(head_dim=64, rope_parameters=options | {"rope_theta": 5e4}, max_position_embeddings=512)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[options["rope_type"]](config, "cpu")
    angles = torch.arange(512)[:, None] * inv_freq
    expected = torch.cat([angles.cos(), angles.sin()], -1) * attention_factor
    torch.testing.assert_close(rope_table(64, 512, 5e4, options), expected, atol=2e-4, rtol=0)
    plain = rope_table(64, 512, 5e4)
    assert (plain - expected).abs().max() > 0.1
    factors = rope_table(64, 1, 5e4)[0, :32]  # ones
    torch.testing.assert_close(
        rope_table(64, 512, 5e4, {"rope_type": "frequency_factors", "factors": factors.tolist()}), plain
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rope_tables_do_not_depend_on_the_default_dtype(dtype):
    """Scripts that load other models in bfloat16 change the default."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    factors = {"rope_type": "frequency_factors", "factors": [1 + i / 7 for i in range(32)]}
    for options in (None, yarn, factors):
        want = rope_table(64, 512, 5e4, options)
        torch.set_default_dtype(dtype)
        try:
            got = rope_table(64, 512, 5e4, options)
        finally:
            torch.set_default_dtype(torch.float32)
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_tensor_of_a_wrong_shape_is_refused():
    param = make_parameter(4)
    with pytest.raises(ValueError, match=r"\[3\].*\[4\]"):
        param.weight_loader(param, torch.zeros(3))
    layer = QKVParallelLinear(4, 2, 2, 1)
    with pytest.raises(ValueError, match=r"\[8, 4\].*\[2, 4\]"):
        layer.weight.weight_loader(layer.weight, torch.zeros(8, 4), "k")


def test_attention_without_a_context_or_a_cache_raises():
    layer = Attention(2, 1, 4, RotaryEmbedding(4, 8, 1e4))
    with pytest.raises(RuntimeError, match="no forward is running"):
        get_context()
    with pytest.raises(RuntimeError, match="no KV cache"):
        layer(torch.zeros(1, 16), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(("size", "kv_heads"), [(1, 2), (2, 2), (4, 2)])
def test_norm_over_all_heads_includes_those_of_other_ranks(size, kv_heads):
    """Two of 4 ranks have the same key head."""
    heads, dim, hidden, eps = 8, 4, 6, 0.1
    x = torch.randn(5, (heads + 2 * kv_heads) * dim) * torch.arange(1, 6)[:, None]
    q, k, v = x.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    weights = torch.rand(heads * dim), torch.rand(kv_heads * dim)
    expected = torch.cat([rms_norm(q, weights[0], eps), rms_norm(k, weights[1], eps), v], 1)
    for tp in ranks(size):
        proj = QKVParallelLinear(hidden, dim, heads, kv_heads, tp=tp)
        norm = WholeQKNorm(proj, eps, tp=tp)
        targets = norm.checkpoint_tensors("self_attn.whole_qk_norm")
        for weight, target in zip(weights, targets.values(), strict=True):
            target.load(weight)
        starts = zip((0, heads * dim, (heads + kv_heads) * dim), proj.shards.values(), strict=True)
        rows = torch.cat([torch.arange(shard.size) + start + shard.start for start, shard in starts])
        out = norm(x[:, rows])
    assert list(targets) == ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    torch.testing.assert_close(out, expected[:, rows])  # of rank 0, which all other ranks have sent their part


def test_state_pool_allocates_and_binds_the_caches_of_different_layers():
    sizes = [(1, 4, torch.float32), (2, 8, torch.bfloat16)]  # KV heads, head_dim, dtype
    model = torch.nn.ModuleList(
        Attention(2, heads, dim, RotaryEmbedding(dim, 8, 1e4), dtype=dtype, window=5 * (heads - 1))
        for heads, dim, dtype in sizes
    )
    pool = StatePool(model, 16, torch.device("cpu"))
    assert pool.kv_kinds == (KVKind(1), KVKind(2, window=5)) and pool.block_bytes == 2 * 16 * (1 * 4 * 4 + 2 * 8 * 2)
    divided = pool.divide(10 * pool.block_bytes - 1, 7, num_blocks=None, caches_prefixes=True)
    assert divided == StateSizes(num_blocks=9, num_seqs=7, num_snapshots=0)
    pool.allocate(divided)
    for layer, (heads, dim, dtype) in zip(model, sizes, strict=True):
        for cache in (layer.kv.k_cache, layer.kv.v_cache):
            assert cache.shape == (9 + 1, 16, heads, dim) and cache.dtype == dtype
        assert layer.kv.window == layer.window
    assert sum(layer.kv.k_cache.nbytes + layer.kv.v_cache.nbytes for layer in model) == 10 * pool.block_bytes
    assert pool.num_bytes(divided) == 10 * pool.block_bytes
    pool.free()
    assert all(layer.kv is None for layer in model)


def test_zero_centered_norm_loads_the_weight_plus_one_and_rounds_like_transformers():
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((50, 40), (40,)))
    reference = Qwen3_5RMSNorm(40, 1e-6).bfloat16()
    reference.weight.data.copy_(weight)
    order = torch.randperm(40, generator=generator)
    for norm, dims in (
        (RMSNorm(40, 1e-6, dtype=torch.bfloat16, zero_centered=True), torch.arange(40)),
        (RMSNorm(40, 1e-6, dtype=torch.bfloat16, zero_centered=True, order=order.numpy()), order),
    ):
        norm.weight.weight_loader(norm.weight, weight)
        assert norm.weight.dtype == torch.float32
        assert torch.equal(norm(x[:, dims]), reference(x)[:, dims])


def hybrid_pool():
    """Return the pool of three recurrent layers of two sizes and one attention layer, and the layers."""
    small, large = (GatedDeltaNetConfig(1, heads, 16, 16) for heads in (1, 2))
    recurrent = [GatedDeltaNet(config, 8, 1e-6, dtype=torch.bfloat16) for config in (small, large, small)]
    model = torch.nn.ModuleList([*recurrent, Attention(2, 1, 4, RotaryEmbedding(4, 8, 1e4))])
    return StatePool(model, 16, torch.device("cpu")), recurrent


def test_state_pool_gives_every_recurrent_layer_its_slots_and_copies_slots_of_all_layers():
    pool, layers = hybrid_pool()
    assert pool.kv_kinds == (KVKind(1),) and pool.block_bytes == 2 * 16 * 4 * 4
    assert pool.slot_bytes == (1 + 2 + 1) * 4 * 256 + (48 + 64 + 48) * 4 * 2
    pool.allocate(StateSizes(2, num_seqs=4, num_snapshots=3))
    states = [layer.state for layer in layers]
    for state, (heads, channels) in zip(states, [(1, 48), (2, 64), (1, 48)], strict=True):
        assert state.recurrent.shape == (4 + 1 + 3, heads, 16, 16) and state.recurrent.dtype == torch.float32
        assert state.conv.shape == (8, 4, channels) and state.conv.dtype == torch.bfloat16
    tensors = [tensor for state in states for tensor in state]
    assert sum(tensor.nbytes for tensor in tensors) == 8 * pool.slot_bytes
    assert pool.num_bytes(StateSizes(2, num_seqs=4, num_snapshots=3)) == 3 * pool.block_bytes + 8 * pool.slot_bytes
    for index, tensor in enumerate(tensors):
        tensor.copy_((10 * index + torch.arange(8)).view(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor))
    pool.copy_slots(torch.tensor([0, 2]), torch.tensor([7, 5]))
    for index, tensor in enumerate(tensors):
        want = 10 * index + torch.tensor([0, 1, 2, 3, 4, 2, 6, 0])
        assert torch.equal(tensor.flatten(1).float(), want.float()[:, None].expand(-1, tensor[0].numel()))
    pool.free()
    assert all(layer.state is None for layer in layers) and not pool.slot_tensors


@pytest.mark.parametrize(
    ("slots", "want", "want_snapshots"),
    [
        (1000, 7, 28),  # 7 running and one scratch slot are a small part; four snapshots for each of the 7
        (16, 7, 1),  # exactly half of the budget; a fifth of the rest
        (15.9, 6, 1),
        (8, 3, 0),
        (1, 1, 0),  # one sequence must run
    ],
)
def test_slots_take_at_most_half_of_the_budget_and_snapshots_a_fifth_of_the_rest(slots, want, want_snapshots):
    pool, _ = hybrid_pool()
    budget = int(slots * pool.slot_bytes)
    for caches_prefixes in (False, True):
        num_snapshots = want_snapshots if caches_prefixes else 0
        rest = max(0, budget - (want + 1 + num_snapshots) * pool.slot_bytes)
        sizes = StateSizes(rest // pool.block_bytes, want, num_snapshots)
        assert pool.divide(budget, 7, num_blocks=None, caches_prefixes=caches_prefixes) == sizes
        assert pool.divide(budget, 7, num_blocks=5, caches_prefixes=caches_prefixes) == sizes._replace(num_blocks=5)


def test_each_class_of_recurrent_layers_gets_the_plan_that_it_asks_for():
    class Planned(GatedDeltaNet):
        @staticmethod
        def plan_prompts(cu_seqlens, num_tokens, max_prompts):
            return cu_seqlens.tolist(), num_tokens, max_prompts

    packed = torch.zeros(StepRows.size(3, 8), dtype=torch.int32)
    rows = StepRows.split(packed, 3, 8)
    rows.cu_seqlens.copy_(torch.tensor([0, 1, 6, 8]))
    ends = torch.tensor([9, 5, 2], dtype=torch.int32)
    inputs = StepInputs(torch.zeros(8), torch.zeros(8), torch.zeros(8), ends, torch.zeros(3))
    planned = plan_state_rows((GatedDeltaNet, Planned), rows, inputs, num_decode=1)
    assert planned[GatedDeltaNet].plan is None  # on a CPU
    assert planned[Planned].plan == ([0, 1, 6, 8], 8, 2)
    assert [each.starts.tolist() for each in planned.values()] == [[8, 0, 0]] * 2
    decode = plan_state_rows((Planned,), StepRows(rows.slots), inputs, num_decode=3)
    assert decode[Planned].plan is None and decode[Planned].starts is inputs.positions
    assert plan_state_rows((), rows, inputs, num_decode=1) == {}


def test_recurrent_layer_without_state_raises():
    layer = GatedDeltaNet(GatedDeltaNetConfig(1, 1, 16, 16), 8, 1e-6)
    with pytest.raises(RuntimeError, match="no forward is running"):
        layer(torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), None)


@pytest.mark.parametrize(("size", "named"), [(2, "linear_num_key_heads=1"), (4, "linear_num_key_heads=2")])
def test_ranks_that_do_not_divide_the_heads_of_linear_attention_are_named(size, named):
    config = GatedDeltaNetConfig(size // 2, 2 * size, 16, 16)
    with pytest.raises(ValueError, match=f"tensor_parallel_size={size} does not divide the model's {named}"):
        GatedDeltaNet(config, 8, 1e-6, tp=TensorParallel(0, size))


def test_hooks_of_a_layer_run():
    class Double(Layer):
        def forward(self, x):
            return 2 * x

    layer, seen = Double(), []
    assert layer(1) == 2
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(args)),
        layer.register_forward_hook(lambda module, args, result: result + 1),
    ]
    assert layer(1) == 3 and seen == [(1,)]
    for hook in hooks:
        hook.remove()
    assert layer(1) == 2
