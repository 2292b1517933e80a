"""Structured outputs: compiles schemas, regular expressions and grammars into token masks, with llguidance.

Compiling what a client sent can overflow the stack, or take minutes and gigabytes. So a child process compiles it
first, with a smaller stack and with limits on CPU time and memory. This process compiles only what the child survived.

The child runs this file as a script. Therefore nothing of nanovllm, and no torch, is imported here.
"""

import json
import os
import re
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from copy import copy
from typing import Any

import numpy as np

# Measured with llguidance 1.9.1 and chains of references: up to 11 KiB of stack a link. Stacks are committed lazily.
STACK_BYTES = 192 << 20
CHILD_STACK_BYTES = 128 << 20
MAX_CPU_SECONDS = 5
MAX_COMPILE_BYTES = 768 << 20  # the child's stack included
MAX_WALL_SECONDS = 300  # for a child that is stopped or starved

# A step waits for its masks, so each must be cheap. llguidance's own limits are 200,000 and 250,000.
_LIMITS = {"step_lexer_fuel": 50_000, "max_lexer_states": 50_000}
# A small model may choose white space for ever where it is free to.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_ERROR_CHARS = 500


class GrammarFilter:
    """Tokens that the grammar of a structured output lets follow.

    Args:
        tokenizer: llguidance's.
        grammar: in llguidance's notation, from `_grammar_text`.
        vocab_size: the model's.

    Raises:
        ValueError: the grammar is wrong or too complex, or no token can be its first.
    """

    depends_on_output = True

    def __init__(self, tokenizer, grammar: str, vocab_size: int):
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**_LIMITS)
        self.matcher, self.num_words = LLMatcher(tokenizer, grammar, log_level=0, limits=limits), -(-vocab_size // 32)
        # Some errors only come up with the first mask, or with the first token of a text that is too long.
        self.mask()
        first = self.copy()
        first.matcher.consume_tokens(first.matcher.compute_ff_tokens()[:1])
        if error := self.error or first.error:
            raise ValueError(f"structured_outputs cannot be followed: {error}")

    def copy(self) -> "GrammarFilter":
        """Return a filter for another sample; compiling the grammar again may take a second."""
        other = copy(self)
        other.matcher = self.matcher.deep_copy()
        return other

    @property
    def is_complete(self) -> bool:
        return self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why it is unknown what may follow. It may come up late, because llguidance limits the work of each step."""
        if not self.matcher.is_error():
            return None
        text = self.matcher.get_error().partition("\n<state>")[0][:_MAX_ERROR_CHARS]
        return "no token can follow" if text == "NoExtensionBias" else text

    def accept(self, token_id: int) -> None:
        self.matcher.consume_token(token_id)

    def mask(self) -> np.ndarray:
        from llguidance.numpy import fill_next_token_bitmask

        mask = np.zeros((1, self.num_words), dtype=np.int32)
        fill_next_token_bitmask(self.matcher, mask)
        return mask[0]


class Grammars:
    """Makes the grammar filters of one model. Several threads may use it.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocab_size: the model's.
        eos_token_ids: the model's end-of-sequence ids.

    Raises:
        ValueError: llguidance is not installed, or does not support this tokenizer.
    """

    def __init__(self, tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]):
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise ValueError(
                "structured_outputs need the llguidance package: pip install 'nanovllm[structured]'"
            ) from None
        self.vocab_size = vocab_size
        sizes = f"{len(tokenizer)} tokens, where the model has {vocab_size}"
        try:
            backend = copy(tokenizer.backend_tokenizer)
            backend.no_padding()
            backend.no_truncation()
            added = backend.get_added_tokens_decoder().items()
            self._spec = {
                "tokenizer": backend.to_str(),
                "num_tokens": backend.get_vocab_size(with_added_tokens=True),
                "vocab_size": vocab_size,
                "eos_token_ids": list(eos_token_ids) or [tokenizer.eos_token_id],
                "text_tokens": [[i, token.content] for i, token in added if not token.special],
            }
            self._tokenizer = _llguidance_tokenizer(**self._spec)
        except Exception as error:  # llguidance and tokenizers raise errors of many types
            what = f"structured_outputs do not work with this tokenizer of {sizes}: {str(error)[:_MAX_ERROR_CHARS]}"
            raise ValueError(what) from error
        self._idle: list[_Child] = []
        self._closed = False

    def filter(self, **structured: Any) -> GrammarFilter:
        """Compile a structured output.

        Args:
            structured: the fields of `StructuredOutputsParams`, one of which is not None.

        Raises:
            ValueError: it is wrong, not supported, or too complex.
        """
        try:
            child = self._idle.pop()
        except IndexError:  # all are in use by other threads
            child = _Child(self._spec)
        try:
            answer = child.ask(structured)
        except BaseException:
            child.close()
            raise
        if answer is None:
            child.close()
            raise ValueError(
                "structured_outputs are too complex: compiling them takes more than "
                f"{MAX_CPU_SECONDS} s of CPU time, {MAX_COMPILE_BYTES >> 20} MiB of memory or the stack"
            )
        self._idle.append(child)
        if self._closed:
            self.close()
        if answer["error"] is not None:
            raise ValueError(answer["error"])
        return _on_deep_stack(STACK_BYTES, GrammarFilter, self._tokenizer, answer["grammar"], self.vocab_size)

    def close(self) -> None:
        """End the child processes. May be called again."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


def _on_deep_stack(num_bytes: int, call, *args: Any) -> Any:
    """Return `call(*args)`, run by a thread with a stack of `num_bytes`, because llguidance compiles recursively."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call(*args))
        except BaseException as error:
            errors.append(error)

    with _stack_size:
        before = threading.stack_size(num_bytes)
        try:
            thread = threading.Thread(target=run, name="nanovllm-grammar", daemon=True)
            thread.start()
        except RuntimeError as error:
            raise ValueError(f"structured_outputs cannot be compiled now: {error}") from error
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


_stack_size = threading.Lock()  # Python has one setting for all new threads


# -- the child process ------------------------------------------------------------------------------------------------

# Ctrl-C goes to all processes of a terminal; the parent decides.
_COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "import runpy, sys; sys.path = {!r}; runpy.run_path({!r}, run_name='__main__')"
)


_FILE = os.path.abspath(__file__)


class _Child:
    """A process that compiles one structured output after the other, and may be lost in doing so."""

    def __init__(self, spec: dict[str, Any]):
        if not sys.executable:
            raise ValueError("structured_outputs need a child process, but sys.executable does not name Python")
        path = [entry or os.getcwd() for entry in sys.path if isinstance(entry, str)]
        command = [sys.executable, "-c", _COMMAND.format(path, _FILE)]
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise ValueError(f"structured_outputs cannot be compiled now: {error}") from error
        self.close = weakref.finalize(self, _end, self.process)
        self.spec: dict[str, Any] | None = spec

    def ask(self, structured: dict[str, Any]) -> dict[str, Any] | None:
        """Return the child's answer, or None if it ended instead of answering."""
        timer = threading.Timer(MAX_WALL_SECONDS, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            for message in (self.spec, structured):
                if message is not None:
                    self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.spec = None
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            return None
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith(b"\n") else None


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    with suppress(BrokenPipeError):  # what was not flushed is lost
        process.stdin.close()


def _serve() -> None:
    """Answer each line of stdin with a line on stdout: a grammar that compiled, or an error."""
    import resource

    spec = json.loads(sys.stdin.buffer.readline())
    tokenizer = _llguidance_tokenizer(**spec)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            num_bytes = int(file.read().split()[0]) * resource.getpagesize() + MAX_COMPILE_BYTES
        _limit(resource.RLIMIT_AS, num_bytes)
    for line in sys.stdin.buffer:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(usage.ru_utime + usage.ru_stime) + 1 + MAX_CPU_SECONDS
        _limit(resource.RLIMIT_CPU, seconds)
        answer = _on_deep_stack(CHILD_STACK_BYTES, _answer, json.loads(line), tokenizer, spec)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit(which: int, most: int) -> None:
    import resource

    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answer(structured: dict[str, Any], tokenizer, spec: dict[str, Any]) -> dict[str, Any]:
    try:
        grammar = _grammar_text(text_tokens=spec["text_tokens"], **structured)
    except Exception as error:  # its type depends on the notation
        return {"error": f"structured_outputs cannot be read: {str(error)[:_MAX_ERROR_CHARS]}", "grammar": None}
    try:
        GrammarFilter(tokenizer, grammar, spec["vocab_size"])
    except ValueError as error:
        return {"error": str(error), "grammar": None}
    return {"error": None, "grammar": grammar}


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def _llguidance_tokenizer(
    tokenizer: str,
    num_tokens: int,
    vocab_size: int,
    eos_token_ids: list[int],
    text_tokens: list[tuple[int, str]],
):
    """Return llguidance's tokenizer.

    By itself it takes all added tokens for special ones, which no text matches, but uses them to spell a text that a
    grammar forces, and then fails. Here added tokens that are not special, such as `<think>`, are text like any other,
    and a text is never spelled with special tokens.

    Args:
        tokenizer: the tokenizers library's JSON.
        num_tokens: tokens it has.
        vocab_size: tokens the model has, at least as many.
        eos_token_ids: end-of-sequence ids.
        text_tokens: ids and texts of the added tokens that are not special.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    base = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_token_ids)
    spelling = _Spelling(base, num_tokens, vocab_size, eos_token_ids[0], text_tokens)
    return LLTokenizer(TokenizerWrapper(spelling), n_vocab=vocab_size, eos_token=eos_token_ids)


class _Spelling:
    """The interface that llguidance's TokenizerWrapper wraps."""

    bos_token_id = None

    def __init__(self, base, num_tokens: int, vocab_size: int, eos_token_id: int, text_tokens: list[tuple[int, str]]):
        self.base, self.eos_token_id = base, eos_token_id
        # Ids beyond the tokenizer's, which pad the model's vocabulary, have no text.
        self.tokens = [base.decode_bytes([i]) for i in range(vocab_size)]
        special = {i for i in range(vocab_size) if i >= num_tokens or base.is_special_token(i)}
        for i, text in text_tokens:
            self.tokens[i] = text.encode()
            special.discard(i)
        self.special_token_ids = sorted(special)
        self._special = frozenset(special)

    def __call__(self, text: str | bytes) -> list[int]:
        token_ids = self.base.tokenize_str(text) if isinstance(text, str) else self.base.tokenize_bytes(text)
        if self._special.isdisjoint(token_ids):
            return token_ids
        # The text has the name of a special token. This way never uses one, but may need a few tokens more.
        return self.base.greedy_tokenize(text if isinstance(text, str) else text.decode())


# -- notations --------------------------------------------------------------------------------------------------------


def _grammar_text(
    text_tokens: list[tuple[int, str]],
    json: str | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> str:
    """Return a structured output in llguidance's notation."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark
    from llguidance.gbnf_to_lark import any_to_lark

    if json is not None:
        return LLMatcher.grammar_from_json_schema(_supported_schema(json), defaults=_JSON_STYLE)
    if regex is not None:
        return grammar_from("regex", regex_to_lark(regex, "dws"))
    if choice is not None:
        # A grammar could have 2,000 alternatives at most.
        return grammar_from("regex", "|".join(map(_literal, choice)))
    token_ids = {text: i for i, text in text_tokens}
    return LLMatcher.grammar_from_lark(_with_text_tokens(any_to_lark(grammar), token_ids))


def _literal(text: str) -> str:
    """Return a regular expression that only `text` matches."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


_LARK_PARTS = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|<[^<>\s]+>')


def _with_text_tokens(lark: str, token_ids: dict[str, int]) -> str:
    """Write `<think>` in a Lark grammar as the number of that token, where llguidance takes it for text."""

    def numbered(part: re.Match) -> str:
        return f"<[{token_ids[part[0]]}]>" if part[0] in token_ids else part[0]

    return _LARK_PARTS.sub(numbered, lark)


# Keywords whose value maps any names to schemas, and keywords whose value is no schema.
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_VALUES = {"default", "examples", "example", "required", "$comment", "title", "description"}
# Formats that ask nothing of the text; those of numbers are hints to a code generator.
_ANY_FORMAT = {"password", "binary", "int32", "int64", "float", "double"}
_INT64 = -(2**63), 2**63 - 1


def _supported_schema(text: str) -> str:
    """Return a JSON schema without what asks nothing and llguidance would refuse.

    Raises:
        ValueError: a number in it is beyond what llguidance compiles exactly.
    """
    schema = json.loads(text)
    _adapt(schema)
    return json.dumps(schema, allow_nan=False)


def _adapt(schema: Any) -> None:
    if isinstance(schema, list):
        for entry in schema:
            _adapt(entry)
    if not isinstance(schema, dict):
        return
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    if isinstance(schema.get("format"), str) and schema["format"] in _ANY_FORMAT:
        del schema["format"]
    for keyword, value in schema.items():
        if keyword in _VALUES:
            continue
        if keyword in ("const", "enum"):
            _check_integers(keyword, value)
        elif keyword in _MAPS and isinstance(value, dict):
            for subschema in value.values():
                _adapt(subschema)
        elif keyword.lower().endswith(("maximum", "minimum")):
            schema[keyword] = _exact_bound(keyword, value, "integer" in str(schema.get("type", "integer")))
        else:
            _adapt(value)


def _exact_bound(keyword: str, bound: Any, is_integer: bool) -> Any:
    """Return a bound that llguidance obeys: it keeps a float, and for integers makes 64 bits of it."""
    if isinstance(bound, bool) or not isinstance(bound, int | float):
        return bound
    is_maximum = keyword.lower().endswith("maximum")
    if is_integer and not is_maximum and bound <= _INT64[0]:
        return _INT64[0] + 1024  # the next float; llguidance does not compile the smallest integer
    effective = float(bound)
    if is_integer:
        effective = min(max(effective, _INT64[0]), _INT64[1])
    if effective > bound if is_maximum else effective < bound:
        raise ValueError(f"{keyword} must be a number that fits in 64 bits exactly, got {str(bound)[:40]}")
    return bound


def _check_integers(keyword: str, value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    for entry in value if isinstance(value, list) else ():
        _check_integers(keyword, entry)
    # The smallest integer makes llguidance overflow the stack.
    if isinstance(value, int) and not _INT64[0] < value <= _INT64[1]:
        raise ValueError(f"{keyword} must have integers of 64 bits, got {str(value)[:40]}")


if __name__ == "__main__":
    _serve()
