"""Checks of what users give. Each raises TypeError or ValueError, naming the argument, its value and what is right."""

import math
import reprlib
import sys
from collections.abc import Collection, Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any

ABOVE_0 = math.ulp(0.0)  # as a lower bound: 0 itself is not in the range
_MAX_SHOWN_CHARS = 200
_reprs = reprlib.Repr()  # shows a few entries of a list, and the ends of a long text, without making the whole repr
_reprs.maxlevel, _reprs.maxstring, _reprs.maxother = 2, 80, 80
_KINDS = {int: (Integral, "an integer"), float: (Real, "a number")}


def shown(value: Any) -> str:
    """Return the repr of a value for an error message, cut short. Never raises."""
    try:
        return _reprs.repr(value)[:_MAX_SHOWN_CHARS]
    except Exception:  # a repr of the caller's, or an integer of too many digits
        return f"a value of type {type(value).__name__}"


def length(value: Collection) -> int:
    """Return `len(value)`, also where it is more than `len` can say."""
    try:
        return len(value)
    except OverflowError:  # a range
        return sys.maxsize


def number(name: str, value: Any, kind: type, low: float, high: float) -> int | float:
    """`value`, from `low` to `high`, as Python's own int or float: numpy's narrow ones would wrap around in sums."""
    accepted, words = _KINDS[kind]
    bounds = f"above 0 and up to {high}" if low == ABOVE_0 else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{name} must be {words} {bounds}, got {shown(value)}")
    if not low <= value <= high:  # NaN fails this too
        raise ValueError(f"{name} must be {bounds}, got {shown(value)}")
    return kind(value)


def plain(text: str) -> str:
    """`text` as Python's own string: other ranks do not know the classes of a caller's program."""
    return str.__str__(text)


def is_list(value: Any) -> bool:
    """Whether `value` is a list or the like, but no text and no bytes."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def in_vocabulary(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    """All `token_ids` are the vocabulary's."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name} has {shown(token_id)}; ids go from 0 to {vocab_size - 1}")


def within(low: float, high: float, default: float | None) -> Any:
    """A dataclass's field for a number, which `check_fields` checks; None is right where it is the default."""
    return field(default=default, metadata={"bounds": (low, high)})


def one_of(*choices: str) -> Any:
    """A dataclass's field for one of some strings, the first by default, which `check_fields` checks."""
    return field(default=choices[0], metadata={"choices": choices})


def check_fields(options: Any) -> None:
    """Check the fields of a frozen dataclass that are bools, or that `within` or `one_of` declare."""
    for declared in fields(options):
        name, kind, value = declared.name, declared.type, getattr(options, declared.name)
        if kind is bool:
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {shown(value)}")
        elif choices := declared.metadata.get("choices"):
            if not isinstance(value, str) or value not in choices:
                error = ValueError if isinstance(value, str) else TypeError
                raise error(f"{name} must be one of the strings {', '.join(choices)}, got {shown(value)}")
            object.__setattr__(options, name, plain(value))
        elif (bounds := declared.metadata.get("bounds")) and not (value is None and declared.default is None):
            value = number(name, value, float if kind is float else int, *bounds)
            object.__setattr__(options, name, value)
