"""The form that an output must have."""

import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from typing import Any

from nanovllm.checks import shown, string_list
from nanovllm.vllm_options import NEUTRAL_STRUCTURED, accept_neutral

# Bounds the work of one request.
MAX_GRAMMAR_CHARS = 1 << 20
_MAX_SCHEMA_LEVELS = 1000  # more are not JSON for Python
# The forms of a structured output.
_FORMS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_JSON_FORMS = ("json", "json_object", "structural_tag")


@accept_neutral(NEUTRAL_STRUCTURED)
@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """The form that an output must have: exactly one of json, regex, choice, grammar, json_object, structural_tag.

    Args:
        json: a JSON schema, as a dict or as text. In a `pattern`, classes, `\\d`, `\\w` and `\\s` mean what they do in
            JavaScript; a dot matches all but a newline. A class that excludes a quotation mark or a backslash excludes
            U+0000 as well. Keywords of JSON Schema that llguidance does not follow, and formats that it does not know,
            are refused. Also refused are `minProperties` above 1 + the number of required names (a repeated name would
            count as another property), and `patternProperties` whose pattern has a class that excludes a quotation
            mark or a backslash, unless `additionalProperties` is false. Unknown keywords are ignored, as JSON Schema
            says, even misspelled ones; so are `uniqueItems: false`, formats of numbers, `password` and `binary`. An
            integer in the schema has at most 64 bits. Where an object may have properties that the schema neither names
            nor has a pattern for, a name spelled with an escape, as `\\u0061` for `a`, counts as one of these.
        regex: a regular expression in Rust's notation that the whole output matches. `\\d`, `\\w` and `\\s` match ASCII
            only; `\\p{...}` matches Unicode classes.
        choice: the output is one of these texts, each of 1 to 1024 characters.
        grammar: a context-free grammar in Lark's notation, or in llama.cpp's (GBNF), where a newline counts as a space.
            In Lark's regular expressions `\\d`, `\\w` and `\\s` match Unicode, as in Python, and a terminal takes as
            many characters as it can. Texts never match a special token; in Lark's notation `<|name|>` without quotes
            does, and `<[NAME]>` matches the token `[NAME]`. `%json {...}` is a JSON schema there.
        json_object: True is any JSON object; False is the same as None.
        disable_any_whitespace: white space in JSON. None is a space after commas and colons and no other; True is
            none at all; False lets the model write any, which a small model may do for ever.
        disable_additional_properties: objects of a schema have no properties that the schema does not name.
        whitespace_pattern: a regular expression of the white space that JSON may have between its tokens, in place of
            `disable_any_whitespace`.
        structural_tag: free text in which each of the `triggers` starts one of the `structures`, as JSON text or a
            dict: `{"structures": [{"begin": "<f=x>", "schema": {...}, "end": "</f>"}], "triggers": ["<f="]}`.

    The model chooses how a text is split into tokens, also where only one text can follow.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it. The schema or grammar is compiled when a
            request is added. If it is wrong, not supported, or takes more than 5 s of CPU time or 1 GiB to compile,
            only that request is refused. An output finishes with the reason "abort" where a step would take too long:
            after a long text of an ambiguous grammar (`s: s s | "a"`), for a regular expression that needs more than
            50,000 states, or if more than 2,000 rules may go on at the same token, as in an object of about 500
            optional properties.
    """

    json: str | dict | None = None
    regex: str | None = None
    choice: SequenceType[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | dict | None = None

    def __post_init__(self):
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(value := getattr(self, name), bool | None):
                raise TypeError(f"structured_outputs.{name} must be a bool, got {shown(value)}")
        if not isinstance(self.whitespace_pattern, str | None):
            got = shown(self.whitespace_pattern)
            raise TypeError(f"structured_outputs.whitespace_pattern must be a string, got {got}")
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"structured_outputs needs exactly one of {', '.join(_FORMS)}; got {given}")
        (form,) = given
        for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
            if getattr(self, name) and form not in _JSON_FORMS:
                raise ValueError(f"structured_outputs.{name} needs one of {', '.join(_JSON_FORMS)}; got {form}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("structured_outputs.whitespace_pattern cannot be used with disable_any_whitespace")
        for name in ("json", "structural_tag"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, _json_text(name, value))
        if self.choice is not None:
            object.__setattr__(self, "choice", string_list("structured_outputs.choice", self.choice, MAX_GRAMMAR_CHARS))
            if not self.choice:
                raise ValueError("structured_outputs.choice must have at least one text")
        for name in (form, "whitespace_pattern"):
            text = self._text(name)
            if not isinstance(text, str):
                forms = "a dict or a string" if name in ("json", "structural_tag") else "a string"
                raise TypeError(f"structured_outputs.{name} must be {forms}, got {shown(text)}")
            if len(text) > MAX_GRAMMAR_CHARS:
                raise ValueError(f"structured_outputs.{name} must have at most {MAX_GRAMMAR_CHARS} characters")

    def _text(self, name: str) -> Any:
        """Return what a field has to compile."""
        value = getattr(self, name)
        if value is None or (name == "json_object" and value is True):
            return ""
        return "".join(value) if name == "choice" else value

    @property
    def num_chars(self) -> int:
        """How many characters there are to compile."""
        return sum(len(self._text(name)) for name in (*_FORMS, "whitespace_pattern"))


def _json_text(name: str, schema: Any) -> str:
    """Return a schema as JSON.

    A dict that occurs many times could make a text of gigabytes. So first count the entries and the characters of
    names and texts, level by level from the outside.
    """
    field = f"structured_outputs.{name}"
    level = [schema]
    num_chars = 0
    for _ in range(_MAX_SCHEMA_LEVELS):
        next_level = []
        for value in level:
            children = value
            texts = value
            if isinstance(value, Mapping):
                children = list(value.values())
                texts = [*value, *children]
            num_chars += len(children) + sum([len(text) for text in texts if isinstance(text, str)])
            next_level += [child for child in children if isinstance(child, (dict, list, tuple))]
            if num_chars > MAX_GRAMMAR_CHARS:
                raise ValueError(f"{field} must have at most {MAX_GRAMMAR_CHARS} characters")
        level = next_level
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{field} is not a schema that JSON can express: {error!s:.200}") from None
