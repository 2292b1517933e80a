"""GGUF files: config, weights and tokenizer, all in terms of the transformers checkpoint they were made from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from nanovllm.models.registry import FAMILIES, ModelConfig, check_model_type, default_head_dim, token_ids, unsupported

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
}


class _File(gguf.GGUFReader):
    """A memory-mapped GGUF file; `get` and `number` read its metadata, with "{arch}" standing for the architecture."""

    def __init__(self, path: Path):
        try:
            super().__init__(path)
        except Exception as error:  # gguf raises what it likes
            raise ValueError(f"{path} is not a GGUF file that can be read: {error}") from error
        self.path = path
        self.by_name = {tensor.name: tensor for tensor in self.tensors}
        self.arch = self.get("general.architecture")
        if self.arch is None:
            raise ValueError(f"{path} lacks the metadata general.architecture")

    def __setattr__(self, name: str, value: Any) -> None:
        # A plain view of the mapping: the reader takes a slice for each of the vocabulary's strings, and slices of a
        # np.memmap cost four times as much.
        super().__setattr__(name, np.asarray(value) if name == "data" else value)

    def get(self, key: str, default: Any = None) -> Any:
        field = self.get_field(key.format(arch=getattr(self, "arch", None)))
        return default if field is None else field.contents()

    def number(self, key: str, default: float | None = None) -> Any:
        """As `get`; ValueError if it is no number, or missing without a default."""
        value = self.get(key, default)
        if type(value) not in (int, float):
            key = key.format(arch=self.arch)
            raise ValueError(f"{self.path} must have a number as its metadata {key}, got {value!r:.80}")
        return value

    def floats(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32."""
        tensor = self.by_name[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise unsupported(f"the quantisation of the GGUF tensor {name}, {tensor.tensor_type.name},") from error


def _rope_scaling(file: _File) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.by_name:
        return {"rope_type": "frequency_factors", "factors": file.floats("rope_freqs.weight").tolist()}
    factor = file.get("{arch}.rope.scaling.factor")
    rope_type = file.get("{arch}.rope.scaling.type", "linear" if factor else "none")  # as llama.cpp reads it
    if rope_type == "none":
        return None
    original = file.number("{arch}.rope.scaling.original_context_length", file.number("{arch}.context_length"))
    return {"rope_type": rope_type, "factor": factor, "original_max_position_embeddings": original}


def read_gguf(path: Path) -> tuple[ModelConfig, bool]:
    """The config of a GGUF file, and whether it has a tokenizer; ValueError if it is not supported."""
    file = _File(path)
    check_model_type(file.arch)
    hidden_size, num_heads = file.number("{arch}.embedding_length"), file.number("{arch}.attention.head_count")
    head_dim = file.number("{arch}.attention.key_length", default_head_dim(hidden_size, num_heads))
    max_position = file.number("{arch}.context_length")
    if file.number("split.count", 1) > 1:
        raise unsupported("a GGUF model that is split over several files")
    if file.number("{arch}.expert_count", 0):
        raise unsupported("a mixture of experts")
    if (file.number("{arch}.attention.sliding_window", 0) or max_position) < max_position:
        raise unsupported("sliding-window attention")
    if file.number("{arch}.rope.dimension_count", head_dim) != head_dim:
        raise unsupported("partial RoPE")
    embedding = file.by_name.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight, a matrix")
    eos_keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    config = ModelConfig(
        model_type=file.arch,
        vocab_size=int(embedding.shape[1]),
        hidden_size=hidden_size,
        intermediate_size=file.number("{arch}.feed_forward_length"),
        num_layers=file.number("{arch}.block_count"),
        num_heads=num_heads,
        num_kv_heads=file.number("{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=file.number("{arch}.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in file.by_name,
        rope_theta=file.number("{arch}.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file),
        qk_norm=FAMILIES[file.arch].get("qk_norm", False),
        qkv_bias="blk.0.attn_q.bias" in file.by_name,
        o_bias="blk.0.attn_output.bias" in file.by_name,
        mlp_bias="blk.0.ffn_gate.bias" in file.by_name,
        dtype={"F32": torch.float32, "F16": torch.float16}.get(embedding.tensor_type.name, torch.bfloat16),
        eos_token_ids=tuple(dict.fromkeys(token_ids([file.get(key) for key in eos_keys if file.get_field(key)]))),
    )
    return config, file.get_field("tokenizer.ggml.tokens") is not None


def _hf_name(name: str) -> str:
    """The transformers name of a GGUF tensor; one that is not known keeps its own, which the loader will refuse."""
    match name.split("."):
        case ["blk", layer, part, kind] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
        case [part, kind] if part in _NAMES:
            return f"{_NAMES[part]}.{kind}"
    return name


def iterate_gguf(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The file's tensors as float32, one at a time, with their transformers names and layout."""
    file = _File(path)
    num_heads = file.number("{arch}.attention.head_count")
    heads = {"attn_q": num_heads, "attn_k": file.number("{arch}.attention.head_count_kv", num_heads)}
    for name in file.by_name:
        if name == "rope_freqs.weight":  # part of the config
            continue
        array = file.floats(name)
        part = name.split(".")[-2:][0]
        if file.arch == "llama" and part in heads and len(array) % (2 * heads[part]) == 0:  # else the loader refuses it
            # llama.cpp rotates neighbouring pairs, so its converter interleaves the halves of each head's rows.
            halves = array.reshape(heads[part], -1, 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        yield _hf_name(name), torch.from_numpy(np.require(array, requirements="W"))
