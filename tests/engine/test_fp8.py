"""Engines with FP8 weights: recognized from the config, quantized while loading, updated, and split over ranks."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.weights.fp8 import Fp8, Fp8Experts
from tests.engine.reference import load_reference, reference_choices
from tests.helpers import engine, greedy, prompts_of, tokens
from tests.models.fp8 import blocks, compressed, quantized, save_fp8, use_references
from tests.models.tiny import save_tiny, tiny_model

FORMATS = {"blocks": blocks(16), "rows": compressed()}
PROMPTS = prompts_of([5, 33])


@pytest.fixture
def fp8_kernels(monkeypatch):
    use_references(monkeypatch)


def formats_of(llm):
    runner = llm.llm_engine.executor.runner
    return {type(getattr(module, "format", None)) for module in runner.model.modules()}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "qwen3.5-moe", "phi3"])
def test_fp8_checkpoints_give_the_greedy_tokens_of_transformers_with_dequantized_weights(tmp_path, name, kind, caplog):
    path, plain_path = save_fp8(tmp_path, name, FORMATS[kind])
    with caplog.at_level(logging.INFO, logger="nanovllm"), engine(path) as llm:
        got = tokens(llm, PROMPTS, greedy(10))
    model = load_reference(plain_path)
    assert got == [reference_choices(model, *pair) for pair in zip(PROMPTS, got, strict=True)]
    logged = [record.getMessage() for record in caplog.records if "FP8" in record.getMessage()]
    assert logged == ["FP8 weights are dequantized to torch.float32: no kernel on cpu computes with them"]


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "qwen3.5-moe"])
def test_transformers_dequantizes_a_checkpoint_to_the_same_tokens(tmp_path, name):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    pytest.importorskip("accelerate")  # transformers needs it for checkpoints in FP8
    # Sizes are multiples of the block: transformers 5 computes the block from the numbers of scales.
    path, _ = save_fp8(tmp_path, name, blocks(8), hidden_size=64, intermediate_size=80)
    config = FineGrainedFP8Config(
        dequantize=True, weight_block_size=(8, 8), modules_to_not_convert=blocks()["modules_to_not_convert"]
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config).eval()
    with engine(path) as llm:
        got = tokens(llm, PROMPTS, greedy(10))
    assert got == [reference_choices(model, *pair) for pair in zip(PROMPTS, got, strict=True)]


@pytest.mark.usefixtures("fp8_kernels")
@pytest.mark.parametrize(("name", "options"), [("llama-bias", compressed()), ("qwen3.5-moe", blocks())])
def test_kernels_give_the_tokens_of_dequantized_weights(tmp_path, name, options):
    sizes = {"hidden_size": 144, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
    sizes = sizes if "moe" in name else {"hidden_size": 144, "head_dim": 64, "intermediate_size": 96}
    path, plain_path = save_fp8(tmp_path, name, options, **sizes)
    new_path, new_plain_path = save_fp8(tmp_path / "new", name, options, seed=1, **sizes)
    with engine(plain_path) as llm:
        want = tokens(llm, PROMPTS, greedy(10))
        llm.update_weights(new_plain_path)
        new = tokens(llm, PROMPTS, greedy(10))
    with engine(path) as llm:
        assert Fp8 in formats_of(llm) and (Fp8Experts in formats_of(llm)) == ("moe" in name)
        assert tokens(llm, PROMPTS, greedy(10)) == want != new
        llm.sleep(2)
        llm.wake_up(tags=["weights"])
        llm.update_weights(new_path)
        llm.wake_up()
        assert tokens(llm, PROMPTS, greedy(10)) == new


@pytest.mark.parametrize(("name", "size"), [("qwen3", 1), ("qwen3.5-moe", 2)])
def test_updated_fp8_weights_are_those_of_a_fresh_load_on_one_rank_or_two(tmp_path, name, size):
    (old, _), (new, _) = (save_fp8(tmp_path / str(seed), name, FORMATS["blocks"], seed) for seed in range(2))
    want = []
    for path in (old, new):
        with engine(path) as llm:
            want.append(tokens(llm, PROMPTS, greedy(10)))
    with engine(old, tensor_parallel_size=size) as llm:
        assert tokens(llm, PROMPTS, greedy(10)) == want[0] != want[1]
        llm.update_weights(load_file(new / "model.safetensors").items())
        assert tokens(llm, PROMPTS, greedy(10)) == want[1]
        llm.start_weight_update()
        for pair in reversed(load_file(old / "model.safetensors").items()):
            llm.load_weights([pair])
        llm.finish_weight_update()
        assert tokens(llm, PROMPTS, greedy(10)) == want[0]


@pytest.mark.parametrize("name", ["llama-bias", "qwen3-moe", "qwen3.5-moe"])
def test_quantising_while_loading_equals_a_checkpoint_quantized_before(tmp_path, name):
    kept = (*blocks()["modules_to_not_convert"], "in_proj_ba")
    plain_paths = [save_tiny(tmp_path / str(seed), name, seed) for seed in range(2)]
    want = []
    for seed, path in enumerate(plain_paths):
        weights = {key: tensor.bfloat16() for key, tensor in load_file(path / "model.safetensors").items()}
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        _, dequantized = quantized(weights, blocks(), kept)
        other = save_tiny(tmp_path / f"quantized-{seed}", name, seed)
        save_file(dequantized, other / "model.safetensors", {"format": "pt"})
        with engine(other) as llm:
            want.append(tokens(llm, PROMPTS, greedy(10)))
    with engine(plain_paths[0], quantization="fp8") as llm:
        assert tokens(llm, PROMPTS, greedy(10)) == want[0] != want[1]
        llm.update_weights(plain_paths[1])
        assert tokens(llm, PROMPTS, greedy(10)) == want[1]
        # transformers' modules have fused experts.
        fused = tiny_model(name, 0).state_dict()
        llm.update_weights((key, tensor.bfloat16()) for key, tensor in fused.items())
        assert tokens(llm, PROMPTS, greedy(10)) == want[0]


def test_weights_of_higher_precision_update_an_fp8_checkpoint_only_if_they_are_to_be_quantized(tmp_path):
    path, plain_path = save_fp8(tmp_path, "qwen3", compressed())
    with engine(path) as llm:
        want = tokens(llm, PROMPTS, greedy(10))
        with pytest.raises(ValueError, match="the checkpoint's quantization is None, but the model's is FP8 with"):
            llm.update_weights(plain_path)
        assert tokens(llm, PROMPTS, greedy(10)) == want
        with pytest.raises(ValueError, match=r"has dtype torch.float32, but the model needs .*; quantization='fp8'"):
            llm.update_weights(load_file(plain_path / "model.safetensors").items())
        llm.update_weights(path)
        assert tokens(llm, PROMPTS, greedy(10)) == want
    with engine(path, quantization="fp8") as llm:
        assert tokens(llm, PROMPTS, greedy(10)) == want
        llm.update_weights(load_file(plain_path / "model.safetensors").items())  # the largest of each row is 448 again
        assert tokens(llm, PROMPTS, greedy(10)) == want


def test_malformed_checkpoint_is_refused_before_memory_is_allocated(tmp_path):
    path, _ = save_fp8(tmp_path, "qwen3", FORMATS["blocks"])
    good = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    for changed, match in (
        ({name: None}, f"lacks 1 tensors: {name}"),
        ({name: good[name][1:]}, rf"{name} has shape \[4, 4\], but the model needs \[5, 4\]"),
        ({name: good[name] * float("nan")}, f"{name} has values that are NaN, infinite or negative"),
        ({name: -good[name]}, f"{name} has values that are NaN, infinite or negative"),
        ({name: good[name].int()}, f"{name} has dtype torch.int32"),
        ({f"{name}_2": good[name].clone()}, f"has the tensor {name}_2, which the model does not have"),
    ):
        checkpoint = {key: tensor for key, tensor in (good | changed).items() if tensor is not None}
        save_file(checkpoint, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=match):
            engine(path)


@pytest.mark.parametrize("options", [{}, {"quantization": "fp8"}])
def test_dummy_weights_of_an_fp8_folder_or_quantized_run(tmp_path, options):
    path = save_tiny(tmp_path, "qwen3-moe") if options else save_fp8(tmp_path, "qwen3-moe", blocks(16))[0]
    with engine(path, load_format="dummy", **options) as llm:
        assert len(tokens(llm, [[1, 2, 3]], greedy(4))[0]) == 4
        assert Fp8 not in formats_of(llm)


def test_other_values_of_quantization_are_refused():
    for wrong, error in (("int8", ValueError), (8, TypeError)):
        with pytest.raises(error, match="quantization must be one of the strings fp8, got"):
            engine(None, quantization=wrong)
