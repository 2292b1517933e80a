"""The tokenizers of GGUF files, as those of the transformers checkpoints that they were converted from."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from nanovllm.checkpoints.gguf_file import GgufFile
from nanovllm.checks import shown
from nanovllm.models.model_config import unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# Types of tokens that a text may have whole: control tokens are special, user-defined ones are not.
_CONTROL = 3
_USER_DEFINED = 4
_SPECIAL_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding"))
# For these pre-tokenizers llama.cpp adds BOS by default, and looks up whole words before it merges.
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
# Pre-tokenizers that split text like those of Llama 3, Qwen, GPT-4o or Tekken. transformers knows these names.
_KNOWN_SPLITS = _WHOLE_WORDS | {"dbrx", "deepseek-r1-qwen", "f2llmv2", "gpt-4o", "jina-v5-nano", "kanana2", "kormo"}
_KNOWN_SPLITS |= {"llama4", "megrez", "minimax-m2", "qwen2", "qwen35", "smaug-bpe", "talkie"}
# These split text like GPT-2's, which transformers uses for names that it does not know.
_GPT2_SPLITS = {"gpt-2", "phi-2", "olmo", "jais", "mpt", "trillion"}
# These split digits from each other first, and then like GPT-2's.
_DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

_TEMPLATE = "tokenizer.chat_template"


def read_tokenizer(path: Path, **options: Any) -> "PreTrainedTokenizerBase":
    """Return the file's transformers tokenizer. Other files of its folder may belong to another model.

    Args:
        options: of transformers' tokenizers, instead of the file's.

    Raises:
        ValueError: transformers is too old to read such tokenizers right, or metadata has a wrong type or length.
    """
    import transformers
    from transformers import PreTrainedTokenizerFast

    if Version(transformers.__version__) < Version("5.18"):
        raise ValueError(
            f"transformers must be 5.18 or later for tokenizers of GGUF files, got {transformers.__version__}"
        )
    file = GgufFile(path)
    _check_types(file)
    is_bpe = file.get("tokenizer.ggml.model") == "gpt2"
    split = file.get("tokenizer.ggml.pre", "default")
    if is_bpe:
        _check_split(path, split)
    whole_words = is_bpe and split in _WHOLE_WORDS
    unknown = _unknown_specials(file)
    with file.metadata_file(without=unknown) if unknown else nullcontext(path) as source:
        # `from_pretrained` would also read the tokenizer files in the folder.
        tokenizer = PreTrainedTokenizerFast(name_or_path=str(source.parent), gguf_file=source.name, **options)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(path.parent)
    if state := _corrected_state(tokenizer, file, unknown):
        backend = Tokenizer.from_str(json.dumps(state))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.init_kwargs)
    backend = tokenizer.backend_tokenizer
    if whole_words:
        backend.model.ignore_merges = True
    # transformers before 5.23 ignores the file's flags, and later ones prefer them to the options.
    for name, default in (("add_bos_token", whole_words or not is_bpe), ("add_eos_token", False)):
        flag = options.get(name)
        if flag is None:
            flag = file.flag(f"tokenizer.ggml.{name}", default)
        setattr(tokenizer, name, flag)
    if is_bpe and split in _DIGIT_SPLITS:
        digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if templates := _named_templates(file):
        tokenizer.chat_template = templates
    if not is_bpe:
        # Like llama.cpp and SentencePiece: the space comes before each part of the text that starts it or follows a
        # special token, also if that part has one already. Metaspace of tokenizers leaves it out there.
        prefix = [normalizers.Prepend("▁")] if file.flag("tokenizer.ggml.add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return tokenizer


def _corrected_state(tokenizer: "PreTrainedTokenizerFast", file: GgufFile, unknown: set[str]) -> dict[str, Any] | None:
    """Return a tokenizer's state with exactly the file's control and user-defined tokens. Return None if it has them.

    transformers leaves out tokens whose text is not in the byte alphabet, such as `<｜User｜>` of DeepSeek. It adds
    tokens that the model does not have: one for the text of such a BOS, and GPT-2's `<|endoftext|>`.
    """
    texts = file.texts("tokenizer.ggml.tokens")
    # For each added token, by its id.
    is_special = {file.get(key): True for key in _SPECIAL_KEYS if key in file.metadata and key not in unknown}
    for i, kind in enumerate(file.get("tokenizer.ggml.token_type", [])):
        if kind in (_CONTROL, _USER_DEFINED):
            is_special[i] = kind == _CONTROL
    found = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    correct_ids = {i for i, text in found.items() if texts[i : i + 1] == [text]}
    has_all = is_special.keys() <= correct_ids
    if has_all and correct_ids == found.keys():
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Added tokens get the file's spelling. Others keep transformers'.
    spellings = {i: text for text, i in state["model"]["vocab"].items()}
    spellings |= {i: texts[i] for i in is_special}
    state["model"]["vocab"] = {spellings.get(i, text): i for i, text in enumerate(texts)}
    plain_match = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {token["id"]: token for token in state["added_tokens"] if token["id"] in correct_ids}
    for i in is_special.keys() - added.keys():
        added[i] = {"id": i, "content": texts[i], "special": is_special[i], **plain_match}
    state["added_tokens"] = [added[i] for i in sorted(added)]
    state["post_processor"] = None  # it has the wrong id of BOS; PreTrainedTokenizerFast makes it again
    return state


def _check_types(file: GgufFile) -> None:
    """Raise ValueError if metadata of the tokenizer has a wrong type, or a list not one entry for each token."""
    num_tokens = len(file.texts("tokenizer.ggml.tokens"))
    file.texts("tokenizer.ggml.merges")
    for key, kinds in (("tokenizer.ggml.token_type", (int,)), ("tokenizer.ggml.scores", (int, float))):
        values = file.get(key, [0] * num_tokens)
        if not isinstance(values, list) or len(values) != num_tokens or any(type(v) not in kinds for v in values):
            raise ValueError(f"{file.path} must have {num_tokens} numbers as its metadata {key}, got {shown(values)}")
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        file.flag(f"tokenizer.ggml.{name}", False)
    file.text(_TEMPLATE, "")


def _named_templates(file: GgufFile) -> dict[str, str]:
    """Return a file's chat templates by their names; none if it has one at most."""
    names = file.texts(f"{_TEMPLATE}s")
    templates = {name: file.text(f"{_TEMPLATE}.{name}") for name in names}
    if templates and _TEMPLATE in file.metadata:
        templates["default"] = file.text(_TEMPLATE)
    return templates


def _unknown_specials(file: GgufFile) -> set[str]:
    """Return the keys of special tokens that the vocabulary does not have. Warn of them, as llama.cpp does.

    Converters write -1 for a token that a model lacks, which becomes 4294967295 in files.
    """
    num_tokens = len(file.texts("tokenizer.ggml.tokens"))
    ids = {key: file.integer(key) for key in _SPECIAL_KEYS if key in file.metadata}
    unknown = {key for key, token_id in ids.items() if not 0 <= token_id < num_tokens}
    for key in sorted(unknown):
        logger.warning("Ignoring %s=%s of %s: ids go from 0 to %d", key, file.get(key), file.path, num_tokens - 1)
    return unknown


def _check_split(path: Path, split: Any) -> None:
    """Raise ValueError unless this pre-tokenizer of a BPE vocabulary is known."""
    if split == "default":
        logger.warning("%s does not name its pre-tokenizer; GPT-2's is used, which may not be the model's", path)
        return
    known = sorted(_KNOWN_SPLITS | _GPT2_SPLITS | _DIGIT_SPLITS)
    if split not in known:
        raise unsupported(f"the pre-tokenizer tokenizer.ggml.pre={shown(split)} of {path} (known: {', '.join(known)})")
