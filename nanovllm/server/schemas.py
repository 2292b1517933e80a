"""Reads the JSON schemas of tools, without recursion: clients send them."""

from typing import Any

_ALL_TYPES = frozenset(("string", "number", "integer", "boolean", "null", "array", "object"))
_TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
# Schemas that are looked at to find the types of one value.
_MAX_SCHEMAS = 64
_MAX_REFERENCES = 16


def type_name(value: Any) -> str:
    """Return JSON Schema's name of a value's type."""
    return _TYPE_NAMES.get(type(value), "null")


def properties(schema: Any) -> dict[str, Any]:
    """Return the schemas of an object's properties by name."""
    schema = follow(schema, schema)
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def value_types(schema: Any, key: str) -> set[str]:
    """Return the types that the property `key` of an object may have: text, if the object's schema does not say it."""
    known = properties(schema)
    if key not in known:
        return {"string"}
    types: set[str] = set()
    pending = [known[key]]
    for _ in range(_MAX_SCHEMAS):
        if not pending:
            return types
        part = pending.pop()
        if not isinstance(part, dict):
            return set(_ALL_TYPES)
        alternatives = [part[word] for word in ("anyOf", "oneOf", "allOf") if isinstance(part.get(word), list)]
        kind = part.get("type")
        if isinstance(part.get("$ref"), str):
            pending.append(_resolve(schema, part["$ref"]))
        elif isinstance(kind, str):
            types.add(kind)
        elif isinstance(kind, list):
            types.update(name for name in kind if isinstance(name, str))
        elif "const" in part:
            types.add(type_name(part["const"]))
        elif isinstance(part.get("enum"), list):
            types.update(map(type_name, part["enum"]))
        elif alternatives:
            pending.extend(alternatives[0])
        else:
            return set(_ALL_TYPES)
    return set(_ALL_TYPES)


def follow(schema: Any, part: Any) -> Any:
    """Return the part of a schema, or what it refers to."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(part, dict) or not isinstance(part.get("$ref"), str):
            break
        part = _resolve(schema, part["$ref"])
    return part


def _resolve(schema: Any, reference: str) -> Any:
    """Return the part of a schema that a reference such as `#/$defs/name` means, or None."""
    part = schema
    for key in reference.removeprefix("#").split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        part = part.get(key) if isinstance(part, dict) else None
    return part
