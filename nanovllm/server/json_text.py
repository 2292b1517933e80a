"""JSON that is read from models and written to clients."""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

# `json.dumps` with these options would make a new encoder for each event.
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# `LongJson` does not split values at this depth: in a response, the log-probabilities of one token.
_WRITTEN_LEVELS = 5
# How many steps of `LongJson` make one chunk of bytes.
_STEPS_PER_CHUNK = 256


def read_json(text: str) -> Any:
    """Return the value of a JSON text. Python would also accept NaN and Infinity, and read 1e999 as infinity.

    Raises:
        ValueError, RecursionError: it is not JSON, or nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_read_float)


def read_cut_json(text: str) -> Any:
    """Return the value of a JSON text that may be cut off anywhere. Raise ValueError if it is not the start of JSON."""
    return _finite(from_json(text, allow_partial="trailing-strings", allow_inf_nan=False))


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read_float(text: str) -> float:
    return _finite(float(text))


def _finite(value: Any) -> Any:
    """Return a value of JSON with the largest float in place of numbers that are too large for a float."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and math.isinf(value):
        return math.copysign(sys.float_info.max, value)
    return value


def json_bytes(value: Any) -> bytes:
    """Return a value as compact JSON."""
    return _as_bytes(_encoder.encode(value))


def _as_bytes(text: str) -> bytes:
    # A lone surrogate, which a client may send escaped, is escaped again: JSON and Python write it in the same way.
    return text.encode(errors="backslashreplace")


class LongJson:
    """Writes a value that may be long as compact JSON, in steps between which other threads run.

        long = LongJson(value)
        for _ in long:
            ...
        long.bytes()

    The encoder keeps the GIL until it has written what it is given. So it is given small parts. A long list can be an
    iterator, so that only one of its entries is in memory at a time.
    """

    def __init__(self, value: Any):
        self._value = value
        self._parts: list[str] = []  # text that is not in a chunk yet
        self._chunks: list[bytes] = []

    def __iter__(self) -> Iterator[None]:
        for number, _ in enumerate(self._write(self._value, _WRITTEN_LEVELS), start=1):
            if number % _STEPS_PER_CHUNK == 0:
                self._add_chunk()
            yield
        self._add_chunk()

    def bytes(self) -> bytes:
        """Return the JSON, once all steps are done."""
        return b"".join(self._chunks)

    def _add_chunk(self) -> None:
        self._chunks.append(_as_bytes("".join(self._parts)))
        self._parts.clear()

    def _write(self, value: Any, levels: int) -> Iterator[None]:
        """Append a value's JSON part by part. An iterator is a list. What is `levels` deep in the value is one part."""
        add = self._parts.append
        if not levels or not isinstance(value, dict | list | Iterator):
            add(_encoder.encode(value))
            yield
            return
        is_dict = isinstance(value, dict)
        separator = ""
        add("{" if is_dict else "[")
        for entry in value:  # a key or a value
            add(separator)
            if is_dict:
                add(f"{_encoder.encode(entry)}:")
            yield from self._write(value[entry] if isinstance(value, dict) else entry, levels - 1)
            separator = ","
        add("}" if is_dict else "]")


def long_json_bytes(value: Any) -> bytes:
    """Return a value as compact JSON. Its lists may be iterators."""
    long = LongJson(value)
    for _ in long:
        pass
    return long.bytes()
