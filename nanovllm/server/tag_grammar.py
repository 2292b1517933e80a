"""The grammar of calls that are tags. Their values are JSON or plain text, as the schema says."""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import regex

from nanovllm.checks import shown
from nanovllm.sandbox.schemas import exact_pattern
from nanovllm.server.call_grammars import CallGrammar, closed, dumps, json_value, lark_text
from nanovllm.server.parsers.qwen3_coder import Qwen3CoderParser
from nanovllm.server.schemas import Alternatives, as_json, choices, type_name, types_of

# A character of a pattern takes up to 3 us. It counts as so many characters of the rules.
_PATTERN_COST = 8
# Required properties whose values may tell the alternatives of `oneOf` apart.
_MAX_DISCRIMINATORS = 16
_KEY = regex.compile(r"[^>\n]{1,256}")
_END_FUNCTION = "</function>\n</tool_call>"
_END_PARAMETER = "\n</parameter>\n"
# Keywords that a grammar of tags cannot enforce: for the schema of a text, and for that of all parameters.
_UNSUPPORTED = {"allOf", "not", "if", "then", "else", "$dynamicRef"}
_UNSUPPORTED_FOR_PARAMETERS = _UNSUPPORTED | {"oneOf", "const", "enum", "patternProperties", "propertyNames"}
_UNSUPPORTED_FOR_PARAMETERS |= {"dependencies", "dependentRequired", "dependentSchemas", "unevaluatedProperties"}
# Keywords that limit the values of a type. All others limit arrays and objects.
_NUMBER_LIMITS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}
_LIMITS: dict[str, set[str]] = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": _NUMBER_LIMITS,
    "number": _NUMBER_LIMITS,
    "boolean": set(),
    "null": set(),
}
# For each type, a pattern of texts that the parser may read as its values, after white space. It may match more.
_READ_AS = {
    "string": r'"(.|\n)*',
    "integer": r"-?[0-9](.|\n)*",
    "number": r"-?[0-9](.|\n)*",
    "boolean": r"(true|false|True|False)[ \t\r\n]*",
    "null": r"(null|None)[ \t\r\n]*",
    "array": r"\[(.|\n)*",
    "object": r"\{(.|\n)*",
}
_SCALARS = {
    "integer": "/-?(0|[1-9][0-9]*)/",
    "number": r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
    "boolean": '"true" | "false"',
    "null": '"null"',
}
_FREE_TEXT = r"/(.|\n)*/ & ~/(.|\n)*<\/parameter>(.|\n)*/"

_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_MONTH_AND_DAY = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_DATE = f"(?:[0-9]{{4}}-{_MONTH_AND_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# Formats of texts. Two of them ask nothing.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "password": r"(?:.|\n)*",
    "binary": r"(?:.|\n)*",
}
# The classes of JavaScript, which are ASCII, in Rust's notation. They may stand in other classes.
_CLASSES = {r"\d": "[0-9]", r"\D": "[^0-9]", r"\w": "[0-9A-Za-z_]", r"\W": "[^0-9A-Za-z_]"}


class Qwen3CoderGrammar(CallGrammar):
    """Calls in tags. A value is JSON, or text that ends at the first end tag.

    Parameters come in the order of the schema. Those that it does not name come last.

    Raises:
        ValueError: a schema has a keyword that a grammar of tags cannot enforce.
    """

    def __init__(self, schemas: Mapping[str, Any], parallel: bool):
        self._num_names = 0
        # For the function whose rule is being made: its schema, the names of its parameters' rules, the rules of its
        # values, and what `_root` returns.
        self._alternatives = Alternatives({})
        self._found: dict[tuple[str, int], str] = {}
        self._values: dict[tuple[int, frozenset[str]], str] = {}
        self._root: dict[str, Any] | None = None
        super().__init__(schemas, parallel)
        self._add(f"VALUE: {_FREE_TEXT}")
        self._add(f"value[lazy]: VALUE {lark_text(_END_PARAMETER)}")

    def _required(self) -> str:
        self._add(r'first: "<tool_call>\n<function=" call')
        self._add(r'other: "\n" first')
        return "first other*" if self.parallel else "first"

    def _optional(self) -> str:
        # The parser also reads calls without the first tag.
        self._add('head[lazy]: FREE "<function="')
        return self._free("head call")

    def _call(self, i: int, name: str, schema: Any) -> str:
        self._charge(len(dumps(schema)))
        self._alternatives = Alternatives(schema)
        self._found = {}
        self._values = {}
        self._root = None
        objects = self._alternatives.of(schema)
        if len(objects) > 1 and any(isinstance(one.get("additionalProperties"), dict) for one in objects):
            raise _unsupported("additionalProperties next to anyOf", schema)
        parameters = " | ".join(map(self._parameters, objects))
        start = lark_text(f"{name}>\n")
        return f"{start} ({parameters}) {lark_text(_END_FUNCTION)}"

    def _parameters(self, one: dict[str, Any]) -> str:
        """Return the rule of all parameters of a call that follows one of the schema's alternatives."""
        found = one.get("properties", {})
        required = one.get("required", [])
        if not isinstance(found, dict) or not isinstance(required, list):
            raise ValueError(f"a tool's properties must be a dict and required must be a list, got {shown(one)}")
        for word in one.keys() & _UNSUPPORTED_FOR_PARAMETERS:
            raise _unsupported(word, one)
        required = dict.fromkeys(map(str, required))
        keys = list(dict.fromkeys([*found, *required]))
        others = one.get("additionalProperties", "properties" not in one)
        if _count(one, "minProperties", 0) > len(required):
            raise _unsupported("minProperties", one)
        if "maxProperties" in one and (others is not False or _count(one, "maxProperties", 0) < len(keys)):
            raise _unsupported("maxProperties", one)
        parts = []
        for key in keys:
            part = found.get(key, others)
            if part is not False:
                rule = self._parameter(part, key)
                parts.append(rule if key in required else f"{rule}?")
            elif key in required:
                raise ValueError(f"a tool's schema requires the parameter {shown(key)} and forbids it")
        if others is not False:
            parts.append(f"{self._other_parameter(others, keys)}*")
        return " ".join(parts) or '""'

    def _parameter(self, part: Any, key: str) -> str:
        """Return the name of the rule of a parameter. Add the rule if it is new."""
        if name := self._found.get((key, id(part))):
            return name
        if not _KEY.fullmatch(key):
            raise ValueError(f"a parameter's name must have up to 256 characters without '>', got {shown(key)}")
        name = self._found[key, id(part)] = self._name("parameter")
        self._add(f"{name}: {lark_text(_tag(key))} {self._value(part, self._alternatives.types_of_member(key))}")
        return name

    def _other_parameter(self, part: Any, keys: list[str]) -> str:
        """Add the rule of a parameter with any other name than `keys`, and return its name."""
        name = self._name("other")
        known = f" & ~({' | '.join(lark_text(_tag(key)) for key in keys)})" if keys else ""
        self._add(f"{name.upper()}: /<parameter=[^>\\n]{{1,256}}>\\n/{known}")
        # No parameter has this name, so the types are those of the other ones.
        self._add(f"{name}: {name.upper()} {self._value(part, self._alternatives.types_of_member('>'))}")
        return name

    def _value(self, part: Any, types: set[str]) -> str:
        """Return the rule of a value and its end tag.

        Args:
            types: what the parser can take a value of this parameter for.
        """
        key = id(part), frozenset(types)
        if key not in self._values:
            self._values[key] = self._make_value(part, types)
        return self._values[key]

    def _make_value(self, part: Any, types: set[str]) -> str:
        leaves = self._alternatives.of(part)
        _check_overlap(leaves)
        if "string" not in types:
            return self._json_or_text(part, [])
        free = {kind for leaf in leaves for kind in types_of(leaf) if _is_free(leaf, kind)}
        if "number" in free:
            free.add("integer")
        if "string" not in free:
            free -= {"array", "object"}
        elif free >= types:
            return "value"
        # Text must not be what the parser takes for another value, unless any such value is valid.
        other_values = [_READ_AS[kind] for kind in sorted(types - free if types > {"string"} else ())]
        excluded = f" & ~/[ \\t\\r\\n]*({'|'.join(other_values)})/" if other_values else ""
        texts = [_choice(choice, types) for leaf in leaves for choice in _checked_choices(leaf)]
        limited = [leaf for leaf in leaves if choices(leaf) is None]
        self._charge(_PATTERN_COST * sum(len(str(leaf.get("pattern", ""))) for leaf in limited))
        texts += [f"({_text_pattern(leaf)}{excluded})" for leaf in limited if "string" in types_of(leaf)]
        if "string" not in free:
            texts += [_SCALARS[kind] for kind in sorted(free)]
        kinds = {kind for leaf in limited for kind in types_of(leaf)} - free - {"string"}
        return self._json_or_text({"allOf": [part, {"type": sorted(kinds)}]} if kinds else None, texts)

    def _json_or_text(self, part: Any, texts: list[str]) -> str:
        """Return the rule of a value that is JSON, unless `part` is None, or one of the texts, and its end tag."""
        rules = [] if part is None else [f"{self._json(part)} {lark_text(_END_PARAMETER)}"]
        if texts:
            rules.append(name := self._name("value"))
            self._add(f"{name.upper()}: {' | '.join(texts)}")
            self._add(f"{name}[lazy]: {name.upper()} {lark_text(_END_PARAMETER)}")
        if not rules:
            raise ValueError("a tool's schema has a parameter that can have no value")
        return f"({' | '.join(rules)})"

    def _json(self, part: Any) -> str:
        """Return the Lark notation of JSON that follows a part of the schema. It gets a copy of what it refers to."""
        if '"$ref": "' not in dumps(part):
            return json_value(part, is_object=False)
        if self._root is None:
            self._root = _root(self._alternatives.schema)
        moved = {**part, "$defs": {"root": self._root}}
        return json_value(moved, is_object=False).replace('"$ref": "#', '"$ref": "#/$defs/root')

    def _name(self, kind: str) -> str:
        """Return a new name of a rule."""
        self._num_names += 1
        return f"{kind}_{self._num_names}"


def _unsupported(word: str, schema: Any) -> ValueError:
    return ValueError(f"this model's calls cannot be held to the keyword {word} of a tool's schema: {shown(schema)}")


def _tag(key: str) -> str:
    return f"<parameter={key}>\n"


def _count(schema: dict[str, Any], word: str, default: int) -> int:
    count = schema.get(word, default)
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"{word} of a tool's schema must be an integer of at least 0, got {shown(count)}")
    return count


def _is_free(leaf: dict[str, Any], kind: str) -> bool:
    """Return whether all values of a type follow a schema, which has no references and no combinations."""
    limits = leaf.keys() - {"type", "oneOf"}
    if kind in _LIMITS:
        limits &= _UNSUPPORTED | _LIMITS[kind]
    return choices(leaf) is None and not limits


def _check_overlap(leaves: list[dict[str, Any]]) -> None:
    """Refuse alternatives, exactly one of which must be followed, if a value could follow two of them."""
    if not any("oneOf" in leaf for leaf in leaves):
        return
    values = [choice for leaf in leaves for choice in choices(leaf) or ()]
    objects = [_discriminators(leaf) for leaf in leaves if types_of(leaf) == {"object"} and choices(leaf) is None]
    are_apart = all(_differ(one, other) for one, other in combinations(objects, 2))
    others = [leaf for leaf in leaves if not are_apart or types_of(leaf) != {"object"}]
    kinds = [kind for leaf in others if choices(leaf) is None for kind in _kinds(types_of(leaf))]
    if are_apart and objects:
        kinds.append("object")
    if len({dumps(value) for value in values}) < len(values) or len(set(kinds)) < len(kinds):
        raise _unsupported("oneOf", leaves)
    if _kinds(map(type_name, values)) & set(kinds):
        raise _unsupported("oneOf", leaves)


def _discriminators(leaf: dict[str, Any]) -> dict[str, set[str]]:
    """Return the values that the schema of an object names for properties that it requires."""
    properties = leaf.get("properties")
    required = leaf.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    parts = {key: properties.get(key) for key in map(str, required[:_MAX_DISCRIMINATORS])}
    found = {key: choices(part) for key, part in parts.items() if isinstance(part, dict)}
    return {key: set(map(dumps, values)) for key, values in found.items() if values is not None}


def _differ(one: dict[str, set[str]], other: dict[str, set[str]]) -> bool:
    """Return whether no object has a property's values of both."""
    return any(one[key].isdisjoint(other[key]) for key in one.keys() & other.keys())


def _kinds(types: Iterable[str]) -> set[str]:
    """Return types of which no two share a value."""
    return {"number" if kind == "integer" else kind for kind in types}


def _checked_choices(leaf: dict[str, Any]) -> list[Any]:
    """Return the only values that follow a schema, if it names them. Refuse it if it limits them further."""
    values = choices(leaf)
    if values is None:
        return []
    for word in leaf.keys() - {"type", "oneOf", "const" if "const" in leaf else "enum"}:
        raise _unsupported(f"{word} next to const or enum", leaf)
    return values


def _choice(choice: Any, types: set[str]) -> str:
    """Return the terminal of the only text that the parser takes for a value.

    Raises:
        ValueError: it takes the text for another value.
    """
    text = choice if isinstance(choice, str) else dumps(choice)
    end = Qwen3CoderParser.end_parameter.search(f"{text}{_END_PARAMETER}{_END_FUNCTION}")
    if end is None or end.start() != len(text) or as_json(text, types) != dumps(choice):
        raise ValueError(f"this model's calls cannot have the value {shown(choice)}, which reads as another one")
    return lark_text(text)


def _text_pattern(leaf: dict[str, Any]) -> str:
    """Return a Lark expression for texts that follow the lengths, the pattern and the format of a schema."""
    for word in leaf.keys() & _UNSUPPORTED:
        raise _unsupported(word, leaf)
    low = _count(leaf, "minLength", 0)
    high = _count(leaf, "maxLength", 0) if "maxLength" in leaf else ""
    terminals = [_FREE_TEXT, rf"/(.|\n){{{low},{high}}}/"]
    if isinstance(pattern := leaf.get("pattern"), str):
        pattern = regex.sub(r"\\.", lambda part: _CLASSES.get(part[0], part[0]), exact_pattern(pattern))
        pattern = regex.sub(r"\\.|[/\n]", lambda part: {"/": r"\/", "\n": r"\n"}.get(part[0], part[0]), pattern)
        before = after = r"(.|\n)*"
        if pattern.startswith("^"):
            before = ""
            pattern = pattern[1:]
        if regex.search(r"(?<!\\)(\\\\)*\$$", pattern):  # not an escaped dollar sign
            after = ""
            pattern = pattern[:-1]
        terminals.append(f"/{before}({pattern}){after}/")
    if "format" in leaf:
        if leaf["format"] not in _FORMATS:
            raise _unsupported(f"format {shown(leaf['format'])}", leaf)
        terminals.append(f"/{_FORMATS[leaf['format']]}/")
    return " & ".join(terminals)


def _root(schema: Any) -> dict[str, Any]:
    """Return what the references in a schema may mean: its definitions, or all of it."""
    has_others = regex.search(r'"\$ref": "#(?!/(?:\$defs|definitions)/)', dumps(schema))
    return {
        word: value
        for word, value in closed(schema).items()
        if word in ("$defs", "definitions") or (has_others and word not in ("$id", "$schema"))
    }
