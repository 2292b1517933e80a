"""Structured outputs: makes token masks of schemas, regular expressions and grammars."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.arithmetic import ceil_div
from nanovllm.engine.token_filter import without
from nanovllm.library_errors import refusing
from nanovllm.sandbox.grammars import STACK_BYTES, compile_grammar, find_error, make_tokenizer, on_deep_stack
from nanovllm.sandbox.pool import Pool

if TYPE_CHECKING:
    from llguidance import LLMatcher

_FAILURE = "structured_outputs cannot be compiled"


class GrammarFilter:
    """The token filter of a structured output: the tokens that its grammar lets follow.

    Args:
        matcher: the grammar, and how far the output has come in it.
        vocab_size: the model's vocabulary size.
        last_resort_ids: tokens that are only sampled where nothing else can follow.
        stop_ids: tokens that the sampler does not sample as one of the first `min_tokens`.

    Attributes:
        is_blocked: whether the newest mask has only tokens that the sampler does not sample yet.
    """

    depends_on_output = True

    def __init__(
        self,
        matcher: "LLMatcher",
        vocab_size: int,
        last_resort_ids: Collection[int] = (),
        stop_ids: Collection[int] = (),
        min_tokens: int = 0,
    ):
        self.matcher = matcher
        self.vocab_size = vocab_size
        self.last_resort_ids = last_resort_ids
        self.stop_ids = stop_ids
        self.min_tokens_left = min_tokens
        self.is_blocked = False

    def copy(self) -> "GrammarFilter":
        """Return a filter for another sample; compiling the grammar again may take a second."""
        return GrammarFilter(
            self.matcher.deep_copy(),
            self.vocab_size,
            self.last_resort_ids,
            self.stop_ids,
            min_tokens=self.min_tokens_left,
        )

    @property
    def is_complete(self) -> bool:
        return self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        if self.is_blocked:
            return "min_tokens forbids all tokens that the grammar lets follow"
        error = find_error(self.matcher)
        return None if error is None else f"the grammar: {error}"

    def accept(self, token_id: int) -> None:
        self.matcher.consume_token(token_id)
        self.min_tokens_left -= 1

    def compute_mask(self) -> np.ndarray:
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.int32, count=ceil_div(self.vocab_size, 32))
        if self.min_tokens_left > 0:
            self.is_blocked = not without(mask, self.stop_ids).any()
        if self.last_resort_ids:
            others = without(mask, self.last_resort_ids)
            return others if others.any() else mask
        return mask


class Grammars:
    """Makes the grammar filters of one model. Several threads may use it.

    Args:
        tokenizer: a fast transformers tokenizer.
        token_bytes: the bytes of each token, special ones included.
        vocab_size: the model's vocabulary size.
        eos_token_ids: the model's end-of-sequence ids.

    Raises:
        ValueError: llguidance is not installed, or does not support this tokenizer.
    """

    def __init__(self, tokenizer, token_bytes: Mapping[int, bytes], vocab_size: int, eos_token_ids: tuple[int, ...]):
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise ValueError(
                "structured_outputs need the llguidance package: pip install 'nanovllm[structured]'"
            ) from None
        self.vocab_size = vocab_size
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i < vocab_size}
        tokens = [added[i].content.encode() if i in added else token_bytes[i] for i in range(vocab_size)]
        eos_token_ids = eos_token_ids or (tokenizer.eos_token_id,)
        special = {i for i, token in added.items() if token.special}.union(eos_token_ids)
        vocabulary = {
            "tokens": [token.decode("latin-1") for token in tokens],
            "special_token_ids": sorted(special),
            "eos_token_ids": eos_token_ids,
        }
        text_tokens = {token.content: i for i, token in added.items() if not token.special}
        # llguidance raises errors of many types.
        with refusing("structured_outputs do not work with this tokenizer", Exception):
            self._tokenizer = make_tokenizer(**vocabulary)
        self._pool = Pool("grammars", {"vocabulary": vocabulary, "text_tokens": text_tokens}, _FAILURE)

    def compile(
        self,
        last_resort_ids: Collection[int] = (),
        stop_ids: Collection[int] = (),
        min_tokens: int = 0,
        max_seconds: float | None = None,
        **structured: Any,
    ) -> GrammarFilter:
        """Return the filter of a structured output.

        Args:
            last_resort_ids, stop_ids, min_tokens: see `GrammarFilter`.
            max_seconds: CPU time, in place of what the child may always take.
            structured: fields of `StructuredOutputsParams`.

        Raises:
            ValueError: it is wrong, not supported, or too complex.
            TooCostly: it takes more CPU time.
        """
        grammar = self._pool.ask(structured, max_seconds)["grammar"]
        compiled = on_deep_stack(STACK_BYTES, compile_grammar, self._tokenizer, grammar)
        return GrammarFilter(compiled, self.vocab_size, last_resort_ids, stop_ids, min_tokens)

    def close(self) -> None:
        """End the child processes. May be called again."""
        self._pool.close()
