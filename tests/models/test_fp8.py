"""FP8 weights: the formula, configs of checkpoints, shards of blocks, and errors by name."""

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F

from nanovllm.arithmetic import ceil_div
from nanovllm.checkpoints.loader import WeightUpdate, check_shapes, dummy_weights, load_weights
from nanovllm.checkpoints.model_source import open_model
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import GateUpParallelLinear, LinearLayer, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.moe import Experts, MoEConfig
from nanovllm.models.decoder import Decoder
from nanovllm.models.hf_config import read_hf_config
from nanovllm.ops.float8 import FP8
from nanovllm.ops.fp8.reference import (
    block_of_scale,
    dequantize,
    linear_fp8_torch,
    quantize_rows_torch,
    quantize_weight,
)
from nanovllm.weights.formats import Plain
from nanovllm.weights.fp8 import Fp8, Fp8Experts, Fp8Scheme
from nanovllm.weights.layer_formats import LayerFormats
from nanovllm.weights.parameter import WHOLE, blocks_covering
from nanovllm.weights.quantization_config import read_scheme
from tests.models.fp8 import KEPT, blocks, compressed, quantized, save_fp8, use_references
from tests.models.test_decoder import prefill_logits
from tests.models.tiny import separate_experts, tiny_model

BLOCKS, ROWS = blocks(), compressed()


@pytest.fixture
def fp8_kernels(monkeypatch):
    use_references(monkeypatch)


# -- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(128, 128), (1, 128), (1, WHOLE), (16, 8), (3, 5)])
@pytest.mark.parametrize("shape", [(300, 200), (128, 128), (1, 7), (129, 257), (2, 70, 130)])
def test_dequantized_weights_equal_the_formula_at_odd_shapes(shape, block):
    generator = torch.Generator().manual_seed(0)
    *batch, rows, columns = shape
    weight = torch.randn(shape, generator=generator).to(FP8)
    scale = torch.rand(*batch, ceil_div(rows, block[0]), ceil_div(columns, block[1]), generator=generator)
    row, column = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
    want = weight.float() * scale[..., row[:, None], column]
    assert torch.equal(dequantize(weight, scale, block, torch.float32), want)
    assert torch.equal(dequantize(weight, scale, block, torch.bfloat16), want.bfloat16())


@pytest.mark.parametrize("block", [(128, 128), (1, WHOLE)])
def test_quantized_weights_are_as_near_as_three_bits_of_mantissa_allow(block):
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 300)[:, None]
    weight[3], weight[128:256, :128] = 0, 0
    quantized, scale = quantize_weight(weight, block)
    error = (dequantize(quantized, scale, block, torch.float32) - weight).abs()
    spread = dequantize(torch.ones_like(weight).to(FP8), scale, block, torch.float32)
    # Half a unit in the last place of a normal number, or of the smallest subnormal one.
    assert (error <= torch.maximum(weight.abs() / 16, spread / 1024) * 1.0001).all()
    assert torch.equal(error == 0, error == 0) and quantized.float().abs().max() == 448
    is_zero = scale == 1
    assert is_zero.any() and not dequantize(quantized, is_zero.float(), block, torch.float32).any()
    for bad in (float("nan"), float("inf")):
        weight[7, 9] = bad
        assert quantize_weight(weight, block)[0].float().isnan().any()


def test_activations_have_a_scale_for_each_token_and_128_columns():
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    quantized, scales = quantize_rows_torch(x)
    assert scales.shape == (5, 2)
    torch.testing.assert_close(scales[:, 1], x[:, 128:].abs().amax(1) / 448)
    torch.testing.assert_close(dequantize(quantized, scales, (1, 128), torch.float32), x, atol=0.01, rtol=1 / 15)


def test_shape_of_scales_says_what_they_cover():
    weight = torch.zeros(300, 200, dtype=FP8)
    for shape, block in (((3, 2), (128, 128)), ((300, 2), (1, 128)), ((300, 1), (1, 200))):
        assert block_of_scale(weight, torch.ones(shape)) == block
        assert block_of_scale(weight[None], torch.ones(1, *shape)) == block
    with pytest.raises(ValueError, match=r"scales of shape \[2, 2\] do not fit a weight of shape \[300, 200\]"):
        block_of_scale(weight, torch.ones(2, 2))


# -- configs ---------------------------------------------------------------------------------------------------------


def scheme(**changes) -> Fp8Scheme:
    return read_scheme(blocks() | changes)


def changed_group(**changes) -> dict:
    """Return the config of FP8-dynamic with other options of its layers. A dict adds to the given options."""
    group = dict(compressed()["config_groups"]["group_0"])
    for name, change in changes.items():
        group[name] = group[name] | change if isinstance(change, dict) else change
    return compressed(config_groups={"group": group})


def test_schemes_of_checkpoints_are_read():
    assert (scheme().block, scheme().scale_name("x.weight")) == ((128, 128), "x.weight_scale_inv")
    assert scheme(weight_block_size=[64, 32]).block == (64, 32)
    rows = read_scheme(ROWS)
    assert (rows.block, rows.scale_name("x.weight")) == ((1, WHOLE), "x.weight_scale")
    by_blocks = changed_group(
        weights={"strategy": "block", "block_structure": [128, 128]}, input_activations={"strategy": "group"}
    )
    by_blocks = read_scheme(by_blocks)
    assert (by_blocks.block, by_blocks.scale_name("x.weight")) == ((128, 128), "x.weight_scale")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq'"),
        (blocks() | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (blocks() | {"activation_scheme": "static"}, "activation_scheme='static'"),
        (blocks() | {"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0'"),
        (blocks() | {"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        (blocks() | {"modules_to_convert": ["embed_tokens"]}, "modules_to_convert=\\['embed_tokens'\\]"),
        (blocks() | {"weight_block_size": None}, "weight_block_size=None"),
        (blocks() | {"weight_block_size": [0, 128]}, "weight_block_size=\\[0, 128\\]"),
        (blocks() | {"weight_block_size": [128]}, "weight_block_size=\\[128\\]"),
        (blocks() | {"modules_to_not_convert": [3]}, "modules_to_not_convert=\\[3\\]"),
        (blocks() | {"modules_to_not_convert": ["("]}, "the pattern"),
        (blocks() | {"modules_to_not_convert": ["x"] * 10_001}, "10001 entries of modules_to_not_convert"),
        (compressed(format="pack-quantized"), "format='pack-quantized'"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme="),
        (compressed(sparsity_config={"format": "dense"}), "sparsity_config="),
        (compressed(config_groups={}), "config_groups={}"),
        (compressed(config_groups={"g": {"weights": None}}), "without weights or input_activations"),
        (compressed(ignore=["re:["]), "the pattern"),
        (changed_group(targets=["re:.*mlp.*"]), "targets="),
        (changed_group(weights={"num_bits": 4}), "num_bits=4"),
        (changed_group(weights={"type": "int"}), "type='int'"),
        (changed_group(weights={"strategy": "tensor"}), "strategy='tensor'"),
        (changed_group(input_activations={"dynamic": False}), "dynamic=False"),
        (changed_group(input_activations={"strategy": "tensor"}), "strategy='tensor'"),
        (changed_group(input_activations=None), "without weights or input_activations"),
    ],
)
def test_other_quantisations_are_refused_by_name(options, named):
    config = tiny_model("llama").config
    config.quantization_config = options
    with pytest.raises(ValueError, match=f"^a quantization_config .*{named}.* is not supported; supported are"):
        read_hf_config(config)


@pytest.mark.parametrize(
    ("options", "name", "is_covered"),
    [
        (blocks(kept=["lm_head", "mlp.gate"]), "model.layers.0.mlp.gate_proj", True),
        (blocks(kept=["model.layers.0.mlp.gate"]), "model.layers.0.mlp.gate", False),
        (blocks(kept=["model.layers.1"]), "model.layers.11.mlp.up_proj", True),
        (blocks(kept=["model.layers.1"]), "model.layers.1.mlp.up_proj", False),
        (blocks(kept=["up_proj"]), "model.layers.1.mlp.up_proj", False),
        (blocks(kept=["model.language_model.layers.1.mlp"]), "model.layers.1.mlp.up_proj", False),
        (blocks(kept=["layers.*"]), "model.layers.1.mlp.up_proj", True),
        (blocks(kept=["model.layers.*"]), "model.layers.1.mlp.up_proj", False),
        (compressed(ignore=["re:.*linear_attn.*"]), "model.layers.2.linear_attn.out_proj", False),
        (compressed(ignore=["re:.*mlp.gate$"]), "model.layers.2.mlp.gate_proj", True),
        (compressed(ignore=["re:.*mlp.gate$"]), "model.layers.2.mlp.gate", False),
        (compressed(ignore=["model.layers.2.mlp"]), "model.layers.2.mlp.up_proj", True),
        (compressed(ignore=["re:model.language_model.*"]), "model.layers.2.mlp.up_proj", False),
    ],
)
def test_excluded_modules_are_matched_like_in_their_libraries(options, name, is_covered):
    assert read_scheme(options).covers(name) is is_covered


@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
@pytest.mark.parametrize("options", [blocks(kept=[*KEPT, "{}"]), compressed(ignore=["lm_head", "{}"])])
def test_merged_modules_that_a_checkpoint_keeps_are_plain(tmp_path, options, name):
    module = f"model.layers.1.{name}"
    options = json.loads(json.dumps(options).replace("{}", module))
    fp8, plain = save_fp8(tmp_path, "phi3", options, kept=(*KEPT, module), hidden_size=256, intermediate_size=512)
    ids = torch.arange(20)
    logits = []
    for path in (fp8, plain):
        source = open_model(path)
        model = Decoder(source.config, tp=TensorParallel())
        load_weights(model, source.weights())
        logits.append(prefill_logits(model, ids))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_pattern_that_takes_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr("nanovllm.weights.quantization._MATCH_SECONDS", 0.05)
    exponential = read_scheme(compressed(ignore=["re:model.(x|x|xx)+[a-w]"]))
    with pytest.raises(ValueError, match="quantization_config takes too long for the module xxx"):
        exponential.covers("x" * 60)


# -- shards ----------------------------------------------------------------------------------------------------------

# Models whose sizes are multiples of 16. Two ranks have whole blocks of columns of down and output projections.
MODELS = {
    "aligned": ("llama-bias", {"hidden_size": 144, "head_dim": 64, "intermediate_size": 512}),
    "odd rows": ("llama-bias", {"hidden_size": 272, "head_dim": 128, "intermediate_size": 768}),
    "merged": ("phi3", {"hidden_size": 256, "intermediate_size": 512}),
    "experts": ("qwen3-moe", {"hidden_size": 144, "head_dim": 32, "moe_intermediate_size": 256}),
    "odd experts": ("qwen3-moe", {"hidden_size": 144, "head_dim": 32, "moe_intermediate_size": 96}),
    "hybrid": (
        "qwen3.5-moe",
        {
            "hidden_size": 144,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 96,
            "linear_value_head_dim": 32,
        },
    ),
    "packed": (
        "qwen3-next",
        {
            "hidden_size": 144,
            "head_dim": 64,
            "moe_intermediate_size": 128,
            "linear_num_value_heads": 8,
            "linear_value_head_dim": 32,
        },
    ),
}


def model_in_fp8(name, options, seed=0):
    """Return a model's config, its checkpoint in FP8, and the same one dequantized."""
    family, sizes = MODELS[name]
    model = tiny_model(family, seed, **sizes)
    kept = (*blocks()["modules_to_not_convert"], "in_proj_ba")
    model.config.quantization_config = options
    return read_hf_config(model.config), *quantized(separate_experts(model.state_dict()), options, kept)


def weights_of(model):
    """Return each linear layer's weight as its GEMM sees it, and those of experts.

    The gates of recurrent layers are the last rows of the input projection, as in models without FP8.
    """
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LinearLayer):
            columns = getattr(layer, "columns", slice(0, model.config.hidden_size))
            weights[name] = layer.format.matmul(torch.eye(columns.stop - columns.start)).T
        elif isinstance(layer, Experts):
            params = layer.format.parameters
            for kind, weight, *scales in zip(("gate_up", "down"), *params.values(), strict=True):
                weights[f"{name}.{kind}"] = weight
                if scales:
                    block = block_of_scale(weight, *scales)
                    weights[f"{name}.{kind}"] = dequantize(weight, *scales, block, torch.float32)
    for name in [name for name in weights if name.endswith(".gates_proj")]:
        rest = name.replace("gates_proj", "in_proj")
        weights[rest] = torch.cat([weights[rest], weights.pop(name)])
    return weights


@pytest.mark.usefixtures("fp8_kernels")
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("options", [BLOCKS, ROWS], ids=["blocks", "rows"])
@pytest.mark.parametrize("name", MODELS)
def test_fp8_weights_are_sharded_like_plain_ones(name, options, rank, size):
    tp = TensorParallel(rank, size)
    config, *_ = model_in_fp8(name, options)
    model, plain_model = Decoder(config, tp=tp), Decoder(dataclasses.replace(config, quantization=None), tp=tp)
    assert {type(getattr(module, "format", None)) for module in model.modules()} & {Fp8, Fp8Experts}
    for seed in range(2):
        _, checkpoint, plain_checkpoint = model_in_fp8(name, options, seed)
        check_shapes(config, {name: tuple(tensor.shape) for name, tensor in checkpoint.items()})
        update = WeightUpdate(model)
        for pair in reversed(checkpoint.items()):  # in parts
            update.load([pair])
        update.finish()
        load_weights(plain_model, plain_checkpoint.items())
        want, got = weights_of(plain_model), weights_of(model)
        assert all(torch.allclose(got[layer], want[layer], atol=1e-6) for layer in want)


@pytest.mark.usefixtures("fp8_kernels")
def test_scales_have_a_row_for_each_row_only_where_shards_split_blocks():
    def rows_of_scales(name, size=1):
        layer = Decoder(model_in_fp8(name, BLOCKS)[0], tp=TensorParallel(0, size)).layers[0]
        is_sparse = "experts" in name
        gate_up = layer.mlp.experts.format.gate_up_scale[0] if is_sparse else layer.mlp.gate_up_proj.format.scale
        return len(layer.self_attn.qkv_proj.format.scale), len(gate_up)

    # Heads of 4 queries, 2 keys and 2 values of 64 dimensions, or of 128; gate and up of 512 or 768 rows.
    assert rows_of_scales("aligned") == (4, 8) and rows_of_scales("odd rows") == (8, 12)
    assert rows_of_scales("aligned", size=2) == (256, 4)
    assert rows_of_scales("experts") == (4, 4) and rows_of_scales("odd experts") == (4, 192)


@pytest.mark.parametrize("merges", [True, False])
def test_weights_of_a_cpu_are_those_of_a_dequantized_checkpoint(merges):
    for name, options in (("odd experts", BLOCKS), ("hybrid", ROWS), ("merged", blocks(24))):
        config, checkpoint, plain_checkpoint = model_in_fp8(name, options)
        if merges:
            merged = tiny_model(MODELS[name][0], **MODELS[name][1]).state_dict()
            checkpoint, plain_checkpoint = quantized(merged, options)
        models = [Decoder(config), Decoder(dataclasses.replace(config, quantization=None))]
        check_shapes(config, {name: tuple(tensor.shape) for name, tensor in checkpoint.items()})
        load_weights(models[0], checkpoint.items())
        load_weights(models[1], plain_checkpoint.items())
        for layer in models[0].modules():
            assert type(getattr(layer, "format", None)) not in (Fp8, Fp8Experts)
        want, got = weights_of(models[1]), weights_of(models[0])
        assert all(torch.equal(got[layer], want[layer]) for layer in want)


@pytest.mark.usefixtures("fp8_kernels")
def test_columns_of_a_rank_that_split_a_block_are_refused():
    formats = LayerFormats(Fp8Scheme())
    two = TensorParallel(1, 2)
    for size in (192, 384 - 16):
        layer = RowParallelLinear(2 * size, 48, tp=two, allocate_weight=formats.weight("down_proj"))
        with pytest.raises(
            ValueError, match=f"the shard {size}:{2 * size} of a weight's {2 * size} rows or columns must"
        ):
            layer.checkpoint_tensors("layer")
    moe = MoEConfig(4, 2, intermediate_size=384, norm_topk_prob=True)
    experts = Experts(moe, 144, None, two, formats)
    with pytest.raises(ValueError, match="the shard 192:384 of a weight's 384 rows or columns must start and stop at"):
        experts.checkpoint_tensors("experts")
    config = dataclasses.replace(model_in_fp8("aligned", BLOCKS)[0], intermediate_size=320)
    with pytest.raises(ValueError, match=re.escape("the shard 0:160 of a weight's 320 rows or columns must")):
        Decoder(config, tp=TensorParallel(0, 2))
    assert blocks_covering(slice(256, 300), 300, 128) == slice(2, 3)  # the last block may be smaller
    assert blocks_covering(slice(160, 192), 300, 128) == slice(1, 2)  # within one block


@pytest.mark.usefixtures("fp8_kernels")
def test_all_parameters_of_a_format_are_the_models_so_that_sleep_moves_them():
    model = Decoder(model_in_fp8("hybrid", BLOCKS)[0])
    params = set(model.parameters())
    formats = [module.format for module in model.modules() if hasattr(module, "format")]
    assert {Fp8, Fp8Experts} < set(map(type, formats))
    for weight_format in formats:
        for param in weight_format.parameters.values():
            assert params.issuperset(param if isinstance(param, tuple) else [param])


@pytest.mark.usefixtures("fp8_kernels")
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_format_computes_with_dequantized_weights(tokens):
    generator = torch.Generator().manual_seed(tokens)
    x, bias = torch.randn(tokens, 48, generator=generator), torch.randn(96, generator=generator)
    layer = GateUpParallelLinear(48, 48, True, tp=TensorParallel(), allocate_weight=Fp8Scheme().allocate)
    weight, scale = quantize_weight(torch.randn(96, 48, generator=generator), (1, 128))
    layer.weight.copy_(weight)
    layer.weight_scale_inv.copy_(scale)
    layer.bias.copy_(bias)
    assert isinstance(layer.format, Fp8)
    want = dequantize(weight, scale, (1, 128), torch.float32)
    residual, written = torch.randn(tokens, 96, generator=generator), torch.empty(tokens, 96)
    gate, up = F.linear(x, want, bias).chunk(2, -1)
    torch.testing.assert_close(layer(x), F.silu(gate) * up)
    torch.testing.assert_close(layer.format.matmul(x, bias), F.linear(x, want, bias))
    layer.format.matmul_into(written, x)
    torch.testing.assert_close(written, F.linear(x, want))
    torch.testing.assert_close(linear_fp8_torch(x, weight, scale, residual=residual), F.linear(x, want) + residual)
    want = residual + F.linear(x, want, bias)
    assert layer.format.linear_add(x, bias, residual) is residual
    torch.testing.assert_close(residual, want)


# -- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fp8_kernels")
def test_modules_that_a_checkpoint_excludes_stay_plain():
    kept = [*BLOCKS["modules_to_not_convert"], "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"]
    model = tiny_model("llama", hidden_size=144, intermediate_size=256)
    model.config.quantization_config = options = blocks(kept=[*kept, "layers.1.self_attn.k_proj"])
    config = read_hf_config(model.config)
    skipped = (*kept, *(f"layers.0.self_attn.{part}_proj" for part in "qkvo"), "layers.1.self_attn.k_proj")
    checkpoint, plain_checkpoint = quantized(model.state_dict(), options, skipped)
    decoders = Decoder(config), Decoder(dataclasses.replace(config, quantization=None))
    formats = {name: layer.format for name, layer in decoders[0].named_modules() if isinstance(layer, LinearLayer)}
    names = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
    first, second = ([isinstance(formats[f"layers.{i}.{name}"], Fp8) for name in names] for i in range(2))
    assert first == [False, False, True, True]
    # Queries and values are in FP8 in the checkpoint, but keys are not: the merged layer is plain.
    assert second == [False, True, True, False] and not isinstance(formats["lm_head"], Fp8)
    for decoder, weights in zip(decoders, (checkpoint, plain_checkpoint), strict=True):
        check_shapes(decoder.config, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        load_weights(decoder, weights.items())
    want = weights_of(decoders[1])
    for name, got in weights_of(decoders[0]).items():
        torch.testing.assert_close(got, want[name], atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("fp8_kernels")
def test_gates_of_recurrent_layers_routers_and_the_head_are_never_in_fp8():
    config = dataclasses.replace(model_in_fp8("hybrid", BLOCKS)[0], quantization=Fp8Scheme(quantizes=True))
    formats = {
        name: type(module.format) for name, module in Decoder(config).named_modules() if hasattr(module, "format")
    }
    in_fp8 = {name.partition(".")[2].partition(".")[2] for name, kind in formats.items() if kind in (Fp8, Fp8Experts)}
    attention = {"linear_attn.in_proj", "linear_attn.out_proj", "self_attn.qkv_proj", "self_attn.o_proj"}
    shared = {"mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj"}
    assert in_fp8 == attention | shared | {"mlp.experts"}
    assert "layers.0.linear_attn.gates_proj" in formats and "layers.0.mlp.gate" in formats and "lm_head" in formats


@pytest.mark.usefixtures("fp8_kernels")
def test_compiled_sizes_are_those_of_the_experts_kernels_also_where_a_checkpoint_excludes_experts():
    config = model_in_fp8("experts", BLOCKS)[0]
    mixed = dataclasses.replace(config, quantization=scheme(modules_to_not_convert=["model.layers.1.mlp"]))
    plain = dataclasses.replace(config, quantization=scheme(modules_to_not_convert=["mlp.experts"]))
    in_fp8, in_both, excluded, unquantized = (
        set(Decoder(config).compile_sizes(8192))
        for config in (config, mixed, plain, dataclasses.replace(config, quantization=None))
    )
    assert excluded == unquantized != in_fp8
    assert in_both == in_fp8 | unquantized


def test_weights_that_no_kernel_can_read_are_dequantized(monkeypatch):
    monkeypatch.setattr(Fp8Scheme, "has_kernels", lambda scheme, device, dtype, shape: shape == (48, 32))
    allocate = LayerFormats(Fp8Scheme()).weight("o_proj")
    kinds = {
        (rows, columns): type(RowParallelLinear(columns, rows, tp=TensorParallel(), allocate_weight=allocate).format)
        for rows, columns in ((48, 32), (48, 40), (40, 32))
    }
    assert kinds == {(48, 32): Fp8, (48, 40): Plain, (40, 32): Plain}


@pytest.mark.parametrize(("capability", "has_kernels"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_kernels_read_the_blocks_of_hubs_on_gpus_from_ada_on(capability, has_kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, bf16, blocks, rows = torch.device("cuda"), torch.bfloat16, Fp8Scheme(), Fp8Scheme(block=(1, WHOLE))
    for fp8_scheme in (blocks, rows):
        for shape in ((40, 64), (3, 40, 64)):
            assert fp8_scheme.has_kernels(gpu, bf16, shape) == has_kernels
        assert not fp8_scheme.has_kernels(gpu, bf16, (48, 40))
    assert not blocks.has_kernels(torch.device("cpu"), bf16, (48, 48))
    assert not blocks.has_kernels(gpu, torch.float32, (48, 48))
    assert not Fp8Scheme(block=(64, 64)).has_kernels(gpu, bf16, (48, 48))


# -- quantizing while loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("computes", [True, False], ids=["kernels", "dequantized"])
@pytest.mark.parametrize("name", ["odd experts", "merged"])
def test_weights_quantized_while_loading_are_those_quantized_before(name, computes, monkeypatch):
    use_references(monkeypatch, computes)
    model = tiny_model(MODELS[name][0], **MODELS[name][1])
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}  # experts are fused
    config = dataclasses.replace(read_hf_config(model.config), quantization=Fp8Scheme(quantizes=True))
    checkpoint, _ = quantized(separate_experts(weights), BLOCKS)
    decoders = [Decoder(config) for _ in range(2)]
    for decoder, given in zip(decoders, (weights, checkpoint), strict=True):
        load_weights(decoder, given.items())
    pairs = zip(decoders[0].parameters(), decoders[1].parameters(), strict=True)
    assert all(torch.equal(mine.float(), theirs.float()) for mine, theirs in pairs)


@pytest.mark.parametrize("computes", [True, False], ids=["kernels", "dequantized"])
def test_dummy_weights_are_a_checkpoint_of_the_models_scheme(computes, monkeypatch):
    use_references(monkeypatch, computes)
    model = Decoder(model_in_fp8("hybrid", BLOCKS)[0])
    dummy = dict(dummy_weights(model, 0))
    load_weights(model, dummy.items())
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"
    assert dummy[name].dtype is FP8 and dummy[f"{name}_scale_inv"].shape == (1, 2)
    assert 0.015 < dequantize(dummy[name], dummy[f"{name}_scale_inv"], (128, 128), torch.float32).std() < 0.025
    assert dummy["model.layers.0.mlp.gate.weight"].dtype is torch.float32


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("computes", [True, False], ids=["kernels", "dequantized"])
@pytest.mark.parametrize("layer", ["self_attn.k_proj", "mlp.experts.3.up_proj", "mlp.experts.15.down_proj"])
def test_fault_of_an_fp8_tensor_is_named(layer, computes, monkeypatch):
    use_references(monkeypatch, computes)
    config, good, _ = model_in_fp8("experts", BLOCKS)
    model = Decoder(config)
    weight, scale = f"model.layers.1.{layer}.weight", f"model.layers.1.{layer}.weight_scale_inv"

    def refuse(match, headers=None, **changed):
        changed = {{"weight": weight, "scale": scale}[kind]: tensor for kind, tensor in changed.items()}
        checkpoint = {name: tensor for name, tensor in (good | changed).items() if tensor is not None}
        with pytest.raises(ValueError, match=match):
            load_weights(model, checkpoint.items())
        if headers is not None:
            with pytest.raises(ValueError, match=headers):
                check_shapes(config, {name: tuple(tensor.shape) for name, tensor in checkpoint.items()})

    refuse(f"lacks 1 tensors: {scale}", f"lacks 1 tensors: {scale}", scale=None)
    refuse(f"lacks 1 tensors: {weight}", f"lacks 1 tensors: {weight}", weight=None)
    wrong = rf"{scale} has shape \[1, 1\], but the model needs \["
    refuse(wrong, wrong, scale=torch.ones(1, 1))
    wrong = rf"{weight} has shape \[3, 2\], but the model needs \["
    refuse(rf"{weight[:-7]}.* has shape \[", wrong, weight=good[weight][:3, :2])
    refuse(rf"{scale} has dtype torch.int32, but the model needs torch.float32", scale=good[scale].int())
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e5m2):
        refuse(f"{weight} has dtype {dtype}", weight=good[weight].float().to(dtype))
    nan = torch.full_like(good[weight].float(), float("nan")).to(FP8)
    refuse(f"{weight} has values that are NaN or infinite", weight=nan)
    for bad in (float("nan"), float("inf"), -1e-9):
        broken = good[scale].clone()
        broken[-1, -1] = bad
        refuse(f"{scale} has values that are NaN, infinite or negative", scale=broken)
    with pytest.raises(ValueError, match=f"has the tensor {scale} twice"):
        load_weights(model, [*good.items(), (scale, good[scale])])
    load_weights(model, (good | {scale: good[scale].bfloat16()}).items())  # as hubs have them


def test_weight_of_higher_precision_in_an_fp8_checkpoint_is_refused():
    config, good, plain_checkpoint = model_in_fp8("aligned", BLOCKS)
    with pytest.raises(
        ValueError, match=r"q_proj.weight has dtype torch.float32, but the model needs FP8 with a scale \*_scale_inv"
    ):
        load_weights(Decoder(config), plain_checkpoint.items())
    with pytest.raises(ValueError, match="which the model does not have"):
        load_weights(Decoder(config), [*good.items(), ("model.norm.weight_scale", torch.ones(1))])
    with pytest.raises(ValueError, match="float8_e4m3fn, but the model needs"):
        load_weights(Decoder(dataclasses.replace(config, quantization=None)), good.items())


def test_tensors_that_wait_for_their_scale_are_copied():
    config, good, _ = model_in_fp8("aligned", BLOCKS)
    models, buffer = [Decoder(config), Decoder(config)], {}
    load_weights(models[0], good.items())
    update = WeightUpdate(models[1])
    for name, tensor in good.items():
        shared = buffer.setdefault((tensor.dtype, tensor.shape), tensor.clone())
        shared.copy_(tensor)
        update.load([(name, shared)])
        shared.zero_()
    update.finish()
    pairs = zip(weights_of(models[0]).values(), weights_of(models[1]).values(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.usefixtures("fp8_kernels")
def test_key_and_value_heads_of_several_ranks_have_the_same_scales():
    formats = LayerFormats(Fp8Scheme())
    layer = QKVParallelLinear(
        144, 128, 4, 1, tp=TensorParallel(1, 2), allocate_weight=formats.weight("q_proj", "k_proj", "v_proj")
    )
    assert layer.format.scale.shape == (4, 2)
    assert layer.checkpoint_tensors("attn.qkv_proj")["attn.v_proj.weight_scale_inv"].shape == (1, 2)
