import pytest
import torch

from nanovllm.ops.fp8.experts import expert_pairs_fp8, experts_fp8
from nanovllm.ops.fp8.linear import choose_adder_fp8, gate_up_fp8, linear_add_fp8, linear_fp8
from nanovllm.ops.fp8.quantize import LazySwiglu, QuantizedRows, quantize_triton
from nanovllm.ops.fp8.reference import (
    dequantize,
    experts_fp8_torch,
    linear_fp8_torch,
    quantize_rows_torch,
    quantize_weight,
)
from nanovllm.ops.fp8.scaled_gemm import ScaledGemmConfig, scaled_gemm_triton
from nanovllm.ops.linear.gemv import GemvConfig, gemv_triton
from nanovllm.ops.linear.reference import silu_mul_torch
from nanovllm.ops.moe import expert_gemv
from nanovllm.ops.moe.dispatch import FP8_TILINGS
from nanovllm.ops.moe.expert_gemv import ExpertGemvConfig
from nanovllm.ops.norm_rope.reference import rms_norm_torch
from nanovllm.ops.triton_utils import HAVE_TRITON

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")


LAYOUTS = [(128, 128), (1, 128), (1, 1 << 30)]  # what a scale covers


class Operands:
    """A layer with an FP8 weight, on a device with FP8 or in the interpreter."""

    def __init__(self, device, tokens, n, k, block, gated):
        # The interpreter multiplies bfloat16 as integers.
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        generator = torch.Generator().manual_seed(tokens)

        def randn(*shape):
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        num_rows = n * (2 if gated else 1)
        magnitudes = 2 ** torch.linspace(-3, 3, num_rows, device=device)[:, None]  # so that scales differ
        self.weight, self.scale = quantize_weight(randn(num_rows, k).float() * magnitudes / k**0.5, block)
        self.x, self.bias, self.residual = randn(tokens, k), randn(num_rows), randn(tokens, n)
        self.norm, self.gated = (randn(k), 1e-6), gated

    def check(self, got, x, **options):
        want = linear_fp8_torch(x, self.weight, self.scale, gated=self.gated, **options)
        tolerance = 1e-5 if self.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.float(), want.float(), atol=tolerance * want.abs().max().item(), rtol=tolerance)


def quantize_rows(x):
    """Quantize with the reference; the tokens of the scales are contiguous, as the kernel leaves them."""
    values, scales = quantize_rows_torch(x)
    return QuantizedRows(values, scales.t().contiguous().t(), x.dtype)


def assert_quantized(got, want):
    torch.testing.assert_close(got.scales, want.scales, atol=0, rtol=1e-2)
    values, wanted = got.values.float(), want.values.float()
    close = (values - wanted).abs() <= wanted.abs() / 7 + 2**-8  # one step of e4m3, where a norm rounds otherwise
    assert close.all()


@pytest.mark.parametrize("size", [256, 304, 40])
def test_quantized_rows_equal_the_reference_also_after_a_norm_or_swiglu(device, size):
    generator = torch.Generator().manual_seed(size)
    x, gate_up, weight = (torch.randn(*s, generator=generator) for s in ((5, size + 8), (3, 2 * size), (size,)))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x, gate_up, weight = (tensor.to(device, dtype) for tensor in (x, gate_up, weight))
    x = x[:, :size]
    x[2] = 0
    x[3, :128] *= 1000
    assert_quantized(quantize_triton(x), quantize_rows(x))
    assert_quantized(quantize_triton(x, (weight, 1e-6)), quantize_rows(rms_norm_torch(x, weight, 1e-6)))
    assert_quantized(quantize_triton(LazySwiglu(gate_up)), quantize_rows(silu_mul_torch(gate_up)))
    assert quantize_triton(x).scales.stride() == (1, 5)
    padded, by_token = quantize_triton(x, multiple=4), quantize_triton(x, (weight, 1e-6), by_token=True)
    assert padded.values.shape == (8, size) and padded.scales.stride() == (1, 8)
    assert_quantized(QuantizedRows(padded.values[:5], padded.scales[:5]), quantize_rows(x))
    want = quantize_rows_torch(rms_norm_torch(x, weight, 1e-6), group=size)
    assert_quantized(by_token, QuantizedRows(*want))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("block", LAYOUTS)
def test_gemv_with_scales_equals_the_reference(device, block, gated):
    rows = 128 if gated and block[0] > 1 else 136
    for tokens, n, k, config in ((1, 128, 304, (4, 4)), (3, rows, 640, None)):
        layer = Operands(device, tokens, n, k, block, gated)
        config = config and GemvConfig(*config)
        for options in ({}, {"bias": layer.bias, "residual": layer.residual}, {"norm": layer.norm}):
            residual = options.get("residual")
            given = options | ({} if residual is None else {"residual": residual.clone()})
            got = gemv_triton(layer.x, layer.weight, scale=layer.scale, gated=gated, config=config, **given)
            layer.check(got, layer.x, **options)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("block", LAYOUTS)
@pytest.mark.parametrize(
    "config",
    [
        ScaledGemmConfig(16, 64, num_warps=4, num_stages=3, num_splits=3),
        ScaledGemmConfig(32, 128, num_warps=4, num_stages=2),
    ],
)
def test_scaled_gemm_equals_the_reference(device, config, block, gated):
    if device.type == "cuda":
        config = config._replace(block_m=4 * config.block_m)
    counters = torch.zeros(100, dtype=torch.int32, device=device)
    for tokens, n, k in ((5, 256, 304), (70, 128 if gated and block[0] > 1 else 136, 640)):
        layer = Operands(device, tokens, n, k, block, gated)
        x = quantize_rows(layer.x)
        for options in ({}, {"bias": layer.bias, "residual": layer.residual}):
            given = {key: value.clone() for key, value in options.items()}
            given |= {"counters": counters, "config": config}
            got = scaled_gemm_triton(x, layer.weight, layer.scale, gated=gated, **given)
            layer.check(got, dequantize(x.values, x.scales, (1, 128), torch.float32), **options)
    assert not counters.any()


class Experts:
    """Experts with FP8 weights, and the choices of some tokens."""

    def __init__(self, device, tokens, block, inner=256, hidden=192, num_experts=4, top_k=2):
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        generator = torch.Generator().manual_seed(tokens)

        def randn(*shape):
            return torch.randn(shape, generator=generator).to(device)

        self.x, self.residual, self.shared = (randn(tokens, hidden).to(self.dtype) for _ in range(3))
        self.norm = randn(hidden).to(self.dtype), 1e-6
        self.gate_up = quantize_weight(randn(num_experts, 2 * inner, hidden) / hidden**0.5, block)
        self.down = quantize_weight(randn(num_experts, hidden, inner) / inner**0.5, block)
        self.ids = randn(tokens, num_experts).argsort(dim=1)[:, :top_k].int().contiguous()
        self.weights = randn(tokens, top_k).softmax(-1).to(self.dtype)

    def reference(self, **options):
        return experts_fp8_torch(self.x, *self.gate_up, *self.down, self.ids, self.weights, **options)


@pytest.mark.parametrize("block", LAYOUTS)
def test_expert_gemv_with_scales_equals_the_reference(device, block, monkeypatch):
    monkeypatch.setattr("nanovllm.ops.fp8.experts.is_expert_gemv", lambda *_: True)
    if device.type == "cpu":  # fewer programs take less time
        monkeypatch.setattr(expert_gemv, "default_gate_up_config", lambda itemsize: ExpertGemvConfig(8, 2))
    layer = Experts(device, 2, block)
    tolerance = 1e-4 if layer.dtype == torch.float32 else 3e-2
    fused = {"norm": layer.norm, "residual": layer.residual, "shared": (layer.shared, None)}
    for options in ({}, fused) if block == LAYOUTS[0] else (fused,):
        want = layer.reference(**{k: v.clone() if k == "residual" else v for k, v in options.items()})
        got = experts_fp8(layer.x, *layer.gate_up, *layer.down, layer.ids, layer.weights, **options)
        torch.testing.assert_close(got, want, atol=tolerance * want.abs().max().item(), rtol=tolerance)


@pytest.mark.parametrize("block", LAYOUTS)
@pytest.mark.parametrize("tiling", FP8_TILINGS, ids=lambda tiling: f"{tiling.block_m}")
def test_grouped_gemm_with_scales_is_close_to_the_reference(device, block, tiling):
    """It quantizes its inputs, so the bound is that of e4m3: three bits of the mantissa."""
    layer = Experts(device, 40, block)
    want = layer.reference(norm=layer.norm)
    options = {"norm": layer.norm, "tiling": tiling}
    pairs = expert_pairs_fp8(layer.x, layer.gate_up, layer.down, layer.ids, layer.weights, **options)
    error = (pairs.float().sum(1) - want.float()).norm() / want.float().norm()
    assert 0.002 < error < 0.06


@pytest.mark.parametrize("block", [LAYOUTS[0], LAYOUTS[2]])
def test_linear_layers_of_any_number_of_tokens_are_close_to_the_reference(device, block):
    """Activations of more than one token are quantized. On Hopper, more than 64 tokens are torch's GEMM."""
    for tokens in (1, 2, 64, 65, 130):
        layer = Operands(device, tokens, 128, 512, block, False)
        weight, bias = (layer.weight, layer.scale), layer.bias
        want = linear_fp8_torch(layer.x, *weight, bias, layer.norm).float()
        error = (linear_fp8(layer.x, *weight, bias, layer.norm).float() - want).norm() / want.norm()
        assert error < (0.05 if tokens > 1 else 0.01)
        want = linear_fp8_torch(layer.x, *weight, residual=layer.residual).float()
        assert linear_add_fp8(layer.x, *weight, None, layer.residual) is layer.residual
        error = (layer.residual.float() - want).norm() / want.norm()
        assert error < (0.05 if tokens > 1 else 0.01)


def test_a_swiglu_that_is_left_to_the_next_layer_is_computed_there(device):
    gate_up = Operands(device, 70, 256, 512, LAYOUTS[0], True)
    down = Operands(device, 70, 128, 256, LAYOUTS[0], False)
    hidden = linear_fp8_torch(gate_up.x, gate_up.weight, gate_up.scale, norm=gate_up.norm, gated=True)
    want = linear_fp8_torch(hidden.to(down.dtype), down.weight, down.scale).float()
    got = gate_up_fp8(gate_up.x, gate_up.weight, gate_up.scale, norm=gate_up.norm)
    if device.type == "cpu":
        assert isinstance(got, torch.Tensor)
        got = LazySwiglu(linear_fp8(gate_up.x, gate_up.weight, gate_up.scale, norm=gate_up.norm))
    assert len(got) == 70
    error = (linear_fp8(got, down.weight, down.scale).float() - want).norm() / want.norm()
    assert error < 0.06
    assert isinstance(got, torch.Tensor) or torch.equal(got[3:9].computed(), got.computed()[3:9])


def test_on_one_rank_the_gemm_of_fp8_weights_adds_to_the_residual_stream():
    x, weight = torch.zeros(100, 16), torch.zeros(16, 16, dtype=torch.float8_e4m3fn)
    assert choose_adder_fp8(x, weight, x, 1, None).name == "LINEAR"
    assert choose_adder_fp8(x, weight, x, 2, None).name == "NEXT_NORM"
