"""Grammars of outputs whose tool calls are all valid, in the notation of llguidance's Lark."""

import json
from collections.abc import Mapping
from typing import Any

import regex

from nanovllm import StructuredOutputsParams
from nanovllm.checks import shown
from nanovllm.sampling_params import MAX_GRAMMAR_CHARS
from nanovllm.server.schemas import follow, properties, value_types

# Models write a space behind commas and colons. One that may choose white space may write it for ever.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Names that all formats can write.
_NAME = regex.compile(r"""[^\s<>"'\\\[\]{}]{1,128}""")
_KEY = regex.compile(r"[^>\n]{1,256}")
_END_CALL = "}\n</tool_call>"
_END_FUNCTION = "</function>\n</tool_call>"
_END_PARAMETER = "\n</parameter>\n"


class CallGrammar:
    """A grammar of calls in the format of Hermes. Subclasses are other formats.

    Args:
        schemas: JSON schemas of the parameters of the functions that can be called, by name.
        parallel: whether one call may follow another.

    Raises:
        TypeError, ValueError: a schema is no dict, too long or too deep, or the format cannot write a name.
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
        self._add(behind_thinking(body, thinking))
        return "\n".join(self._rules)

    def _call(self, i: int, name: str, schema: Any) -> str:
        """Return the rule of calls of function number `i`, behind the text that starts a call."""
        return f"{_text(_head(name, 'arguments'))} {_json(schema)} {_text(_END_CALL)}"

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
        self._num_chars += len(rule)
        if self._num_chars > MAX_GRAMMAR_CHARS:
            raise ValueError(f"the schemas of all tools must have at most {MAX_GRAMMAR_CHARS} characters")
        self._rules.append(rule)


class Llama3Grammar(CallGrammar):
    """Calls in the format of Llama 3. The model is asked to make one call, and nothing else with it."""

    def text(self, is_required: bool, thinking: str, response: str | None = None) -> str:
        if response is not None:
            raise ValueError("this model's calls are JSON, so its responses cannot be JSON while there are tools")
        return super().text(is_required, thinking)

    def _call(self, i: int, name: str, schema: Any) -> str:
        return f'{_text(_head(name, "parameters"))} {_json(schema)} "}}"'

    def _required(self) -> str:
        return "call"

    def _optional(self) -> str:
        self._add(r"OTHER: /[^\s{;,](.|\n)*/")
        return "(call | OTHER?)"


class MistralGrammar(CallGrammar):
    """Lists of calls behind the token `[TOOL_CALLS]`."""

    def _call(self, i: int, name: str, schema: Any) -> str:
        return f'{_text(_head(name, "arguments"))} {_json(schema)} "}}"'

    def _required(self) -> str:
        self._add('other: ", " call')
        return f'<[TOOL_CALLS]> / ?\\[/ call {"other*" if self.parallel else ""} "]"'

    def _optional(self) -> str:
        return f"FREE ({self._required()})?"


class MistralTagGrammar(CallGrammar):
    """Calls with the token `[TOOL_CALLS]` before the name and `[ARGS]` behind it."""

    def _call(self, i: int, name: str, schema: Any) -> str:
        return f"<[TOOL_CALLS]> {_text(name)} <[ARGS]> {_json(schema)}"

    def _required(self) -> str:
        return "call+" if self.parallel else "call"

    def _optional(self) -> str:
        return self._free("FREE call")


class Qwen3CoderGrammar(CallGrammar):
    """Calls in tags. A value that is text ends at the first end tag."""

    def __init__(self, schemas: Mapping[str, Any], parallel: bool):
        self._text_rule = f"VALUE: {_text_pattern({})}", f"value[lazy]: VALUE {_text(_END_PARAMETER)}"
        super().__init__(schemas, parallel)
        for rule in self._text_rule:
            self._add(rule)
        self._add('any_parameter: "<parameter=" /[^>\\n]{1,256}/ ">\\n" value')

    def _required(self) -> str:
        self._add(r'first: "<tool_call>\n<function=" call')
        self._add(r'other: "\n" first')
        return "first other*" if self.parallel else "first"

    def _optional(self) -> str:
        # The parser also reads calls without the first tag.
        self._add('head[lazy]: FREE "<function="')
        return self._free("head call")

    def _call(self, i: int, name: str, schema: Any) -> str:
        required = schema.get("required")
        required = [key for key in required if isinstance(key, str)] if isinstance(required, list) else []
        keys = dict.fromkeys([*properties(schema), *required])
        if not keys and "properties" not in schema and schema.get("additionalProperties") is not False:
            parts = ["any_parameter*"]
        else:
            names = [self._parameter(f"{i}_{j}", schema, key) for j, key in enumerate(keys)]
            parts = [part if key in required else f"{part}?" for key, part in zip(keys, names, strict=True)]
        return " ".join([_text(f"{name}>\n"), *parts, _text(_END_FUNCTION)])

    def _parameter(self, suffix: str, schema: Any, key: str) -> str:
        """Add the rule of a parameter, and return its name."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"a parameter's name must have up to 256 characters without '>', got {shown(key)}")
        head = _text(f"<parameter={key}>\n")
        self._add(f"parameter_{suffix}: {head} {self._value(suffix, schema, key)}")
        return f"parameter_{suffix}"

    def _value(self, suffix: str, schema: Any, key: str) -> str:
        """Return the rule of a value and its end tag."""
        types = value_types(schema, key)
        value = follow(schema, properties(schema).get(key))
        choices = value.get("enum", [value["const"]] if "const" in value else None) if isinstance(value, dict) else None
        if "string" not in types:
            rule = _json(_with_definitions(schema, properties(schema)[key]), is_object=False)
        elif isinstance(choices, list) and choices:
            texts = (choice if isinstance(choice, str) else _dumps(choice) for choice in choices)
            rule = f"({' | '.join(map(_text, texts))})"
        elif types == {"string"} and isinstance(value, dict) and value.keys() & {"minLength", "maxLength", "pattern"}:
            self._add(f"VALUE_{suffix}: {_text_pattern(value)}")
            self._add(f"value_{suffix}[lazy]: VALUE_{suffix} {_text(_END_PARAMETER)}")
            return f"value_{suffix}"
        else:
            return "value"
        return f"{rule} {_text(_END_PARAMETER)}"


GRAMMARS: dict[str, type[CallGrammar]] = {
    "none": CallGrammar,
    "hermes": CallGrammar,
    "llama3": Llama3Grammar,
    "mistral": MistralGrammar,
    "mistral_tags": MistralTagGrammar,
    "qwen3_coder": Qwen3CoderGrammar,
}


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
    has_options = response.disable_any_whitespace is not None or response.whitespace_pattern is not None
    return None if has_options or response.disable_additional_properties else _json(schema, is_object=False)


def behind_thinking(body: str, thinking: str) -> str:
    """Return the grammar of an output that follows the rule `body`, behind thinking as in `CallGrammar.text`."""
    before = {"open": "thought BREAKS", "optional": '("<think>" thought BREAKS)?', "none": ""}[thinking]
    # Text that may start thinking would be taken for free text, because that can be longer than the tag.
    free = r"/(.|\n)*/ & ~/<think>(.|\n)*/" if thinking == "optional" else r"/(.|\n)*/"
    rules = f"FREE: {free}", r'thought[lazy]: /(.|\n)*/ "</think>"', r"BREAKS: /\n{0,2}/", f"start: {before} {body}"
    return "\n".join(rules)


def _head(name: str, key: str) -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '


def _text(text: str) -> str:
    """Return the Lark notation of a text."""
    return json.dumps(text)


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the schema of a tool's parameters is not JSON: {error!s:.200}") from None


def _json(schema: Any, is_object: bool = True) -> str:
    """Return the Lark notation of JSON that follows a schema.

    Args:
        is_object: the JSON is a call's arguments: an object with no other properties than the schema names.
    """
    if is_object:
        schema = {**schema, "type": "object"}
        if "properties" in schema and not schema.keys() & {"patternProperties", "allOf", "anyOf", "oneOf", "$ref"}:
            schema.setdefault("additionalProperties", False)
    return f"%json {_dumps({**schema, 'x-guidance': _STYLE} if isinstance(schema, dict) else schema)}"


def _with_definitions(schema: Mapping[str, Any], part: Any) -> Any:
    """Return a part of a schema with the definitions that it may refer to."""
    if not isinstance(part, dict) or '"$ref"' not in _dumps(part):
        return part
    return {**part, **{word: schema[word] for word in ("$defs", "definitions") if word in schema}}


def _text_pattern(schema: Mapping[str, Any]) -> str:
    """Return a Lark terminal of texts that follow the lengths and the pattern of a schema."""
    low, high = (schema.get(word, default) for word, default in (("minLength", 0), ("maxLength", "")))
    terminals = [rf"/(.|\n){{{low},{high}}}/", r"~/(.|\n)*<\/parameter>(.|\n)*/"]
    if isinstance(pattern := schema.get("pattern"), str):
        pattern = regex.sub(r"\\.|[/\n]", lambda part: {"/": r"\/", "\n": r"\n"}.get(part[0], part[0]), pattern)
        start = "" if pattern.startswith("^") else r"(.|\n)*"
        end = "" if regex.search(r"(?<!\\)(\\\\)*\$$", pattern) else r"(.|\n)*"
        body = pattern.removeprefix("^") if not start else pattern
        terminals.append(f"/{start}({body[:-1] if not end else body}){end}/")
    return " & ".join(terminals)
