"""Grammars of outputs whose tool calls are all valid, in the notation of llguidance's Lark."""

import json
from collections.abc import Mapping
from typing import Any

import regex

from nanovllm import StructuredOutputsParams
from nanovllm.checks import shown
from nanovllm.structured_outputs import MAX_GRAMMAR_CHARS

# Models write a space after commas and colons. If a grammar allowed any white space, a model could write it for ever.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Names that all formats can write.
_NAME = regex.compile(r"""[^\s<>"'\\\[\]{}]{1,128}""")
_END_CALL = "}\n</tool_call>"


class CallGrammar:
    """A grammar of calls in the format of Hermes. Subclasses are other formats.

    Args:
        schemas: JSON schemas of the parameters of the functions that can be called, by name.
        parallel: whether one call may follow another.

    Raises:
        TypeError, ValueError: a schema is too long, too deep or not that of an object, or a name
            cannot be written in the format.
    """

    def __init__(self, schemas: Mapping[str, Any], parallel: bool):
        self.parallel = parallel
        self._rules: list[str] = []
        self._num_chars = 0
        for i, (name, schema) in enumerate(schemas.items()):
            if not _NAME.fullmatch(name):
                raise ValueError(f"a tool's name must have 1 to 128 letters, digits, '_' or '-', got {shown(name)}")
            if not isinstance(schema, dict):
                raise TypeError(f"the parameters of the tool {name} must be a JSON schema, got {shown(schema)}")
            kind = schema.get("type", "object")
            if "object" not in (kind if isinstance(kind, list) else [kind]):
                message = f"the parameters of the tool {name} must have the type 'object', got {shown(kind)}"
                raise ValueError(message)
            self._add(f"call_{i}: {self._call(i, name, schema)}")
        self._add(f"call: {' | '.join(f'call_{i}' for i in range(len(schemas)))}")

    def text(self, is_required: bool, thinking: str, response: str | None = None) -> str:
        """Return the grammar.

        Args:
            is_required: the output is calls alone. Otherwise it is free text, and whatever starts as a call is valid.
            thinking: "open" if the output starts inside thinking, "optional" if it may start with it, else "none".
            response: a rule. The output is either calls alone, or a response that follows this rule.
        """
        if response is not None:
            body = f"({self._required()} | {response})"
        else:
            body = self._required() if is_required else self._optional()
        self._add(after_thinking(body, thinking))
        return "\n".join(self._rules)

    def _call(self, i: int, name: str, schema: Any) -> str:
        """Return the rule of calls of function number `i`, after the text that starts a call."""
        return f"{lark_text(_head(name, 'arguments'))} {json_value(schema)} {lark_text(_END_CALL)}"

    def _required(self) -> str:
        """Return the rule of one or more calls."""
        self._add(r'first: "<tool_call>\n" call')
        self._add(r'other: "\n" first')
        return "first other*" if self.parallel else "first"

    def _optional(self) -> str:
        """Return the rule of free text with calls in it."""
        self._add('head[lazy]: FREE "<tool_call>"')
        return self._free(r'head "\n" call')

    def _free(self, text_and_call: str) -> str:
        return f"({text_and_call})* FREE" if self.parallel else f"(FREE | {text_and_call})"

    def _add(self, rule: str) -> None:
        self._charge(len(rule))
        self._rules.append(rule)

    def _charge(self, num_chars: int) -> None:
        """Refuse schemas and rules that have too many characters together."""
        self._num_chars += num_chars
        if self._num_chars > MAX_GRAMMAR_CHARS:
            raise ValueError(f"the schemas of all tools must have at most {MAX_GRAMMAR_CHARS} characters")


class Llama3Grammar(CallGrammar):
    """Calls in the format of Llama 3. The model is asked to make one call, and nothing else with it."""

    def text(self, is_required: bool, thinking: str, response: str | None = None) -> str:
        if response is not None:
            raise ValueError("this model's calls are JSON, so its responses cannot be JSON while there are tools")
        return super().text(is_required, thinking)

    def _call(self, i: int, name: str, schema: Any) -> str:
        return f'{lark_text(_head(name, "parameters"))} {json_value(schema)} "}}"'

    def _required(self) -> str:
        return "call"

    def _optional(self) -> str:
        self._add(r"OTHER: /[^\s{;,](.|\n)*/")
        return "(call | OTHER?)"


class MistralGrammar(CallGrammar):
    """Lists of calls after the token `[TOOL_CALLS]`."""

    def _call(self, i: int, name: str, schema: Any) -> str:
        return f'{lark_text(_head(name, "arguments"))} {json_value(schema)} "}}"'

    def _required(self) -> str:
        self._add('other: ", " call')
        return f'<[TOOL_CALLS]> / ?\\[/ call {"other*" if self.parallel else ""} "]"'

    def _optional(self) -> str:
        return f"FREE ({self._required()})?"


class MistralTagGrammar(CallGrammar):
    """Calls with the token `[TOOL_CALLS]` before the name and `[ARGS]` after it."""

    def _call(self, i: int, name: str, schema: Any) -> str:
        return f"<[TOOL_CALLS]> {lark_text(name)} <[ARGS]> {json_value(schema)}"

    def _required(self) -> str:
        return "call+" if self.parallel else "call"

    def _optional(self) -> str:
        return self._free("FREE call")


def json_rule(response: StructuredOutputsParams) -> str | None:
    """Return the rule of a response that is JSON with the usual white space; None if it has another form."""
    if response.json_object:
        schema: Any = {"type": "object"}
    elif isinstance(response.json, str):
        try:
            schema = json.loads(response.json)
        except (ValueError, RecursionError):
            return None
    else:
        return None
    has_whitespace_option = response.disable_any_whitespace is not None or response.whitespace_pattern is not None
    if has_whitespace_option or response.disable_additional_properties:
        return None
    return json_value(schema, is_object=False)


def after_thinking(body: str, thinking: str) -> str:
    """Return the grammar of an output that follows the rule `body`, after thinking as in `CallGrammar.text`."""
    before = {"open": "thought BREAKS", "optional": '("<think>" thought BREAKS)?', "none": ""}[thinking]
    # Else a thinking tag would be taken for free text, because that can be longer than the tag.
    free = r"/(.|\n)*/ & ~/<think>(.|\n)*/" if thinking == "optional" else r"/(.|\n)*/"
    rules = f"FREE: {free}", r'thought[lazy]: /(.|\n)*/ "</think>"', r"BREAKS: /\n{0,2}/", f"start: {before} {body}"
    return "\n".join(rules)


def _head(name: str, key: str) -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '


def lark_text(text: str) -> str:
    """Return the Lark notation of a text."""
    return json.dumps(text)


def dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the schema of a tool's parameters is not JSON: {error!s:.200}") from None


def json_value(schema: Any, is_object: bool = True) -> str:
    """Return the Lark notation of JSON that follows a schema.

    Args:
        is_object: the JSON is a call's arguments: an object with no other properties than the schema names.
    """
    if is_object:
        schema = closed(schema)
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": _STYLE}
    return f"%json {dumps(schema)}"


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a call's arguments, which have no other properties than it names."""
    schema = {**schema, "type": "object"}
    if "properties" in schema and not schema.keys() & {"patternProperties", "allOf", "anyOf", "oneOf", "$ref"}:
        schema.setdefault("additionalProperties", False)
    return schema
