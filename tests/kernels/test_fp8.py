import pytest
import torch

from nanovllm.ops.fp8.quantize import QuantizedRows, quantize_triton
from nanovllm.ops.fp8.reference import dequantize, linear_fp8_torch, quantize_rows_torch, quantize_weight
from nanovllm.ops.fp8.scaled_gemm import ScaledGemmConfig, scaled_gemm_triton
from nanovllm.ops.linear.gemm import GemmConfig, gemm_triton
from nanovllm.ops.linear.gemv import GemvConfig, gemv_triton
from nanovllm.ops.linear.reference import silu_mul_torch
from nanovllm.ops.norm_rope.reference import rms_norm_torch
from nanovllm.ops.triton_utils import HAVE_TRITON

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")

BLOCKS, ROWS = (128, 128), (1, 1 << 30)


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
    return QuantizedRows(values, scales.t().contiguous().t())


def assert_quantized(got, want):
    torch.testing.assert_close(got.scales, want.scales, atol=0, rtol=1e-2)
    values, wanted = got.values.float(), want.values.float()
    close = (values - wanted).abs() <= wanted.abs() / 7 + 2**-8  # one step of e4m3, where a norm rounds otherwise
    if values.device.type == "cpu":  # the interpreter halves values that it should round up to a power of two
        close |= values == wanted / 2
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
    assert_quantized(quantize_triton(gate_up, gated=True), quantize_rows(silu_mul_torch(gate_up)))
    assert quantize_triton(x).scales.stride() == (1, 5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("block", [BLOCKS, ROWS])
def test_gemv_with_scales_equals_the_reference(device, block, gated):
    for tokens, n, k, config in ((1, 128, 304, (4, 4)), (3, 128 if gated else 136, 640, None)):
        layer = Operands(device, tokens, n, k, block, gated)
        config = config and GemvConfig(*config)
        for options in ({}, {"bias": layer.bias, "residual": layer.residual}, {"norm": layer.norm}):
            residual = options.get("residual")
            given = options | ({} if residual is None else {"residual": residual.clone()})
            got = gemv_triton(layer.x, layer.weight, scale=layer.scale, gated=gated, config=config, **given)
            layer.check(got, layer.x, **options)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("block", [BLOCKS, ROWS])
def test_gemm_with_scales_equals_the_reference(device, block, gated):
    counters = torch.zeros(20, dtype=torch.int32, device=device)
    for tokens, n, k in ((5, 128 if gated else 136, 304), (20, 128, 640)):
        layer = Operands(device, tokens, n, k, block, gated)
        config = GemmConfig(32, 64, 128, 4, 4, 3, 128)
        for options in ({}, {"bias": layer.bias, "residual": layer.residual}):
            given = {key: value.clone() for key, value in options.items()} | {"counters": counters, "config": config}
            got = gemm_triton(layer.x, layer.weight, scale=layer.scale, gated=gated, **given)
            layer.check(got, layer.x, **options)
    assert not counters.any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("block", [BLOCKS, ROWS])
@pytest.mark.parametrize(
    "config",
    [
        ScaledGemmConfig(16, 64, False, 4, 3, num_splits=3),
        ScaledGemmConfig(32, 128, True, 4, 3),
        ScaledGemmConfig(16, 64, True, 4, 3, rescale=True),
    ],
)
def test_scaled_gemm_equals_the_reference(device, config, block, gated):
    if device.type == "cuda":
        config = config._replace(block_m=4 * config.block_m)
    counters = torch.zeros(100, dtype=torch.int32, device=device)
    for tokens, n, k in ((5, 256, 304), (70, 128 if gated else 136, 640)):
        layer = Operands(device, tokens, n, k, block, gated)
        x = quantize_rows(layer.x)
        for options in ({}, {"bias": layer.bias, "residual": layer.residual}):
            given = {key: value.clone() for key, value in options.items()}
            given |= {"counters": counters, "config": config, "dtype": layer.dtype}
            got = scaled_gemm_triton(x, layer.weight, layer.scale, gated=gated, **given)
            layer.check(got, dequantize(*x, (1, 128), torch.float32), **options)
    assert not counters.any()
