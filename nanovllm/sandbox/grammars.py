"""Compiles schemas, regular expressions and grammars, with llguidance.

A child process runs this first, because compiling what a client sent can overflow the stack, or take minutes and
gigabytes. The engine's process imports this too, and compiles only what the child survived. Nothing of nanovllm, and no
torch, is imported here.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Measured with llguidance 1.9.1 and chains of references: up to 11 KiB of stack a link. Stacks are committed lazily.
STACK_BYTES = 192 << 20
_CHILD_STACK_BYTES = 128 << 20

# A step waits for its masks, so each must be cheap. Measured with llguidance 1.9.1: the lexer's 50,000 steps take 6 ms,
# and 20,000 items of an ambiguous grammar 45 ms. llguidance's own limits are 200,000, 250,000 and 50,000.
_MAX_LEXER_STEPS = 50_000
_MAX_ITEMS = 20_000
# A small model that may choose white space may do so for ever.
_JSON_STYLE: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# llguidance would tokenize a text that must follow at each step, which may take a second. Unforced, the model chooses
# among the tokens that the text starts with.
_UNFORCED = '\n%llguidance {"no_forcing": true}\n'
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
        grammar = on_deep_stack(_CHILD_STACK_BYTES, _grammar_text, text_tokens, special_tokens, **structured)
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


# -- notations --------------------------------------------------------------------------------------------------------


def _grammar_text(
    text_tokens: dict[str, int],
    special_tokens: dict[str, int],
    *,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
    **json_form: Any,
) -> str:
    """Return a structured output in llguidance's notation."""
    from llguidance import LLMatcher, regex_to_lark

    if grammar is not None:
        return _with_tokens(_with_schemas(_lark(grammar)), text_tokens, special_tokens) + _UNFORCED
    if regex is not None:
        return _unforced(LLMatcher.grammar_from_regex(regex_to_lark(regex, "dws")))
    if choice is not None:
        # A grammar could have 2,000 alternatives at most.
        return _unforced(LLMatcher.grammar_from_regex("|".join(map(_literal, choice))))
    return _json_grammar(special_tokens, **json_form)


def _json_grammar(
    special_tokens: dict[str, int],
    *,
    json: str | None = None,
    json_object: bool | None = None,  # else there is a schema or a tag
    structural_tag: str | None = None,
    disable_any_whitespace: bool | None = None,
    disable_additional_properties: bool = False,
    whitespace_pattern: str | None = None,
) -> str:
    """Return a JSON schema, any JSON object, or free text with JSON in it, in llguidance's notation."""
    from llguidance import LLMatcher

    style: JsonCompileOptions = _JSON_STYLE
    if whitespace_pattern is not None:
        style = {"whitespace_pattern": whitespace_pattern}
    elif disable_any_whitespace is not None:
        style = {"whitespace_flexible": not disable_any_whitespace}
    is_closed = disable_additional_properties
    if structural_tag is not None:
        return _tags_grammar(structural_tag, special_tokens, is_closed, style) + _UNFORCED
    schema = _supported_schema('{"type": "object"}' if json is None else json, is_closed)
    return _unforced(LLMatcher.grammar_from_json_schema(schema, defaults=style))


def _tags_grammar(text: str, special_tokens: dict[str, int], is_closed: bool, style: "JsonCompileOptions") -> str:
    """Return free text with tagged JSON in it, in Lark's notation.

    A trigger is not part of the free text: it must start one of the tags. So does StructTag of llguidance, for tags
    that are all text or all special tokens.
    """
    tag = json.loads(text)
    structures: Any = tag.get("structures") if isinstance(tag, dict) else None
    triggers: Any = tag.get("triggers") if isinstance(tag, dict) else None
    if not _is_list_of(structures, dict) or not _is_list_of(triggers, str) or "" in triggers:
        raise ValueError("structural_tag must be a JSON object with the lists structures and triggers")
    if unknown := tag.keys() - {"type", "structures", "triggers"}:
        raise ValueError(f"structural_tag has {min(unknown)!r:.100}; it can have type, structures and triggers")
    rules = [f"start: ({' | '.join(f'tag_{i}' for i in range(len(structures)))})* free", "free: FREE"]
    rules.append(r"FREE: /(.|\n)*/")
    for i, structure in enumerate(structures):
        begin = structure.get("begin")
        schema = structure.get("schema")
        end = structure.get("end")
        starts = [trigger for trigger in triggers if isinstance(begin, str) and begin.startswith(trigger)]
        trigger = min(starts, key=len, default=None)  # the text reaches this one first
        if trigger is None or not isinstance(end, str) or not isinstance(schema, dict):
            raise ValueError(
                "each of structural_tag.structures needs begin, schema and end, and a trigger of its begin"
            )
        head = f"FREE {_lark_text(trigger, special_tokens)}"
        if trigger not in special_tokens:
            rules.append(f"head_{i}[lazy]: {head}")
            head = f"head_{i}"
        body = json.loads(_supported_schema(json.dumps(schema), is_closed)) | {"x-guidance": style}
        rest = _lark_text(begin[len(trigger) :], special_tokens)
        rules.append(f"tag_{i}: {head} {rest} %json {json.dumps(body)} {_lark_text(end, special_tokens)}")
    return "\n".join(rules)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, kind) for entry in value)


def _lark_text(text: str, special_tokens: dict[str, int]) -> str:
    """Return a text, with the special tokens in it, in Lark's notation."""
    if not text:
        return ""
    names = "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or "(?!)"
    parts = [part for part in re.split(f"({names})", text) if part]
    return " ".join(f"<[{special_tokens[part]}]>" if part in special_tokens else json.dumps(part) for part in parts)


def _unforced(text: str) -> str:
    """Return a grammar that is JSON with the option that nothing is forced, which any of its parts may set."""
    (main,) = json.loads(text)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": "start: @main" + _UNFORCED}, main | {"name": "main"}]})


def _literal(text: str) -> str:
    """Return a regular expression that only `text` matches."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


# A Lark grammar starts a line with one of these. `?` and `!` before a rule are Lark's, `::=` is GBNF's.
_LARK_START = re.compile(r"^[ \t]*(?:%llguidance\b|[?!]?start\b[^:\n]*:(?!:=))", re.MULTILINE)
# A part of a GBNF grammar that llguidance converts wrongly, or whose inside must stay as it is: a text, a class, a
# comment, a dot, or the end of a repeated group.
_GBNF_PARTS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\r\n]*|\.|\)(?=\s*[*+?{])')
_GBNF_CHARACTER = r"(?:\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\.|[^\\])"
_GBNF_RANGE = re.compile(rf"({_GBNF_CHARACTER})(?:-({_GBNF_CHARACTER}))?", re.DOTALL)


def _lark(grammar: str) -> str:
    """Return a grammar of either notation in Lark's."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    return grammar if _LARK_START.search(grammar) else gbnf_to_lark(_GBNF_PARTS.sub(_plain_part, grammar))


def _plain_part(part: re.Match) -> str:
    """Return a part of a GBNF grammar with its characters spelled so that llguidance converts them correctly.

    It cuts zeros from `\u00e9`, lets a dot match no newline, and makes a regular expression of a class, in which `&&`,
    `--` and `~~` are operators. It drops the parentheses of `("a"+)?`, unless the group has a second item.
    """
    text = part[0]
    if text == ")":
        return ' "")'
    if text == ".":
        return "[\\x00-\U0010ffff]"
    if text.startswith("#"):
        return text
    if text.startswith('"'):
        return '"' + re.sub(_GBNF_CHARACTER, lambda character: _plain_character(character[0]), text[1:-1]) + '"'
    start = "[^" if text.startswith("[^") else "["
    ranges = _GBNF_RANGE.finditer(text, len(start), len(text) - 1)
    return start + _spelled_ranges(ranges, _plain_character) + "]"


def _spelled_ranges(ranges: Iterable[re.Match], spell: Callable[[str], str]) -> str:
    """Return the inside of a class. The groups of a match are a character, and the last one if it is a range."""
    return "".join("-".join(map(spell, filter(None, each.groups()))) for each in ranges)


def _plain_character(text: str) -> str:
    """Return a character of a GBNF text or class as itself if it is a letter, a digit or not ASCII, else as `\x2d`."""
    if text.startswith("\\"):
        kind = text[1]
        code = text[2:]
        if not code and kind not in 'nrt"\\[]':
            return text  # the conversion refuses it
        text = chr(int(code, 16)) if code else {"n": "\n", "r": "\r", "t": "\t"}.get(kind, kind)
    return _spelled(text)


def _spelled(character: str) -> str:
    """Return a character that means itself in a class: a letter, a digit, one beyond ASCII, or `\x2d`."""
    return character if character.isalnum() or not character.isascii() else f"\\x{ord(character):02x}"


_LARK_PARTS = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|<[^<>\s]+>')


def _with_tokens(lark: str, text_tokens: dict[str, int], special_tokens: dict[str, int]) -> str:
    """Replace names of tokens in a Lark grammar by their numbers where llguidance would not find them.

    It takes the name `<think>` of an added token that is not special for text, and a name in square brackets, as in
    `<[TOOL_CALLS]>`, for numbers.
    """

    def numbered(part: re.Match) -> str:
        name = part[0]
        token_id = text_tokens.get(name)
        if token_id is None and name.startswith("<["):
            token_id = special_tokens.get(name[1:-1])
        return name if token_id is None else f"<[{token_id}]>"

    return _LARK_PARTS.sub(numbered, lark)


_SCHEMA_START = re.compile(rf"{_LARK_PARTS.pattern}|%json\s*(?={{)")


def _with_schemas(lark: str) -> str:
    """Return a Lark grammar whose `%json` schemas are as `_supported_schema` returns them."""
    decoder = json.JSONDecoder()
    parts = []
    at = 0
    while found := _SCHEMA_START.search(lark, at):
        parts.append(lark[at : found.end()])
        at = found.end()
        if found[0].startswith("%json"):
            _, end = decoder.raw_decode(lark, at)
            parts.append(_supported_schema(lark[at:end]))
            at = end
    return "".join(parts) + lark[at:]


# Keywords whose value maps any names to schemas, and keywords whose value is no schema.
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_VALUES = {"default", "examples", "example", "required", "$comment", "title", "description"}
# Formats that ask nothing of the text; those of numbers are hints to a code generator.
_ANY_FORMAT = {"password", "binary", "int32", "int64", "float", "double"}
_INT64 = -(2**63), 2**63 - 1


def _supported_schema(text: str, is_closed: bool = False) -> str:
    """Return a JSON schema without the keywords that ask nothing and that llguidance would refuse.

    Args:
        is_closed: objects have no properties that the schema does not name, unless it says `additionalProperties`.

    Raises:
        ValueError: a number in it is beyond what llguidance compiles exactly.
    """
    schema = json.loads(text)
    _adapt(schema, is_closed)
    return json.dumps(schema, allow_nan=False)


def _adapt(schema: Any, is_closed: bool) -> None:
    if isinstance(schema, list):
        for entry in schema:
            _adapt(entry, is_closed)
    if not isinstance(schema, dict):
        return
    if is_closed and ("properties" in schema or "patternProperties" in schema):
        schema.setdefault("additionalProperties", False)
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    if isinstance(schema.get("format"), str) and schema["format"] in _ANY_FORMAT:
        del schema["format"]
    _check_exclusive_bounds(schema)
    _check_min_properties(schema)
    _merge_named_patterns(schema)
    _follow_patterns(schema)
    for keyword, value in schema.items():
        if keyword in _VALUES:
            continue
        if keyword in ("const", "enum"):
            _check_integers(keyword, value)
        elif keyword in _MAPS and isinstance(value, dict):
            for subschema in value.values():
                _adapt(subschema, is_closed)
        elif keyword.lower().endswith(("maximum", "minimum")):
            # The type is a name or a list of names. Without a type, the bound may be one of integers.
            may_be_integer = "integer" in str(schema.get("type", "integer"))
            schema[keyword] = _exact_bound(keyword, value, may_be_integer)
        else:
            _adapt(value, is_closed)


def _merge_named_patterns(schema: dict[str, Any]) -> None:
    """Move the schema of a pattern such as `^name$` to the property of that name.

    The pattern matches no other property, but llguidance would let a comma follow, and after it nothing.
    """
    properties = schema.get("properties")
    patterns = schema.get("patternProperties")
    if not isinstance(properties, dict) or not isinstance(patterns, dict):
        return
    for pattern in list(patterns):
        match = re.fullmatch(r"\^([\w -]+)\$", pattern)
        if match and match[1] in properties:
            properties[match[1]] = {"allOf": [properties[match[1]], patterns.pop(pattern)]}


def _follow_patterns(schema: dict[str, Any]) -> None:
    """Rewrite the patterns of a schema so that llguidance follows them, and exclude 29 February of other years."""
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = exact_pattern(pattern)
    if schema.get("format") in ("date", "date-time"):
        schema["allOf"] = [*_as_list(schema.get("allOf")), {"pattern": _EXISTING_DAY}]
    if not isinstance(patterns := schema.get("patternProperties"), dict):
        return
    exact: dict[str, Any] = {}
    for pattern, subschema in patterns.items():
        name = exact_pattern(pattern)
        # A name with U+0000, which the pattern does not match any more, must not count as one of the other names.
        if _WITHOUT_NUL in name and (schema.get("additionalProperties") is not False or _has_nul_names(schema)):
            what = "patternProperties with a class that excludes a quotation mark or a backslash"
            raise ValueError(f"{what} need additionalProperties false and no name with U+0000, got {pattern!r:.100}")
        exact[name] = {"allOf": [exact[name], subschema]} if name in exact else subschema
    schema["patternProperties"] = exact


def _has_nul_names(schema: dict[str, Any]) -> bool:
    """Whether a property's name has the character U+0000."""
    properties = schema.get("properties")
    return isinstance(properties, dict) and any("\0" in name for name in properties)


_PATTERN_CODE = r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[xu]\{[0-9a-fA-F]{1,6}\}"
_PATTERN_CHARACTER = rf"(?:{_PATTERN_CODE}|\\[pP](?:\{{[^}}]{{0,40}}\}}|[a-zA-Z])|\\.|[^\\])"
# A class, the flag x, or a character of a pattern. As in JavaScript, the first `]` ends a class.
_PATTERN_PARTS = re.compile(
    rf"\[(?P<negation>\^?)(?P<body>(?:\\.|[^\]\\])*)(?P<end>\]?)|(?P<flag>\(\?[a-zA-Z]*x)|{_PATTERN_CHARACTER}",
    re.DOTALL,
)
_PATTERN_RANGE = re.compile(rf"({_PATTERN_CHARACTER})(?:-({_PATTERN_CHARACTER}))?", re.DOTALL)
_WITHOUT_NUL = r"--\x00]"


def exact_pattern(pattern: str) -> str:
    """Return a pattern in JavaScript's notation as one that llguidance follows exactly.

    llguidance reads Rust's notation, in which a class may have operators and other classes. If a class has all control
    characters, it also lets an escaped quotation mark and backslash follow. So a class without one of these two loses
    U+0000. No union of such classes has all control characters either.
    """
    return _PATTERN_PARTS.sub(_exact_part, pattern)


def _exact_part(part: re.Match) -> str:
    """Return a class or a character of a pattern in Rust's notation."""
    text = part[0]
    body = part["body"]
    if part["flag"]:
        raise ValueError(f"pattern must not have the flag x, got {text}")
    if body is None:
        is_class = text[:2] in (*_SPACES, r"\p", r"\P") or _plain_character_of_pattern(text) == r"\x00"
        return _exact_class(f"[{text}]") if is_class else text
    if not part["end"]:
        raise ValueError(f"pattern must not have a class without its end, got {text[:40]}")
    if not body:
        raise ValueError(rf"pattern must not have ] as the first character of a class: write {text[:-1]}\]")
    body = _spelled_ranges(_PATTERN_RANGE.finditer(body), _plain_character_of_pattern)
    return _exact_class(f"[{part['negation']}{body}]")


def _plain_character_of_pattern(text: str) -> str:
    r"""Return a character of a pattern as `_plain_character` does, and an escape such as `\d` as it is."""
    if re.fullmatch(_PATTERN_CODE, text) and (code := int(text[2:].strip("{}"), 16)) <= 0x10FFFF:
        return _spelled(chr(code))
    return text if text[0] == "\\" and text[1].isalnum() else _spelled(text[-1])


# JavaScript's white space in place of Unicode's.
_SPACES = {r"\s": r"[[\s\ufeff]--\x85]", r"\S": r"[^[\s\ufeff]--\x85]"}


def _exact_class(text: str) -> str:
    """Return a class with JavaScript's white space, and without U+0000 if it lacks a quotation mark or a backslash."""
    try:
        matches = re.compile(text, re.ASCII).match
        is_exact = not matches("\0") or (matches('"') and matches("\\"))
    except re.error:  # Python does not know \p{L}
        is_exact = False
    for escape, exact in _SPACES.items():
        text = text.replace(escape, exact)
    return text if is_exact else f"[{text}{_WITHOUT_NUL}"


# The 29th of February exists in some years only.
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_EXISTING_DAY = f"^(?:{_LEAP_YEAR}-02-29|[0-9]{{4}}-(?:02-(?:[01][0-9]|2[0-8])|0[13-9]-|1))"


def _check_min_properties(schema: dict[str, Any]) -> None:
    """Refuse a number of properties that a repeated name could reach: llguidance counts it each time."""
    minimum: Any = schema.get("minProperties")
    num_names = len(set(map(str, _as_list(schema.get("required")))))
    if _is_number(minimum) and minimum > num_names + 1:
        what = "minProperties must be at most 1 + the number of required names, because a repeated name would count"
        raise ValueError(f"{what}, got {str(minimum)[:40]}")


def _check_exclusive_bounds(schema: dict[str, Any]) -> None:
    """Refuse an exclusive bound that is the integer part of the other bound: llguidance would include it."""
    parts = [part for part in (schema, *_as_list(schema.get("allOf"))) if isinstance(part, dict)]
    if any(part.get("type") == "integer" for part in parts):
        return
    for exclusive, others in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum")),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum")),
    ):
        for bound in _numbers(parts, exclusive):
            for other in _numbers(parts, *others):
                if abs(other - bound) < 1 and bound == int(other):
                    what = f"{exclusive} must not be the integer part of the other bound"
                    raise ValueError(f"{what}, got {str(bound)[:40]} and {str(other)[:40]}")


def _as_list(value: Any) -> list[Any]:
    """Return `value` if it is a list, and else an empty list: a schema may have anything in place of a list."""
    return value if isinstance(value, list) else []


def _numbers(schemas: list[dict[str, Any]], *keywords: str) -> list[Any]:
    """Return the numbers that schemas have as these keywords."""
    values = [schema.get(keyword) for schema in schemas for keyword in keywords]
    return [value for value in values if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _exact_bound(keyword: str, bound: Any, is_integer: bool) -> Any:
    """Return a bound that llguidance obeys. It keeps bounds as floats, and converts those of integers to 64 bits."""
    if not _is_number(bound):
        return bound
    is_maximum = keyword.lower().endswith("maximum")
    if is_integer and not is_maximum and bound <= _INT64[0]:
        return _INT64[0] + 1024  # the next float; llguidance does not compile the smallest integer
    effective = float(bound)
    if is_integer:
        effective = min(max(effective, _INT64[0]), _INT64[1])
    is_looser = effective > bound if is_maximum else effective < bound
    if is_looser:
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
