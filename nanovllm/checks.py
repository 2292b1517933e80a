"""Checks the arguments of users. Each error names the argument, its value and what would be right."""

import math
import reprlib
import sys
from collections.abc import Collection, Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any, TypeVar

N = TypeVar("N", int, float)

# A lower bound that excludes 0 itself.
ABOVE_0 = math.ulp(0.0)
_MAX_STRING_CHARS = 1024
_MAX_SHOWN_CHARS = 200
# Shows a few entries of a list, and the start and the end of a long text, without making the whole repr.
_reprs = reprlib.Repr()
_reprs.maxlevel = 2
_reprs.maxstring = 80
_reprs.maxother = 80
_KINDS = {int: (Integral, "an integer"), float: (Real, "a number")}


def shown(value: Any) -> str:
    """Return the repr of a value for an error message, cut short. Never raises."""
    try:
        return _reprs.repr(value)[:_MAX_SHOWN_CHARS]
    except Exception:  # the caller's own repr fails, or an integer has too many digits
        return f"a value of type {type(value).__name__}"


def length(value: Collection) -> int:
    """Return `len(value)`, or the largest integer that `len` can return if the length is above it."""
    try:
        return len(value)
    except OverflowError:  # a range
        return sys.maxsize


def number(name: str, value: Any, kind: type[N], low: float, high: float) -> N:
    """Return a number from `low` to `high` as Python's int or float: numpy's narrow types would overflow in sums."""
    accepted, words = _KINDS[kind]
    bounds = f"above 0 and up to {high}" if low == ABOVE_0 else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{name} must be {words} {bounds}, got {shown(value)}")
    if not low <= value <= high:  # NaN fails this too
        raise ValueError(f"{name} must be {bounds}, got {shown(value)}")
    return kind(value)


def plain(text: str) -> str:
    """Return `text` as Python's str: other ranks do not know subclasses of the caller's program."""
    return str.__str__(text)


def is_list(value: Any) -> bool:
    """Whether `value` is a list or another sequence, but neither text nor bytes."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def check_in_vocabulary(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raise ValueError unless all `token_ids` are in the vocabulary."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name} has {shown(token_id)}; ids go from 0 to {vocab_size - 1}")


def within(low: float, high: float, default: float | None, optional: bool = False) -> Any:
    """Return a dataclass field for a number, for `check_fields`. None is valid if it is the default or `optional`."""
    return field(default=default, metadata={"bounds": (low, high), "optional": optional})


def one_of(*choices: str, default: str | None = "") -> Any:
    """Return a dataclass field for one of the strings `choices`, for `check_fields`.

    Args:
        default: one of the choices, by default the first; or None, which is then valid too.
    """
    return field(default=choices[0] if default == "" else default, metadata={"choices": choices})


def check_fields(options: Any) -> None:
    """Check those fields of a frozen dataclass that are bools, or that `within` or `one_of` made."""
    for declared in fields(options):
        name = declared.name
        kind = declared.type
        value = getattr(options, name)
        if value is None and (declared.default is None or declared.metadata.get("optional")):
            continue
        if kind is bool:
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {shown(value)}")
        elif choices := declared.metadata.get("choices"):
            if not isinstance(value, str) or value not in choices:
                message = f"{name} must be one of the strings {', '.join(choices)}, got {shown(value)}"
                raise ValueError(message) if isinstance(value, str) else TypeError(message)
            object.__setattr__(options, name, plain(value))
        elif bounds := declared.metadata.get("bounds"):
            value = number(name, value, float if kind is float else int, *bounds)
            object.__setattr__(options, name, value)


def _entries(name: str, value: Any, entries: str, max_entries: int) -> tuple:
    """Return the entries of a list or a set. None has none."""
    if value is None:
        return ()
    if not is_list(value) and not isinstance(value, set | frozenset):
        raise TypeError(f"{name} must be a list of {entries}, got {shown(value)}")
    if (count := length(value)) > max_entries:
        raise ValueError(f"{name} must have at most {max_entries} entries, got {count}")
    return tuple(value)


def string_list(name: str, value: Any, max_entries: int) -> tuple[str, ...]:
    """Return a list of strings, which may be given as a single one."""
    strings = _entries(name, [value] if isinstance(value, str) else value, "strings", max_entries)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"{name} must be a list of strings, got the entry {shown(string)}")
        if not 0 < len(string) <= _MAX_STRING_CHARS:
            raise ValueError(f"{name} must have strings of 1 to {_MAX_STRING_CHARS} characters, got {shown(string)}")
    return tuple(map(plain, strings))


def token_id_list(name: str, value: Any, max_entries: int) -> tuple[int, ...]:
    """Return a list of token ids.

    The list may be long, so only a few ids are checked by themselves: the first one of a wrong type, or else the
    smallest and the largest.
    """
    ids = _entries(name, value, "token ids", max_entries)
    types = set(map(type, ids))
    wrong_types = [kind for kind in types if kind is bool or not issubclass(kind, Integral)]
    if wrong_types:
        checked = [next(token_id for token_id in ids if type(token_id) in wrong_types)]
    else:
        checked = [min(ids, default=0), max(ids, default=0)]
    for token_id in checked:
        number(f"each id of {name}", token_id, int, 0, 2**31 - 1)
    return ids if types <= {int} else tuple(map(int, ids))
