"""Text and token ids: a model's tokenizer, and bounds that refuse too long a text early."""

import copy
from numbers import Integral
from typing import TYPE_CHECKING, Any

from nanovllm.checkpoints.model_source import ModelSource
from nanovllm.checks import check_in_vocabulary, is_list, length, shown
from nanovllm.engine.detokenizer import TokenBytes
from nanovllm.library_errors import refusing_panics
from nanovllm.utils.loaded_once import loaded_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Bounds the characters of a token: no vocabulary has a longer one. A text with more characters than this for each token
# of max_model_len is refused before it is tokenized.
_MAX_CHARS_PER_TOKEN = 1024
# Few texts have more characters a token. Those that do are tokenized in pieces first, to refuse them early if they are
# too long.
_USUAL_CHARS_PER_TOKEN = 8
_PIECE_CHARS = 1 << 16


class TextCodec:
    """Encodes texts to token ids and decodes token ids. Several threads may use it at the same time.

    Args:
        source: the model, which has the tokenizer and the vocabulary size.
        max_model_len: texts of more tokens are refused.
        skip_tokenizer_init: use no tokenizer, even if the model has one.

    Attributes:
        has_tokenizer: whether there is a tokenizer to use.
    """

    def __init__(self, source: ModelSource, max_model_len: int, skip_tokenizer_init: bool = False):
        self.source = source
        self.max_model_len = max_model_len
        self.skip_tokenizer_init = skip_tokenizer_init
        self.vocab_size = source.config.vocab_size
        self.has_tokenizer = source.has_tokenizer and not skip_tokenizer_init
        self._token_bytes: dict[bool, TokenBytes] = {}

    @property
    def max_chars(self) -> int:
        """No text that fits has more characters."""
        return _MAX_CHARS_PER_TOKEN * self.max_model_len

    @loaded_once
    def tokenizer(self):
        """The model's transformers tokenizer, loaded when it is first used."""
        if self.skip_tokenizer_init:
            raise ValueError("skip_tokenizer_init is set, so there is no tokenizer: give prompts as token ids")
        return self.source.tokenizer()

    @loaded_once
    def backend(self) -> "Tokenizer":
        """The engine's copy of the tokenizer's backend.

        `tokenizer` belongs to the caller, who may use it while the engine encodes: each call with truncation or padding
        sets them in its backend.
        """
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return backend

    @loaded_once
    def end_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text: those that the model's configs name, and the tokenizer's, as in vLLM.

        The configs of a model that was tuned to chat may still name the end token of its base model.
        """
        ids = self.source.config.eos_token_ids
        tokenizer_id: Any = None
        if self.has_tokenizer:
            tokenizer_id = self.tokenizer.eos_token_id
        elif self.source.has_tokenizer and not ids:  # even with `skip_tokenizer_init`, a text must end
            tokenizer_id = self.source.tokenizer().eos_token_id
        if tokenizer_id is None or tokenizer_id in ids or tokenizer_id >= self.vocab_size:
            return ids
        return (*ids, tokenizer_id)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text, by default without the special tokens that start or end a prompt."""
        return self.encode_all([text], add_special_tokens)[0]

    def encode_all(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Return the token ids of each text; see `encode`."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                at = error.start
                message = f"the text has a lone surrogate, {text[at]!r} at index {at}, which no tokenizer can read"
                raise ValueError(message) from None
        with refusing_panics("the text cannot be tokenized"):
            # A batch, because only that releases the GIL.
            found = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in found]

    def encode_bounded(self, text: str, add_special_tokens: bool) -> list[int]:
        """Do the same as `encode`, but refuse a text of far too many tokens for `max_model_len`."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {shown(text)}")
        self.check_text("text", text)
        return self.encode(text, add_special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        if not is_list(token_ids):
            raise TypeError(f"tokens must be a list of token ids, got {shown(token_ids)}")
        if (num_tokens := length(token_ids)) > self.max_model_len:
            raise self.too_long(f"tokens are {num_tokens} ids")
        token_ids = self.checked_ids("tokens", list(token_ids))
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_bytes(self, skip_special_tokens: bool) -> TokenBytes:
        """Return the bytes of each token, which make the text of outputs."""
        if skip_special_tokens not in self._token_bytes:
            self._token_bytes[skip_special_tokens] = TokenBytes(self.backend, skip_special_tokens)
        return self._token_bytes[skip_special_tokens]

    # -- checks --------------------------------------------------------------------------------------------------------

    def checked_ids(self, name: str, token_ids: list) -> list[int]:
        """Return token ids as Python's integers. Raise if one is no integer, or not in the vocabulary."""
        # Prompts are long, so a right one is not checked by a loop in Python.
        if set(map(type, token_ids)) != {int}:
            for token_id in token_ids:
                if isinstance(token_id, bool) or not isinstance(token_id, Integral):
                    raise TypeError(f"each id of {name} must be an integer, got {shown(token_id)}")
            token_ids = list(map(int, token_ids))
        check_in_vocabulary(name, token_ids, self.vocab_size)
        return token_ids

    def check_text(self, name: str, text: str) -> None:
        """Refuse a text of far too many tokens before all of it is tokenized, which would take long."""
        self.check_chars(name, len(text))
        if len(text) <= _USUAL_CHARS_PER_TOKEN * self.max_model_len:
            return
        num_tokens = 0
        for start in range(0, len(text), _PIECE_CHARS):
            num_tokens += len(self.encode(text[start : start + _PIECE_CHARS]))
            # The pieces may have a few more tokens than the whole, so this is not exact.
            if num_tokens > 2 * self.max_model_len:
                at_least = num_tokens // 2  # this part of the text has more tokens, however it is split
                raise self.too_long(f"{name}: {len(text)} characters are more than {at_least} tokens")

    def too_long(self, subject: str) -> ValueError:
        """Return the error of an input that is too long. Clients of OpenAI's API look for its last words."""
        limit = self.max_model_len
        reason = f"this model's maximum context length is {limit} tokens, including the output"
        return ValueError(f"{subject}, too many for max_model_len={limit}: {reason}")

    def check_chars(self, name: str, num_chars: int) -> None:
        """Refuse a text of so many characters that it has too many tokens, whatever they are."""
        if num_chars > self.max_chars:
            raise self.too_long(f"{name}: {num_chars} characters")
