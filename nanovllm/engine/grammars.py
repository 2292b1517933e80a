"""Structured outputs: makes token masks of schemas, regular expressions and grammars."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.arithmetic import ceil_div
from nanovllm.sandbox.grammars import STACK_BYTES, compile_grammar, find_error, make_tokenizer, on_deep_stack
from nanovllm.sandbox.pool import Pool

if TYPE_CHECKING:
    from llguidance import LLMatcher

_FAILURE = "structured_outputs cannot be compiled"


class GrammarFilter:
    """Tokens that the grammar of a structured output lets follow; see `TokenFilter`."""

    depends_on_output = True

    def __init__(self, matcher: "LLMatcher", vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size

    def copy(self) -> "GrammarFilter":
        """Return a filter for another sample; compiling the grammar again may take a second."""
        return GrammarFilter(self.matcher.deep_copy(), self.vocab_size)

    @property
    def is_complete(self) -> bool:
        return self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        return find_error(self.matcher)

    def accept(self, token_id: int) -> None:
        self.matcher.consume_token(token_id)

    def mask(self) -> np.ndarray:
        return np.frombuffer(self.matcher.compute_bitmask(), np.int32, count=ceil_div(self.vocab_size, 32))


class Grammars:
    """Makes the grammar filters of one model. Several threads may use it.

    Args:
        tokenizer: a fast transformers tokenizer.
        token_bytes: the bytes of each token, special ones included.
        vocab_size: the model's.
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
        try:
            self._tokenizer = make_tokenizer(**vocabulary)
        except Exception as error:  # llguidance raises errors of many types
            raise ValueError(f"structured_outputs do not work with this tokenizer: {error!s:.500}") from error
        self._pool = Pool("grammars", {"vocabulary": vocabulary, "text_tokens": text_tokens}, _FAILURE)

    def filter(self, **structured: Any) -> GrammarFilter:
        """Compile a structured output.

        Args:
            structured: the fields of `StructuredOutputsParams`, one of which is not None.

        Raises:
            ValueError: it is wrong, not supported, or too complex.
        """
        grammar = self._pool.ask(structured)["grammar"]
        compiled = on_deep_stack(STACK_BYTES, compile_grammar, self._tokenizer, grammar)
        return GrammarFilter(compiled, self.vocab_size)

    def close(self) -> None:
        """End the child processes. May be called again."""
        self._pool.close()
