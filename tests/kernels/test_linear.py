import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels.linear import can_pack, linear, pack


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 65])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_is_the_plain_one(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight, b = (torch.randn(shape, generator=generator) for shape in ((rows, 40), (67, 40), (67,)))
    if not can_pack(weight):
        pytest.skip("no oneDNN here")
    packed = pack(weight)
    torch.testing.assert_close(packed.to_dense(), weight, atol=0, rtol=0)
    b = b if bias else None
    torch.testing.assert_close(linear(x, packed, b), F.linear(x, weight, b), atol=1e-5, rtol=1e-5)
