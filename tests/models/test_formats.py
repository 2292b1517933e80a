import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.arithmetic import ceil_div
from nanovllm.checkpoints.loader import WeightUpdate, check_shapes, dummy_weights, load_weights
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.linear import GateUpParallelLinear, LinearLayer, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Residual
from nanovllm.models.decoder import Decoder
from nanovllm.models.registry import ModelConfig
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.weights.formats import Packed, Plain, WeightFormat
from nanovllm.weights.parameter import in_blocks, make_parameter
from tests.models.tiny import tiny_model

needs_onednn = pytest.mark.skipif(not Packed.supports(torch.zeros(1, 1)), reason="needs oneDNN")


def plain(rows, columns, is_shared=False):
    """Return a plain format, and a copy of its weight."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return Plain(nn.Parameter(weight.clone(), requires_grad=False), is_shared), weight


class MinimalFormat(WeightFormat):
    """A format with the required methods only."""

    def __init__(self, weight):
        self.weight = weight

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
    def allocate(rows, columns, dtype, weight_loader):
        return MinimalFormat(make_parameter(rows, columns, dtype=dtype, weight_loader=weight_loader))

    layer = RowParallelLinear(40, 68, tp=TensorParallel(), allocate_weight=allocate)
    loaded = torch.randn(68, 40, generator=torch.Generator().manual_seed(0))
    layer.checkpoint_tensors("down_proj")["down_proj.weight"].load(loaded)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    residual = Residual(torch.zeros(3, 68), TensorParallel())
    assert isinstance(layer.format, MinimalFormat)
    torch.testing.assert_close((residual + layer(x)).sum(), F.linear(x, loaded), atol=1e-5, rtol=1e-5)


BLOCK = 16
FP8 = torch.float8_e4m3fn
SCALES = "weight_scale_inv"


def dequantised(weight, scales):
    scales = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight.float() * scales[: len(weight), : weight.shape[1]]


def quantised(weight):
    """Return 8-bit floats, and a scale for each block of 16 rows and 16 columns."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / 448  # the largest 8-bit float
    return (weight / dequantised(torch.ones_like(weight), scales)).to(FP8), scales


class BlockScaled(WeightFormat):
    """A weight [N, K] of 8-bit floats with scales [ceil(N / 16), ceil(K / 16)], as in FP8 checkpoints."""

    def __init__(self, weight, scales):
        self.weight, self.scales = weight, scales

    @classmethod
    def allocate(cls, rows, columns, dtype, weight_loader):
        weight = make_parameter(rows, columns, dtype=FP8, weight_loader=weight_loader)
        shape = ceil_div(rows, BLOCK), ceil_div(columns, BLOCK)
        return cls(weight, make_parameter(*shape, weight_loader=weight_loader, block=(BLOCK, BLOCK)))

    @property
    def parameters(self):
        return {"weight": self.weight, SCALES: self.scales}

    def matmul(self, x, bias=None):
        return F.linear(x, dequantised(self.weight, self.scales), bias)


def block_scaled_model(seed=0):
    """Return the config of a model whose layers are block-scaled, its checkpoint, and the same with plain weights.

    Heads have 16 rows. Of the other sizes, two ranks divide those that they split into blocks.
    """
    model = tiny_model("llama-bias", seed, head_dim=16, intermediate_size=96)
    config = dataclasses.replace(ModelConfig.from_hf(model.config), allocate_weight=BlockScaled.allocate)
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain_checkpoint = dict(checkpoint)
    for name, tensor in plain_checkpoint.items():
        if name.endswith("_proj.weight"):
            weight, scales = quantised(tensor)
            checkpoint[name], checkpoint[name.replace("weight", SCALES)] = weight, scales
            plain_checkpoint[name] = dequantised(weight, scales)
    return config, checkpoint, plain_checkpoint


def weights_of(model):
    """Return each linear layer's weight as its GEMM sees it."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LinearLayer)}
    columns = {name: getattr(layer, "columns", slice(0, 56)) for name, layer in layers.items()}
    eyes = {name: torch.eye(part.stop - part.start) for name, part in columns.items()}
    return {name: layer.format.matmul(eyes[name]) for name, layer in layers.items()}


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_block_scaled_weights_are_sharded_like_plain_ones(rank, size):
    tp = TensorParallel(rank, size)
    config, *_ = block_scaled_model()
    scaled = Decoder(config, tp=tp)
    plain_model = Decoder(dataclasses.replace(config, allocate_weight=Plain.allocate), tp=tp)
    for seed in range(2):
        _, checkpoint, plain_checkpoint = block_scaled_model(seed)
        check_shapes(config, {name: tuple(tensor.shape) for name, tensor in checkpoint.items()})
        update = WeightUpdate(scaled)
        for name, tensor in reversed(checkpoint.items()):  # in parts
            update.load([(name, tensor)])
        update.finish()
        load_weights(plain_model, plain_checkpoint.items())
        want = weights_of(plain_model)
        assert len(want) == 4 * config.num_layers + 1
        for name, got in weights_of(scaled).items():
            torch.testing.assert_close(got, want[name], atol=1e-5, rtol=1e-5)


def test_all_parameters_of_a_format_are_the_models_so_that_sleep_moves_them():
    model = Decoder(block_scaled_model()[0])
    params = dict(model.named_parameters())
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        name = f"layers.1.{name}"
        weight_format = model.get_submodule(name).format
        assert params[f"{name}.weight"] is weight_format.weight and params[f"{name}.{SCALES}"] is weight_format.scales


def test_dummy_weights_have_the_dtypes_of_the_format():
    model = Decoder(block_scaled_model()[0])
    dummy = dict(dummy_weights(model, 0))
    load_weights(model, dummy.items())
    assert dummy["model.layers.0.mlp.up_proj.weight"].dtype is FP8
    assert dummy[f"model.layers.0.mlp.up_proj.{SCALES}"].dtype is torch.float32


@pytest.mark.parametrize("layer", ["self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"])
def test_fault_of_a_block_scaled_tensor_is_named(layer):
    config, good, _ = block_scaled_model()
    model = Decoder(config)
    weight, scales = f"model.layers.1.{layer}.weight", f"model.layers.1.{layer}.{SCALES}"

    def refuse(match, **changed):
        changed = {{"weight": weight, "scales": scales}[kind]: tensor for kind, tensor in changed.items()}
        checkpoint = {name: tensor for name, tensor in (good | changed).items() if tensor is not None}
        with pytest.raises(ValueError, match=match):
            load_weights(model, checkpoint.items())

    nan = torch.full_like(good[weight].float(), float("nan")).to(FP8)
    refuse(f"lacks 1 tensors: {scales}", scales=None)
    refuse(rf"{scales} has shape \[1, 1\], but the model needs", scales=torch.ones(1, 1))
    refuse(rf"{scales} has dtype torch.int32, but the model needs torch.float32", scales=good[scales].int())
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e5m2):
        refuse(f"{weight} has dtype {dtype}, but the model needs {FP8}", weight=good[weight].to(dtype))
    refuse(f"{weight} has values that are NaN or infinite in {FP8}", weight=nan)
    refuse(f"{scales} has values that are NaN or infinite in torch.float32", scales=good[scales] / 0)
    load_weights(model, good.items())


def test_shards_that_split_a_block_are_refused():
    options = {"allocate_weight": BlockScaled.allocate}
    two = TensorParallel(1, 2)
    layers = [
        GateUpParallelLinear(40, 24, **options),  # up would start in a block of gate
        GateUpParallelLinear(40, 48, tp=two, **options),
        QKVParallelLinear(40, 16, 4, 1, tp=two, **options),
        QKVParallelLinear(40, 8, 1, 1, **options),
        RowParallelLinear(48, 40, tp=two, **options),
        ParallelLMHead(80, 40, tp=two, **options),
    ]
    fits = layers.pop(2)
    assert fits.checkpoint_tensors("attn.qkv_proj")[f"attn.v_proj.{SCALES}"].shape == (1, 3)
    for layer in layers:
        with pytest.raises(ValueError, match="must start and stop at multiples of 16, the block size of its format"):
            layer.checkpoint_tensors("layer")
    config = dataclasses.replace(block_scaled_model()[0], intermediate_size=80)
    with pytest.raises(ValueError, match=re.escape("the shard 0:40 of a weight's 80 rows or columns must")):
        Decoder(config, tp=TensorParallel(0, 2))
    assert in_blocks(slice(32, 56), 56, BLOCK) == slice(2, 4)  # the last block may be smaller


def test_head_may_have_a_format_of_its_own():
    loaded = torch.randn(63, 40, generator=torch.Generator().manual_seed(0))
    weight, scales = quantised(loaded)
    got = []
    for rank in range(2):
        head = ParallelLMHead(63, 40, tp=TensorParallel(rank, 2), allocate_weight=BlockScaled.allocate)
        tensors = head.checkpoint_tensors("lm_head")
        tensors["lm_head.weight"].load(weight)
        tensors[f"lm_head.{SCALES}"].load(scales)
        got.append(head.format.matmul(torch.eye(40)))
    torch.testing.assert_close(torch.cat(got, 1)[:, :63].T, dequantised(weight, scales))
    assert not got[1][:, 31].any()  # padding
