from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanovllm.ops.dispatch import (
    MAX_GEMV_TOKENS,
    TABLE,
    Adder,
    Fp8Kernel,
    Kernel,
    Regime,
    compile_sizes,
    kernel_of,
    mixed_capture_sizes,
    regime_of,
)
from nanovllm.ops.linear import gemm
from nanovllm.ops.linear.gemm import GemmConfig, gemm_triton
from nanovllm.ops.linear.gemv import GemvConfig, gemv_triton
from nanovllm.ops.linear.linear import choose_adder, linear, linear_add, wants_zero_bias
from nanovllm.ops.linear.reference import linear_torch
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.ops.triton_utils import HAVE_TRITON, tl


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("tokens", "size", "k", "config"), [(1, 33, 48, None), (4, 20, 300, (4, 4)), (3, 5, 64, (1, 2))]
)
def test_gemv_equals_the_reference(device, tokens, size, k, config, biased, gated):
    """Each combination of norm, bias, activation and residual equals the reference."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    x, weight = randn(tokens, k), randn(size * (2 if gated else 1), k)
    bias, residual = (randn(len(weight)) if biased else None), randn(tokens, size)
    config = config and GemvConfig(*config)
    for norm in (None, (randn(k), 1e-6)):
        got = gemv_triton(x, weight, bias, norm, gated, config=config)
        torch.testing.assert_close(got, linear_torch(x, weight, bias, norm, gated), atol=1e-4, rtol=1e-4)
        total = residual.clone()
        assert gemv_triton(x, weight, bias, norm, gated, residual=total, config=config) is total
        want = linear_torch(x, weight, bias, norm, gated, residual)
        torch.testing.assert_close(total, want, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("tokens", "size", "k", "config"),
    [(5, 100, 2104, None), (33, 72, 264, (64, 64, 32, 4, 2, 3, 64)), (100, 200, 136, (128, 16, 64, 4, 3, 2, 128))],
)
def test_gemm_equals_the_reference(device, tokens, size, k, config, biased, gated):
    """Each combination of bias, activation, residual and splits of K equals the reference."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    padded, weight = randn(tokens, k + 8), randn(size * (2 if gated else 1), k) / k**0.5
    x, residual = padded[:, :k], randn(tokens, size)
    bias = randn(len(weight)) if biased else None
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    config = config and GemmConfig(*config)
    counters = torch.zeros(20, dtype=torch.int32, device=device)
    for options in ({}, {"counters": counters}, {"counters": counters}):
        got = gemm_triton(x, weight, bias, gated, config=config, **options)
        torch.testing.assert_close(got, linear_torch(x, weight, bias, gated=gated), **close)
        total = residual.clone()
        assert gemm_triton(x, weight, bias, gated, residual=total, config=config, **options) is total
        want = linear_torch(x, weight, bias, gated=gated, residual=residual)
        torch.testing.assert_close(total, want, **close)
        assert not counters.any()


@pytest.mark.skipif(not HAVE_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    ("size", "k", "splits", "gated"), [(128, 640, 3, False), (64, 192, 1, True), (70, 200, 2, False)]
)
def test_programs_prefetch_each_line_of_their_weights_once(monkeypatch, size, k, splits, gated):
    """They prefetch nothing else, however many columns they may prefetch."""
    prefetched = []
    monkeypatch.setattr(gemm, "launch_options", lambda device: {"PDL": True})
    monkeypatch.setattr(gemm, "wait_for_inputs", lambda PDL: None)
    record = lambda code, constraints, args, **options: prefetched.extend(args[0].handle.data.tolist())  # noqa: E731
    monkeypatch.setattr(tl, "inline_asm_elementwise", record)
    x, weight = (torch.zeros(num_rows, k, dtype=torch.float16) for num_rows in (5, size * (2 if gated else 1)))
    config = GemmConfig(16, 64, 64, 2, 2, splits, 4096)
    gemm_triton(x, weight, gated=gated, counters=torch.zeros(2, dtype=torch.int32), config=config)
    offsets = [(address - weight.data_ptr()) // 2 for address in prefetched]
    lines = {row * k + column for row in range(len(weight)) for column in range(0, k, 64)}
    assert set(offsets) == lines
    assert len(offsets) == len(lines) or size % 64  # rows past the end repeat the last one


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
def test_gemm_takes_only_operands_that_tma_can_load(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    def make(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)

    chip = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip[0])
    weight, wide = make(40, 16), make(5, 32)
    for tokens, fits in ((0, False), (4, False), (5, True), (64, True), (65, False)):
        assert gemm.is_gemm(make(tokens, 16), weight) == fits
    assert gemm.is_gemm(wide[:, 8:24], weight)
    assert not gemm.is_gemm(wide[:, 4:20], weight)  # starts at no multiple of 16 bytes
    assert not gemm.is_gemm(make(5, 20)[:, :16], weight)  # the stride is no multiple of 16 bytes
    assert not gemm.is_gemm(wide[:, ::2], weight)
    assert not gemm.is_gemm(make(5, 16), make(16, 40).t())
    assert not gemm.is_gemm(make(5, 16, 16), weight)
    assert not gemm.is_gemm(make(5, 12), make(40, 12))
    assert not gemm.is_gemm(make(5, 16), make(648)[4:644].view(40, 16))
    assert not gemm.is_gemm(make(5, 16, dtype=torch.float32), make(40, 16, dtype=torch.float32))
    assert gemm.is_gemm(make(5, 8), make(65536, 8)) and not gemm.is_gemm(make(5, 8), make(65537, 8))
    chip[0] = (12, 0)
    assert not gemm.is_gemm(make(5, 16), weight)


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    ("tokens", "on_hopper", "on_ampere", "in_float32", "on_two_ranks", "on_two_hosts"),
    [
        (1, "LINEAR", "LINEAR", "NEXT_NORM", "ALL_REDUCE_GEMV", "NEXT_NORM"),
        (4, "LINEAR", "LINEAR", "NEXT_NORM", "ALL_REDUCE_GEMV", "NEXT_NORM"),
        (5, "LINEAR", "NEXT_NORM", "NEXT_NORM", "NEXT_NORM", "NEXT_NORM"),
        (64, "LINEAR", "NEXT_NORM", "NEXT_NORM", "NEXT_NORM", "NEXT_NORM"),
        (65, *["NEXT_NORM"] * 5),
        (512, *["NEXT_NORM"] * 5),
        (513, *["LINEAR"] * 5),
        (2048, *["LINEAR"] * 5),
        (2049, "LINEAR", "LINEAR", "LINEAR", "SLICED_GEMM", "LINEAR"),
    ],
)
def test_who_adds_to_the_residual_stream_follows_from_the_number_of_tokens(
    monkeypatch, tokens, on_hopper, on_ampere, in_float32, on_two_ranks, on_two_hosts
):
    chip = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip[0])
    weight, residual = torch.zeros(40, 16, dtype=torch.bfloat16).as_subclass(OnGpu), torch.zeros(tokens, 40)
    x = torch.zeros(tokens, 16, dtype=torch.bfloat16)
    assert choose_adder(x, weight, residual, 1, None) is Adder.LINEAR  # a CPU
    x = x.as_subclass(OnGpu)
    overlapped = SimpleNamespace(fits=lambda residual: True)
    peers = SimpleNamespace(fits_all_reduce=lambda residual: True, overlapped=overlapped)
    assert choose_adder(x, weight, residual, 1, None).name == on_hopper
    assert choose_adder(x, weight, residual, 2, peers).name == on_two_ranks
    assert choose_adder(x, weight, residual, 2, None).name == on_two_hosts
    peers.overlapped = None
    assert choose_adder(x, weight, residual, 2, peers).name == (on_two_ranks if tokens < 2049 else on_two_hosts)
    assert choose_adder(x.float(), weight.float(), residual, 1, None).name == in_float32
    chip[0] = (8, 0)
    assert choose_adder(x, weight, residual, 1, None).name == on_ampere


def test_a_bias_of_zeros_is_for_wide_gemms_that_the_next_norm_adds():
    for k in (4096, 4104):
        weight = torch.zeros(40, k)
        for tokens, wants in ((1, False), (64, False), (65, True), (512, True), (513, False)):
            x = torch.zeros(tokens, k)
            assert not wants_zero_bias(x, weight)  # a CPU
            assert wants_zero_bias(x.as_subclass(OnGpu), weight) == (wants and k > 4096)


def test_the_table_s_sizes_lie_in_their_regimes_and_the_largest_is_compiled():
    for before, regime in pairwise((Regime(0, *TABLE[0][1:]), *TABLE)):
        sizes = {*regime.captured, *regime.compiled}
        assert all(before.max_tokens < size <= regime.max_tokens for size in sizes)
        assert regime.max_tokens in regime.captured or not regime.captured  # a graph for as many tokens as there may be
    assert mixed_capture_sizes(100) == [16, 32, 64, 96] and compile_sizes(100) == [1, 2, 3, 4, 16, 32, 64, 100]
    assert [regime_of(tokens) for tokens in (0, 1, 2, 4, 5, 2049)] == [TABLE[i] for i in (0, 0, 1, 1, 2, 5)]
    assert MAX_GEMV_TOKENS == 4


def test_a_gemv_is_for_one_token_or_small_weights():
    large, small = 4096 * 4096, 1024 * 2048
    assert [kernel_of(tokens, large) for tokens in (1, 2, 4, 5)] == [Kernel.GEMV, Kernel.GEMM, Kernel.GEMM, Kernel.GEMM]
    assert [kernel_of(tokens, small) for tokens in (1, 2, 4, 5)] == [Kernel.GEMV, Kernel.GEMV, Kernel.GEMV, Kernel.GEMM]
    in_fp8 = [regime_of(tokens).fp8_kernel for tokens in (1, 2, 64, 65)]
    assert in_fp8 == [Fp8Kernel.GEMV, Fp8Kernel.GEMM, Fp8Kernel.GEMM, Fp8Kernel.LIBRARY]


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_linear_does_the_same_for_few_and_many_rows(device, rows):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    x, weight, norm = (torch.randn(s, generator=generator).to(device, dtype) for s in ((rows, 64), (96, 64), (64,)))
    weight /= 8  # the products' size is about 1
    y = F.linear(rms_norm(x, norm, 1e-6), weight)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # rounded once instead of thrice
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(linear(x, weight, norm=(norm, 1e-6)), y, **close)
    torch.testing.assert_close(linear(x, weight, norm=(norm, 1e-6), gated=True), F.silu(y[:, :48]) * y[:, 48:], **close)
    residual = torch.ones(rows, 96, dtype=dtype, device=device)
    assert linear_add(x, weight, None, residual) is residual
    torch.testing.assert_close(residual, 1 + F.linear(x, weight), **close)
