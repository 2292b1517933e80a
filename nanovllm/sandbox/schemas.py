"""Adapts JSON schemas and their patterns to what llguidance supports."""

import json
import re
from typing import Any

# Keywords whose value maps any names to schemas, and keywords whose value is no schema.
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_VALUES = {"default", "examples", "example", "required", "$comment", "title", "description"}
# Formats that ask nothing of the text; those of numbers are hints to a code generator.
_ANY_FORMAT = {"password", "binary", "int32", "int64", "float", "double"}
_INT64 = -(2**63), 2**63 - 1


def supported_schema(text: str, is_closed: bool = False) -> str:
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
        is_class = text[:2] in (*_SPACES, r"\p", r"\P") or _plain_character(text) == r"\x00"
        return _exact_class(f"[{text}]") if is_class else text
    if not part["end"]:
        raise ValueError(f"pattern must not have a class without its end, got {text[:40]}")
    if not body:
        raise ValueError(rf"pattern must not have ] as the first character of a class: write {text[:-1]}\]")
    ranges = [filter(None, found.groups()) for found in _PATTERN_RANGE.finditer(body)]  # its first character, and last
    body = "".join("-".join(map(_plain_character, characters)) for characters in ranges)
    return _exact_class(f"[{part['negation']}{body}]")


def _plain_character(text: str) -> str:
    r"""Return a character of a pattern as `spelled` does, and an escape such as `\d` as it is."""
    if re.fullmatch(_PATTERN_CODE, text) and (code := int(text[2:].strip("{}"), 16)) <= 0x10FFFF:
        return spelled(chr(code))
    return text if text[0] == "\\" and text[1].isalnum() else spelled(text[-1])


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
    # The smallest integer makes llguidance overflow the stack, and it writes the largest one for a larger float.
    if isinstance(value, int | float) and value == value // 1 and not _INT64[0] < value <= _INT64[1]:
        raise ValueError(f"{keyword} must have integers of 64 bits, got {str(value)[:40]}")


def spelled(character: str) -> str:
    r"""Return a character that means itself in a class: a letter, a digit, one beyond ASCII, or `\x2d`."""
    return character if character.isalnum() or not character.isascii() else f"\\x{ord(character):02x}"
