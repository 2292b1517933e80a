import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanovllm.checkpoints.loader import WeightUpdate, check_shapes, dummy_weights, load_weights
from nanovllm.checkpoints.weight_files import iterate_weights, read_shapes
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.models.decoder import Decoder
from nanovllm.models.hf_config import read_hf_config
from nanovllm.weights.formats import Packed
from tests.models.tiny import save_tiny, separate_experts, tiny_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def untied():
    """Return a function that makes an empty decoder, and the checkpoint to load."""
    model = tiny_model("qwen3-yarn")
    config = read_hf_config(model.config)

    def make_decoder(tp=None):
        return Decoder(config, tp=tp)

    return make_decoder, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def plain(layer):
    """Return the layer's weight in its plain format."""
    with torch.inference_mode():
        layer.format = layer.format.start_loading()
    return layer.weight


def test_checkpoint_fills_every_parameter_and_can_be_loaded_again(untied):
    make, weights = untied
    with torch.inference_mode():  # like the runner
        model = make()
    for factor in (1.0, 2.0):
        load_weights(model, ((name, factor * tensor) for name, tensor in reversed(weights.items())))
        attention = model.layers[1].self_attn
        prefix = "model.layers.1.self_attn."
        expected = torch.cat([weights[f"{prefix}{i}_proj.bias"] for i in "qkv"])
        torch.testing.assert_close(attention.qkv_proj.bias, factor * expected)
        torch.testing.assert_close(attention.attn.q_norm.weight, factor * weights[prefix + "q_norm.weight"])
        torch.testing.assert_close(plain(model.lm_head), factor * weights["lm_head.weight"])


def test_each_rank_loads_its_slices(untied):
    make, weights = untied
    models = [make(TensorParallel(rank, 2)) for rank in range(2)]
    for model in models:
        load_weights(model, weights.items())
    got = torch.cat([plain(model.layers[0].mlp.down_proj) for model in models], 1)
    torch.testing.assert_close(got, weights["model.layers.0.mlp.down_proj.weight"])
    got = torch.cat([plain(model.lm_head) for model in models])
    torch.testing.assert_close(got[:131], weights["lm_head.weight"])
    assert not got[131:].any()


def test_fault_of_a_checkpoint_is_named(untied):
    make, weights = untied
    name = "model.layers.0.self_attn.k_proj.weight"

    def load(items):
        load_weights(make(), items)

    with pytest.raises(ValueError, match=f"lacks 1 tensors: {name}"):
        load((k, v) for k, v in weights.items() if k != name)
    with pytest.raises(ValueError, match=r"model\.layers\.7\.x\.weight, which the model does not have"):
        load([*weights.items(), ("model.layers.7.x.weight", torch.zeros(1))])
    with pytest.raises(ValueError, match=f"{name} twice"):
        load([*weights.items(), (name, weights[name])])
    with pytest.raises(ValueError, match=rf"{name} has shape \[64, 55\], but the model needs \[64, 56\]"):
        load({**weights, name: weights[name][:, 1:]}.items())
    with pytest.raises(ValueError, match=rf"{name} has dtype torch\.int8"):
        load({**weights, name: weights[name].to(torch.int8)}.items())


def experts_model(rank=0, size=1):
    """Return an empty decoder with experts, and its checkpoint with merged and with separate experts."""
    model = tiny_model("qwen2-moe")
    merged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = Decoder(read_hf_config(model.config), tp=TensorParallel(rank, size))
    return decoder, merged, separate_experts(merged)


@pytest.mark.parametrize("merges", [True, False])
def test_each_rank_loads_its_slices_of_experts(merges):
    parts = []
    for rank in range(2):
        decoder, merged, separate = experts_model(rank, 2)
        load_weights(decoder, (merged if merges else separate).items())
        parts.append(decoder.layers[2].mlp)
    want = {name.removeprefix("model.layers.2.mlp."): tensor for name, tensor in merged.items()}
    experts = [mlp.experts for mlp in parts]
    for half in range(2):
        got = torch.cat([weights.gate_up_proj.chunk(2, dim=1)[half] for weights in experts], 1)
        assert torch.equal(got, want["experts.gate_up_proj"].chunk(2, dim=1)[half])
    assert torch.equal(torch.cat([weights.down_proj for weights in experts], 2), want["experts.down_proj"])
    for mlp in parts:
        router = plain(mlp.gate)
        assert torch.equal(router[:9], want["gate.weight"])
        assert torch.equal(router[9:10], want["shared_expert_gate.weight"])
        assert not router[10:].any()


@pytest.mark.parametrize("merges", [True, False])
def test_fault_of_experts_in_a_checkpoint_is_named(merges):
    decoder, merged, separate = experts_model()
    good = merged if merges else separate
    prefix = "model.layers.2.mlp.experts."
    one, both = f"{prefix}3.up_proj.weight", f"{prefix}gate_up_proj"
    name = both if merges else one
    shapes = {key: tuple(tensor.shape) for key, tensor in good.items()}

    def refused(change, without, message):
        given = {key: tensor for key, tensor in {**good, **change}.items() if key != without}
        with pytest.raises(ValueError, match=message):
            load_weights(decoder, given.items())
        with pytest.raises(ValueError, match=message):
            check_shapes(decoder.config, {key: tuple(tensor.shape) for key, tensor in given.items()})

    check_shapes(decoder.config, shapes)
    refused({}, name, f"lacks {18 if merges else 1} tensors: {prefix}{0 if merges else 3}")
    refused({name: good[name][1:]}, None, rf"{name} has shape .*, but the model needs \[{9 if merges else 16}, ")
    refused(
        {f"{prefix}9.up_proj.weight": separate[one]}, None, r"experts\.9\.up_proj\.weight, which the model does not"
    )
    refused({f"{both}.weight": merged[both]}, None, r"gate_up_proj\.weight, which the model does not have")
    refused(
        {"model.layers.1.mlp.experts.down_proj": merged[f"{prefix}down_proj"]}, None, "which the model does not have"
    )
    other = separate if merges else merged
    with pytest.raises(ValueError, match=f"{both} twice" if not merges else f"{one} twice"):
        load_weights(decoder, [*good.items(), *((key, other[key]) for key in ((one if merges else both),))])


@pytest.mark.parametrize("name", ["8.down_proj", "0.gate_proj", "0.up_proj"])
@pytest.mark.parametrize("merges", [True, False])
def test_expert_with_nan_is_named(name, merges):
    decoder, merged, separate = experts_model()
    name = f"model.layers.2.mlp.experts.{name}.weight"
    separate[name][-1, -1] = float("nan")  # a view of the merged tensor
    with pytest.raises(ValueError, match=f"tensor {name} has values that are NaN or infinite in torch.float32"):
        load_weights(decoder, (merged if merges else separate).items())


def test_ranks_that_do_not_divide_the_inner_size_of_experts_are_refused():
    config = experts_model()[0].config
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, intermediate_size=12))
    with pytest.raises(ValueError, match="tensor_parallel_size=8 does not divide the model's moe_intermediate_size=12"):
        Decoder(config, tp=TensorParallel(0, 8))


def test_redundant_tensors_are_ignored():
    model = tiny_model("qwen3")
    weights = dict(model.state_dict())  # tied: the head is the embedding
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)
    decoder = Decoder(read_hf_config(model.config))
    load_weights(decoder, weights.items())
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    torch.testing.assert_close(decoder.lm_head.weight, weights["model.embed_tokens.weight"])


def tied(separate_head=False, rank=0, size=1):
    """Return a decoder with tied embeddings, and a checkpoint with both tensors, which differ if `separate_head`."""
    model = tiny_model("qwen3")
    config = dataclasses.replace(read_hf_config(model.config), separate_head=separate_head)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if separate_head:
        weights[HEAD] = weights[EMBEDDING].flip(0)
    return Decoder(config, tp=TensorParallel(rank, size)), weights


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("order", [1, -1])
def test_separate_head_of_a_tied_config_takes_equal_and_different_values(size, order):
    for rank in range(size):
        decoder, weights = tied(separate_head=True, rank=rank, size=size)
        rows = slice(66 * rank, 66 * rank + 66) if size > 1 else slice(None)
        equal = {**weights, HEAD: weights[EMBEDDING]}
        without_head = {name: tensor for name, tensor in weights.items() if name != HEAD}
        for checkpoint in (weights, equal, weights, without_head, weights):
            load_weights(decoder, list(checkpoint.items())[::order])
            for layer, name in ((decoder.embed_tokens, EMBEDDING), (decoder.lm_head, HEAD)):
                want = checkpoint.get(name, weights[EMBEDDING])[rows]
                got = plain(layer) if name == HEAD else layer.weight
                assert torch.equal(got[: len(want)], want)


@pytest.mark.parametrize("order", [1, -1])
def test_different_head_is_refused_by_a_model_with_one_parameter_for_both(order):
    decoder, weights = tied()
    load_weights(decoder, list(weights.items())[::order])
    weights[HEAD] = weights[HEAD].clone()
    weights[HEAD][77, 7] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        load_weights(decoder, list(weights.items())[::order])


@pytest.mark.parametrize("without", [(), ("lm_head.weight",), ("model.embed_tokens.weight",)])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_tied_checkpoint_may_lack_one_of_both_tensors_and_the_prefix(without, prefix):
    decoder, weights = tied()
    given = {k.removeprefix("model.") if not prefix else k: v for k, v in weights.items() if k not in without}
    load_weights(decoder, given.items())
    assert torch.equal(decoder.embed_tokens.weight, weights[EMBEDDING])
    name = f"{prefix}layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"lacks 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_weights(decoder, ((k, v) for k, v in given.items() if k != name))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight twice"):
        other = "model." + name if not prefix else name.removeprefix("model.")
        load_weights(decoder, [*given.items(), (other, given[name])])
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[1\]"):
        load_weights(decoder, {**given, HEAD: torch.zeros(1)}.items())
    with pytest.raises(ValueError, match=r"lacks .*embed_tokens"):
        load_weights(decoder, ((k, v) for k, v in given.items() if "embed" not in k and k != HEAD))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["k_proj.bias", "k_proj.weight", "k_norm.weight", "lm_head.weight", "down_proj.weight"]
)
def test_tensor_with_nan_or_infinity_is_named(untied, value, name):
    make, weights = untied
    name = next(key for key in weights if key.endswith(name))
    bad = weights[name].clone()
    bad.view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"tensor {name} has values that are NaN or infinite in torch.float32"):
        load_weights(make(), {**weights, name: bad}.items())


def test_tensor_that_overflows_in_the_dtype_is_named(untied):
    make, weights = untied
    bad = {**weights, "model.norm.weight": weights["model.norm.weight"] * 1e6}
    load_weights(make(), bad.items())
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight .* infinite in torch\.float16"):
        load_weights(Decoder(make().config, dtype=torch.float16), bad.items())


def test_dummy_weights_depend_on_the_seed_only():
    decoders = [Decoder(read_hf_config(tiny_model("qwen2").config)) for _ in range(3)]
    state = torch.get_rng_state()
    for decoder, seed in zip(decoders, (1, 1, 2), strict=True):
        load_weights(decoder, dummy_weights(decoder, seed))
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (plain(decoder.layers[0].mlp.down_proj) for decoder in decoders)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(decoders[0].norm.weight, torch.ones_like(decoders[0].norm.weight))


@pytest.mark.parametrize("name", ["olmo2", "qwen3.5", "qwen3-next"])
def test_dummy_norms_scale_by_one_and_dummy_gates_are_constant(name):
    decoder = Decoder(read_hf_config(tiny_model(name).config))
    load_weights(decoder, dummy_weights(decoder, seed=0))
    params = dict(decoder.named_parameters())
    constants = {"norm.weight": 1.0, "whole_qk_norm.q_weight": 1.0, "a_log": 0.0, "dt_bias": 1.0}
    found = {end: [params[name] for name in params if name.endswith(end)] for end in constants}
    assert found["norm.weight"] and (found["whole_qk_norm.q_weight"] or (found["a_log"] and found["dt_bias"]))
    for end, values in found.items():
        assert all(torch.equal(value, torch.full_like(value, constants[end])) for value in values)


def test_safetensors_are_read_from_one_file_or_several(tmp_path):
    folder = save_tiny(tmp_path, "llama-bias")
    single = dict(iterate_weights(folder))
    whole = load_file(folder / "model.safetensors")
    assert single.keys() == whole.keys()
    names = sorted(whole)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: whole[name] for name in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    (folder / "model.safetensors").unlink()
    save_file({"extra": torch.zeros(1)}, folder / "consolidated.safetensors")  # not in the index
    sharded = dict(iterate_weights(folder))
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in names)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        iterate_weights(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="not a file in that folder"):
        iterate_weights(folder)


def test_single_file_precedes_shards_in_the_same_folder_as_in_transformers(tmp_path, caplog):
    single, sharded = tiny_model("qwen3", seed=0), tiny_model("qwen3", seed=1)
    single.save_pretrained(tmp_path)
    read_shapes(tmp_path)
    assert "shards" not in caplog.text
    sharded.save_pretrained(tmp_path, max_shard_size="20KB")  # keeps the single file
    read_shapes(tmp_path)
    assert "Reading" in caplog.text and "not the shards next to it" in caplog.text
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(expected["model.norm.weight"], single.model.norm.weight)
    weights = dict(iterate_weights(tmp_path))
    assert weights.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_single_file_is_read_whatever_the_index_of_an_earlier_model_says(tmp_path):
    new = tiny_model("qwen3")
    tiny_model("qwen3", seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    new.save_pretrained(tmp_path)  # removes the shards, but keeps their index
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(dict(iterate_weights(tmp_path))["model.norm.weight"], new.model.norm.weight)


STREAM = """
import sys
from pathlib import Path
from nanovllm.models.decoder import Decoder
from nanovllm.checkpoints.loader import load_weights
from nanovllm.checkpoints.model_source import open_model

def anonymous_memory():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) << 10

def recorded(weights):
    for name, tensor in weights:
        sizes.append(anonymous_memory())
        yield name, tensor

source = open_model(sys.argv[1])
decoder, sizes = Decoder(source.config), [anonymous_memory()]
load_weights(decoder, recorded(source.weights()))
print(max(sizes) - sizes[0])
"""


def test_json_is_utf8_in_any_locale(tmp_path):
    (tmp_path / "config.json").write_bytes('{"note": "é日"}'.encode())
    code = "import sys, pathlib; from nanovllm.checkpoints.weight_files import read_json as read\n"
    code += "print(len(read(pathlib.Path(sys.argv[1]))['note']))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "config.json")]
    assert subprocess.run(command, env=os.environ | locale, capture_output=True, text=True).stdout == "2\n"


def test_loading_takes_memory_for_the_model_and_a_few_tensors_only(tmp_path):
    """Pages of the mapped file do not count as anonymous memory. The heap keeps some of what layers had in float32."""
    folder = save_tiny(tmp_path, "llama3", num_hidden_layers=16, hidden_size=240, intermediate_size=2000)
    num_bytes = (folder / "model.safetensors").stat().st_size
    assert num_bytes > 90 << 20
    done = subprocess.run([sys.executable, "-c", STREAM, str(folder)], capture_output=True, text=True, check=True)
    assert num_bytes * 0.9 < int(done.stdout) < num_bytes + (48 << 20)


def test_a_weight_is_converted_and_checked_once_all_its_tensors_are_loaded(untied):
    if not Packed.supports(torch.zeros(1)):
        pytest.skip("this CPU keeps weights as they are")
    make, tensors = untied
    layer = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    bad = "model.layers.0.mlp.down_proj.weight"
    for first in (layer, {**layer, bad: torch.full_like(layer[bad], float("nan"))}):
        with torch.inference_mode():
            decoder = make()
        update = WeightUpdate(decoder)
        update.load(first.items())
        sizes = [[param.numel() for param in each.mlp.parameters()] for each in decoder.layers]
        assert not any(sizes[0]) and all(sizes[1])
        update.load((name, tensor) for name, tensor in tensors.items() if name not in first)
        if first is layer:
            update.finish()
        else:
            with pytest.raises(ValueError, match=f"the tensor {bad} has values that are NaN or infinite"):
                update.finish()


def test_pickled_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no weights: no \*\.safetensors files$"):
        iterate_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"no \*\.safetensors files; pickled weights \('pytorch_model.bin'\) .* must be converted"
    ):
        iterate_weights(tmp_path)
