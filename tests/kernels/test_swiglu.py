import pytest
import torch
import torch.nn.functional as F

from nanovllm.ops.linear import linear as products
from nanovllm.ops.linear import swiglu
from nanovllm.ops.linear.silu_mul import silu_mul_torch
from nanovllm.ops.linear.swiglu import SwigluConfig, is_swiglu, swiglu_triton
from nanovllm.ops.triton_utils import HAVE_TRITON

SMALL = SwigluConfig(32, 16, 16, 4, 2)


def operands(rows, n, k, device, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((rows, k), (2 * n, k)))
    return x.to(device, dtype), (weight * k**-0.5).to(device, dtype)


def unit(x, weight):
    return silu_mul_torch(F.linear(x.float(), weight.float()))


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 8, 8), (33, 24, 40), (300, 40, 16), (64, 16, 48)])
def test_it_is_the_gated_unit_at_odd_sizes(device, rows, n, k, monkeypatch):
    monkeypatch.setattr(swiglu, "sm_count", lambda device: 3)  # programs that share the tiles
    interpreted = device.type == "cpu"  # which multiplies the bits of bfloat16
    for dtype in (torch.float16,) if interpreted else (torch.float16, torch.bfloat16):
        x, weight = operands(rows, n, k, device, dtype)
        torch.testing.assert_close(swiglu_triton(x, weight, SMALL).float(), unit(x, weight), rtol=2e-2, atol=2e-2)


def test_products_of_other_kinds_are_not_its_own(device, monkeypatch):
    for other in ("is_gemv", "is_gemm"):  # they come first, and a GPU may take such small products
        monkeypatch.setattr(products, other, lambda *_: False)
    monkeypatch.setattr(products, "is_swiglu", lambda *_: True)
    monkeypatch.setattr(products, "swiglu_triton", lambda x, weight: "taken")
    x, weight = operands(8, 8, 8, device)
    assert products.linear(x, weight, gated=True) == "taken"
    assert products.linear(x, weight) != "taken"
    assert products.linear(x, weight, weight[:, 0], gated=True) != "taken"


def test_what_it_takes(monkeypatch):
    class OnHopper(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(swiglu, "sm_count", lambda device: 132)
    monkeypatch.setattr(swiglu, "HAVE_TRITON", True)

    def takes(rows, n, k, dtype=torch.bfloat16):
        x = torch.empty(rows, k, dtype=dtype, device="meta").as_subclass(OnHopper)
        return is_swiglu(x, torch.empty(2 * n, k, dtype=dtype, device="meta"))

    wide, weight = (torch.empty(size, 2048, dtype=torch.bfloat16, device="meta") for size in (2048, 6144))
    assert is_swiglu(wide.as_subclass(OnHopper), weight)
    assert not is_swiglu(wide.as_subclass(OnHopper)[:, :1024], weight[:, :1024].contiguous())
    assert not is_swiglu(wide.as_subclass(OnHopper), torch.empty(2048, 6144, dtype=torch.bfloat16, device="meta").t())

    assert takes(2048, 3072, 1024) and takes(512, 12288, 4096)
    assert not takes(1024, 3072, 1024)  # two waves of tiles, of which the second is short
    assert not takes(2048, 3072, 1028) and not takes(2048, 3076, 1024)  # rows that TMA does not take
    assert not takes(2048, 3072, 1024, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert not takes(2048, 3072, 1024)
