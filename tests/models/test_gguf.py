import math
import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoints import gguf as reader
from nanovllm.checkpoints.gguf_tokenizer import _check_split
from nanovllm.checkpoints.loader import load_weights
from nanovllm.checkpoints.model_source import open_model
from nanovllm.checkpoints.tokenizers import get_tokenizer
from nanovllm.checkpoints.weight_files import iterate_weights
from nanovllm.layers.rotary_embedding import rope_table
from nanovllm.models.decoder import Decoder
from nanovllm.models.hf_config import read_hf_config
from nanovllm.models.model_config import ModelConfig
from tests.helpers import engine
from tests.models.tiny import separate_experts, tiny_model

_GGUF_NAMES = {hf: name for name, hf in (reader._NAMES | reader._LAYER_NAMES).items()}
_GGUF_NAMES |= {f"mlp.experts.{hf}": name for name, hf in reader._EXPERT_NAMES.items()}


def interleaved(array, heads):
    """Return q or k in llama.cpp's layout: the two halves of each head's rows alternate."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path, model, extra=(), quantize=False, without=(), **metadata):
    """Write a transformers model like llama.cpp's converter.

    Args:
        extra: pairs of a name and a tensor to add.
        quantize: quantize matrices to Q8_0.
        without: metadata keys and tensors to leave out.
        metadata: values to add or replace, by their keys with "__" in place of ".".
    """
    config = model.config
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type.replace("_", ""))
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(read_hf_config(config).head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch.endswith("moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(getattr(config, "shared_expert_intermediate_size", 0))
    if "tokenizer.ggml.eos_token_id" not in without:
        writer.add_eos_token_id(1)
        writer.add_eot_token_id(9)
    metadata = {key.replace("__", "."): value for key, value in metadata.items()}
    for key in {*without, *metadata}:
        writer.kv_data[0].pop(key, None)
    add_metadata(writer, metadata)
    add_weights(writer, model, arch, quantize, without)
    for name, tensor in extra:
        writer.add_tensor(name, tensor.numpy())
    finish(writer)
    return path


def add_metadata(writer, metadata):
    methods = {
        int: writer.add_uint32,
        float: writer.add_float32,
        bool: writer.add_bool,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        method = writer.add_int32 if type(value) is int and value < 0 else methods[type(value)]
        method(key, value)


def add_weights(writer, model, arch, quantize, without):
    config = model.config
    for name, tensor in with_gguf_experts(model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        parts = name.split(".")
        prefix = ""
        if "layers" in parts:
            prefix = f"blk.{parts[2]}."
            parts = parts[3:]
        module = ".".join(parts[:-1])
        if arch == "llama" and module.endswith("q_proj"):
            array = interleaved(array, config.num_attention_heads)
        if arch == "llama" and module.endswith("k_proj"):
            array = interleaved(array, config.num_key_value_heads)
        target = f"{prefix}{_GGUF_NAMES[module]}.{parts[-1]}"
        if target in without:
            continue
        if quantize and array.ndim >= 2 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(array))


def with_gguf_experts(weights):
    """Return the weights with gate and up of all experts as two tensors, and the shared expert's gate as a vector."""
    changed = {}
    for name, tensor in weights.items():
        prefix, _, kind = name.rpartition(".mlp.")
        if kind == "experts.gate_up_proj":
            for part, weight in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                changed[f"{prefix}.mlp.experts.{part}_proj.weight"] = weight
        elif kind == "experts.down_proj":
            changed[f"{name}.weight"] = tensor
        else:
            changed[name] = tensor[0] if kind == "shared_expert_gate.weight" else tensor
    return changed


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


YARN = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
FACTORS = ("rope_freqs.weight", torch.linspace(1, 8, 8))


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "llama-bias", "mistral", "qwen3-moe", "qwen2-moe"])
def test_config_and_weights_equal_those_of_the_original(tmp_path, name):
    overrides = {"rope_parameters": None} if name == "llama-bias" else {}
    model = tiny_model(name, **overrides)
    source = open_model(write_gguf(tmp_path / "tiny.gguf", model))
    expected = read_hf_config(model.config)
    assert source.config.eos_token_ids == (1, 9)
    for field in ModelConfig.__dataclass_fields__.keys() - {"eos_token_ids", "model_type", "rms_norm_eps"}:
        assert getattr(source.config, field) == getattr(expected, field), field
    assert source.config.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    weights = dict(source.weights())
    original = separate_experts(model.state_dict())
    if expected.tie_word_embeddings:
        del original["lm_head.weight"]
    assert weights.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(weights[key], tensor), key


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-moe"])
def test_quantized_tensors_are_dequantized(tmp_path, name):
    model = tiny_model(name, hidden_size=64, intermediate_size=96, moe_intermediate_size=32)
    source = open_model(write_gguf(tmp_path / "tiny.gguf", model, quantize=True))
    assert source.config.dtype == torch.bfloat16
    original = separate_experts(model.state_dict())
    for key, tensor in source.weights():
        torch.testing.assert_close(tensor, original[key], atol=0.01, rtol=0)


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
        ({"llama__attention__sliding_window": 64}, "a GGUF file with sliding-window attention"),
        ({"llama__rope__dimension_count": 4}, "partial RoPE"),
        ({"split__count": 2}, "split over several files"),
        ({"llama__attention__causal": False}, "attention.causal=False"),
        ({"llama__attention__clamp_kqv": 8.0}, "attention.clamp_kqv=8"),
        ({"llama__attention__max_alibi_bias": 8.0}, "attention.max_alibi_bias=8"),
        ({"llama__attention__temperature_scale": 0.1}, "attention.temperature_scale=0.1"),
        ({"llama__attention__scale": 0.5}, "attention.scale=0.5"),
        ({"llama__attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50"),
        ({"llama__final_logit_softcapping": 30.0}, "final_logit_softcapping=30"),
        ({"llama__embedding_scale": 12.0}, "embedding_scale=12"),
        ({"llama__residual_scale": 0.5}, "residual_scale=0.5"),
        ({"llama__logit_scale": 0.5}, "logit_scale=0.5"),
        ({"llama__rope__scaling__attn_factor": 1.5}, "rope.scaling.attn_factor=1.5"),
        ({"llama__rope__scaling__yarn_ext_factor": 1.0}, "rope.scaling.yarn_ext_factor=1"),
        ({**YARN, "llama__rope__scaling__yarn_ext_factor": 0.0}, "rope.scaling.yarn_ext_factor=0"),
        ({**YARN, "llama__rope__scaling__yarn_attn_factor": 2.0}, "rope.scaling.yarn_attn_factor=2"),
        ({**YARN, "llama__rope__scaling__yarn_log_multiplier": 0.5}, "rope.scaling.yarn_log_multiplier=0.5"),
        ({**YARN, "extra": [FACTORS]}, "rope_freqs.weight and RoPE scaling of type 'yarn'"),
        (
            {"llama__rope__scaling__factor": 2.0, "extra": [FACTORS]},
            "rope_freqs.weight and .* of type 'linear'",
        ),
    ],
)
def test_unsupported_feature_is_refused_by_name(tmp_path, metadata, named):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **metadata)
    with pytest.raises(ValueError, match=f"{named}.*supported are"):
        open_model(path)


def test_recommended_sampling_is_the_default(tmp_path):
    values = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1, "mirostat": 0}
    metadata = {f"general__sampling__{name}": value for name, value in values.items()}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **metadata)
    want = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1)
    with engine(path) as llm:
        assert llm.get_default_sampling_params() == want
    with engine(path, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_recommended_sampling_that_cannot_be_used_is_ignored_with_a_warning(tmp_path, caplog):
    values = {"temp": -1.0, "top_k": 2.5, "top_p": 0.0, "min_p": "0.1", "penalty_repeat": 1.25}
    metadata = {f"general__sampling__{name}": value for name, value in values.items()}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **metadata)
    assert open_model(path).sampling_defaults == {"repetition_penalty": 1.25}
    assert [f"general.sampling.{name}" in caplog.text for name in values] == [True] * 4 + [False]


@pytest.mark.parametrize(
    "metadata",
    [
        {
            "llama__attention__causal": True,
            "llama__attention__clamp_kqv": 0.0,
            "llama__attention__scale": 16**-0.5,
            "llama__embedding_scale": 1.0,
            "llama__logit_scale": 0.0,
            "llama__rope__scaling__attn_factor": 1.0,
            "llama__rope__scaling__yarn_ext_factor": 0.0,
            "llama__rope__scaling__yarn_attn_factor": 1.0,
            "llama__rope__scaling__yarn_log_multiplier": 0.0,
        },
        {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0},
        {"llama__rope__scaling__factor": 1.0},
    ],
)
def test_metadata_that_changes_no_result_is_accepted(tmp_path, metadata):
    want = open_model(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))).config
    assert open_model(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **metadata)).config == want
    factors = open_model(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra=[FACTORS], **metadata)).config
    assert factors.rope_scaling["rope_type"] == "frequency_factors"


def test_architecture_that_is_only_read_from_safetensors_is_refused_by_name(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "olmo2")
    finish(writer)
    with pytest.raises(ValueError, match="a GGUF file of the architecture 'olmo2' is not supported"):
        open_model(path)


def test_unsupported_quantisation_is_refused_by_name(tmp_path):
    extra = [("blk.0.attn_q.odd", torch.zeros(32, dtype=torch.int8))]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra=extra)
    with pytest.raises(ValueError, match=r"quantization of the GGUF tensor blk\.0\.attn_q\.odd, I8, is not supported"):
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
def test_missing_metadata_or_tensor_is_named_with_the_file(tmp_path, key):
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
        ({"general__architecture": ["llama", "qwen3"]}, r"general\.architecture must be a text, got \['llama'"),
        ({"llama__attention__head_count_kv": 0}, "num_kv_heads must be .*, got 0"),
        ({"extra": [("rope_freqs.weight", torch.ones(7))]}, "RoPE factors must be 8 "),
        ({"extra": [("nonsense", torch.ones(7))]}, "tensor nonsense, which the model does not have"),
        ({"extra": [("blk.0.attn_q.weight", torch.ones(7, 56))], "without": ["blk.0.attn_q.weight"]}, "shape .7, 56"),
    ],
)
def test_wrong_metadata_or_tensor_is_named(tmp_path, changes, named):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **changes)
    with pytest.raises(ValueError, match=named):
        source = open_model(path)
        load_weights(Decoder(source.config), source.weights())


def test_file_without_a_tokenizer_takes_and_returns_token_ids(tmp_path):
    with LLM(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama")), device="cpu") as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert len(output.token_ids) == 4 and output.text == ""
        with pytest.raises(ValueError, match="has no tokenizer: give prompts as token ids"):
            llm.generate("text")


def test_rope_factor_without_a_type_means_linear_scaling(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), llama__rope__scaling__factor=2)
    assert open_model(path).config.rope_scaling["rope_type"] == "linear"


@pytest.mark.parametrize(("scale_linear", "factor"), [(2.0, 2.0), (0.0, None)])
def test_older_key_of_the_linear_factor_is_read(tmp_path, scale_linear, factor):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), llama__rope__scale_linear=scale_linear)
    config = open_model(path).config
    assert (config.rope_scaling or {}).get("factor") == factor
    assert config.max_position == 512 * (factor or 1)
    keys = {"llama__rope__scale_linear": scale_linear, "llama__rope__scaling__factor": 4.0}
    path = write_gguf(path, tiny_model("llama"), **keys)
    assert open_model(path).config.rope_scaling["factor"] == 4


def test_yarn_is_read_with_its_original_length_and_bounds(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 512, "yarn_beta_fast": 16.0}
    keys = {f"llama__rope__scaling__{key}": value for key, value in scaling.items()}
    config = open_model(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **keys)).config
    want = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16.0}
    assert config.rope_scaling == want and config.max_position == 2048


def test_the_attention_factor_multiplies_what_yarn_scales_by(tmp_path):
    path = tmp_path / "tiny.gguf"
    (with_1, with_2) = (
        open_model(write_gguf(path, tiny_model("llama"), **YARN, llama__rope__scaling__attn_factor=factor)).config
        for factor in (1.0, 2.0)
    )
    tables = [rope_table(16, 8, 10000.0, config.rope_scaling) for config in (with_1, with_2)]
    torch.testing.assert_close(tables[0] * 2, tables[1])
    assert tables[0][0, 0] == pytest.approx(1 + 0.1 * math.log(4))
    assert "attention_factor" not in with_1.rope_scaling


# A byte-level vocabulary whose merges do not make its one word, and a template.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|begin|>", "<|endoftext|>", "<|im_end|>", "<|file_sep|>"]
WORDS = [*ALPHABET, "he", "ll", "hello", *SPECIAL]
BEGIN, END, IM_END, FILE_SEP = range(len(WORDS) - 4, len(WORDS))
TOKENIZER = {
    "tokenizer__ggml__model": "gpt2",
    "tokenizer__ggml__pre": "llama-bpe",
    "tokenizer__ggml__tokens": WORDS,
    "tokenizer__ggml__token_type": [3 if word in SPECIAL else 1 for word in WORDS],
    "tokenizer__ggml__merges": ["h e", "l l"],
    "tokenizer__ggml__bos_token_id": BEGIN,
    "tokenizer__chat_template": "{{ messages[0].content }}",
}


def write_words(path, name="llama", **metadata):
    """Write a GGUF file with the vocabulary WORDS that names no end token."""
    return write_gguf(
        path,
        tiny_model(name, vocab_size=len(WORDS)),
        without=["tokenizer.ggml.eos_token_id"],
        **{**TOKENIZER, **metadata},
    )


def test_tokenizer_of_the_file_is_read_in_spite_of_another_in_its_folder(tmp_path, monkeypatch):
    # A process that is killed would leave a temporary folder.
    monkeypatch.delattr(tempfile, "mkdtemp")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "<end>": 2}, unk_token="<unk>"))
    other = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    other.chat_template = "another"
    other.save_pretrained(tmp_path)
    tokenizer = open_model(write_words(tmp_path / "tiny.gguf")).tokenizer()
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hi", add_special_tokens=False)) == ["h", "i"]


def test_named_chat_templates_of_a_file_are_read(tmp_path):
    metadata = {"tokenizer__chat_templates": ["tool_use"], "tokenizer__chat_template__tool_use": "TOOLS {{ tools }}"}
    tokenizer = open_model(write_words(tmp_path / "tiny.gguf", **metadata)).tokenizer()
    assert tokenizer.chat_template == {"default": "{{ messages[0].content }}", "tool_use": "TOOLS {{ tools }}"}
    path = write_words(tmp_path / "wrong.gguf", tokenizer__chat_templates=["tool_use"])
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template\.tool_use, got None"):
        open_model(path).tokenizer()


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2-moe"])
def test_tokenizer_of_a_mixture_of_experts_is_read(tmp_path, name):
    tokenizer = open_model(write_words(tmp_path / "tiny.gguf", name, tokenizer__ggml__pre="qwen2")).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello")) == ["he", "ll", "o"]


@pytest.mark.parametrize(
    ("name", "without", "message"),
    [
        ("qwen3-moe", "qwen3moe.expert_used_count", r"must have a number as its metadata qwen3moe\.expert_used_count"),
        ("qwen2-moe", "qwen2moe.expert_shared_feed_forward_length", "expert_shared_feed_forward_length, got None"),
        ("qwen3-moe", "blk.1.ffn_up_exps.weight", r"lacks 16 tensors: model\.layers\.1\.mlp\.experts\.0\.up_proj"),
        ("qwen3-moe", "blk.1.ffn_gate_inp.weight", r"layers\.1\.mlp\.experts\.0\..*, which the model does not have"),
        ("qwen2-moe", "blk.0.ffn_gate_inp_shexp.weight", r"lacks 1 tensors: .*\.mlp\.shared_expert_gate\.weight"),
    ],
)
def test_missing_part_of_a_mixture_of_experts_is_named(tmp_path, name, without, message):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(name), without=[without])
    with pytest.raises(ValueError, match=message):
        open_model(path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((15, 24, 56), r"lacks 1 tensors: model\.layers\.0\.mlp\.experts\.15\.up_proj\.weight"),
        ((17, 24, 56), r"layers\.0\.mlp\.experts\.16\.up_proj\.weight, which the model does not have"),
        ((16, 24, 57), r"experts\.0\.up_proj\.weight has shape \[24, 57\], but the model needs \[24, 56\]"),
        ((24, 56), r"blk\.0\.ffn_up_exps\.weight, which the model does not have"),
        ((1 << 40, 0, 0), r"blk\.0\.ffn_up_exps\.weight' must have at most 4096 experts"),
    ],
)
def test_misshapen_experts_are_named(tmp_path, shape, message):
    name = "blk.0.ffn_up_exps.weight"
    extra = [(name, torch.zeros(shape))]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen3-moe"), without=[name], extra=extra)
    with pytest.raises(ValueError, match=message):
        open_model(path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ["<|begin|>", "hello"]),  # like llama.cpp: BOS, and whole words before merges
        ({"tokenizer__ggml__add_bos_token": False}, ["hello"]),
        ({"tokenizer__ggml__pre": "qwen2"}, ["he", "ll", "o"]),
        ({"tokenizer__ggml__pre": "qwen2", "tokenizer__ggml__add_bos_token": True}, ["<|begin|>", "he", "ll", "o"]),
    ],
)
def test_llama_3_tokenizer_adds_bos_and_prefers_whole_words(tmp_path, metadata, words):
    path = write_words(tmp_path / "tiny.gguf", **metadata)
    tokenizer = open_model(path).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello")) == words
    for adds_bos in (True, False):
        tokenizer = get_tokenizer(path, add_bos_token=adds_bos)
        assert ("<|begin|>" in tokenizer.convert_ids_to_tokens(tokenizer.encode("hello"))) == adds_bos


@pytest.mark.parametrize(
    ("split", "tokens"),
    [
        ("smollm", ["a", "Ġ", "1", "2", "ĊĊ", "1"]),  # digits first: then the two newlines are one piece
        ("gpt-2", ["a", "Ġ", "12", "Ċ", "Ċ", "1"]),
        ("default", ["a", "Ġ", "12", "Ċ", "Ċ", "1"]),
    ],
)
def test_pre_tokenizer_of_the_file_splits_digits(tmp_path, split, tokens, caplog):
    words = [*ALPHABET, "ĊĊ", "12", *SPECIAL]
    metadata = {
        "tokenizer__ggml__pre": split,
        "tokenizer__ggml__tokens": words,
        "tokenizer__ggml__token_type": [3 if word in SPECIAL else 1 for word in words],
        "tokenizer__ggml__merges": ["Ċ Ċ", "1 2"],
        "tokenizer__ggml__bos_token_id": len(words) - 4,
    }
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(words)), **{**TOKENIZER, **metadata})
    tokenizer = open_model(path).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a 12\n\n1")) == tokens
    assert ("does not name its pre-tokenizer" in caplog.text) == (split == "default")


def test_control_tokens_outside_the_byte_alphabet_are_whole_and_keep_their_ids(tmp_path):
    """DeepSeek's have such characters, and transformers would cut them, or give them ids that the model lacks."""
    controls = ["<｜begin｜>", "<｜User｜>", "<｜end｜>"]
    words = [*ALPHABET, "ĠĠ", "hello", *controls, "  ", "<｜call｜>"]
    begin = words.index(controls[0])
    metadata = {
        "tokenizer__ggml__pre": "deepseek-r1-qwen",
        "tokenizer__ggml__tokens": words,
        "tokenizer__ggml__token_type": [1] * begin + [3, 3, 3, 4, 4],
        "tokenizer__ggml__merges": ["Ġ Ġ"],
        "tokenizer__ggml__bos_token_id": begin,
        "tokenizer__ggml__eos_token_id": begin + 2,
        "tokenizer__ggml__add_bos_token": True,
    }
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(words)), **{**TOKENIZER, **metadata})
    tokenizer = open_model(path).tokenizer()
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(words)}
    assert tokenizer.encode("<｜User｜>h  <｜call｜>") == [begin, begin + 1, words.index("h"), begin + 3, begin + 4]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (begin, begin + 2)
    assert tokenizer.decode([begin, begin + 1, begin + 4], skip_special_tokens=True) == "<｜call｜>"
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_gguf_tokenizer_has_no_tokens_beyond_the_vocabulary(tmp_path):
    words = [*ALPHABET, "he", "<|begin|>", "<|im_end|>"]
    metadata = {
        "tokenizer__ggml__tokens": words,
        "tokenizer__ggml__token_type": [1] * (len(words) - 2) + [3, 3],
        "tokenizer__ggml__merges": ["h e"],
        "tokenizer__ggml__bos_token_id": len(words) - 2,
    }
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(words)), **{**TOKENIZER, **metadata})
    tokenizer = open_model(path).tokenizer()
    assert max(tokenizer.encode("a<|endoftext|>")) < len(words)  # GPT-2's, which is plain text to this model


def test_versions_of_transformers_that_misread_tokenizers_are_refused(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), **TOKENIZER)
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(ValueError, match=r"transformers must be 5\.18 or later .* got 5\.17\.0"):
        open_model(path).tokenizer()


def test_pre_tokenizers_that_transformers_knows_are_accepted():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    for split in mapping.GGUF_PRE_TOKENIZER_SPLITS:
        _check_split(Path("a.gguf"), split)


@pytest.mark.parametrize("split", ["nonsense", "deepseek-llm", "x" * 1_000_000, 7])
def test_unknown_pre_tokenizer_is_refused_by_name(tmp_path, split):
    path = write_words(tmp_path / "tiny.gguf", tokenizer__ggml__pre=split)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre=.*smollm") as caught:
        open_model(path).tokenizer()
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("adds_space", [None, True, False])
def test_space_before_a_sentencepiece_text_is_as_the_file_says(tmp_path, adds_space):
    """Like llama.cpp: also before a space, and after each special token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi", "hi"]
    metadata = {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__scores": [0.0] * 259 + [-5.0, -6.0, -6.0, -1.0, -0.5, -2.0],
        "tokenizer__ggml__token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__unknown_token_id": 0,
    }
    if adds_space is not None:
        metadata["tokenizer__ggml__add_space_prefix"] = adds_space
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(tokens)), **metadata)
    tokenizer = open_model(path).tokenizer()
    is_prefixed = adds_space is not False
    for text, prefixed, bare in (
        ("hi", ["▁hi"], ["hi"]),
        (" hi", ["▁", "▁hi"], ["▁hi"]),
        ("hi</s>hi", ["▁hi", "</s>", "▁hi"], ["hi", "</s>", "hi"]),
        ("</s> hi", ["</s>", "▁", "▁hi"], ["</s>", "▁hi"]),
        ("</s>", ["</s>"], ["</s>"]),
    ):
        want = ["<s>", *(prefixed if is_prefixed else bare)]
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == want


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        ({"tokenizer__ggml__eos_token_id": [1, 2]}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer__ggml__eot_token_id": "a" * 1_000_000}, "tokenizer.ggml.eot_token_id"),
        ({"tokenizer__ggml__tokens": 7}, "tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__bos_token_id": "1"}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer__ggml__bos_token_id": 2.5}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer__ggml__merges": "h e"}, "tokenizer.ggml.merges"),
        ({"tokenizer__ggml__merges": [1, 2]}, "tokenizer.ggml.merges"),
        ({"tokenizer__ggml__token_type": [3]}, "tokenizer.ggml.token_type"),
        ({"tokenizer__ggml__token_type": [1.5] * len(WORDS)}, "tokenizer.ggml.token_type"),
        ({"tokenizer__ggml__token_type": 1}, "tokenizer.ggml.token_type"),
        ({"tokenizer__ggml__scores": [1.0]}, "tokenizer.ggml.scores"),
        ({"tokenizer__ggml__add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
        ({"tokenizer__ggml__add_eos_token": "yes"}, "tokenizer.ggml.add_eos_token"),
        ({"tokenizer__ggml__add_space_prefix": 1}, "tokenizer.ggml.add_space_prefix"),
        ({"tokenizer__chat_template": 7}, "tokenizer.chat_template"),
    ],
)
def test_tokenizer_metadata_of_a_wrong_type_is_refused_by_name(tmp_path, metadata, key):
    with pytest.raises(ValueError, match=key) as caught:
        open_model(write_words(tmp_path / "tiny.gguf", **metadata)).tokenizer()
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("unknown_id", [-1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("name", ["bos", "eos", "unknown", "padding"])
def test_special_token_that_the_vocabulary_lacks_is_ignored_with_a_warning(tmp_path, name, unknown_id, caplog):
    key = f"tokenizer.ggml.{name}_token_id"
    path = write_words(tmp_path / "tiny.gguf", **{key.replace(".", "__"): unknown_id})
    tokenizer = open_model(path).tokenizer()
    assert f"Ignoring {key}={unknown_id} of {path}: ids go from 0 to {len(WORDS) - 1}" in caplog.text
    ids = tokenizer.encode("hello<|im_end|>")
    assert ids == [*([] if name == "bos" else [BEGIN]), WORDS.index("hello"), IM_END]
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(WORDS)}
    assert Path(tokenizer.name_or_path) == tmp_path


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        ({}, {END, IM_END, FILE_SEP}),
        ({"tokenizer__ggml__eos_token_id": 7, "tokenizer__ggml__eom_token_id": 8}, {7, 8, END, IM_END, FILE_SEP}),
        ({"tokenizer__ggml__eos_token_id": 2**32 - 1}, {END, IM_END, FILE_SEP}),  # -1 as an unsigned number
    ],
)
def test_tokens_with_known_texts_end_a_text(tmp_path, metadata, ends, caplog):
    config = open_model(write_words(tmp_path / "tiny.gguf", **metadata)).config
    assert set(config.eos_token_ids) == ends
    assert ("Ignoring the model's eos_token_id" in caplog.text) == (2**32 - 1 in metadata.values())


def test_big_endian_file_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("x", np.zeros(4, np.float32))
    finish(writer)
    with pytest.raises(ValueError, match=r"big\.gguf .*big-endian"):
        open_model(tmp_path / "big.gguf")


def header(num_tensors, fields, infos=b""):
    return struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, len(fields)) + b"".join(fields) + infos


def text(words):
    return struct.pack("<Q", len(words)) + words


def tensor_info(name, offset, dims=(8,)):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)


ARRAY = text(b"list") + struct.pack("<I", 9)


# By the fault of a file: its content, and a part of the error.
BROKEN = {
    "numbers beyond the file": (header(0, [ARRAY + struct.pack("<IQ", 0, 1 << 60)]), "ends at"),
    "wide numbers beyond the file": (header(0, [ARRAY + struct.pack("<IQ", 12, 1 << 62)]), "ends at"),
    "strings beyond the file": (header(0, [ARRAY + struct.pack("<IQ", 8, 1 << 60)]), ""),
    "deep arrays": (header(0, [ARRAY + struct.pack("<IQ", 9, 1 << 60) * 50_000]), ""),
    "an array of an unknown type": (header(0, [ARRAY + struct.pack("<IQ", 77, 1)]), "unknown type 77"),
    "a long key": (header(0, [struct.pack("<Q", 1 << 63)]), "ends at"),
    "tensors beyond the file": (header(1 << 60, []), ""),
    "metadata beyond the file": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60), ""),
    "an unknown version": (struct.pack("<4sIQQ", b"GGUF", 7, 0, 0), "version is 7"),
    "a key twice": (header(0, [text(b"a") + struct.pack("<II", 4, 1)] * 2), "twice"),
    "no alignment": (
        header(1, [text(b"general.alignment") + struct.pack("<II", 4, 0)], tensor_info(b"x", 0)),
        "power of two",
    ),
    "no dimension": (header(1, [], tensor_info(b"x", 0, dims=())), "1 to 4 dimensions, got 0"),
    "a size beyond 64 bits": (header(1, [], tensor_info(b"x", 0, dims=(1 << 32, 1 << 32))), "'x' is from"),
    "an end outside": (header(1, [], tensor_info(b"x", 64)), "'x' is from"),
    "a start that wraps around": (header(1, [], tensor_info(b"x", 2**64 - 64)), "'x' is from"),
    "a start that is not aligned": (header(1, [], tensor_info(b"x", 4)), "multiple of 32"),
    "a name twice": (header(2, [], tensor_info(b"x", 0) + tensor_info(b"x", 32)), "same name"),
    "two tensors at one offset": (header(2, [], tensor_info(b"x", 0) + tensor_info(b"y", 0)), "'x' and 'y' overlap"),
    "an overlap": (header(2, [], tensor_info(b"x", 32) + tensor_info(b"y", 0, dims=(4, 4))), "'y' and 'x' overlap"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_impossible_counts_and_offsets_are_refused(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content + b"\0" * (-len(content) % 32) + b"\0" * 64)
    with pytest.raises(ValueError, match=rf"x\.gguf is not a GGUF file that can be read: .*{message}"):
        open_model(path)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ({"llama__embedding_length": 1 << 24}, "token_embd|embed_tokens"),
        ({"llama__feed_forward_length": 1 << 24}, "gate_proj|up_proj|down_proj"),
        ({"llama__block_count": 1 << 24}, "num_layers must be at most 4096, got 16777216"),
        ({"llama__block_count": 4096}, "num_layers is 4096, but the checkpoint has 2"),
        ({"llama__attention__head_count": 1 << 12}, "q_proj|o_proj"),
        ({"llama__attention__head_count": 1 << 22}, "at most 1048576 features"),
        ({"llama__attention__key_length": 1 << 10}, "proj"),
        ({"llama__attention__key_length": 1 << 24}, "at most 1048576 features"),
    ],
)
def test_sizes_that_differ_from_the_tensors_are_refused(tmp_path, size, named):
    path = write_gguf(tmp_path / "large.gguf", tiny_model("llama"), **size)
    with pytest.raises(ValueError, match=named):
        open_model(path)


def test_other_or_truncated_file_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", tiny_model("llama")).read_bytes()
    for content in (b"", b"not at all a GGUF file", whole[:100], whole[:-10], whole[:16] + b"\xff" * 8 + whole[24:]):
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gguf is not a GGUF file"):
            open_model(path)
