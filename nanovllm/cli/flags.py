"""Flags that are made from a dataclass of options: its fields, their types and defaults, and its docstring."""

import argparse
import inspect
import re
import types
from collections.abc import Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from nanovllm.checks import shown

# Types of fields that are read from text, by the first one that a field may have.
_KINDS: tuple[type, ...] = (bool, int, float, str)


def add_flags(parser: argparse._ActionsContainer, options: type, without: Iterable[str] = ()) -> None:
    """Add a flag for each field of the dataclass `options`. Flags that are not given are None in the namespace.

    Args:
        without: names of fields that get no flag.
    """
    hints = get_type_hints(options)
    docs = argument_docs(options)
    for declared in fields(options):
        if declared.name not in without:
            settings = _settings(declared, hints[declared.name])
            text = docs.get(declared.name, "") + _default(declared)
            parser.add_argument(flag(declared.name), default=None, help=text.replace("%", "%%").strip(), **settings)


def given(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """Return the values that flags of the dataclass `options` were given, by the names of its fields."""
    values = {declared.name: getattr(args, declared.name, None) for declared in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def flag(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


def parse_value(options: type, name: str, text: str) -> Any:
    """Return the value that `text` gives to the field `name` of the dataclass `options`.

    Raises:
        ValueError: the text is no value of the field's type.
    """
    kind = _kind(get_type_hints(options)[name])
    if kind is bool:
        words = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
        if text.lower() not in words:
            raise ValueError(f"{name} must be true or false, got {shown(text)}")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} must be {_WORDS[kind]}, got {shown(text)}") from None


_WORDS: dict[type, str] = {int: "an integer", float: "a number"}


def argument_docs(options: type) -> dict[str, str]:
    """Return the descriptions in the section "Args:" of a class's docstring, by name."""
    _, _, section = (inspect.getdoc(options) or "").partition("\nArgs:\n")
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if start := re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line):
            names = start[1].split(", ")
            docs |= dict.fromkeys(names, start[2])
        elif line.strip():
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
    return docs


def _settings(declared: Field, hint: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` that depend on a field's type.

    The dataclass itself checks choices and bounds: its messages say what is right.
    """
    choices = declared.metadata.get("choices")
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        is_open = kinds[-1] is Ellipsis
        metavar = kinds[0].__name__.upper() if is_open else tuple(declared.metadata["metavar"])
        return {"type": kinds[0], "nargs": "+" if is_open else len(kinds), "metavar": metavar}
    kind = _kind(hint)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices:
        return {"metavar": "{" + ",".join(choices) + "}"}
    return {"type": kind, "metavar": declared.metadata.get("metavar") or kind.__name__.upper()}


def _kind(hint: Any) -> type:
    """Return the type that makes a value of a field from text. A path stays text."""
    hints = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((kind for kind in _KINDS if kind in hints), str)


def _default(declared: Field) -> str:
    """Return the words about a field's default. None has none: the description says what it means."""
    value = declared.default
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return f" (default: {' '.join(map(str, value))})"
    return f" (default: {value})" if isinstance(value, str | int | float | Path) else ""
