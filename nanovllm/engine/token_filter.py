"""Token filters: which tokens a request may sample next. No torch here.

A filter returns a bit mask over the vocabulary: int32 words, where bit i % 32 of word i // 32 is token i's. A mask that
depends on the output is computed once the host knows all of the output. With a step in flight this is every second
step. Other sequences go on meanwhile.
"""

from collections import deque
from collections.abc import Callable, Iterable
from copy import copy
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nanovllm.arithmetic import ceil_div
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Self


def _pack_bits(allowed: np.ndarray) -> np.ndarray:
    """Return a bool for each token as a mask."""
    return np.packbits(allowed, bitorder="little").view(np.int32)


def without(mask: np.ndarray, token_ids: Iterable[int]) -> np.ndarray:
    """Return a copy of `mask` in which `token_ids` are not allowed."""
    mask = mask.copy()
    words = mask.view(np.uint32)
    for token_id in token_ids:
        words[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    return mask


class TokenFilter(Protocol):
    """A filter of the tokens that a sequence may sample next.

    Attributes:
        depends_on_output: whether the mask depends on the tokens sampled so far.
        is_blocked: whether the newest mask allows only tokens that cannot be sampled.
    """

    depends_on_output: bool
    is_blocked: bool

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        ...

    @property
    def error(self) -> str | None:
        """Why the sequence must end, or None."""
        ...

    def copy(self) -> "Self":
        """Return a filter for another sample. It shares all that does not change."""
        ...

    def accept(self, token_id: int) -> None:
        """Take in a sampled token."""
        ...

    def compute_mask(self) -> np.ndarray:
        """Return the mask of the tokens that may be sampled next."""
        ...


class AllowedTokens:
    """The filter of `allowed_token_ids` and `bad_words`: no token may complete a bad word.

    Args:
        allowed: for each token whether it is allowed at all; padded to a multiple of 32.
        bad_words: token ids of each spelling.
        stop_ids: tokens that the sampler does not sample as one of the first `min_tokens`.

    Attributes:
        min_tokens_left: how many more tokens must come before a stop id may be sampled.
        is_blocked: whether all tokens that the newest mask should allow would complete a bad word.
    """

    is_complete = False
    is_blocked = False

    def __init__(self, allowed: np.ndarray, bad_words: list[tuple[int, ...]], stop_ids: Iterable[int], min_tokens: int):
        self.stop_ids = list(stop_ids)
        self.min_tokens_left = min_tokens
        self.allowed = allowed.copy()
        self.allowed[[word[0] for word in bad_words if len(word) == 1]] = False
        self.usual_mask = _pack_bits(self.allowed)
        # The first tokens and the last token of each longer word.
        self.bad_words = [(list(word[:-1]), word[-1]) for word in bad_words if len(word) > 1]
        self.depends_on_output = bool(self.bad_words)
        longest_start = max((len(start) for start, _ in self.bad_words), default=0)
        self.recent_ids: deque[int] = deque(maxlen=longest_start)

    def copy(self) -> "Self":
        other = copy(self)
        other.recent_ids = self.recent_ids.copy()
        return other

    @property
    def error(self) -> str | None:
        return "bad_words leave no token that could be sampled next" if self.is_blocked else None

    def accept(self, token_id: int) -> None:
        self.recent_ids.append(token_id)
        self.min_tokens_left -= 1

    def has_any(self, allowed: np.ndarray) -> bool:
        """Return whether one of the tokens `allowed` can be sampled next."""
        if self.min_tokens_left > 0:
            allowed = np.delete(allowed, self.stop_ids)
        return bool(allowed.any())

    def compute_mask(self) -> np.ndarray:
        """Return the tokens that may be sampled next. If bad words leave none, the filter is blocked from now on."""
        recent = list(self.recent_ids)
        ends = [end for start, end in self.bad_words if recent[-len(start) :] == start]
        if not ends:
            return self.usual_mask
        allowed = self.allowed.copy()
        allowed[ends] = False
        self.is_blocked = not self.has_any(allowed)
        return self.usual_mask if self.is_blocked else _pack_bits(allowed)


# Texts to tokenize a word after. After each of them, the word may have other tokens.
_ANCHORS = ("=", "a", "1", "\n")


def _spellings(words: Iterable[str], encode_all: Callable[[list[str]], list[list[int]]]) -> set[tuple[int, ...]]:
    """Return the token ids of each bad word as it is written, and after a space unless it starts with white space.

    A tokenizer may put a space before each text that it encodes, and an output does not start a text. So the ids are
    those that a word adds to another text, the anchor. After some anchors, the word's first token merges with theirs.
    """
    forms = []
    for word in words:
        forms.append(word)
        if not word[0].isspace():
            forms.append(" " + word)
    spellings = set()
    always_merged = set(forms)
    for anchor in _ANCHORS:
        anchor_ids, *anchored_ids = encode_all([anchor, *(anchor + form for form in forms)])
        for form, ids in zip(forms, anchored_ids, strict=True):
            if anchor_ids and ids[: len(anchor_ids)] == anchor_ids:
                spellings.add(tuple(ids[len(anchor_ids) :]))
                always_merged.discard(form)
    spellings.update(map(tuple, encode_all(list(always_merged))))
    return spellings - {()}


def make_filter(
    params: SamplingParams,
    vocab_size: int,
    encode_all: Callable[[list[str]], list[list[int]]],
    stop_ids: Iterable[int],
) -> AllowedTokens | None:
    """Return the filter of `allowed_token_ids` and `bad_words`, or None if there are none.

    Args:
        encode_all: returns the token ids of each text.

    Raises:
        ValueError: no token is left.
    """
    if params.allowed_token_ids is None and not params.bad_words:
        return None
    allowed = np.zeros(32 * ceil_div(vocab_size, 32), dtype=bool)
    allowed[slice(vocab_size) if params.allowed_token_ids is None else list(params.allowed_token_ids)] = True
    spellings = _spellings(params.bad_words, encode_all) if params.bad_words else ()
    # A tokenizer may have more tokens than its model, which never samples those.
    spellings = sorted(ids for ids in spellings if max(ids) < vocab_size)
    token_filter = AllowedTokens(allowed, bad_words=spellings, stop_ids=stop_ids, min_tokens=params.min_tokens)
    if not token_filter.has_any(token_filter.allowed):
        raise ValueError("min_tokens, allowed_token_ids and bad_words leave no token that could be sampled first")
    return token_filter
