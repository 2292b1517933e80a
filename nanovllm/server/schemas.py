"""Reads the JSON schemas of tools. Clients send them, so the work is bounded."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from nanovllm.checks import shown
from nanovllm.server.json_text import read_json

_ALL_TYPES = frozenset(("string", "number", "integer", "boolean", "null", "array", "object"))
_TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
# Bounds the alternatives of one part of a schema, and how deep its parts are nested.
_MAX_ALTERNATIVES = 64
_MAX_DEPTH = 64
# Bounds the alternatives of all parts, which take about 2 us each, and the keywords, properties and elements of lists
# that are copied into them, which take about 50 ns each.
_MAX_ALL_ALTERNATIVES = 4096
_MAX_COPIED = 1 << 18
# Bounds the event loop's work for all parameters that a parser reads, to about 30 ms.
_MAX_WORK = 1 << 19
_COPIES_PER_ALTERNATIVE = 40
# Keywords that `Alternatives` follows, and some that ask nothing.
_FOLLOWED = {"$ref", "allOf", "anyOf", "oneOf", "$defs", "definitions"}
_NOTES = {"$comment", "$id", "$schema", "default", "deprecated", "description", "example", "examples", "title"}
_TEXT = {"type": "string"}


def type_name(value: Any) -> str:
    """Return JSON Schema's name of a value's type."""
    return _TYPE_NAMES.get(type(value), "null")


class Alternatives:
    """Takes the parts of one schema apart: into schemas without references and without combinations such as `anyOf`.

    A value follows a part if it follows one of its alternatives. Of alternatives with `"oneOf": True`, it must follow
    exactly one. Keywords that cannot be joined stay as `allOf`.

    Args:
        schema: the whole schema, in which references start.
    """

    def __init__(self, schema: Any):
        self.schema = schema
        # Each part with its alternatives, by the id of the part. The parts that are being taken apart have None.
        self._found: dict[int, tuple[Any, list[dict[str, Any]] | None]] = {}
        self._num_found = self._num_copied = self._depth = 0
        self._types: dict[int, set[str]] = {}  # the types of each part, by its `id()`

    def of(self, part: Any) -> list[dict[str, Any]]:
        """Return the alternatives of a part.

        Raises:
            ValueError: it is not a schema, is too large, or refers to itself.
        """
        if isinstance(part, bool):
            return [{}] if part else []
        if not isinstance(part, dict):
            raise ValueError(f"the parts of a tool's schema must be dicts or booleans, got {shown(part)}")
        if id(part) not in self._found:
            self._found[id(part)] = part, None
            self._depth += 1
            try:
                self._found[id(part)] = part, self._take_apart(part)
            finally:
                self._depth -= 1
        _, found = self._found[id(part)]
        if found is None:
            raise ValueError(f"a tool's schema refers to itself without end: {shown(part)}")
        return found

    def reset_bounds(self) -> int:
        """Start the counts of bounded work again, and keep what was found. Return that work, in copied keywords."""
        work = self._num_copied + self._num_found * _COPIES_PER_ALTERNATIVE
        self._num_found = self._num_copied = 0
        return work

    def types_of_member(self, key: str) -> set[str]:
        """Return the types that the property `key` of the whole schema, an object, may have."""
        parts = {id(part): part for part in (member(whole, key) for whole in self.of(self.schema))}
        return set().union(*(self._types_of(part) for part in parts.values()))

    def _types_of(self, part: Any) -> set[str]:
        if id(part) not in self._types:
            self._types[id(part)] = {name for leaf in self.of(part) for name in types_of(leaf)}
        return self._types[id(part)]

    def _take_apart(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"a tool's schema must be nested at most {_MAX_DEPTH} levels deep")
        found = [{word: value for word, value in part.items() if word not in _FOLLOWED | _NOTES}]
        for word, options in self._combinations(part):
            note = {"oneOf": True} if word == "oneOf" and len(options) > 1 else {}
            others = [{**other, **note} for option in options for other in self.of(option)]
            num_found = len(found) * len(others)
            self._num_found += num_found
            self._num_copied += len(others) * sum(map(_size, found)) + len(found) * sum(map(_size, others))
            is_large = self._num_found > _MAX_ALL_ALTERNATIVES or self._num_copied > _MAX_COPIED
            if num_found > _MAX_ALTERNATIVES or is_large:
                raise ValueError(f"a tool's schema has too many alternatives: {shown(part)}")
            found = [_joined(one, other) for one in found for other in others]
        return found

    def _combinations(self, part: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
        """Yield the keyword and the schemas of each combination. A value must follow one schema of each."""
        if isinstance(part.get("$ref"), str):
            yield "$ref", [_resolve(self.schema, part["$ref"])]
        if isinstance(options := part.get("allOf"), list):
            yield from (("allOf", [option]) for option in options)
        for word in ("anyOf", "oneOf"):
            if isinstance(options := part.get(word), list):
                yield word, options


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose values follow both."""
    both = {**other, **one}
    for word in one.keys() & other.keys():
        left = one[word]
        right = other[word]
        if left == right:
            continue
        if word == "properties" and isinstance(left, dict) and isinstance(right, dict):
            shared = {key: {"allOf": [left[key], right[key]]} for key in left.keys() & right.keys()}
            both[word] = {**left, **right, **shared}
        elif word in ("required", "type") and isinstance(left, list) and isinstance(right, list):
            names = dict.fromkeys(map(str, left))
            others = dict.fromkeys(map(str, right))
            both[word] = list(names | others) if word == "required" else [name for name in names if name in others]
        else:
            both["allOf"] = [*both.get("allOf", ()), {word: right}]
    for closed, open_ in ((one, other), (other, one)):
        if closed.get("additionalProperties", True) is not True and _names(open_) - _names(closed):
            both["allOf"] = [*both.get("allOf", ()), closed]
    return both


def _size(schema: dict[str, Any]) -> int:
    return len(schema) + sum(len(value) for value in schema.values() if isinstance(value, dict | list))


def _names(schema: dict[str, Any]) -> set[str]:
    properties = schema.get("properties")
    return set(properties) if isinstance(properties, dict) else set()


def _resolve(schema: Any, reference: str) -> Any:
    """Return the part of a schema that a reference such as `#/$defs/name` means, or None."""
    part = schema
    for key in unquote(reference.removeprefix("#")).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list):
            part = part[int(key)] if key.isdecimal() and int(key) < len(part) else None
        else:
            part = part.get(key) if isinstance(part, dict) else None
    return part


# -- types ------------------------------------------------------------------------------------------------------------


def types_of(alternative: dict[str, Any]) -> set[str]:
    """Return the types of the values of an alternative."""
    kind = alternative.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {name for name in kind if isinstance(name, str)}
    values = _named_values(alternative)
    return set(_ALL_TYPES) if values is None else set(map(type_name, values))


def choices(alternative: dict[str, Any]) -> list[Any] | None:
    """Return the only values that an alternative may have, or None if it names none."""
    values = _named_values(alternative)
    types = types_of(alternative)
    if "number" in types:
        types.add("integer")
    return None if values is None else [value for value in values if type_name(value) in types]


def _named_values(alternative: dict[str, Any]) -> list[Any] | None:
    if "const" in alternative:
        return [alternative["const"]]
    return alternative["enum"] if isinstance(alternative.get("enum"), list) else None


def member(alternative: dict[str, Any], key: str) -> Any:
    """Return the schema of an object's property. Without one, the property is text."""
    properties = alternative.get("properties")
    others = alternative.get("additionalProperties")
    if isinstance(properties, dict) and key in properties:
        return properties[key]
    return others if isinstance(others, dict) else _TEXT


class ToolSchemas:
    """The schemas of the functions that can be called. All samples of a request share what is found out about them.

    Args:
        schemas: JSON schemas of the parameters of the functions, by name.
    """

    def __init__(self, schemas: Mapping[str, Any]):
        self._schemas = schemas
        self._alternatives: dict[str, Alternatives] = {}
        self._types: dict[tuple[str, str], set[str]] = {}
        self._work = 0

    def __contains__(self, name: str) -> bool:
        return name in self._schemas

    def value_types(self, name: str, key: str) -> set[str]:
        """Return the types that a parameter of a function may have: all, if its schema cannot be read."""
        if (name, key) not in self._types:
            if name not in self._alternatives:
                self._alternatives[name] = Alternatives(self._schemas[name])
            types: set[str] = set(_ALL_TYPES)
            if self._work < _MAX_WORK:
                with suppress(ValueError):
                    types = self._alternatives[name].types_of_member(key)
                self._work += self._alternatives[name].reset_bounds()
            self._types[name, key] = types
        return self._types[name, key]


# -- values that a model writes as text -------------------------------------------------------------------------------

_PYTHON_VALUES = {"True": ("true", "boolean"), "False": ("false", "boolean"), "None": ("null", "null")}
_JSON_SPACE = " \t\r\n"


def as_json(text: str, types: set[str]) -> str:
    """Return the JSON of a value that a model has written as text. It has one of the types, if the text allows that."""
    if types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    bare = text.strip(_JSON_SPACE)
    value, kind = _PYTHON_VALUES.get(bare, ("", ""))
    if kind in types:
        return value
    try:
        kind = type_name(read_json(text))
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    fits = kind in types or (kind == "integer" and "number" in types)
    if fits or "string" not in types:
        return bare
    return json.dumps(text, ensure_ascii=False)
