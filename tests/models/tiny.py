"""Tiny random models of every family, with odd shapes, in transformers' format."""

from collections.abc import Mapping
from pathlib import Path

import torch

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}


def _hybrid(layer_types: str, key_heads: int, value_heads: int, key_dim: int, value_dim: int, **options) -> dict:
    """Return options of a hybrid model. `layer_types` has a letter per layer: l for linear, f for full attention."""
    return {
        "layer_types": [{"l": "linear_attention", "f": "full_attention"}[letter] for letter in layer_types],
        "num_hidden_layers": len(layer_types),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "rope_parameters": _PARTIAL,
        **options,
    }


# Families and options by name. 4 ranks divide the heads and inner sizes, but no ranks divide the vocabulary. Experts
# have inner sizes that a GPU can read, multiples of 8.
TINY = {
    "qwen3": ("qwen3", {"heads": (4, 4), "head_dim": 32, "tied": True}),  # GQA 1, head_dim not hidden / heads
    "qwen3-yarn": ("qwen3", {"heads": (12, 4), "head_dim": 16, "attention_bias": True, "rope_parameters": _YARN}),
    "qwen2": ("qwen2", {"heads": (12, 4), "hidden_size": 96}),  # GQA 3, head_dim 8
    "qwen2-tied": ("qwen2", {"heads": (8, 2), "hidden_size": 64, "tied": True}),
    "llama": ("llama", {"heads": (8, 1), "head_dim": 16, "tied": True}),  # GQA 8
    "llama3": ("llama", {"heads": (12, 4), "hidden_size": 48, "head_dim": 24, "rope_parameters": _LLAMA3}),
    "llama-bias": (
        "llama",
        {
            "heads": (4, 2),
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        },
    ),
    "mistral": ("mistral", {"heads": (8, 4), "head_dim": 10, "sliding_window": None}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "heads": (8, 4),
            "head_dim": 16,
            "num_experts": 16,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-mixed": (  # top 1, in every second layer; a window
        "qwen3_moe",
        {
            "heads": (4, 4),
            "head_dim": 16,
            "num_hidden_layers": 4,
            "num_experts": 5,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 12,
            "tied": True,
        },
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {
            "heads": (8, 4),
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_experts": 9,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 28,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3.5": ("qwen3_5_text", {"heads": (8, 2), "head_dim": 32, **_hybrid("lflf", 4, 8, 16, 32)}),
    "qwen3.5-tied": (
        "qwen3_5_text",
        {
            "heads": (4, 4),
            "head_dim": 32,
            "tied": True,
            "attention_bias": True,
            **_hybrid("fl", 4, 4, 32, 16, rope_parameters={**_YARN, "partial_rotary_factor": 0.5}),
        },
    ),
    "qwen3-next": (
        "qwen3_next",
        {
            "heads": (4, 1),
            "head_dim": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [0],
            **_hybrid("lfl", 4, 12, 16, 16),
        },
    ),
    "qwen3.5-moe": (
        "qwen3_5_moe_text",
        {
            "heads": (8, 4),
            "head_dim": 32,
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            **_hybrid("lf", 4, 8, 16, 16),
        },
    ),
    "mistral-window": ("mistral", {"heads": (4, 2), "sliding_window": 16}),  # as long as a block
    "ministral": (  # windows shorter than a block
        "ministral",
        {"heads": (8, 4), "head_dim": 16, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen2-window": (
        "qwen2",
        {
            "heads": (8, 2),
            "hidden_size": 64,
            "use_sliding_window": True,
            "sliding_window": 33,
            "max_window_layers": 1,
        },
    ),
    "cwm": (
        "cwm",
        {
            "heads": (4, 4),
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": 2,
            "rope_parameters": _LLAMA3,
            "bos_token_id": 2,
        },
    ),
    "smollm3": ("smollm3", {"heads": (8, 4), "hidden_size": 64, "tied": True, "no_rope_layer_interval": 2}),
    "olmo2": ("olmo2", {"heads": (8, 4), "hidden_size": 64, "attention_bias": True}),
    "olmo3": (
        "olmo3",
        {
            "heads": (12, 4),
            "hidden_size": 96,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {**_YARN, "attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "ministral3": (
        "ministral3",
        {
            "heads": (4, 2),
            "head_dim": 32,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4},
        },
    ),
    "phi3": ("phi3", {"heads": (8, 4), "hidden_size": 64, "sliding_window": 50}),
    "phi3-long": (
        "phi3",
        {
            "heads": (4, 2),
            "hidden_size": 64,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
                "long_factor": [4.0] * 6,
            },
        },
    ),
    "seed_oss": ("seed_oss", {"heads": (4, 2), "head_dim": 16, "attention_bias": True, "attention_out_bias": True}),
}


def tiny_model(name: str, seed: int = 0, **overrides):
    """Return the transformers model `name` of TINY in float32 with random weights, biases and norms.

    Args:
        overrides: options of the transformers config that replace TINY's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family, options = TINY[name]
    options = dict(options)
    heads, kv_heads = options.pop("heads")
    options = {
        "vocab_size": 131,
        "hidden_size": 56,
        "intermediate_size": 76,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": options.pop("tied", False),
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": 0,
        "dtype": "float32",
        **options,
        **overrides,
    }
    config = AutoConfig.for_model(family, **options)
    return fill_randomly(AutoModelForCausalLM.from_config(config).eval(), seed)


def fill_randomly(model, seed: int = 0):
    """Return the model with random weights, biases and norms, and random buffers of those that a checkpoint holds."""
    generator = torch.Generator().manual_seed(seed)
    in_checkpoint = model.state_dict().keys()
    with torch.no_grad():
        for key, param in model.named_parameters():
            param.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.2, generator=generator)
        for key, buffer in model.named_buffers():
            if key in in_checkpoint and buffer.is_floating_point():
                buffer.normal_(0.0, 0.2, generator=generator)
    return model


def save_tiny(folder: Path, name: str, seed: int = 0, **overrides) -> Path:
    """Save `tiny_model(...)` in the folder `name` under `folder`. Return the new folder."""
    path = Path(folder) / name
    tiny_model(name, seed, **overrides).save_pretrained(path)
    return path


def separate_experts(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights of a transformers model with three tensors for each expert, as in files."""
    separate = {}
    for name, tensor in weights.items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                for part, weight in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                    separate[f"{prefix}.experts.{expert}.{part}_proj.weight"] = weight
        elif kind == "down_proj":
            separate |= {f"{prefix}.experts.{i}.down_proj.weight": weight for i, weight in enumerate(tensor)}
        else:
            separate[name] = tensor
    return separate


CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def save_tiny_with_tokenizer(folder: Path, name: str, chat_template: str | None = None) -> Path:
    """Save the tiny model `name` with a tokenizer whose tokens are bytes. Return its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )
    path = save_tiny(folder, name, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(path)
    return path
