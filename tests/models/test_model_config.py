import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

from nanovllm.layers.gated_delta_net import GatedDeltaNetConfig
from nanovllm.layers.moe import MoEConfig
from nanovllm.models import model_config
from nanovllm.models.families import FAMILIES
from nanovllm.models.hf_config import read_hf_config
from nanovllm.models.presets import PRESETS
from tests.models.tiny import TINY

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
FULL_AND_SLIDING = ["full_attention", "sliding_attention"]


def hf_config(**options):
    """Return a config like that of transformers 4 for a llama checkpoint."""
    defaults = {
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": torch.bfloat16,
        "eos_token_id": 2,
    }
    return SimpleNamespace(**(defaults | options))


def test_families_have_their_options():
    small = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    qwen3 = read_hf_config(Qwen3Config(**small))
    qwen2 = read_hf_config(Qwen2Config(**small))
    llama = read_hf_config(LlamaConfig(**small, attention_bias=True, mlp_bias=True))
    mistral = read_hf_config(MistralConfig(**small, sliding_window=None))
    olmo2 = read_hf_config(Olmo2Config(**small))
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    qwen3_moe = read_hf_config(Qwen3MoeConfig(**small, **experts, norm_topk_prob=True))
    qwen2_moe = read_hf_config(Qwen2MoeConfig(**small, **experts, shared_expert_intermediate_size=40))
    assert {c.model_type for c in (qwen3, qwen2, llama, mistral, qwen3_moe, qwen2_moe)} < set(FAMILIES)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)
    assert (qwen2.qk_norm, qwen2.qkv_bias, qwen2.o_bias, qwen2.head_dim) == (False, True, False, 16)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    assert (mistral.qkv_bias, mistral.o_bias, mistral.mlp_bias) == (False, False, False)
    assert (olmo2.qk_norm, olmo2.whole_qk_norm, olmo2.post_norms) == (False, True, True)
    assert (qwen3_moe.qk_norm, qwen3_moe.qkv_bias, qwen3_moe.moe) == (True, False, MoEConfig(6, 2, 24, True))
    assert (qwen2_moe.qkv_bias, qwen2_moe.moe) == (True, MoEConfig(6, 2, 24, False, 40))
    assert qwen3.moe is qwen2.moe is None


def test_every_family_has_a_tiny_model():
    nested = {"qwen3_5", "qwen3_5_moe", "mistral3"}  # whose texts are of other families
    assert {family for family, _ in TINY.values()} == set(FAMILIES) - nested


@pytest.mark.parametrize(
    ("step", "listed", "dense"), [(1, None, ()), (1, [2, 0], (0, 2)), (2, [], (0, 2, 4)), (3, [2], (0, 1, 2, 3, 4))]
)
def test_layers_without_experts_are_those_that_transformers_makes_dense(step, listed, dense):
    options = {"num_hidden_layers": 5, "decoder_sparse_step": step, "mlp_only_layers": listed}
    found = read_hf_config(Qwen3MoeConfig(**options)).moe
    assert found is None if len(dense) == 5 else found.dense_layers == dense


HYBRID = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_hybrid_families_have_their_options():
    text = read_hf_config(Qwen3_5TextConfig(**HYBRID, eos_token_id=7, dtype="bfloat16"))
    assert text.layer_types == ("gated_delta_net",) * 3 + ("full_attention",)
    assert [text.is_recurrent(index) for index in range(4)] == [True, True, True, False]
    assert (text.attention_gate, text.zero_centered_norms, text.qk_norm) == (True, True, True)
    assert (text.head_dim, text.partial_rotary_factor, text.rotary_dim) == (256, 0.25, 64)
    assert text.gated_delta_net == GatedDeltaNetConfig(16, 32, 128, 128)
    nested = Qwen3_5Config(text_config={**HYBRID, "eos_token_id": 7, "dtype": "bfloat16"}, dtype="bfloat16")
    assert read_hf_config(nested) == text and text.eos_token_ids == (7,)
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    sizes = {**HYBRID, **experts, "shared_expert_intermediate_size": 40}
    sparse = read_hf_config(Qwen3_5MoeConfig(text_config={**sizes, "norm_topk_prob": False}))
    assert sparse.moe == MoEConfig(6, 2, 24, True, 40) and sparse.attention_gate
    packed = read_hf_config(Qwen3NextConfig(**sizes, norm_topk_prob=False, linear_num_value_heads=48))
    assert packed.moe == MoEConfig(6, 2, 24, False, 40)
    assert packed.gated_delta_net == GatedDeltaNetConfig(16, 48, 128, 128, is_packed=True)
    dense = read_hf_config(Qwen3_5TextConfig(**HYBRID, layer_types=["full_attention"] * 4))
    assert dense.layer_types is None and dense.gated_delta_net is None


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_embeddings_are_tied_if_either_config_says_so(outer, inner):
    config = Qwen3_5Config(text_config={**HYBRID, "tie_word_embeddings": inner}, tie_word_embeddings=outer)
    assert read_hf_config(config).tie_word_embeddings == (outer or inner)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"linear_key_head_dim": 24}, "heads of 24 dimensions"),
        ({"linear_value_head_dim": 8}, "heads of 8 dimensions"),
        ({"linear_num_value_heads": 40}, "linear_num_value_heads=40 with linear_num_key_heads=16"),
        ({"linear_num_value_heads": 1 << 14}, "linear_num_value_heads must have at most .*, got 16384 heads of 128"),
        ({"linear_num_key_heads": 0}, "num_key_heads must be an integer from 1 .*, got 0"),
        ({"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim=3"),
        ({"layer_types": ["linear_attention"] * 4}, "a model without layers of attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types must be 4"),
        ({"layer_types": ["full_attention", "mamba", "linear_attention"]}, "a layer of type 'mamba'"),
        ({"partial_rotary_factor": 0.001}, "partial_rotary_factor must leave .*, got 0.001"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must leave .*, got 1.5"),
    ],
)
def test_hybrid_options_that_no_kernel_supports_are_named(options, named):
    given = vars(Qwen3_5TextConfig(**HYBRID)) | {"rope_parameters": None, "partial_rotary_factor": 0.25} | options
    with pytest.raises(ValueError, match=named):
        read_hf_config(SimpleNamespace(**given, model_type="qwen3_5_text", torch_dtype=None))


def test_other_weights_of_hybrid_models_are_refused_by_the_option_that_differs():
    mine = read_hf_config(Qwen3_5TextConfig(**HYBRID))
    for option, changes in (
        ("layer_types", {"layer_types": ["full_attention", "linear_attention"] * 2}),
        ("gated_delta_net.num_key_heads", {"linear_num_key_heads": 8}),
        ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ):
        with pytest.raises(ValueError, match=f"the checkpoint's {option} is .*, but the model's is"):
            mine.check_same_model(read_hf_config(Qwen3_5TextConfig(**HYBRID, **changes)))
    mine.check_same_model(read_hf_config(Qwen3_5Config(text_config=HYBRID)))


def test_rope_options_of_transformers_4_and_5_give_the_same_config():
    old = hf_config(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    new = hf_config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert read_hf_config(old) == read_hf_config(new)
    assert read_hf_config(new).rope_theta == 5e5
    assert read_hf_config(new).rope_scaling == {"rope_type": "llama3", **LLAMA3}
    for plain in ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5}}):
        config = read_hf_config(hf_config(**plain))
        assert (config.rope_theta, config.rope_scaling) == (5e5, None)
    # transformers 4 with a checkpoint saved by 5 has the default theta and the checkpoint's theta.
    both = hf_config(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert read_hf_config(both).rope_theta == 5e5


def test_scaled_queries_are_an_option_of_ministral3_alone():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, **YARN}
    scaled = {"rope_parameters": {**rope, "llama_4_scaling_beta": 0.1}}
    given = read_hf_config(hf_config(**scaled, model_type="ministral3", sliding_window=None))
    assert given.rope_scaling["llama_4_scaling_beta"] == 0.1
    assert read_hf_config(hf_config(**scaled)) == read_hf_config(hf_config(rope_parameters=rope))


def test_dtype_and_end_tokens_are_read():
    config = read_hf_config(hf_config(eos_token_id=[3, 4]))
    assert (config.dtype, config.eos_token_ids) == (torch.bfloat16, (3, 4))
    config = read_hf_config(hf_config(dtype="float16"), eos_token_ids=(7, 8))
    assert (config.dtype, config.eos_token_ids) == (torch.float16, (7, 8))
    assert read_hf_config(hf_config(torch_dtype=None, eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "gemma3"}, "gemma3"),
        ({"model_type": "qwen4_exp"}, "qwen4_exp"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'llama' with linear attention"),
        ({"model_type": None}, "None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"is_causal": False}, "is_causal=False"),
        ({"model_type": "qwen3_next", "layer_types": FULL_AND_SLIDING}, "'qwen3_next' with sliding attention"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "layer of type 'chunked_attention'"),
        ({"model_type": "llama", "layer_types": ["linear_attention"] * 2}, "'llama' with linear attention"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"chunked_attention": {"rope_theta": 1e4}}}, "differs between layers"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "factor": 2.0}}, "differs between layers"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial RoPE"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"dtype": "float64"}, "float64"),
    ],
)
def test_unsupported_feature_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match="qwen3, qwen2, llama, mistral, ") as error:
        read_hf_config(hf_config(**options))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": []}, r"model type \[\] is not supported"),
        ({"num_key_value_heads": 0}, "num_kv_heads must be .*, got 0"),
        ({"num_attention_heads": 0}, "num_heads must be .*, got 0"),
        ({"hidden_size": "32"}, "hidden_size must be .*, got '32'"),
        ({"head_dim": 0}, "head_dim must be .*, got 0"),
        ({"model_type": "mistral", "sliding_window": "4"}, "sliding_window must be .*, got '4'"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "sliding_window must be .*, got None"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"], "sliding_window": 4}, "layer_types must be 2"),
        ({"layer_types": 5}, "layer_types must be a list, got 5"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"rope_layers must be 2 times 0 or 1, got \(1,\)"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, r"rope_layers must be 2 times 0 or 1, got \(1, 2\)"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 0}}}, "rope_theta must be .*, got 0"),
        ({"rope_theta": 0}, "rope_theta must be .*, got 0"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be .*, got '1e4'"),
        ({"rope_parameters": {"rope_type": []}}, r"RoPE of type \[\] is not supported"),
        ({"torch_dtype": {}}, "dtype {} is not supported"),
    ],
)
def test_invalid_options_are_named_instead_of_replaced_by_defaults(options, named):
    with pytest.raises(ValueError, match=named):
        read_hf_config(hf_config(**options))


def test_missing_rope_option_is_named():
    with pytest.raises(ValueError, match=r"RoPE factor must be a number from 1e-15 to 1e15, got None"):
        read_hf_config(hf_config(rope_scaling={"rope_type": "linear"}))


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
        ({"rope_type": "linear", "factor": 2.5}, 10240),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "original_max_position_embeddings": 512}, 512),
        ({"rope_type": "llama3", **LLAMA3}, 4096),
        ({"rope_type": "default"}, 4096),
    ],
)
def test_scaling_extends_the_positions_unless_the_config_includes_it(scaling, positions):
    assert read_hf_config(hf_config(rope_scaling=scaling)).max_position == positions


@pytest.mark.parametrize("option", [{"factor": "x"}, {"factor": 2.0, "original_max_position_embeddings": "x"}])
def test_rope_scaling_by_a_string_is_refused(option):
    with pytest.raises(ValueError, match=r"must be a number .*, got 'x'"):
        read_hf_config(hf_config(rope_scaling={"rope_type": "linear", **option}))


def test_end_tokens_outside_the_vocabulary_are_ignored_with_a_warning(caplog):
    config = read_hf_config(hf_config(eos_token_id=[-1, 3, 99]), eos_token_ids=(-1,))
    assert config.eos_token_ids == (3,)
    assert "eos_token_id [-1, 99]: ids go from 0 to 98" in caplog.text
    assert read_hf_config(hf_config(eos_token_id=[3] * 1024)).eos_token_ids[-1] == 3
    with pytest.raises(ValueError, match="eos_token_id must have at most 1024 ids, got 1025"):
        read_hf_config(hf_config(eos_token_id=[99] * 1025))
    with pytest.raises(ValueError, match=r"eos_token_id must be a token id or a list of them, got 2\.5"):
        read_hf_config(hf_config(eos_token_id=2.5))


@pytest.mark.parametrize(
    ("whole", "text", "found"),
    [
        ("bfloat16", None, torch.bfloat16),
        (None, "float16", torch.float16),
        ("float16", "bfloat16", torch.float16),
        (None, None, torch.float32),
    ],
)
def test_dtype_of_a_whole_config_precedes_that_of_its_text(whole, text, found):
    config = Qwen3_5Config(text_config={**HYBRID, "dtype": text}, dtype=whole)
    assert read_hf_config(config).dtype == found


@pytest.mark.parametrize(
    "config",
    [
        hf_config(model_type="qwen2", sliding_window=1024, use_sliding_window=False),
        hf_config(hidden_act="swish"),  # another name of silu
        hf_config(sliding_window=1024, use_sliding_window=True),  # a llama's config does not have these
        hf_config(layer_types=FULL_AND_SLIDING, sliding_window=7),
        hf_config(model_type="mistral", sliding_window=4096),
        hf_config(model_type="mistral", sliding_window=None),
        MistralConfig(sliding_window=4096, max_position_embeddings=4096),
        Qwen2Config(sliding_window=1024),
        Qwen3Config(sliding_window=1024, use_sliding_window=True, max_window_layers=32),
        SmolLM3Config(sliding_window=1024),
    ],
)
def test_a_window_that_hides_nothing_is_no_window(config):
    config = read_hf_config(config)
    assert (config.layer_types, config.sliding_window, config.window(0, 1 << 20)) == (None, None, 0)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MistralConfig(sliding_window=100), {0: 100, 31: 100}),
        # These families do not have the options of others.
        (MistralConfig(sliding_window=100, use_sliding_window=False), {0: 100, 31: 100}),
        (Ministral3Config(sliding_window=100, use_sliding_window=False), {0: 100}),
        (Phi3Config(sliding_window=100, layer_types=["full_attention"] * 32), {0: 100, 31: 100}),
        (
            Qwen3MoeConfig(sliding_window=100, use_sliding_window=True, layer_types=["full_attention"] * 24),
            {0: 100, 23: 100},
        ),
        (Qwen2MoeConfig(sliding_window=100, use_sliding_window=True), {0: 100, 1: 0, 2: 100}),
        (
            MinistralConfig(sliding_window=100, layer_types=["full_attention", "sliding_attention"] * 16),
            {0: 0, 31: 100},
        ),
        (Qwen2Config(sliding_window=100, use_sliding_window=True), {27: 0, 28: 100}),
        (Olmo3Config(sliding_window=100), {0: 100, 2: 100, 3: 0, 30: 100, 31: 0}),
    ],
)
def test_layers_have_the_windows_of_the_family(config, windows):
    config = read_hf_config(config)
    assert {index: config.window(index, max_position=101) for index in windows} == windows
    assert not any(config.window(index, max_position=100) for index in windows)  # it hides nothing


def test_layers_have_the_rope_of_their_type_or_none():
    yarn = {"rope_type": "yarn", "rope_theta": 9.0, **YARN}
    config = read_hf_config(Olmo3Config(rope_parameters={"full_attention": yarn, "sliding_attention": {}}))
    assert [config.rope(i)[0] for i in range(4)] == [500000.0] * 3 + [9.0]
    assert [config.rope(i)[1] is None for i in range(4)] == [True, True, True, False]
    config = read_hf_config(SmolLM3Config(rope_parameters={"rope_theta": 7.0}))
    assert [config.rope(i) for i in range(5)] == [(7.0, None)] * 3 + [(None, None), (7.0, None)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 12}, "the checkpoint's sliding_window is 12, but the model's is 11"),
        ({"layer_types": ("sliding_attention",) * 4}, "the checkpoint's layer_types is"),
        ({"rope_layers": (1, 1, 0, 1)}, "the checkpoint's RoPE is rope_theta=None"),
        ({"sliding_rope": (500.0, None)}, r"the checkpoint's RoPE is rope_theta=500\.0"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN}}, "the checkpoint's RoPE is .* but the model's is .*beta"),
        ({"post_norms": True}, "the checkpoint's post_norms is True, but the model's is False"),
    ],
)
def test_weights_of_a_model_that_differs_in_one_option_are_refused(change, message):
    types = ("sliding_attention", "full_attention") * 2
    scaling = {"rope_type": "yarn", **YARN, "llama_4_scaling_beta": 0.1}
    options = {"num_layers": 4, "layer_types": types, "sliding_window": 11, "rope_scaling": scaling}
    config = dataclasses.replace(PRESETS["qwen3-0.6b"], **options)
    config.check_same_model(dataclasses.replace(config))
    with pytest.raises(ValueError, match=message):
        config.check_same_model(dataclasses.replace(config, **change))


def test_weights_of_a_model_whose_queries_grow_from_another_position_are_refused():
    scaling = {"rope_type": "default", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
    config = dataclasses.replace(PRESETS["qwen3-0.6b"], rope_scaling=scaling)
    config.check_same_model(dataclasses.replace(config, rope_scaling=dict(scaling)))
    with pytest.raises(ValueError, match="the checkpoint's RoPE"):
        other = scaling | {"original_max_position_embeddings": 32}
        config.check_same_model(dataclasses.replace(config, rope_scaling=other))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-0.6b", 0.596),
        ("qwen3-4b", 4.02),
        ("qwen3-8b", 8.19),
        ("qwen3-30b-a3b", 30.53),
        ("qwen3.5-9b", 8.95),
        ("qwen3.5-35b-a3b", 34.66),
    ],
)
def test_presets_have_the_sizes_of_the_real_models(name, billions):
    from nanovllm.models.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, "head_dim must be even"),
        ({"eos_token_ids": (99999999,)}, "eos_token_id has 99999999; ids go from 0"),
        ({"num_layers": 0}, "num_layers must be an integer from 1 to 2..24, got 0"),
        ({"hidden_size": -8}, "hidden_size must be .*, got -8"),
        ({"max_position": 10**11}, "max_position must be .*, got 100000000000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 1e-15 to 1e15, got nan"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be .*, got '1e-6'"),
        ({"rope_theta": -1.0}, "rope_theta must be .*, got -1.0"),
        ({"rope_theta": 10**400}, "rope_theta must be"),
        ({"qkv_bias": "no"}, "qkv_bias must be true or false, got 'no'"),
        ({"sliding_rope": (1e4, {"rope_type": "linear"})}, "factor must be .*, got None"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "llama_4_scaling_beta": -1}}, "beta must be .*, got -1"),
        ({"rope_scaling": {"rope_type": "default", "llama_4_scaling_beta": 1.0}}, "original_.* must be .*, got None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor must be .*, got 'x'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": [2.0]}}, r"factor must be .*, got \[2.0\]"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4}}, "high_freq_factor .* above"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": "x"}}, "beta_fast must be .*, got 'x'"),
        ({"rope_scaling": {"rope_type": "longrope", **YARN, "short_factor": [1.0] * 63}}, "short_factor must be 64 "),
        ({"rope_scaling": {"rope_type": "yarn", **YARN}, "rope_theta": 1.0}, "rope_theta must be above 1 .*, got 1.0"),
        (
            {"rope_scaling": {"rope_type": "frequency_factors", "factors": [1.0] * 63}},
            "factors must be 64 ",
        ),
    ],
)
def test_impossible_options_of_a_config_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["qwen3-0.6b"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "moe.num_experts must be an integer from 1 to 2..24, got 0"),
        ({"num_experts": 4097}, "num_experts must be at most 4096, got 4097"),
        ({"num_experts": 4096}, "65536 experts in all layers together, got 48 layers of num_experts=4096"),
        ({"experts_per_token": 129}, "experts_per_token must be at most 64, got 129"),
        ({"num_experts": 4}, "experts_per_token must be at most 4, got 8"),
        ({"intermediate_size": 2.0}, "moe.intermediate_size must be .*, got 2.0"),
        ({"norm_topk_prob": 1}, "moe.norm_topk_prob must be true or false, got 1"),
        ({"shared_intermediate_size": -1}, "moe.shared_intermediate_size must be .*, got -1"),
    ],
)
def test_impossible_options_of_experts_are_named(change, message):
    config = PRESETS["qwen3-30b-a3b"]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, moe=dataclasses.replace(config.moe, **change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be .*, got 0"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers must be a list of layer indices, got 'all'"),
        ({"mlp_only_layers": [0.5]}, r"mlp_only_layers must be a list of layer indices, got \[0\.5\]"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be .*, got 0"),
    ],
)
def test_impossible_options_of_experts_in_a_file_are_named(options, message):
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": False}
    experts |= {"decoder_sparse_step": 1, "mlp_only_layers": None, "shared_expert_intermediate_size": 8}
    with pytest.raises(ValueError, match=message):
        read_hf_config(hf_config(model_type="qwen2_moe", **experts | options))


def test_models_with_other_experts_are_not_the_same():
    config = PRESETS["qwen3-30b-a3b"]
    config.check_same_model(config)
    for change in ({"experts_per_token": 4}, {"dense_layers": (3,)}, {"norm_topk_prob": False}):
        other = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **change))
        (name,) = change
        with pytest.raises(ValueError, match=rf"the checkpoint's moe\.{name} is .*, but the model's is"):
            config.check_same_model(other)
    with pytest.raises(ValueError, match=r"moe\.num_experts is None, but the model's is 128"):
        config.check_same_model(dataclasses.replace(config, moe=None))


@dataclasses.dataclass(frozen=True)
class ScoredMoEConfig(MoEConfig):
    scoring: str = "softmax"


def test_models_that_differ_in_an_option_of_any_type_are_not_the_same():
    moe = ScoredMoEConfig(num_experts=8, experts_per_token=2, intermediate_size=64, norm_topk_prob=True)
    config = dataclasses.replace(PRESETS["qwen3-30b-a3b"], moe=moe)
    other = dataclasses.replace(config, moe=dataclasses.replace(moe, scoring="sigmoid"))
    config.check_same_model(dataclasses.replace(config))
    with pytest.raises(ValueError, match=r"the checkpoint's moe\.scoring is 'sigmoid', but the model's is 'softmax'"):
        config.check_same_model(other)


@pytest.mark.parametrize("types", [("mamba",) * 4, ("mamba", "gated_delta_net") * 2])
def test_models_without_a_kv_cache_are_refused_whatever_their_recurrent_layers_are(monkeypatch, types):
    monkeypatch.setattr(model_config, "LAYER_TYPES", (*model_config.LAYER_TYPES, "mamba"))
    with pytest.raises(ValueError, match="a model without layers of attention over a KV cache is not supported"):
        dataclasses.replace(PRESETS["qwen3-0.6b"], num_layers=4, layer_types=types)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen3.5-9b"])
def test_layers_with_post_norms_and_experts_or_recurrent_state_are_refused(name):
    with pytest.raises(ValueError, match="post_norms that has experts or recurrent state is not supported"):
        dataclasses.replace(PRESETS[name], post_norms=True)
