"""Other quantization schemes than FP8, in plain torch. They need no change of loader and layers.

FP4 has two values in a byte, and scales. Affine FP4 has all that other formats have: zero points, a scale for the whole
tensor, transposed tensors, and a tensor with the weight's shape.
"""

import dataclasses
import re
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from nanovllm.checkpoints.loader import WeightUpdate, check_shapes, dummy_weights, load_weights
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import GateUpParallelLinear, LinearLayer, RowParallelLinear
from nanovllm.layers.moe import Experts
from nanovllm.models.decoder import Decoder
from nanovllm.models.hf_config import read_hf_config
from nanovllm.ops.moe.experts import experts
from nanovllm.weights import quantization_config
from nanovllm.weights.formats import ExpertFormat, PlainExperts, WeightFormat
from nanovllm.weights.parameter import WHOLE, is_scale, is_valid, make_parameter
from nanovllm.weights.quantization import QuantizationScheme, StoredTensor
from tests.helpers import engine, greedy, tokens
from tests.models.fp8 import KEPT, write_scheme
from tests.models.tiny import save_tiny, separate_experts, tiny_model

GROUP = 16  # columns of a scale
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
OPTIONS = {"quant_method": "toy-fp4"}
MODELS = {
    "qwen3": {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96},
    "phi3": {"hidden_size": 64, "intermediate_size": 96},
    "qwen3-moe": {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 32},
    "qwen3.5-moe": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_value_head_dim": 16,
    },
}


def quantize(weight):
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1) / 6
    codes = ((groups / scale.clamp_min(1e-12)[..., None])[..., None] - VALUES).abs().argmin(-1).flatten(-2)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.int8), scale  # signed, so half of the bytes are negative


def dequantize(packed, scale):
    low, high = packed.int() & 15, packed.int() >> 4 & 15
    return VALUES[torch.stack([low, high], -1).flatten(-2)] * scale.repeat_interleave(GROUP, -1)


def dequantize_affine(packed, scale, zero, whole):
    return (dequantize(packed, scale) + zero.repeat_interleave(GROUP, -1)) * whole


class Fp4(WeightFormat):
    dequantize = staticmethod(dequantize)

    def __init__(self, **params):
        self.parameters = {f"weight_{name}": param for name, param in params.items()}

    def matmul(self, x, bias=None):
        return F.linear(x, self.dequantize(*self.parameters.values()).to(x.dtype), bias)


class AffineFp4(Fp4):
    dequantize = staticmethod(dequantize_affine)


class Fp4Experts(ExpertFormat):
    dequantize = staticmethod(dequantize)

    def __init__(self, gate_up, down):
        self.parameters = {f"_{name}": (gate_up[name], down[name]) for name in gate_up}

    def run(self, x, ids, weights, norm=None, residual=None, shared=None):
        operands = zip(*self.parameters.values(), strict=True)
        gate_up, down = (self.dequantize(*params).to(x.dtype) for params in operands)
        return experts(x, gate_up, down, ids, weights, norm=norm, residual=residual, shared=shared)


class AffineFp4Experts(Fp4Experts):
    dequantize = staticmethod(dequantize_affine)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp4Scheme(QuantizationScheme):
    name: ClassVar[str] = "fp4"
    layout: ClassVar[str] = "FP4 with a scale for each 16 values"
    formats: ClassVar[tuple] = (Fp4, Fp4Experts)
    ends: ClassVar[tuple] = ("_packed", "_scale")
    computes: bool = True

    def stored(self, name, shape):
        *rows, columns = shape
        scale = StoredTensor((*rows, columns // GROUP), torch.float32, is_scale=True)
        return {f"{name}_packed": StoredTensor((*rows, columns // 2), torch.int8), f"{name}_scale": scale}

    def weight_name(self, name, dtype):
        end = next((end for end in self.ends if name.endswith(end)), None)
        return None if end is None else name.removesuffix(end)

    def quantize(self, name, weight):
        packed, scale = quantize(weight)
        return {f"{name}_packed": packed, f"{name}_scale": scale}

    def dequantize(self, name, tensors):
        return dequantize(tensors[f"{name}_packed"], tensors[f"{name}_scale"])

    def has_kernels(self, device, dtype, shape):
        return self.computes and shape[-1] % GROUP == 0

    def make_weight(self, rows, columns, *, dtype, weight_loader, row_alignment):
        return self.formats[0](**self._make((rows, columns), weight_loader, row_alignment))

    def make_experts(self, sizes, *, dtype, load_gate_up, load_down):
        gate_up = self._make(sizes.gate_up_shape, load_gate_up, sizes.row_alignment)
        down = self._make(sizes.down_shape, load_down, 0)
        return self.formats[1](gate_up, down)

    def _make(self, shape, loader, row_alignment):
        *rows, columns = shape
        packed = make_parameter(*rows, columns // 2, dtype=torch.int8, weight_loader=loader, block=(1, 2))
        options = {"weight_loader": loader, "block": (1, GROUP), "is_scale": True}
        return {"packed": packed, "scale": make_parameter(*rows, columns // GROUP, dtype=torch.float32, **options)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AffineFp4Scheme(Fp4Scheme):
    """(FP4 * scale + zero) * whole: `whole` is one scale for the tensor; `packed` and `scale` are transposed."""

    layout: ClassVar[str] = "affine FP4"
    formats: ClassVar[tuple] = (AffineFp4, AffineFp4Experts)
    ends: ClassVar[tuple] = ("_packed", "_scale", "_zero", "_whole", "_shape")

    def stored(self, name, shape):
        *rows, columns = shape
        stored = {
            end: tensor._replace(shape=(*rows[:-1], tensor.shape[-1], rows[-1]))
            for end, tensor in super().stored(name, shape).items()
        }
        zero = StoredTensor((*rows, columns // GROUP), torch.float32)
        return stored | {f"{name}_zero": zero, f"{name}_whole": StoredTensor(shape[:-2], torch.float32, is_scale=True)}

    def constants(self, name, shape):
        return {f"{name}_shape": torch.tensor(shape[-2:])}

    def arrange(self, name, tensor):
        if name.endswith("_whole"):
            return tensor[..., None, None]
        return tensor if tensor.ndim < 2 or name.endswith("_zero") else tensor.transpose(-1, -2)

    def quantize(self, name, weight):
        whole = weight.float().abs().amax((-1, -2))
        weight = weight / whole[..., None, None]
        zero = weight.unflatten(-1, (-1, GROUP)).mean(-1)
        parts = super().quantize(name, weight - zero.repeat_interleave(GROUP, -1))
        parts = {end: tensor.transpose(-1, -2).contiguous() for end, tensor in parts.items()}
        return parts | {f"{name}_zero": zero, f"{name}_whole": whole}

    def dequantize(self, name, tensors):
        names = (f"{name}{end}" for end in self.ends[:-1])
        return dequantize_affine(*(self.arrange(name, tensors[name]) for name in names))

    def _make(self, shape, loader, row_alignment):
        *rows, columns = shape
        options = {"dtype": torch.float32, "weight_loader": loader}
        zero = make_parameter(*rows, columns // GROUP, block=(1, GROUP), **options)
        row_block = 1 if row_alignment else WHOLE
        whole_rows = rows[-1] if row_alignment else 1
        whole = make_parameter(
            *rows[:-1], whole_rows, 1, block=(WHOLE, WHOLE), row_block=row_block, is_scale=True, **options
        )
        return super()._make(shape, loader, row_alignment) | {"zero": zero, "whole": whole}


SCHEMES = {"fp4": Fp4Scheme, "affine": AffineFp4Scheme}


@pytest.fixture(autouse=True)
def reader(monkeypatch):
    excluded = "|".join(rf".*{end}$" for end in KEPT)
    for kind, scheme in SCHEMES.items():
        read = partial(lambda scheme, options: scheme(excluded=excluded), scheme)
        monkeypatch.setitem(quantization_config._READERS, f"toy-{kind}", read)


def quantized(weights, kind="fp4"):
    """Return a checkpoint in a kind of FP4, and the same one dequantized."""
    checkpoint, plain, scheme = {}, {}, SCHEMES[kind]()
    for name, weight in weights.items():
        is_kept = name.removesuffix(".weight").endswith((*KEPT, "in_proj_ba"))
        if is_kept or weight.ndim < 2 or not name.endswith((".weight", "_proj")):
            checkpoint[name] = plain[name] = weight
        else:
            parts = scheme.quantize(name, weight)
            checkpoint |= parts | scheme.constants(name, weight.shape)
            plain[name] = scheme.dequantize(name, parts)
    return checkpoint, plain


def model_in_fp4(name, kind="fp4", seed=0, fused=False, **changes):
    """Return a model's config, its checkpoint in a kind of FP4, and the same one dequantized."""
    model = tiny_model(name, seed, **MODELS[name])
    model.config.quantization_config = {"quant_method": f"toy-{kind}"}
    config = read_hf_config(model.config)
    config = dataclasses.replace(config, quantization=dataclasses.replace(config.quantization, **changes))
    return config, *quantized(model.state_dict() if fused else separate_experts(model.state_dict()), kind)


def weights_of(model):
    """Return each linear layer's weight and the experts' weights. Gates of recurrent layers follow their projection."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LinearLayer):
            columns = getattr(layer, "columns", slice(0, model.config.hidden_size))
            weights[name] = layer.format.matmul(torch.eye(columns.stop - columns.start)).T
        elif isinstance(layer, Experts):
            params_of = zip(*layer.format.parameters.values(), strict=True)
            for kind, params in zip(("gate_up", "down"), params_of, strict=True):
                weights[f"{name}.{kind}"] = params[0] if len(params) == 1 else layer.format.dequantize(*params)
    for name in [name for name in weights if name.endswith(".gates_proj")]:
        rest = name.replace("gates_proj", "in_proj")
        weights[rest] = torch.cat([weights[rest], weights.pop(name)])
    return weights


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("computes", [True, False], ids=["kernels", "dequantized"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", SCHEMES)
def test_packed_weights_are_loaded_and_sharded_like_plain_ones(kind, name, rank, size, computes, fused):
    tp = TensorParallel(rank, size)
    config, checkpoint, plain_checkpoint = model_in_fp4(name, kind, fused=fused, computes=computes)
    model, plain_model = Decoder(config, tp=tp), Decoder(dataclasses.replace(config, quantization=None), tp=tp)
    assert any(isinstance(module.format, Fp4) for module in model.modules() if hasattr(module, "format")) == computes
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in checkpoint.items()})
    update = WeightUpdate(model)
    for pair in reversed(checkpoint.items()):  # in parts
        update.load([pair])
    update.finish()
    load_weights(plain_model, plain_checkpoint.items())
    want, got = weights_of(plain_model), weights_of(model)
    assert want.keys() == got.keys() and all(torch.allclose(got[layer], want[layer], atol=1e-6) for layer in want)


@pytest.mark.parametrize("computes", [True, False], ids=["kernels", "dequantized"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_dummy_weights_are_stored_as_the_scheme_says(kind, computes):
    config, checkpoint, _ = model_in_fp4("qwen3-moe", kind, computes=computes)
    model = Decoder(config)
    dummy = dict(dummy_weights(model, 0))
    stored = {name: tensor.shape for name, tensor in checkpoint.items() if not name.endswith("_shape")}
    assert {name: tensor.shape for name, tensor in dummy.items()} == stored
    load_weights(model, dummy.items())


@pytest.mark.parametrize("computes", [True, False], ids=["kernels", "dequantized"])
@pytest.mark.parametrize("layer", ["self_attn.k_proj", "mlp.experts.3.up_proj"])
def test_fault_of_a_zero_point_a_whole_scale_a_transposed_tensor_or_a_constant_is_named(layer, computes):
    config, good, _ = model_in_fp4("qwen3-moe", "affine", computes=computes)
    model, weight = Decoder(config), f"model.layers.1.{layer}.weight"

    def refuse(match, **changed):
        changed = {f"{weight}_{end}": tensor for end, tensor in changed.items()}
        checkpoint = {name: tensor for name, tensor in (good | changed).items() if tensor is not None}
        with pytest.raises(ValueError, match=match):
            load_weights(model, checkpoint.items())

    packed = good[f"{weight}_packed"]
    needed = re.escape(f"the model needs {list(packed.shape)}")  # as the checkpoint has it, not transposed
    refuse(rf"the tensor {weight}_packed has shape \[3, .*, but {needed}", packed=packed[:3])
    refuse(f"the tensor {weight}_packed has ", packed=packed[0])
    refuse(f"the tensor {weight}_packed has dtype torch.float32, but the model needs torch.int8", packed=packed.float())
    refuse(f"the tensor {weight}_zero has dtype torch.int64, but", zero=good[f"{weight}_zero"].long())
    refuse("has values that are NaN or infinite", zero=good[f"{weight}_zero"] / 0)
    refuse(f"the tensor {weight}_whole has values that are NaN", whole=-good[f"{weight}_whole"])
    refuse(f"the tensor {weight}_whole has shape", whole=torch.ones(2))
    refuse(rf"the tensor {weight}_shape is \[1, 2\], but the model needs \[", shape=torch.tensor([1, 2]))
    for end in ("packed", "scale", "zero", "whole"):
        refuse(f"lacks 1 tensors: {weight}_{end}$", **{end: None})
    unknown = good | {f"{weight}_g_idx": torch.zeros(2)}
    with pytest.raises(ValueError, match=f"has the tensor {weight}_g_idx, which the model does not have"):
        load_weights(model, unknown.items())
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in good.items()})
    load_weights(model, (pair for pair in good.items() if not pair[0].endswith("_shape")))  # it is not needed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScheme(Fp4Scheme):
    """Has kernels for linear layers only."""

    make_experts = QuantizationScheme.make_experts

    def has_kernels(self, device, dtype, shape):
        return len(shape) == 2


def test_experts_are_dequantized_if_a_scheme_has_kernels_for_linear_layers_only():
    config, checkpoint, plain_checkpoint = model_in_fp4("qwen3-moe")
    plain_model = Decoder(dataclasses.replace(config, quantization=None))
    model = Decoder(dataclasses.replace(config, quantization=LinearScheme(excluded=config.quantization.excluded)))
    assert isinstance(model.layers[0].self_attn.o_proj.format, Fp4)
    assert isinstance(model.layers[0].mlp.experts.format, PlainExperts)
    load_weights(model, checkpoint.items())
    load_weights(plain_model, plain_checkpoint.items())
    want, got = weights_of(plain_model), weights_of(model)
    assert all(torch.allclose(got[layer], want[layer], atol=1e-6) for layer in want)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPackedScheme(Fp4Scheme):
    """Eight rows in an integer, as in AWQ."""

    def _make(self, shape, loader, row_alignment):
        *experts, rows, columns = shape
        packed = make_parameter(*experts, rows // 8, columns, dtype=torch.int32, weight_loader=loader, block=(8, 1))
        return {"packed": packed}


def test_shards_that_split_packed_rows_are_refused():
    allocate = RowPackedScheme().allocate
    layer = GateUpParallelLinear(16, 96, tp=TensorParallel(1, 2), allocate_weight=allocate)
    packed = torch.arange(12 * 16, dtype=torch.int32).view(12, 16)
    for target in layer.checkpoint_tensors("mlp.gate_up_proj").values():
        target.load(packed)
    assert torch.equal(layer.weight_packed, torch.cat([packed[6:], packed[6:]]))
    RowParallelLinear(16, 40, tp=TensorParallel(), allocate_weight=allocate)
    message = "shards that start at multiples of 20 rows split the blocks of 8 rows in a weight in FP4"
    with pytest.raises(ValueError, match=message):
        GateUpParallelLinear(16, 40, tp=TensorParallel(1, 2), allocate_weight=allocate)


@pytest.mark.parametrize("computes", [True, False], ids=["kernels", "dequantized"])
@pytest.mark.parametrize("layer", ["self_attn.k_proj", "mlp.experts.3.up_proj"])
def test_fault_of_a_stored_tensor_is_named(layer, computes):
    config, good, plain_checkpoint = model_in_fp4("qwen3-moe", computes=computes)
    model, weight = Decoder(config), f"model.layers.1.{layer}.weight"

    def refuse(match, checkpoint, headers=True):
        with pytest.raises(ValueError, match=match):
            load_weights(model, checkpoint.items())
        if headers:
            with pytest.raises(ValueError, match=match):
                check_shapes(config, {name: tuple(tensor.shape) for name, tensor in checkpoint.items()})

    for part in ("packed", "scale"):
        lacking = dict(good)
        del lacking[f"{weight}_{part}"]
        refuse(f"lacks 1 tensors: {weight}_{part}$", lacking)
        refuse(f"tensor {weight}_{part} has shape", good | {f"{weight}_{part}": good[f"{weight}_{part}"][:3]})
    refuse(f"tensor {weight}_packed has dtype", good | {f"{weight}_packed": good[f"{weight}_packed"].short()}, False)
    refuse(f"{weight}_scale has values that are NaN", good | {f"{weight}_scale": -good[f"{weight}_scale"]}, False)
    refuse("which the model does not have|lacks" if computes else "has dtype|lacks", plain_checkpoint)


def test_only_scales_count_as_scales_and_experts_without_kernels_need_nothing_else():
    config, *_ = model_in_fp4("qwen3-moe")
    model = Decoder(config)
    assert all(is_scale(param) == name.endswith("_scale") for name, param in model.named_parameters())
    assert model.compile_sizes(4096) == Decoder(dataclasses.replace(config, moe=None)).compile_sizes(4096)
    assert not model.layers[0].mlp.experts.format.fuses_norm(torch.zeros(1, 64), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_scales_of_any_float_dtype_are_checked(dtype):
    for values, is_number, is_positive in (
        ([1, 0], True, True),
        ([1, -1], True, False),
        ([1, torch.nan], False, False),
    ):
        scales = torch.tensor(values, dtype=torch.float32).to(dtype)
        assert (bool(is_valid(scales, False)), bool(is_valid(scales, True))) == (is_number, is_positive)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_engine_gives_the_tokens_of_dequantized_weights(tmp_path, name):
    from safetensors.torch import load_file, save_file

    paths = [save_tiny(tmp_path / kind, name, **MODELS[name]) for kind in ("fp4", "plain")]
    weights = load_file(paths[0] / "model.safetensors")
    for path, checkpoint in zip(paths, quantized(weights), strict=True):
        save_file(checkpoint, path / "model.safetensors", {"format": "pt"})
    write_scheme(paths[0], OPTIONS)
    prompts, found = [[3, 1, 4, 1, 5], [9, 2, 6] * 15], []
    for path in paths:
        with engine(path) as llm:
            found.append(tokens(llm, prompts, greedy(8)))
    assert found[0] == found[1]
