"""Tiny models in FP8, in the layouts of hubs, and the same models with dequantized weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanovllm.ops.fp8.reference import dequantize, experts_fp8_torch, linear_fp8_torch, quantize_weight
from nanovllm.weights import fp8
from nanovllm.weights.fp8 import Fp8Scheme
from nanovllm.weights.parameter import WHOLE
from tests.models.tiny import save_tiny

# The ends of the names of modules that checkpoints keep in higher precision.
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate", "shared_expert_gate", "conv1d", "in_proj_a", "in_proj_b")
_TOKENWISE = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"}


def use_references(monkeypatch, computes: bool = True) -> None:
    """Let this machine compute with FP8 weights through the references of the kernels, or else not at all."""

    def linear(*args, counters=None, **options):
        return linear_fp8_torch(*args, **options)

    def gate_up(*args, **options):
        return linear(*args, gated=True, **options)

    def linear_add(*args, residual, counters=None):
        return residual.copy_(linear_fp8_torch(*args, residual=residual))

    def has_kernels(scheme, device, dtype, shape):
        return computes and shape[-1] % 16 == 0

    monkeypatch.setattr(Fp8Scheme, "has_kernels", has_kernels)
    monkeypatch.setattr(fp8, "linear_fp8", linear)
    monkeypatch.setattr(fp8, "gate_up_fp8", gate_up)
    monkeypatch.setattr(fp8, "linear_add_fp8", linear_add)
    monkeypatch.setattr(fp8, "experts_fp8", experts_fp8_torch)


def blocks(size: int = 128, kept=KEPT) -> dict:
    """Return the quantization_config of Qwen's FP8 checkpoints."""
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [size, size]}
    return config | {"modules_to_not_convert": list(kept)}


def compressed(
    ignore=("lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_[ab]$"), **changes
) -> dict:
    """Return the quantization_config of FP8-dynamic checkpoints of compressed-tensors."""
    weights = {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
    group = {"input_activations": _TOKENWISE, "output_activations": None, "targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    return config | {"ignore": list(ignore), "kv_cache_scheme": None, "quantization_status": "compressed"} | changes


def quantized(weights: dict[str, torch.Tensor], options: dict, kept=KEPT) -> tuple[dict, dict]:
    """Return a checkpoint in FP8, and the same one dequantized.

    Args:
        options: a quantization_config.
        kept: the ends of names of modules that are not quantized.
    """
    is_blocks = options["quant_method"] == "fp8"
    block = tuple(options["weight_block_size"]) if is_blocks else (1, WHOLE)
    suffix = "_scale_inv" if is_blocks else "_scale"
    checkpoint, plain = {}, {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        is_experts = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if not ((name.endswith(".weight") and tensor.ndim == 2) or is_experts) or module.endswith(tuple(kept)):
            checkpoint[name] = plain[name] = tensor
            continue
        weight, scale = quantize_weight(tensor, block)
        checkpoint[name], checkpoint[name + suffix] = weight, scale
        plain[name] = dequantize(weight, scale, block, torch.float32)
    return checkpoint, plain


def save_fp8(folder: Path, name: str, options: dict, seed: int = 0, kept=KEPT, **overrides) -> tuple[Path, Path]:
    """Save a tiny model in FP8 and dequantized. Return the two folders."""
    paths = [save_tiny(folder / kind, name, seed, **overrides) for kind in ("fp8", "plain")]
    weights = load_file(paths[0] / "model.safetensors")
    for path, tensors in zip(paths, quantized(weights, options, kept), strict=True):
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    write_scheme(paths[0], options)
    return paths[0], paths[1]


def write_scheme(path: Path, options: dict) -> None:
    """Write a quantization_config into a folder's config."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
