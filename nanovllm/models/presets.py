"""Shapes of real models for load_format="dummy"."""

from typing import Any

from nanovllm.layers.gated_delta_net import GatedDeltaNetConfig
from nanovllm.layers.moe import MoEConfig
from nanovllm.models.model_config import ModelConfig

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_kv_heads": 8, "head_dim": 128, "max_position": 40960}
_QWEN3 |= {"rope_theta": 1e6, "qk_norm": True, "eos_token_ids": (151645, 151643)}
_QWEN3_5: dict[str, Any] = {"vocab_size": 248320, "num_heads": 16, "head_dim": 256}
_QWEN3_5 |= {"max_position": 262144, "rope_theta": 1e7, "partial_rotary_factor": 0.25}
_QWEN3_5 |= {"qk_norm": True, "attention_gate": True, "zero_centered_norms": True, "eos_token_ids": (248046, 248044)}
_QWEN3_5 |= {"gated_delta_net": GatedDeltaNetConfig(16, 32, 128, 128)}
_EVERY_FOURTH = ("gated_delta_net",) * 3 + ("full_attention",)
PRESETS = {
    "qwen3-0.6b": ModelConfig(
        **_QWEN3, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, tie_word_embeddings=True
    ),
    "qwen3-4b": ModelConfig(
        **_QWEN3, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, tie_word_embeddings=True
    ),
    "qwen3-8b": ModelConfig(**_QWEN3, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32),
    "qwen3-30b-a3b": ModelConfig(
        **_QWEN3 | {"model_type": "qwen3_moe", "num_kv_heads": 4},
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=48,
        num_heads=32,
        moe=MoEConfig(num_experts=128, experts_per_token=8, intermediate_size=768, norm_topk_prob=True),
    ),
    "qwen3.5-9b": ModelConfig(
        **_QWEN3_5,
        model_type="qwen3_5_text",
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=32,
        num_kv_heads=4,
        layer_types=_EVERY_FOURTH * 8,
    ),
    "qwen3.5-35b-a3b": ModelConfig(
        **_QWEN3_5,
        model_type="qwen3_5_moe_text",
        hidden_size=2048,
        intermediate_size=512,
        num_layers=40,
        num_kv_heads=2,
        layer_types=_EVERY_FOURTH * 10,
        moe=MoEConfig(256, 8, intermediate_size=512, norm_topk_prob=True, shared_intermediate_size=512),
    ),
}
