"""Turns the forms of structured outputs into grammars in llguidance's notation."""

import json
import re
from typing import TYPE_CHECKING, Any

from nanovllm.sandbox import gbnf
from nanovllm.sandbox.schemas import supported_schema

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# A small model that may choose white space may do so for ever.
_JSON_STYLE: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# llguidance would tokenize a text that must follow at each step, which may take a second. Unforced, the model chooses
# among the tokens that the text starts with.
_UNFORCED = '\n%llguidance {"no_forcing": true}\n'


def grammar_text(
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
    schema = supported_schema('{"type": "object"}' if json is None else json, is_closed)
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
        body = json.loads(supported_schema(json.dumps(schema), is_closed)) | {"x-guidance": style}
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


# Only GBNF has rules like this.
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+\s*::=", re.MULTILINE)
# llguidance gives the temperature of a rule to its caller, which would have to obey it.
_RULE_TEMPERATURE = re.compile(r"^[ \t]*[?!]*[\w.]+\s*\[[^\]\n]*\btemperature\s*=", re.MULTILINE)


def _lark(grammar: str) -> str:
    """Return a grammar of either notation in Lark's."""
    if _GBNF_RULE.search(grammar):
        return gbnf.convert(grammar)
    if found := _RULE_TEMPERATURE.search(grammar):
        raise ValueError(f"a rule cannot have a temperature, got {found[0].strip()!r:.100}")
    return grammar


_LARK_PARTS = re.compile(r'"(?:\\.|[^"\\\n])*"|(?://|#)[^\n]*|/(?:\\.|[^/\\\n])+/|<[^<>\s]+>')


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
    """Return a Lark grammar whose `%json` schemas are as `supported_schema` returns them."""
    decoder = json.JSONDecoder()
    parts = []
    at = 0
    while found := _SCHEMA_START.search(lark, at):
        parts.append(lark[at : found.end()])
        at = found.end()
        if found[0].startswith("%json"):
            _, end = decoder.raw_decode(lark, at)
            parts.append(supported_schema(lark[at:end]))
            at = end
    return "".join(parts) + lark[at:]
