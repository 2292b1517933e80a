import pytest
import torch

from nanovllm.ops.linear import linear as linear_module
from nanovllm.ops.linear import swiglu
from nanovllm.ops.linear.reference import linear_torch
from nanovllm.ops.linear.swiglu import SwigluConfig, is_swiglu, swiglu_triton
from nanovllm.ops.triton_utils import HAVE_TRITON

SMALL = SwigluConfig(32, 16, 16, 4, 2)


def operands(tokens, n, k, device, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((tokens, k), (2 * n, k)))
    return x.to(device, dtype), (weight * k**-0.5).to(device, dtype)


def swiglu_torch(x, weight):
    return linear_torch(x.float(), weight, gated=True)


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 8, 8), (33, 24, 40), (300, 40, 16), (64, 16, 48)])
def test_swiglu_equals_the_reference_at_odd_sizes(device, tokens, n, k, monkeypatch):
    monkeypatch.setattr(swiglu, "sm_count", lambda device: 3)  # fewer programs than tiles
    interpreted = device.type == "cpu"  # the interpreter multiplies bfloat16 as integers
    for dtype in (torch.float16,) if interpreted else (torch.float16, torch.bfloat16):
        x, weight = operands(tokens, n, k, device, dtype)
        got = swiglu_triton(x, weight, SMALL).float()
        torch.testing.assert_close(got, swiglu_torch(x, weight), rtol=2e-2, atol=2e-2)


def test_linear_uses_swiglu_only_for_gated_weights_without_bias(device, monkeypatch):
    for other in ("is_gemv", "is_gemm"):  # they come first, and a GPU may take such small operands
        monkeypatch.setattr(linear_module, other, lambda *_: False)
    monkeypatch.setattr(linear_module, "is_swiglu", lambda *_: True)
    monkeypatch.setattr(linear_module, "swiglu_triton", lambda x, weight: "taken")
    x, weight = operands(8, 8, 8, device)
    assert linear_module.linear(x, weight, gated=True) == "taken"
    assert linear_module.linear(x, weight) != "taken"
    assert linear_module.linear(x, weight, weight[:, 0], gated=True) != "taken"


def test_swiglu_takes_large_aligned_operands_on_hopper(monkeypatch):
    class OnHopper(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(swiglu, "sm_count", lambda device: 132)
    monkeypatch.setattr(swiglu, "HAVE_TRITON", True)

    def takes(tokens, n, k, dtype=torch.bfloat16):
        x = torch.empty(tokens, k, dtype=dtype, device="meta").as_subclass(OnHopper)
        return is_swiglu(x, torch.empty(2 * n, k, dtype=dtype, device="meta"))

    wide, weight = (torch.empty(size, 2048, dtype=torch.bfloat16, device="meta") for size in (2048, 6144))
    assert is_swiglu(wide.as_subclass(OnHopper), weight)
    assert not is_swiglu(wide.as_subclass(OnHopper)[:, :1024], weight[:, :1024].contiguous())
    assert not is_swiglu(wide.as_subclass(OnHopper), torch.empty(2048, 6144, dtype=torch.bfloat16, device="meta").t())

    assert takes(2048, 3072, 1024) and takes(512, 12288, 4096)
    assert not takes(1024, 3072, 1024)  # two waves of tiles, the second one short
    assert not takes(2048, 3072, 1028) and not takes(2048, 3076, 1024)  # rows that TMA cannot load
    assert not takes(2048, 3072, 1024, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert not takes(2048, 3072, 1024)
