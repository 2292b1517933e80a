"""Read GGUF files: config, weights and tokenizer, as in the transformers checkpoint they were converted from."""

import json
import logging
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
import numpy as np
import torch
from packaging.version import Version
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from nanovllm.arithmetic import ceil_div, is_power_of_2
from nanovllm.checkpoints.files import regular_file
from nanovllm.checks import shown
from nanovllm.layers.moe import MoEConfig
from nanovllm.library_errors import refusing
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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
# The numpy dtype of each scalar type of metadata, by its number in the format.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING = 8
_ARRAY = 9
_MAX_DIMS = 4
# Types of tokens that a text may have whole: control tokens are special, user-defined ones are not.
_CONTROL = 3
_USER_DEFINED = 4
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
# For these pre-tokenizers llama.cpp adds BOS by default, and looks up whole words before it merges.
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
# Pre-tokenizers that split text like those of Llama 3, Qwen, GPT-4o or Tekken. transformers knows these names.
_KNOWN_SPLITS = _WHOLE_WORDS | {"dbrx", "deepseek-r1-qwen", "f2llmv2", "gpt-4o", "jina-v5-nano", "kanana2", "kormo"}
_KNOWN_SPLITS |= {"llama4", "megrez", "minimax-m2", "qwen2", "qwen35", "smaug-bpe", "talkie"}
# These split text like GPT-2's, which transformers uses for names that it does not know.
_GPT2_SPLITS = {"gpt-2", "phi-2", "olmo", "jais", "mpt", "trillion"}
# These split digits from each other first, and then like GPT-2's.
_DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


@dataclass(frozen=True)
class _Tensor:
    """A tensor's header.

    Attributes:
        shape: as in transformers: the reverse of the file's.
        start, end: offsets of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    start: int
    end: int


class _GgufFile:
    """A memory-mapped GGUF file.

    `get` and `number` read its metadata; "{arch}" in a key stands for the architecture.

    Raises:
        ValueError: the file breaks the format, or a count or an offset points outside the file.
    """

    def __init__(self, path: Path):
        self.path = regular_file(path)
        self.arch = ""
        with refusing(f"{path} is not a GGUF file that can be read", OSError, ValueError, struct.error, RecursionError):
            self.data = np.memmap(path, mode="r").data
            self.offset = 0
            self.metadata, self.tensors = self._parse()
        arch = self.get("general.architecture")
        if arch is None:
            raise ValueError(f"{path} lacks the metadata general.architecture")
        if not isinstance(arch, str):
            raise ValueError(f"{path}: general.architecture must be a text, got {shown(arch)}")
        self.arch = arch

    def _parse(self) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        magic, version = self._unpack("<4sI")
        if magic != b"GGUF":
            raise ValueError("it does not start with GGUF")
        if version & 0xFFFF == 0:
            raise unsupported("a big-endian GGUF file")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; it must be 2 or 3")
        num_tensors, num_fields = self._unpack("<QQ")
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):  # a wrong count ends at the end of the file: each field takes some bytes
            key = self._text()
            if key in metadata:
                raise ValueError(f"it has the metadata {shown(key)} twice")
            metadata[key] = self._value(self._integer("<I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        return metadata, self._locate(infos, metadata.get("general.alignment", 32))

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return values

    def _integer(self, layout: str) -> int:
        return self._unpack(layout)[0]

    def _bytes(self, size: int) -> memoryview:
        if size > len(self.data) - self.offset:
            raise ValueError(f"a value has {size} bytes at offset {self.offset}, but the file ends at {len(self.data)}")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def _text(self) -> str:
        return str(self._bytes(self._integer("<Q")), "utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            kind, count = self._unpack("<IQ")
            if kind not in _SCALARS:
                return [self._value(kind) for _ in range(count)]
            return np.frombuffer(self._bytes(count * np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])
        if kind not in _SCALARS:
            raise ValueError(f"it has a value of the unknown type {kind} at {self.offset}")
        return np.frombuffer(self._bytes(np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])[0].item()

    def _tensor_info(self) -> _Tensor:
        """Read a tensor's header. Its `start` and `end` still count from the first tensor."""
        name = self._text()
        num_dims = self._integer("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"the tensor {shown(name)} must have 1 to {_MAX_DIMS} dimensions, got {num_dims}")
        shape = self._unpack(f"<{num_dims}Q")[::-1]
        kind, start = self._unpack("<IQ")
        kind = gguf.GGMLQuantizationType(kind)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block_size:
            raise ValueError(f"the tensor {shown(name)} has rows of {shape[-1]}, in blocks of {block_size}")
        end = start + math.prod(shape) // block_size * block_bytes
        return _Tensor(name=name, shape=shape, type=kind, start=start, end=end)

    def _locate(self, infos: list[_Tensor], alignment: Any) -> dict[str, _Tensor]:
        """Return the tensors by name, with offsets in the file. Raise ValueError if two of them overlap."""
        if type(alignment) is not int or not is_power_of_2(alignment):
            raise ValueError(f"its alignment must be a power of two, got {shown(alignment)}")
        first = ceil_div(self.offset, alignment) * alignment
        tensors = {info.name: replace(info, start=first + info.start, end=first + info.end) for info in infos}
        if len(tensors) < len(infos):
            raise ValueError("two of its tensors have the same name")
        in_order = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end))
        for tensor in in_order:
            if tensor.start % alignment or tensor.end > len(self.data):
                raise ValueError(
                    f"the tensor {shown(tensor.name)} is from {tensor.start} to {tensor.end}; it must start at a "
                    f"multiple of {alignment} and end within the file's {len(self.data)} bytes"
                )
        for first_tensor, second in pairwise(in_order):
            if first_tensor.end > second.start:
                raise ValueError(f"the tensors {shown(first_tensor.name)} and {shown(second.name)} overlap")
        return tensors

    def get(self, key: str, default: Any = None) -> Any:
        """Return the metadata, or `default` if it is missing."""
        value = self.metadata.get(key.format(arch=self.arch), default)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def number(self, key: str, default: float | None = None) -> Any:
        """Return the metadata. Raise ValueError if it is not a number, or is missing without a default."""
        value = self.get(key, default)
        if type(value) not in (int, float):
            key = key.format(arch=self.arch)
            raise ValueError(f"{self.path} must have a number as its metadata {key}, got {shown(value)}")
        return value

    def floats(self, name: str, expert: int | None = None) -> np.ndarray:
        """Return the tensor, or its part of one expert, dequantized to float32."""
        tensor = self.tensors[name]
        data = np.frombuffer(self.data[tensor.start : tensor.end], np.uint8)
        data = data.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type))
        try:
            return gguf.dequantize(data if expert is None else data[expert], tensor.type)
        except NotImplementedError as error:
            raise unsupported(f"the quantization of the GGUF tensor {name:.200}, {tensor.type.name},") from error


def _rope_scaling(file: _GgufFile) -> dict[str, Any] | None:
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
    betas = {name: file.get(f"{{arch}}.rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    given = {name: value for name, value in betas.items() if value is not None}
    scaling = {"rope_type": rope_type, "factor": factor, "original_max_position_embeddings": original, **given}
    if rope_type == "yarn":
        _check_neutral(file, {"rope.scaling.yarn_ext_factor": (1, -1)})
        attn_factor = file.number("{arch}.rope.scaling.attn_factor", 1)
        if attn_factor != 1 and factor > 0:  # it multiplies what YaRN scales by; ModelConfig refuses other factors
            scaling["attention_factor"] = attn_factor * (1 + 0.1 * math.log(max(factor, 1)))
    return scaling


def _check_neutral(file: _GgufFile, values: dict[str, tuple[float, ...]]) -> None:
    """Refuse a file that sets one of these metadata to another value than those that change no result."""
    for key, neutral in values.items():
        value = file.get(f"{{arch}}.{key}")
        if value is not None and value not in neutral:
            raise unsupported(f"a GGUF file with {file.arch}.{key}={shown(value)}")


def _num_layers(file: _GgufFile) -> int:
    num_layers = checked_option("num_layers", file.number("{arch}.block_count"), int)
    if num_layers > MAX_LAYERS:
        raise ValueError(f"the model's num_layers must be at most {MAX_LAYERS}, got {num_layers}")
    return num_layers


def _moe(file: _GgufFile) -> MoEConfig | None:
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


def _end_ids(file: _GgufFile, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text: those that the file names, and those with one of _END_TEXTS."""
    keys = [f"tokenizer.ggml.{key}_token_id" for key in _END_KEYS]
    named = [file.number(key) for key in keys if key in file.metadata]
    tokens = file.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(text, str) for text in tokens):
        raise ValueError(f"{file.path} must have a list of texts as its metadata tokenizer.ggml.tokens")
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
    file = _GgufFile(path)
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
    if (file.number("{arch}.attention.sliding_window", 0) or max_position) < max_position:
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


def _sampling_defaults(file: _GgufFile) -> dict[str, Any]:
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


def read_tokenizer(path: Path, **options: Any) -> "PreTrainedTokenizerBase":
    """Return the file's transformers tokenizer. Other files of its folder may belong to another model.

    Args:
        options: of transformers' tokenizers, instead of the file's.

    Raises:
        ValueError: transformers is too old to read such tokenizers right.
    """
    import transformers
    from transformers import PreTrainedTokenizerFast

    if Version(transformers.__version__) < Version("5.18"):
        raise ValueError(
            f"transformers must be 5.18 or later for tokenizers of GGUF files, got {transformers.__version__}"
        )
    file = _GgufFile(path)
    is_bpe = file.get("tokenizer.ggml.model") == "gpt2"
    split = file.get("tokenizer.ggml.pre", "default")
    if is_bpe:
        _check_split(path, split)
    whole_words = is_bpe and split in _WHOLE_WORDS
    # `from_pretrained` would also read the tokenizer files in the folder.
    tokenizer = PreTrainedTokenizerFast(name_or_path=str(path.parent), gguf_file=path.name, **options)
    if state := _corrected_state(tokenizer, file):
        backend = Tokenizer.from_str(json.dumps(state))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.init_kwargs)
    backend = tokenizer.backend_tokenizer
    if whole_words:
        backend.model.ignore_merges = True
    # transformers before 5.23 ignores the file's flags, and later ones prefer them to the options.
    for name, default in (("add_bos_token", whole_words or not is_bpe), ("add_eos_token", False)):
        flag = options.get(name)
        setattr(tokenizer, name, file.get(f"tokenizer.ggml.{name}", default) if flag is None else flag)
    if is_bpe and split in _DIGIT_SPLITS:
        digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if not is_bpe:
        # Like llama.cpp and SentencePiece: the space comes before each part of the text that starts it or follows a
        # special token, also if that part has one already. Metaspace of tokenizers leaves it out there.
        prefix = [] if file.get("tokenizer.ggml.add_space_prefix", True) is False else [normalizers.Prepend("▁")]
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return tokenizer


def _corrected_state(tokenizer: "PreTrainedTokenizerFast", file: _GgufFile) -> dict[str, Any] | None:
    """Return a tokenizer's state with all control and user-defined tokens of the file. Return None if it has them.

    transformers leaves out tokens whose text is not in the byte alphabet, such as `<｜User｜>` of DeepSeek. It adds
    tokens that the model does not have: one for the text of such a BOS, and GPT-2's `<|endoftext|>`.
    """
    texts = file.get("tokenizer.ggml.tokens")
    specials = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")]
    is_special = {i: True for i in specials if i in range(len(texts))}
    for i, kind in enumerate(file.get("tokenizer.ggml.token_type", [])[: len(texts)]):
        if kind in (_CONTROL, _USER_DEFINED):
            is_special[i] = kind == _CONTROL
    found = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    right = {i for i, text in found.items() if texts[i : i + 1] == [text]}
    if is_special.keys() <= right == found.keys():
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    spelled = {i: text for text, i in state["model"]["vocab"].items()} | {i: texts[i] for i in is_special}
    state["model"]["vocab"] = {spelled.get(i, text): i for i, text in enumerate(texts)}
    plain_match = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {token["id"]: token for token in state["added_tokens"] if token["id"] in right}
    for i in is_special.keys() - added.keys():
        added[i] = {"id": i, "content": texts[i], "special": is_special[i], **plain_match}
    state["added_tokens"] = [added[i] for i in sorted(added)]
    state["post_processor"] = None  # it has the wrong id of BOS; PreTrainedTokenizerFast makes it again
    return state


def _check_split(path: Path, split: Any) -> None:
    """Raise ValueError unless this pre-tokenizer of a BPE vocabulary is known."""
    if split == "default":
        logger.warning("%s does not name its pre-tokenizer; GPT-2's is used, which may not be the model's", path)
        return
    known = sorted(_KNOWN_SPLITS | _GPT2_SPLITS | _DIGIT_SPLITS)
    if split not in known:
        raise unsupported(f"the pre-tokenizer tokenizer.ggml.pre={shown(split)} of {path} (known: {', '.join(known)})")


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


def _split_experts(tensor: _Tensor) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Iterate over transformers names, shapes and experts of the matrices in a tensor. Others are whole: no expert."""
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
    weights = [tensor for tensor in _GgufFile(path).tensors.values() if _is_weight(tensor.name)]
    return {name: shape for tensor in weights for name, shape, _ in _split_experts(tensor)}


def has_quantized(path: Path) -> bool:
    """Return whether the file has quantized tensors, which have blocks of more than one value."""
    return any(gguf.GGML_QUANT_SIZES[tensor.type][0] > 1 for tensor in _GgufFile(path).tensors.values())


def iterate_gguf(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the file's tensors, dequantized to float32, with their transformers names and layouts.

    Experts come one by one, because all experts of a layer may take a GiB in float32.
    """
    file = _GgufFile(path)
    num_heads = file.number("{arch}.attention.head_count")
    heads = {"attn_q": num_heads, "attn_k": file.number("{arch}.attention.head_count_kv", num_heads)}
    for name in filter(_is_weight, file.tensors):
        module = name.split(".")[-2:][0]
        for hf_name, shape, expert in _split_experts(file.tensors[name]):
            array = file.floats(name, expert)
            # The loader refuses a size that the heads do not divide.
            if file.arch == "llama" and module in heads and len(array) % (2 * heads[module]) == 0:
                # llama.cpp rotates neighboring pairs, so its converter interleaves the halves of each head's rows.
                pairs = array.reshape((heads[module], -1, 2, *array.shape[1:]))
                array = pairs.swapaxes(1, 2)
            yield hf_name, torch.from_numpy(np.require(array.reshape(shape), requirements="W"))
