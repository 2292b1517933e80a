import gguf
import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import iterate_weights, load_weights
from nanovllm.models.registry import ModelConfig
from nanovllm.utils import gguf as reader
from nanovllm.utils.hub import open_model
from tests.models.tiny import tiny_model

_GGUF_NAMES = {hf: name for name, hf in (reader._NAMES | reader._LAYER_NAMES).items()}


def interleaved(array, heads):
    """llama.cpp's layout of q and k: the two halves of each head's rows alternate."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path, model, extra=(), quantise=False, without=(), **metadata):
    """Write a transformers model as llama.cpp's converter does, but `without` some keys and tensors."""
    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(ModelConfig.from_hf(config).head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(9)
    for key, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_array
        add(key.replace("__", "."), value)
    for key in without:
        writer.kv_data[0].pop(key, None)
    for name, tensor in (*model.state_dict().items(), *extra):
        array, parts = tensor.numpy(), name.split(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name in dict(extra):
            writer.add_tensor(name, array)
            continue
        module = ".".join(parts[3:-1]) if "layers" in parts else ".".join(parts[:-1])
        if arch == "llama" and module.endswith(("q_proj", "k_proj")):
            kind = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            array = interleaved(array, kind)
        prefix = f"blk.{parts[2]}." if "layers" in parts else ""
        target = f"{prefix}{_GGUF_NAMES[module]}.{parts[-1]}"
        if target in without:
            continue
        if quantise and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "llama-bias", "mistral"])
def test_config_and_weights_are_those_of_the_original(tmp_path, name):
    model = tiny_model(name, **({"rope_parameters": None} if name == "llama-bias" else {}))
    source = open_model(write_gguf(tmp_path / "tiny.gguf", model))
    expected = ModelConfig.from_hf(model.config)
    assert source.config.eos_token_ids == (1, 9)
    for field in ModelConfig.__dataclass_fields__.keys() - {"eos_token_ids", "model_type", "rms_norm_eps"}:
        assert getattr(source.config, field) == getattr(expected, field), field
    assert source.config.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    weights = dict(source.weights())
    original = model.state_dict()
    if expected.tie_word_embeddings:
        del original["lm_head.weight"]
    assert weights.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(weights[key], tensor), key


def test_quantised_tensors_are_dequantised(tmp_path):
    model = tiny_model("qwen2-tied", hidden_size=64, intermediate_size=96)
    source = open_model(write_gguf(tmp_path / "tiny.gguf", model, quantise=True))
    assert source.config.dtype == torch.bfloat16
    for key, tensor in source.weights():
        torch.testing.assert_close(tensor, model.state_dict()[key], atol=0.01, rtol=0)


def test_llama3_rope_is_read_from_its_frequency_factors(tmp_path):
    factors = torch.linspace(1, 8, 12)
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama3"), extra=[("rope_freqs.weight", factors)])
    source = open_model(path)
    assert source.config.rope_scaling == {"rope_type": "frequency_factors", "factors": factors.tolist()}
    assert "rope_freqs.weight" not in dict(source.weights())


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__attention__sliding_window": 64}, "sliding-window"),
        ({"llama__rope__dimension_count": 4}, "partial RoPE"),
        ({"split__count": 2}, "split over several files"),
    ],
)
def test_unsupported_is_refused_by_name(tmp_path, metadata, named):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **metadata)
    with pytest.raises(ValueError, match=f"{named}.*supported are"):
        open_model(path)


def test_a_quantisation_that_the_library_cannot_undo_is_refused_by_name(tmp_path):
    extra = [("blk.0.attn_q.odd", torch.zeros(32, dtype=torch.int8))]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra=extra)
    with pytest.raises(ValueError, match=r"quantisation of the GGUF tensor blk\.0\.attn_q\.odd, I8, is not supported"):
        list(iterate_weights(path))


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "token_embd.weight",
    ],
)
def test_what_is_missing_is_named_with_the_file(tmp_path, key):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), without=[key])
    with pytest.raises(ValueError, match=rf"tiny\.gguf .*{key}"):
        open_model(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"llama__attention__head_count_kv": [2, 2]},
            r"number as its metadata llama\.attention\.head_count_kv, got \[2",
        ),
        ({"llama__attention__head_count_kv": 0}, "num_kv_heads must be .*, got 0"),
        ({"extra": [("rope_freqs.weight", torch.ones(7))]}, "RoPE factors must be 8 "),
        ({"extra": [("nonsense", torch.ones(7))]}, "tensor nonsense, for which the model has no place"),
        ({"extra": [("blk.0.attn_q.weight", torch.ones(7, 56))], "without": ["blk.0.attn_q.weight"]}, "shape .7, 56"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, named):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **changes)
    with pytest.raises(ValueError, match=named):
        source = open_model(path)
        load_weights(Decoder(source.config), source.weights())


def test_without_a_tokenizer_prompts_and_answers_are_token_ids(tmp_path):
    with LLM(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama")), device="cpu") as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert len(output.token_ids) == 4 and output.text == ""
        with pytest.raises(ValueError, match="has no tokenizer: give prompts as token ids"):
            llm.generate("text")


def test_a_factor_without_a_type_is_linear_scaling(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), llama__rope__scaling__factor=2)
    assert open_model(path).config.rope_scaling["rope_type"] == "linear"


def test_what_is_not_a_gguf_file_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", tiny_model("llama")).read_bytes()
    for content in (b"", b"not at all a GGUF file", whole[:100], whole[:-10], whole[:16] + b"\xff" * 8 + whole[24:]):
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gguf is not a GGUF file"):
            open_model(path)
