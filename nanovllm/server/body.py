"""The base class of request bodies, and bounds of their JSON.

The event loop parses and checks bodies. Bodies of millions of values, or of errors to describe, would hold up all other
requests, so they are refused.
"""

import math
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, ValidationError, model_validator

MAX_TOOLS = 4096
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
_MAX_ERRORS = 100
# Long conversations with tools have some thousands of lists and objects. Each takes up to 10 us.
_MAX_CONTAINERS = 20_000
_MAX_KEYS = 1 << 16  # each takes up to 0.6 us to parse
_MAX_VALUES = 1 << 19  # a token id takes 0.1 us to parse and check
_MAX_OTHER_VALUES = 1 << 16  # values that are not token ids: each takes up to 1 us to check
_CONTAINERS = {dict, list}
# Fields of bodies that may have many token ids.
_TOKEN_ID_FIELDS = frozenset(("prompt", "tokens", "allowed_token_ids", "stop_token_ids"))


class JsonCounter:
    """Counts the keys, the lists and objects, and the values of a JSON text that comes in chunks.

    It looks only at what stands outside strings, so it takes a small part of the time of parsing.
    """

    def __init__(self):
        self._counts = {"lists and objects": 0, "keys": 0, "values": 0}
        self._in_string = False
        self._rest = b""  # a backslash at the end of a chunk, whose character comes with the next

    def add(self, chunk: bytes) -> None:
        """Count the next chunk. Raise ValueError if the text has too many parts by now, or is UTF-16 or UTF-32."""
        if b"\0" in chunk:
            raise ValueError("the body is not UTF-8, or has a NUL character that is not escaped")
        text = (self._rest + chunk).replace(b"\\\\", b"").replace(b'\\"', b"")
        self._rest = b"\\" if text.endswith(b"\\") else b""
        parts = text.split(b'"')  # alternately outside and inside of strings
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        num_containers = outside.count(b"[") + outside.count(b"{")
        self._add("lists and objects", num_containers, _MAX_CONTAINERS)
        self._add("keys", outside.count(b":"), _MAX_KEYS)
        self._add("values", num_containers + outside.count(b","), _MAX_VALUES)

    def _add(self, kind: str, number: int, limit: int) -> None:
        self._counts[kind] += number
        if self._counts[kind] > limit:
            raise ValueError(f"the body has more than {limit} {kind}")


class Body(BaseModel):
    """The JSON of a request, whose parts a `JsonCounter` has bounded. Many errors become one."""

    @model_validator(mode="wrap")
    @classmethod
    def _bound(cls, data: Any, handler: ModelWrapValidatorHandler["Body"]) -> "Body":
        _check_size(data)
        try:
            return handler(data)
        except ValidationError as error:
            num_errors = error.error_count()
            if num_errors <= _MAX_ERRORS:
                raise
            raise ValueError(f"{num_errors} values in the body are wrong") from None


def _check_size(data: Any) -> None:
    """Raise ValueError if the body has too many values that are not token ids, or a number in it is not finite.

    Numbers that are fields of the body itself are not checked here: the endpoints do it. Deeper ones may be parts of a
    schema, which is written as JSON again.
    """
    todo = [(data, False)]
    num_values = 0
    while todo:
        value, may_be_ids = todo.pop()
        children: Collection[Any] = value if isinstance(value, list) else ()
        if isinstance(value, dict):
            children = value.values()
        kinds = set(map(type, children))  # fast for many token ids
        if not (may_be_ids and kinds == {int}):
            num_values += len(children)
        if num_values > _MAX_OTHER_VALUES:
            raise ValueError(f"the body has more than {_MAX_OTHER_VALUES} values that are not token ids")
        if float in kinds and value is not data:
            for child in children:
                if isinstance(child, float) and not math.isfinite(child):
                    raise ValueError(f"the body has the number {child}, but numbers must be finite")
        if kinds.isdisjoint(_CONTAINERS):
            continue
        if value is data and isinstance(data, dict):
            todo += [(child, name in _TOKEN_ID_FIELDS) for name, child in data.items() if type(child) in _CONTAINERS]
        else:
            todo += [(child, may_be_ids) for child in children if type(child) in _CONTAINERS]
