"""A second quantization scheme: FP4 in plain torch, two values in a byte. It needs no change of loader and layers."""

import dataclasses
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from nanovllm.checkpoints.loader import WeightUpdate, check_shapes, dummy_weights, load_weights
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import LinearLayer
from nanovllm.layers.moe import Experts
from nanovllm.models.decoder import Decoder
from nanovllm.models.registry import ModelConfig
from nanovllm.ops.moe.experts import experts
from nanovllm.weights import quantization_config
from nanovllm.weights.formats import ExpertFormat, WeightFormat
from nanovllm.weights.parameter import is_scale, is_valid, make_parameter
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


class Fp4(WeightFormat):
    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale
        self.parameters = {"weight_packed": packed, "weight_scale": scale}

    def matmul(self, x, bias=None):
        return F.linear(x, dequantize(self.packed, self.scale).to(x.dtype), bias)


class Fp4Experts(ExpertFormat):
    def __init__(self, gate_up, down):
        self.gate_up, self.down = gate_up, down
        self.parameters = {"_packed": (gate_up[0], down[0]), "_scale": (gate_up[1], down[1])}

    def run(self, x, ids, weights, norm=None, residual=None, shared=None):
        gate_up, down = (dequantize(*params).to(x.dtype) for params in (self.gate_up, self.down))
        return experts(x, gate_up, down, ids, weights, norm=norm, residual=residual, shared=shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp4Scheme(QuantizationScheme):
    name: ClassVar[str] = "fp4"
    layout: ClassVar[str] = "FP4 with a scale for each 16 values"
    computes: bool = True

    def stored(self, name, shape):
        *rows, columns = shape
        scale = StoredTensor((*rows, columns // GROUP), torch.float32, is_scale=True)
        return {f"{name}_packed": StoredTensor((*rows, columns // 2), torch.int8), f"{name}_scale": scale}

    def weight_name(self, name, dtype):
        end = next((end for end in ("_packed", "_scale") if name.endswith(end)), None)
        return None if end is None else name.removesuffix(end)

    def quantize(self, name, weight):
        packed, scale = quantize(weight)
        return {f"{name}_packed": packed, f"{name}_scale": scale}

    def dequantize(self, name, tensors):
        return dequantize(tensors[f"{name}_packed"], tensors[f"{name}_scale"])

    def has_kernels(self, device, dtype, columns):
        return self.computes and all(size % GROUP == 0 for size in columns)

    def make_weight(self, rows, columns, *, dtype, weight_loader, alignment):
        return Fp4(*self._make((rows, columns), weight_loader))

    def make_experts(self, sizes, *, dtype, load_gate_up, load_down):
        gate_up = self._make((sizes.num_experts, 2 * sizes.inner, sizes.hidden), load_gate_up)
        return Fp4Experts(gate_up, self._make((sizes.num_experts, sizes.hidden, sizes.inner), load_down))

    def _make(self, shape, loader):
        *rows, columns = shape
        packed = make_parameter(*rows, columns // 2, dtype=torch.int8, weight_loader=loader, block=(1, 2))
        options = {"weight_loader": loader, "block": (1, GROUP), "is_scale": True}
        return packed, make_parameter(*rows, columns // GROUP, dtype=torch.float32, **options)


@pytest.fixture(autouse=True)
def reader(monkeypatch):
    excluded = "|".join(rf".*{end}$" for end in KEPT)
    monkeypatch.setitem(quantization_config._READERS, "toy-fp4", lambda options: Fp4Scheme(excluded=excluded))


def quantized(weights):
    """Return a checkpoint in FP4, and the same one dequantized."""
    checkpoint, plain, scheme = {}, {}, Fp4Scheme()
    for name, weight in weights.items():
        is_kept = name.removesuffix(".weight").endswith((*KEPT, "in_proj_ba"))
        if is_kept or weight.ndim < 2 or not name.endswith((".weight", "_proj")):
            checkpoint[name] = plain[name] = weight
        else:
            parts = scheme.quantize(name, weight)
            checkpoint |= parts
            plain[name] = scheme.dequantize(name, parts)
    return checkpoint, plain


def model_in_fp4(name, seed=0, fused=False, **changes):
    """Return a model's config, its checkpoint in FP4, and the same one dequantized."""
    model = tiny_model(name, seed, **MODELS[name])
    model.config.quantization_config = OPTIONS
    config = ModelConfig.from_hf(model.config)
    config = dataclasses.replace(config, quantization=dataclasses.replace(config.quantization, **changes))
    return config, *quantized(model.state_dict() if fused else separate_experts(model.state_dict()))


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
                weights[f"{name}.{kind}"] = params[0] if len(params) == 1 else dequantize(*params)
    for name in [name for name in weights if name.endswith(".gates_proj")]:
        rest = name.replace("gates_proj", "in_proj")
        weights[rest] = torch.cat([weights[rest], weights.pop(name)])
    return weights


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("computes", [True, False], ids=["kernels", "dequantized"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_are_loaded_and_sharded_like_plain_ones(name, rank, size, computes, fused):
    tp = TensorParallel(rank, size)
    config, checkpoint, plain_checkpoint = model_in_fp4(name, fused=fused, computes=computes)
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
def test_dummy_weights_are_stored_as_the_scheme_says(computes):
    config, checkpoint, _ = model_in_fp4("qwen3-moe", computes=computes)
    model = Decoder(config)
    dummy = dict(dummy_weights(model, 0))
    assert {name: tensor.shape for name, tensor in dummy.items()} == {n: t.shape for n, t in checkpoint.items()}
    load_weights(model, dummy.items())


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
