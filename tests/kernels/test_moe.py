"""Mixtures of experts: the reference equals transformers, and each kernel equals its reference."""

import pytest
import torch

from nanovllm.ops.moe import alignment, grouped_gemm
from nanovllm.ops.moe.alignment import align_triton, max_tiles
from nanovllm.ops.moe.combine import combine_triton
from nanovllm.ops.moe.dispatch import (
    FP8_TILINGS,
    MAX_FEW_PAIRS,
    REGIMES,
    TILINGS,
    ExpertKernel,
    GroupedGemmConfig,
    Tiling,
    expert_compile_sizes,
    expert_regime_of,
    tiling_of,
)
from nanovllm.ops.moe.expert_gemv import ExpertGemvConfig, down_gemv_triton, fits_expert_gemv, gate_up_gemv_triton
from nanovllm.ops.moe.experts import (
    check_expert_sizes,
    default_tiling,
    experts,
    experts_gemm_triton,
    experts_gemv_triton,
    is_expert_gemv,
)
from nanovllm.ops.moe.grouped_gemm import grouped_down_triton, grouped_gate_up_triton
from nanovllm.ops.moe.reference import combine_torch, experts_torch, route_torch, sort_pairs_torch
from nanovllm.ops.moe.router import route, route_triton
from nanovllm.ops.norm_rope.reference import rms_norm_torch
from nanovllm.ops.triton_utils import HAVE_TRITON

needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


class Layer:
    """Random operands of `experts` in float32."""

    def __init__(self, num_experts, top_k, i, h, tokens, device, used=None):
        generator = torch.Generator().manual_seed(tokens)

        def randn(*shape):
            return torch.randn(shape, generator=generator).to(device)

        self.x, self.residual, self.shared, self.gate = (randn(tokens, n) for n in (h, h, h, 1))
        self.gate_up, self.down = randn(num_experts, 2 * i, h) / h**0.5, randn(num_experts, h, i) / i**0.5
        self.norm = randn(h)
        self.logits = randn(tokens, num_experts)
        self.logits[:, used or num_experts :] = -10  # experts without tokens
        self.ids, self.weights = route_torch(self.logits, top_k, True)
        self.top_k = top_k

    @property
    def operands(self):
        return self.x, self.gate_up, self.down, self.ids, self.weights


# [experts, top k, I, H, tokens, experts with tokens]
SHAPES = [(4, 1, 16, 64, 1, 4), (16, 4, 48, 72, 5, 16), (5, 3, 96, 40, 37, 3), (12, 2, 48, 64, 130, 7)]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k", "tokens"), [(4, 1, 1), (7, 3, 40), (16, 4, 300)])
def test_the_reference_equals_transformers_qwen3_moe(num_experts, top_k, tokens, renormalize):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=24,
        moe_intermediate_size=16,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=renormalize,
    )
    block = Qwen3MoeSparseMoeBlock(config)
    layer = Layer(num_experts, top_k, 16, 24, tokens, "cpu")
    with torch.no_grad():
        block.gate.weight.copy_(torch.randn(num_experts, 24, generator=torch.Generator().manual_seed(1)))
        block.experts.gate_up_proj.copy_(layer.gate_up)
        block.experts.down_proj.copy_(layer.down)
        want = block(layer.x[None])[0]
        _, want_weights, want_ids = block.gate(layer.x)
        ids, weights = route(layer.x @ block.gate.weight.t(), top_k, renormalize)
    assert torch.equal(ids.long(), want_ids)
    torch.testing.assert_close(weights, want_weights)
    torch.testing.assert_close(experts(layer.x, layer.gate_up, layer.down, ids, weights), want, atol=1e-5, rtol=1e-5)


def test_the_reference_equals_transformers_qwen3_5_moe_with_its_shared_expert():
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

    config = Qwen3_5MoeTextConfig(
        hidden_size=24,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    block = Qwen3_5MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, residual = torch.randn(2, 9, 24)
    with torch.no_grad():
        want = residual + block(x[None])[0]
        ids, weights = route(x @ block.gate.weight.t(), 2, True)
        shared = block.shared_expert(x), block.shared_expert_gate(x)
        experts(x, block.experts.gate_up_proj, block.experts.down_proj, ids, weights, residual=residual, shared=shared)
    torch.testing.assert_close(residual, want, atol=1e-5, rtol=1e-5)


def test_the_reference_of_16_bits_is_near_that_of_32_bits():
    layer = Layer(6, 2, 32, 64, 20, "cpu")
    want = experts_torch(*layer.operands)
    x, gate_up, down, weights = (t.bfloat16() for t in (layer.x, layer.gate_up, layer.down, layer.weights))
    got = experts_torch(x, gate_up, down, layer.ids, weights)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() / want.norm() < 0.02


@needs_triton
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 4, 4), (3, 60, 3), (2, 512, 16)])
def test_route_equals_the_reference(device, tokens, num_experts, top_k, dtype, renormalize):
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, num_experts + 3, generator=generator).to(device, dtype)[:, :num_experts] * 3
    ids, weights = route_triton(logits, top_k, renormalize)
    want_ids, want_weights = route_torch(logits, top_k, renormalize)
    assert ids.dtype == torch.int32 and torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights)


@needs_triton
def test_route_prefers_the_lower_id_where_logits_are_equal(device):
    logits = torch.tensor([[1.0, 2, 1, 2, 0, 2]], device=device)
    for run in (route_triton, route_torch):
        assert run(logits, 4, True)[0].tolist() == [[1, 3, 5, 0]]


@needs_triton
def test_route_yields_different_valid_ids_whatever_the_logits_are(device):
    logits = torch.zeros(4, 5, device=device)
    logits[0], logits[1], logits[2, :2], logits[3, 1:] = float("nan"), float("-inf"), float("inf"), float("-inf")
    for row in route_triton(logits, 4, True)[0].tolist():
        assert len({*row}) == 4 and {*row} <= {0, 1, 2, 3, 4}


@needs_triton
@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("block_m", [1, 16])
@pytest.mark.parametrize(
    ("num_experts", "tokens", "top_k", "used", "blocks"),
    [(4, 1, 1, 4, 9), (16, 300, 4, 9, 3), (5, 40, 3, 1, 9), (7, 31, 2, 7, 9), (512, 9, 16, 512, 9)],
)
def test_align_sorts_pairs_by_expert_in_tiles_of_one_expert(
    device, monkeypatch, num_experts, tokens, top_k, used, blocks, block_m, by_blocks
):
    monkeypatch.setattr(alignment, "MAX_BLOCKS", blocks)
    if by_blocks:
        monkeypatch.setattr(alignment, "MAX_FEW_PAIRS", 0)
    if num_experts < 512:
        monkeypatch.setattr(alignment, "ONE_HOT", 128)  # several blocks of pairs
    ids = torch.randint(used, (tokens, top_k), generator=torch.Generator().manual_seed(0)).int().to(device)
    tiles = align_triton(ids, num_experts, block_m)
    order, counts = sort_pairs_torch(ids, num_experts)
    assert sorted(tiles.order.tolist()) == list(range(tokens * top_k))
    assert torch.equal(ids.flatten()[tiles.order.long()], ids.flatten()[order])  # the order in an expert is free
    want, start = [], 0
    for expert, count in enumerate(counts):
        want += [[expert, first, start + count] for first in range(start, start + count, block_m)]
        start += count
    assert tiles.num_tiles.tolist() == [len(want)]
    assert len(want) <= tiles.tiles.shape[1] == max_tiles(tokens * top_k, num_experts, block_m)
    assert tiles.tiles[:, : len(want)].t().tolist() == want


def test_the_bound_of_tiles_is_reached_by_the_worst_routing():
    """Every expert that has pairs has one more than whole tiles."""
    assert max_tiles(3, 8, 16) == 3
    assert max_tiles(8 + 3 * 16, 8, 16) == 11
    assert max_tiles(8 + 3 * 16 + 15, 8, 16) == 11


@needs_triton
@pytest.mark.parametrize("config", [None, (4, 4)])  # one row per program, and several
@pytest.mark.parametrize("shape", [SHAPES[0], (16, 4, 24, 40, 3, 16)])
def test_gemv_experts_equal_the_reference(device, shape, config):
    layer = Layer(*shape[:5], device, shape[5])
    config = config and ExpertGemvConfig(*config)
    hidden = gate_up_gemv_triton(layer.x, layer.gate_up, layer.ids, config=config)
    got = down_gemv_triton(hidden, layer.down, layer.ids, layer.weights, config=config)
    torch.testing.assert_close(got, experts_torch(*layer.operands), **CLOSE)


@needs_triton
@pytest.mark.parametrize("run", [experts_gemv_triton, experts_gemm_triton])
@pytest.mark.parametrize("gate_columns", [0, 1, 3])  # of the tensor whose last column is the gate
def test_experts_add_the_shared_expert_and_the_residual(device, run, gate_columns):
    layer = Layer(6, 2, 24, 40, 3, device)
    gate = torch.cat([layer.residual[:, : gate_columns - 1], layer.gate], 1)[:, -1:] if gate_columns else None
    shared = layer.shared, gate
    for residual in (None, layer.residual):
        total, want = (None, None) if residual is None else (residual.clone(), residual.clone())
        want = experts_torch(*layer.operands, want, shared)
        got = run(*layer.operands, residual=total, shared=shared)
        assert total is None or got is total
        torch.testing.assert_close(got, want, **CLOSE)


@needs_triton
def test_gemv_experts_normalize_x(device):
    layer = Layer(6, 2, 24, 40, 3, device)
    x = rms_norm_torch(layer.x.clone(), layer.norm, 1e-6)
    want = experts_torch(x, *layer.operands[1:])
    torch.testing.assert_close(experts_gemv_triton(*layer.operands, norm=(layer.norm, 1e-6)), want, **CLOSE)
    torch.testing.assert_close(experts(*layer.operands, norm=(layer.norm, 1e-6)), want, **CLOSE)


@needs_triton
@pytest.mark.parametrize(
    ("block_m", "config"),
    [(16, (64, 64, 4, 2, 1)), (32, (32, 32, 4, 2, 9)), (64, (32, 16, 4, 2, 1)), (128, (64, 32, 4, 2, 1, True))],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_gemm_equals_the_reference(device, monkeypatch, shape, block_m, config):
    monkeypatch.setattr(grouped_gemm, "sm_count", lambda device: 3)  # fewer programs than tiles
    layer = Layer(*shape[:5], device, shape[5])
    config = GroupedGemmConfig(*config)
    tiles = align_triton(layer.ids, len(layer.down), block_m)
    hidden = grouped_gate_up_triton(layer.x, layer.gate_up, tiles, layer.top_k, config)
    got = combine_triton(grouped_down_triton(hidden, layer.down, tiles, layer.weights, config))
    torch.testing.assert_close(got, experts_torch(*layer.operands), **CLOSE)


@needs_triton
def test_experts_read_tokens_with_a_stride(device):
    tiling = Tiling(0, 16, GroupedGemmConfig(32, 32, 4, 2, 9), GroupedGemmConfig(32, 32, 4, 2, 9))
    for run, tokens in ((experts_gemv_triton, 3), (lambda *args: experts_gemm_triton(*args, tiling=tiling), 20)):
        layer = Layer(6, 2, 24, 40, tokens, device)
        x = torch.cat([layer.x, layer.x + 1], dim=1)[:, :40]
        torch.testing.assert_close(run(x, *layer.operands[1:]), experts_torch(*layer.operands), **CLOSE)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_equals_the_reference(device, dtype):
    generator = torch.Generator().manual_seed(0)
    pairs, output, residual = (
        torch.randn(s, generator=generator).to(device, dtype) for s in ((5, 3, 100), (5, 100), (5, 100))
    )
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 4e-2}
    for shared in (None, (output, None), (output, output[:, :1].contiguous())):
        torch.testing.assert_close(combine_triton(pairs, None, shared), combine_torch(pairs, None, shared), **tolerance)
        want = combine_torch(pairs, residual.clone(), shared)
        torch.testing.assert_close(combine_triton(pairs, residual.clone(), shared), want, **tolerance)


def test_experts_of_no_tokens_give_an_empty_result(device):
    layer = Layer(4, 2, 16, 64, 0, device)
    assert experts(*layer.operands).shape == (0, 64)
    assert experts(*layer.operands, residual=layer.residual) is layer.residual


@needs_triton
def test_the_number_of_tokens_chooses_the_kernels(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    gemv_tokens = next(int(regime.max_tokens) for regime in REGIMES if regime.kernel is ExpertKernel.GEMV)
    down = torch.empty(8, 64, 48, device="meta")
    for tokens in (1, gemv_tokens, gemv_tokens + 1):
        x = torch.zeros(tokens, 64)
        assert not is_expert_gemv(x, down, 2)  # a CPU
        assert is_expert_gemv(x.as_subclass(OnGpu), down, 2) == (tokens <= gemv_tokens)
    assert fits_expert_gemv(2048, 768, 8) and fits_expert_gemv(4096, 14336, 2)
    assert not fits_expert_gemv(2048, 20000, 8)  # too many weights for the registers of a program
    assert not is_expert_gemv(torch.zeros(1, 64).as_subclass(OnGpu), torch.empty(8, 64, 1 << 16, device="meta"), 2)


def test_tilings_cover_all_sizes_and_need_no_more_shared_memory_in_float32():
    assert tiling_of(1, 512) is TILINGS[0] and tiling_of(1 << 20, 8) is TILINGS[-1]
    assert [*TILINGS] == sorted(TILINGS)
    for tiling in TILINGS:
        assert all(config.block_n >= 64 or tiling.block_m >= 64 for config in tiling[2:])  # rows for tensor cores
        assert tiling.block_m >= 128 or not (tiling.gate_up.halve or tiling.down.halve)
    halves, whole = (default_tiling(torch.zeros(3, 64, dtype=d), 8, 2) for d in (torch.float32, torch.bfloat16))
    assert 2 * halves.gate_up.block_k == whole.gate_up.block_k and 2 * halves.down.block_k == whole.down.block_k


@pytest.mark.parametrize("tilings", [TILINGS, FP8_TILINGS], ids=["plain", "fp8"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (8, 2), (512, 10), (5, 1), (60, 4), (4, 4)])
def test_every_number_of_tokens_runs_the_kernels_of_a_listed_size(num_experts, top_k, tilings):
    def kernels(tokens):
        pairs = tokens * top_k
        return expert_regime_of(tokens), tiling_of(pairs, num_experts, tilings), pairs <= MAX_FEW_PAIRS

    sizes = expert_compile_sizes(num_experts, top_k, 20_000, tilings)
    listed = {kernels(size) for size in [1, *sizes]}
    assert {kernels(tokens) for tokens in range(1, 20_001)} <= listed
    assert expert_compile_sizes(num_experts, top_k, 100, tilings) == [size for size in sizes if size <= 100]


def test_experts_whose_rows_a_gpu_cannot_read_are_refused(monkeypatch):
    check_expert_sizes(2044, 100, torch.bfloat16)
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    check_expert_sizes(2048, 96, torch.bfloat16)
    check_expert_sizes(2048, 100, torch.float32)
    for h, i in ((2048, 100), (2044, 96)):
        with pytest.raises(ValueError, match=f"hidden size {h} and inner size {i} .* multiples of 16 bytes, 8 values"):
            check_expert_sizes(h, i, torch.bfloat16)
