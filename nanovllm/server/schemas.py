"""Reads the JSON schemas of tools. Clients send them, so the work is bounded."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from nanovllm.checks import shown

_ALL_TYPES = frozenset(("string", "number", "integer", "boolean", "null", "array", "object"))
_TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
# Bounds the schemas that are visited to find the alternatives of one, and so the recursion, and the alternatives.
_MAX_SCHEMAS = 128
# Keywords that `alternatives` follows, and some that ask nothing.
_FOLLOWED = {"$ref", "allOf", "anyOf", "oneOf", "$defs", "definitions"}
_NOTES = {"$comment", "$id", "$schema", "default", "deprecated", "description", "example", "examples", "title"}


def type_name(value: Any) -> str:
    """Return JSON Schema's name of a value's type."""
    return _TYPE_NAMES.get(type(value), "null")


def alternatives(schema: Any, part: Any, visits: Iterator[int] | None = None) -> list[dict[str, Any]]:
    """Return schemas without references and without combinations such as `anyOf`.

    A value follows `part` if it follows one of them; for `oneOf`, exactly one, which each of them then notes. What
    cannot be joined stays as `allOf`.

    Args:
        schema: the whole that references start from.
        part: the schema to take apart.
        visits: numbers, one of which is taken for each schema.

    Raises:
        ValueError: it is not a schema, has too many parts, or refers to itself without end.
    """
    visits = iter(range(_MAX_SCHEMAS)) if visits is None else visits
    if next(visits, None) is None:
        raise ValueError(f"a schema of a tool must have at most {_MAX_SCHEMAS} alternatives and no endless references")
    if isinstance(part, bool):
        return [{}] if part else []
    if not isinstance(part, dict):
        raise ValueError(f"the parts of a tool's schema must be dicts or booleans, got {shown(part)}")
    found = [{word: value for word, value in part.items() if word not in _FOLLOWED | _NOTES}]
    for options, note in _combinations(schema, part):
        others = [{**other, **note} for option in options for other in alternatives(schema, option, visits)]
        if len(found) * len(others) > _MAX_SCHEMAS:
            raise ValueError(f"a schema of a tool must have at most {_MAX_SCHEMAS} alternatives")
        found = [_joined(one, other) for one in found for other in others]
    return found


def _combinations(schema: Any, part: dict[str, Any]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Yield lists of schemas, one of which a value must follow, and what to note in each of them."""
    if isinstance(part.get("$ref"), str):
        yield [_resolve(schema, part["$ref"])], {}
    for word in _FOLLOWED & part.keys():
        if isinstance(options := part[word], list):
            yield from (
                (([option], {}) for option in options)
                if word == "allOf"
                else ((options, {"oneOf": True} if word == "oneOf" and len(options) > 1 else {}),)
            )


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose values follow both."""
    both = {**other, **one}
    for word in one.keys() & other.keys():
        left, right = one[word], other[word]
        if left == right:
            continue
        if word == "properties" and isinstance(left, dict) and isinstance(right, dict):
            shared = {key: {"allOf": [left[key], right[key]]} for key in left.keys() & right.keys()}
            both[word] = {**left, **right, **shared}
        elif word in ("required", "type") and isinstance(left, list) and isinstance(right, list):
            names = [*left, *right] if word == "required" else [name for name in left if name in right]
            both[word] = list(dict.fromkeys(map(str, names)))
        else:
            both["allOf"] = [*both.get("allOf", ()), {word: right}]
    for closed, open_ in ((one, other), (other, one)):
        if closed.get("additionalProperties", True) is not True and _names(open_) - _names(closed):
            both["allOf"] = [*both.get("allOf", ()), closed]
    return both


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
    """Return the types of the values of one of the `alternatives`."""
    kind = alternative.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {name for name in kind if isinstance(name, str)}
    values = _named_values(alternative)
    return set(_ALL_TYPES) if values is None else set(map(type_name, values))


def choices(alternative: dict[str, Any]) -> list[Any] | None:
    """Return the only values that one of the `alternatives` may have, or None if it names none."""
    values, types = _named_values(alternative), types_of(alternative)
    types |= {"integer"} if "number" in types else set()
    return None if values is None else [value for value in values if type_name(value) in types]


def _named_values(alternative: dict[str, Any]) -> list[Any] | None:
    if "const" in alternative:
        return [alternative["const"]]
    return alternative["enum"] if isinstance(alternative.get("enum"), list) else None


def member(alternative: dict[str, Any], key: str) -> Any:
    """Return the schema of an object's property: text, if the object's schema does not say it."""
    properties, others = alternative.get("properties"), alternative.get("additionalProperties")
    if isinstance(properties, dict) and key in properties:
        return properties[key]
    return others if isinstance(others, dict) else {"type": "string"}


def value_types(schema: Any, key: str) -> set[str]:
    """Return the types that the property `key` of an object may have."""
    try:
        parts = [member(whole, key) for whole in alternatives(schema, schema)]
        return {name for part in parts for leaf in alternatives(schema, part) for name in types_of(leaf)}
    except ValueError:
        return set(_ALL_TYPES)


# -- values that a model writes as text -------------------------------------------------------------------------------

_PYTHON_VALUES = {"True": ("true", "boolean"), "False": ("false", "boolean"), "None": ("null", "null")}
_JSON_SPACE = " \t\r\n"


def as_json(text: str, types: set[str]) -> str:
    """Return the JSON of a value that a model has written as text, of one of the types if it can be."""
    if types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    value, kind = _PYTHON_VALUES.get(text.strip(_JSON_SPACE), ("", ""))
    if kind in types:
        return value
    try:
        kind = type_name(json.loads(text, parse_constant=refuse_constant))
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    fits = kind in types or (kind == "integer" and "number" in types)
    return text.strip(_JSON_SPACE) if fits or "string" not in types else json.dumps(text, ensure_ascii=False)


def refuse_constant(constant: str) -> None:
    """Raise ValueError for NaN and Infinity, which Python's `json.loads` would accept."""
    raise ValueError(f"{constant} is not JSON")
