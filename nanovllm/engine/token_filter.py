"""Which tokens a request may draw next. No torch here.

A filter's answer is a bit mask over the vocabulary: int32 words, bit i % 32 of word i // 32 is token i's. One that
depends on the output so far is asked once the host knows all of it, which with a step in flight is every second step;
other rows go on meanwhile.
"""

from collections import deque
from collections.abc import Callable, Iterable
from copy import copy

import numpy as np

from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

# A small model may choose white space for ever where it is free to.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _packed(allowed: np.ndarray) -> np.ndarray:
    return np.packbits(allowed, bitorder="little").view(np.int32)


class TokenFilter:
    """Allowed tokens, without those that would complete a bad word.

    Args:
        allowed: which tokens are allowed at all, bools; a multiple of 32 of them.
        bad_words: token ids of each spelling.
        end_ids: the sampler never draws these as one of the first `min_tokens`.

    Attributes:
        depends_on_output: whether `mask` does.
        is_complete: whether nothing can follow.
        error: why it cannot be said what may follow; None if it can.
    """

    is_complete, error = False, None

    def __init__(self, allowed: np.ndarray, bad_words: list[tuple[int, ...]], end_ids: Iterable[int], min_tokens: int):
        self.end_ids, self.num_unending = list(end_ids), min_tokens
        self.allowed = allowed.copy()
        self.allowed[[word[0] for word in bad_words if len(word) == 1]] = False
        self.words = _packed(self.allowed)
        self.bad_words = [list(word) for word in bad_words if len(word) > 1]
        self.depends_on_output = bool(self.bad_words)
        self.last: deque[int] = deque(maxlen=max(map(len, self.bad_words), default=1) - 1)

    def copy(self) -> "TokenFilter":
        """One for another sample, which shares all that does not change."""
        other = copy(self)
        other.last = self.last.copy()
        return other

    def accept(self, token_id: int) -> None:
        """Take in a token that was drawn."""
        self.last.append(token_id)
        self.num_unending -= 1

    def has_any(self, allowed: np.ndarray) -> bool:
        """Whether one of the tokens `allowed` can be drawn next."""
        return bool((np.delete(allowed, self.end_ids) if self.num_unending > 0 else allowed).any())

    def mask(self) -> np.ndarray:
        """The tokens that may be drawn next; all that are allowed if bad words left none."""
        last = list(self.last)
        ends = [end for *begin, end in self.bad_words if last[-len(begin) :] == begin]
        if not ends:
            return self.words
        allowed = self.allowed.copy()
        allowed[ends] = False
        return _packed(allowed) if self.has_any(allowed) else self.words


class GrammarFilter:
    """Tokens that the grammar of a structured output lets follow, by llguidance.

    Args:
        tokenizer: llguidance's, from `grammar_tokenizer`.
        grammar: from `compile_grammar`.

    Raises:
        ValueError: the grammar means nothing, or no token can be its first.
    """

    depends_on_output = True

    def __init__(self, tokenizer, grammar: str, vocab_size: int):
        from llguidance import LLMatcher

        self.matcher, self.num_words = LLMatcher(tokenizer, grammar, log_level=0), -(-vocab_size // 32)
        self.mask()  # finds out the rest
        if self.error:
            raise ValueError(f"structured_outputs cannot be followed: {self.error}")

    def copy(self) -> "GrammarFilter":
        """One for another sample; compiling the grammar again may take a second."""
        other = copy(self)
        other.matcher = self.matcher.deep_copy()
        return other

    @property
    def is_complete(self) -> bool:
        return self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """It may also come up on the way: llguidance bounds the work that a grammar makes."""
        if not self.matcher.is_error():
            return None
        what = self.matcher.get_error().partition("\n<state>")[0]
        return "no token can follow" if what == "NoExtensionBias" else what

    def accept(self, token_id: int) -> None:
        self.matcher.consume_token(token_id)

    def mask(self) -> np.ndarray:
        from llguidance.numpy import fill_next_token_bitmask

        mask = np.zeros((1, self.num_words), dtype=np.int32)
        fill_next_token_bitmask(self.matcher, mask)
        return mask[0]


def grammar_tokenizer(tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]):
    """What llguidance makes of a transformers tokenizer, in about a second; ValueError if it cannot."""
    try:
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise ValueError("structured_outputs need the llguidance package: pip install 'nanovllm[structured]'") from None
    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
    except Exception as error:  # it raises what it likes
        what = f"{len(tokenizer)} tokens, where the model has {vocab_size}"
        raise ValueError(f"structured_outputs cannot be had with this tokenizer of {what}: {error}") from error


def compile_grammar(params: StructuredOutputsParams) -> str:
    """`params` in llguidance's own notation; ValueError if they mean nothing."""
    from llguidance import LLMatcher, grammar_from

    try:
        if params.json is not None:
            return LLMatcher.grammar_from_json_schema(params.json, defaults=_JSON_STYLE)
        if params.choice is not None:
            return grammar_from("regex", "|".join(map(_literal, params.choice)))  # a grammar's could be 2000 at most
        if params.regex is not None:
            return grammar_from("regex", params.regex)
        return grammar_from("grammar", params.grammar)
    except Exception as error:  # of any kind, depending on the notation
        raise ValueError(f"structured_outputs cannot be read: {error}") from None


def _literal(text: str) -> str:
    """A regular expression that `text` alone matches."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def make_filter(
    params: SamplingParams, vocab_size: int, encode: Callable[[str], list[int]], end_ids: Iterable[int]
) -> TokenFilter | None:
    """The filter of `allowed_token_ids` and `bad_words`, None if there are none; ValueError if no token is left."""
    if params.allowed_token_ids is None and not params.bad_words:
        return None
    allowed = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
    allowed[slice(vocab_size) if params.allowed_token_ids is None else list(params.allowed_token_ids)] = True
    # Alone and after a space: most tokenizers spell a word differently there.
    spellings = {tuple(encode(prefix + word.lstrip())) for word in params.bad_words for prefix in ("", " ")}
    token_filter = TokenFilter(allowed, sorted(spellings - {()}), end_ids, params.min_tokens)
    if not token_filter.has_any(token_filter.allowed):
        raise ValueError("min_tokens, allowed_token_ids and bad_words leave no token that could be drawn first")
    return token_filter
