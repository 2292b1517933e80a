"""Compiles schemas, regular expressions and grammars, with llguidance.

A child process runs this first, because compiling what a client sent can overflow the stack, or take minutes and
gigabytes. The engine's process imports this too, and compiles only what the child survived. Modules of this folder
import each other and nothing else of nanovllm.
"""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nanovllm.sandbox.notations import grammar_text

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Measured with llguidance 1.9.1 and chains of references: up to 11 KiB of stack a link. Stacks are committed lazily.
STACK_BYTES = 192 << 20
_CHILD_STACK_BYTES = 128 << 20

# A step waits for its masks, so each must be cheap. Measured with llguidance 1.9.1: the lexer's 50,000 steps take 6 ms,
# and 20,000 items of an ambiguous grammar 45 ms. llguidance's own limits are 200,000, 250,000 and 50,000.
_MAX_LEXER_STEPS = 50_000
_MAX_ITEMS = 20_000
_MAX_ERROR_CHARS = 500

_stack_size = threading.Lock()  # Python has one setting for all new threads


def prepare(vocabulary: dict[str, Any], text_tokens: dict[str, int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that answers requests: it compiles a structured output and returns its `grammar`.

    A request has the fields of `StructuredOutputsParams`.

    Args:
        vocabulary: arguments of `make_tokenizer`.
        text_tokens: ids of the added tokens that are not special.
    """
    tokenizer = make_tokenizer(**vocabulary)
    tokens = vocabulary["tokens"]
    special_tokens = {tokens[i].encode("latin-1").decode(errors="replace"): i for i in vocabulary["special_token_ids"]}

    def answer(structured: dict[str, Any]) -> dict[str, Any]:
        grammar = on_deep_stack(_CHILD_STACK_BYTES, grammar_text, text_tokens, special_tokens, **structured)
        on_deep_stack(_CHILD_STACK_BYTES, compile_grammar, tokenizer, grammar)
        return {"grammar": grammar}

    return answer


def make_tokenizer(tokens: list[str], special_token_ids: list[int], eos_token_ids: list[int]) -> "LLTokenizer":
    """Return llguidance's tokenizer.

    Args:
        tokens: each token's bytes, as Latin-1.
        special_token_ids: ids of tokens that no text matches.
        eos_token_ids: ids that end an output.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    # It never has to split a text into tokens, because nothing is forced.
    vocabulary = SimpleNamespace(
        tokens=[token.encode("latin-1") for token in tokens],
        special_token_ids=special_token_ids,
        eos_token_id=eos_token_ids[0],
        bos_token_id=None,
    )
    return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=len(tokens), eos_token=eos_token_ids)


def compile_grammar(tokenizer: "LLTokenizer", grammar: str) -> "LLMatcher":
    """Compile a grammar in llguidance's notation.

    Raises:
        ValueError: it is wrong or too complex, or no token can be its first.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        step_lexer_fuel=_MAX_LEXER_STEPS, max_lexer_states=_MAX_LEXER_STEPS, step_max_items=_MAX_ITEMS
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # some errors only come up with the first mask
    if error := find_error(matcher):
        raise ValueError(error)
    return matcher


def find_error(matcher: "LLMatcher") -> str | None:
    """Return why the matcher cannot say what may follow, or None. A limit on a step's work may be met late."""
    if not matcher.is_error():
        return None
    text = matcher.get_error().partition("<state>")[0].partition("<backtrace>")[0][:_MAX_ERROR_CHARS].strip()
    return "no token can follow" if text == "NoExtensionBias" else text


def on_deep_stack(num_bytes: int, call: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run `call(*args)` in a thread with a stack of `num_bytes`, because llguidance compiles recursively."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call(*args, **kwargs))
        except BaseException as error:
            errors.append(error)

    with _stack_size:
        before = threading.stack_size(num_bytes)
        try:
            thread = threading.Thread(target=run, name="nanovllm-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
