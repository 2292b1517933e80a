"""Read the config and the weights of GGUF files, as in the transformers checkpoints they were converted from."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch

from nanovllm.checkpoints.gguf_file import GgufFile, GgufTensor
from nanovllm.checks import shown
from nanovllm.layers.moe import MoEConfig
from nanovllm.models.families import FAMILIES
from nanovllm.models.model_config import (
    MAX_EXPERTS,
    MAX_LAYERS,
    ModelConfig,
    check_model_type,
    checked_option,
    default_head_dim,
    known_ids,
    scaled_max_position,
    unsupported,
)
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# The architectures that this reader knows. Files of other supported families are refused.
_ARCHITECTURES = ("qwen3", "qwen2", "llama", "mistral")
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
# Tensors [experts, rows, columns], and the names of each expert's matrix.
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
# The families whose architecture has another name.
_MOE_FAMILIES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
# Metadata with the values of arguments of SamplingParams that the model's authors recommend.
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
# Metadata that names tokens which end a text. Like llama.cpp, the engine also stops at tokens with _END_TEXTS.
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_END_TEXTS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>", "<end_of_utterance>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
}
# Metadata of other models that changes results, with the values that change none.
_NEUTRAL = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "rope.scaling.yarn_attn_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
}


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """Return the RoPE scaling as llama.cpp reads it, in transformers' terms."""
    # The second key is the older name, 0 is no scaling, and the type is linear by default.
    factor = file.number("{arch}.rope.scaling.factor", file.number("{arch}.rope.scale_linear", 0))
    rope_type = file.get("{arch}.rope.scaling.type", "linear")
    is_scaled = rope_type != "none" and not (rope_type == "linear" and factor in (0, 1))
    if rope_type != "yarn":
        _check_neutral(file, {"rope.scaling.attn_factor": (1,), "rope.scaling.yarn_ext_factor": (0, -1)})
    if "rope_freqs.weight" in file.tensors:
        if is_scaled:
            raise unsupported(f"a GGUF file with rope_freqs.weight and RoPE scaling of type {shown(rope_type)}")
        return {"rope_type": "frequency_factors", "factors": file.floats("rope_freqs.weight").tolist()}
    if not is_scaled:
        return None
    original = file.number("{arch}.rope.scaling.original_context_length", file.number("{arch}.context_length"))
    scaling = {"rope_type": rope_type, "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        beta = file.get(f"{{arch}}.rope.scaling.yarn_{name}")
        if beta is not None:
            scaling[name] = beta
    if rope_type == "yarn":
        _check_neutral(file, {"rope.scaling.yarn_ext_factor": (1, -1)})
        attn_factor = file.number("{arch}.rope.scaling.attn_factor", 1)
        if attn_factor != 1 and factor > 0:  # ModelConfig refuses factors that are not positive
            # The file's factor multiplies YaRN's own, 1 + 0.1 ln(factor). transformers' option is the product of both.
            scaling["attention_factor"] = attn_factor * (1 + 0.1 * math.log(max(factor, 1)))
    return scaling


def _check_neutral(file: GgufFile, values: dict[str, tuple[float, ...]]) -> None:
    """Refuse a file that sets one of these metadata to another value than those that change no result."""
    for key, neutral in values.items():
        value = file.get(f"{{arch}}.{key}")
        if value is not None and value not in neutral:
            raise unsupported(f"a GGUF file with {file.arch}.{key}={shown(value)}")


def _num_layers(file: GgufFile) -> int:
    num_layers = checked_option("num_layers", file.number("{arch}.block_count"), int)
    if num_layers > MAX_LAYERS:
        raise ValueError(f"the model's num_layers must be at most {MAX_LAYERS}, got {num_layers}")
    return num_layers


def _moe(file: GgufFile) -> MoEConfig | None:
    """Return the options of mixtures of experts, as llama.cpp reads them; None for a dense model."""
    num_experts = file.number("{arch}.expert_count", 0)
    if not num_experts:
        return None
    if file.arch not in _MOE_FAMILIES:
        raise unsupported(f"a mixture of experts of the architecture {shown(file.arch)}")
    num_layers = _num_layers(file)
    has_shared = file.arch == "qwen2moe"
    return MoEConfig(
        num_experts=num_experts,
        experts_per_token=file.number("{arch}.expert_used_count"),
        intermediate_size=file.number("{arch}.expert_feed_forward_length"),
        norm_topk_prob=file.arch == "qwen3moe",
        shared_intermediate_size=file.number("{arch}.expert_shared_feed_forward_length") if has_shared else 0,
        dense_layers=tuple(i for i in range(num_layers) if f"blk.{i}.ffn_gate_inp.weight" not in file.tensors),
    )


def _end_ids(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text: those that the file names, and those with one of _END_TEXTS."""
    keys = [f"tokenizer.ggml.{key}_token_id" for key in _END_KEYS]
    named = [file.number(key) for key in keys if key in file.metadata]
    tokens = file.texts("tokenizer.ggml.tokens")
    by_text = [token_id for token_id, text in enumerate(tokens) if text in _END_TEXTS]
    return known_ids(list(dict.fromkeys([*named, *by_text])), vocab_size)


class GgufModel(NamedTuple):
    """The metadata of a GGUF file, as the engine needs it.

    Attributes:
        sampling_defaults: arguments of SamplingParams.
    """

    config: ModelConfig
    has_tokenizer: bool
    sampling_defaults: dict[str, Any]


def read_gguf(path: Path) -> GgufModel:
    """Read the metadata of a GGUF file. Raise ValueError if the model is not supported."""
    file = GgufFile(path)
    model_type = _MOE_FAMILIES.get(file.arch, file.arch)
    check_model_type(model_type)
    if model_type not in _ARCHITECTURES and model_type == file.arch:
        raise unsupported(f"a GGUF file of the architecture {shown(file.arch)}")
    hidden_size = file.number("{arch}.embedding_length")
    num_heads = file.number("{arch}.attention.head_count")
    head_dim = file.number("{arch}.attention.key_length", default_head_dim(hidden_size, num_heads))
    max_position = file.number("{arch}.context_length")
    if file.number("split.count", 1) > 1:
        raise unsupported("a GGUF model that is split over several files")
    window = file.number("{arch}.attention.sliding_window", 0)
    if window and window < max_position:
        raise unsupported("a GGUF file with sliding-window attention")  # it does not say in which layers
    if file.number("{arch}.rope.dimension_count", head_dim) != head_dim:
        raise unsupported("partial RoPE")
    _check_neutral(file, _NEUTRAL)
    scale = file.number("{arch}.attention.scale", 0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
        raise unsupported(f"a GGUF file with {file.arch}.attention.scale={scale}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight, a matrix")
    vocab_size = embedding.shape[0]
    rope_scaling = _rope_scaling(file)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=file.number("{arch}.feed_forward_length"),
        num_layers=_num_layers(file),
        num_heads=num_heads,
        num_kv_heads=file.number("{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=scaled_max_position(max_position, rope_scaling),
        rms_norm_eps=file.number("{arch}.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in file.tensors,
        rope_theta=file.number("{arch}.rope.freq_base", 10000.0),
        rope_scaling=rope_scaling,
        qk_norm=FAMILIES[model_type].options.get("qk_norm") is True,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        dtype={"F32": torch.float32, "F16": torch.float16}.get(embedding.type.name, torch.bfloat16),
        eos_token_ids=_end_ids(file, vocab_size),
        moe=_moe(file),
    )
    return GgufModel(config, "tokenizer.ggml.tokens" in file.metadata, _sampling_defaults(file))


def _sampling_defaults(file: GgufFile) -> dict[str, Any]:
    """Return the arguments of SamplingParams that the file recommends. Warn of values that cannot be used."""
    defaults = {}
    for key, name in _SAMPLING.items():
        if key in file.metadata:
            try:
                value = round(file.number(key), 6)  # metadata has 32 bits: 0.6 comes as 0.60000002
                SamplingParams(**{name: value})
            except (TypeError, ValueError) as error:
                logger.warning("Ignoring %s of %s: %.200s", key, file.path, error)
            else:
                defaults[name] = value
    return defaults


def _hf_name(name: str) -> str:
    """Return the transformers name of a GGUF tensor. The loader refuses an unknown name, which stays as it is."""
    match name.split("."):
        case ["blk", layer, module, kind] if module in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
        case [module, kind] if module in _NAMES:
            return f"{_NAMES[module]}.{kind}"
    return name


def _is_weight(name: str) -> bool:
    return name != "rope_freqs.weight"  # part of the config


def _split_experts(tensor: GgufTensor) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Iterate over the transformers tensors in a GGUF tensor: each one's name, shape, and index of the expert.

    A tensor of experts has a matrix for each of them. Any other tensor is one tensor, and its expert is None.
    """
    match tensor.name.split("."):
        case ["blk", layer, module, "weight"] if module in _EXPERT_NAMES and len(tensor.shape) == 3:
            if tensor.shape[0] > MAX_EXPERTS:
                raise ValueError(f"the tensor {shown(tensor.name)} must have at most {MAX_EXPERTS} experts")
            for expert in range(tensor.shape[0]):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{_EXPERT_NAMES[module]}.weight"
                yield name, tensor.shape[1:], expert
        case ["blk", _, "ffn_gate_inp_shexp", "weight"] if len(tensor.shape) == 1:
            yield _hf_name(tensor.name), (1, *tensor.shape), None
        case _:
            yield _hf_name(tensor.name), tensor.shape, None


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the file's tensors, by their transformers names."""
    weights = [tensor for tensor in GgufFile(path).tensors.values() if _is_weight(tensor.name)]
    return {name: shape for tensor in weights for name, shape, _ in _split_experts(tensor)}


def has_quantized(path: Path) -> bool:
    """Return whether the file has quantized tensors, which have blocks of more than one value."""
    return any(gguf.GGML_QUANT_SIZES[tensor.type][0] > 1 for tensor in GgufFile(path).tensors.values())


def iterate_gguf(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the file's tensors, dequantized to float32, with their transformers names and layouts.

    Experts come one by one, because all experts of a layer may take a GiB in float32.
    """
    file = GgufFile(path)
    num_heads = file.number("{arch}.attention.head_count")
    heads = {"attn_q": num_heads, "attn_k": file.number("{arch}.attention.head_count_kv", num_heads)}
    for name in filter(_is_weight, file.tensors):
        parts = name.split(".")
        module = parts[-2] if len(parts) > 1 else name
        for hf_name, shape, expert in _split_experts(file.tensors[name]):
            array = file.floats(name, expert)
            if file.arch == "llama" and module in heads:
                array = _with_whole_halves(array, heads[module])
            yield hf_name, torch.from_numpy(np.require(array.reshape(shape), requirements="W"))


def _with_whole_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Return the rows of query or key heads with the first half of each head before the second, as in transformers.

    llama.cpp rotates neighboring rows, so its converter interleaves the two halves.
    """
    if len(rows) % (2 * num_heads):
        return rows  # the loader refuses this size
    pairs = rows.reshape((num_heads, -1, 2, *rows.shape[1:]))
    return pairs.swapaxes(1, 2).reshape(rows.shape)
