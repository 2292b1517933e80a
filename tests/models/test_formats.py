import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.residual import Residual
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.weights.formats import Packed, Plain, WeightFormat
from nanovllm.weights.parameter import make_parameter

needs_onednn = pytest.mark.skipif(not Packed.supports(torch.zeros(1, 1)), reason="needs oneDNN")


def plain(rows, columns, is_shared=False):
    """Return a plain format, and a copy of its weight."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return Plain(nn.Parameter(weight.clone(), requires_grad=False), is_shared), weight


class MinimalFormat(WeightFormat):
    """A format with the required methods only."""

    def __init__(self, weight):
        self.weight = weight
        self.parameters = {"weight": weight}

    def matmul(self, x, bias=None):
        return F.linear(x, self.weight, bias)


@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 65, 600])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", [pytest.param("packed", marks=needs_onednn), "plain", "minimal"])
def test_formats_agree_with_plain_torch(kind, tokens, biased):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 40, generator=generator)
    bias = torch.randn(68, generator=generator) if biased else None
    residual = torch.randn(tokens, 68, generator=generator)
    norm = torch.randn(40, generator=generator)
    format, weight = plain(68, 40)
    if kind == "packed":
        format = Packed(format)
    elif kind == "minimal":
        format = MinimalFormat(weight)
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(format.linear(x, bias), expected, atol=1e-5, rtol=1e-5)
    total = residual.clone()
    assert format.linear_add(x, bias, total) is total
    torch.testing.assert_close(total, residual + expected, atol=1e-5, rtol=1e-5)
    gate, up = F.linear(rms_norm(x, norm, 1e-6), weight, bias).chunk(2, -1)
    got = format.linear(x, bias, (norm, 1e-6), gated=True)
    torch.testing.assert_close(got, F.silu(gate) * up, atol=1e-5, rtol=1e-5)
    written = torch.empty(tokens, 68)
    format.matmul_into(written, x)
    torch.testing.assert_close(written, F.linear(x, weight), atol=1e-5, rtol=1e-5)
    assert format.choose_adder(x, residual, 1, None) is Adder.LINEAR and not format.wants_zero_bias(x)


@needs_onednn
@pytest.mark.parametrize("is_shared", [False, True])
def test_packed_weight_becomes_plain_for_loading_and_packed_after_it(is_shared):
    format, weight = plain(67, 40, is_shared)
    param = format.weight
    packed = format.finish_loading()
    assert isinstance(packed, Packed) and packed.weight is param
    assert param.numel() == (67 * 40 if is_shared else 0)  # an embedding reads it
    assert packed.start_loading() is format and torch.equal(param, weight)
    param.copy_(-weight)
    torch.testing.assert_close(format.finish_loading().linear(torch.eye(40)), -weight.T)


def test_linear_layers_use_the_format_that_they_are_given():
    def allocate(rows, columns, *, dtype, weight_loader, row_alignment):
        return MinimalFormat(make_parameter(rows, columns, dtype=dtype, weight_loader=weight_loader))

    layer = RowParallelLinear(40, 68, tp=TensorParallel(), allocate_weight=allocate)
    loaded = torch.randn(68, 40, generator=torch.Generator().manual_seed(0))
    layer.checkpoint_tensors("down_proj")["down_proj.weight"].load(loaded)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    residual = Residual(torch.zeros(3, 68), TensorParallel())
    assert isinstance(layer.format, MinimalFormat)
    torch.testing.assert_close(residual.add(layer(x)).complete(), F.linear(x, loaded), atol=1e-5, rtol=1e-5)
