"""The base class of request bodies."""

from typing import Any

from pydantic import BaseModel, ModelWrapValidatorHandler, ValidationError, model_validator

MAX_TOOLS = 4096
_MAX_ERRORS = 100
# Long conversations with tools have some thousands of lists and objects. Each takes the event loop about 10 us.
_MAX_CONTAINERS = 20_000
_CONTAINERS = {dict, list}
_MAX_VALUES = 1 << 20  # such as token ids, which take it about 0.1 us each


class Body(BaseModel):
    """The JSON of a request.

    Bodies of far too many lists and objects are refused, and many errors become one: to check millions of values, or to
    describe their errors, would hold up all other requests.
    """

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
        raise ValueError(f"{num_errors} values in the body are wrong")


def _check_size(data: Any) -> None:
    """Raise ValueError if the body has too many lists and objects."""
    todo, num_containers, num_values = [data], 0, 0
    while todo:
        value = todo.pop()
        num_containers += 1
        num_values += len(value) if isinstance(value, dict | list) else 1
        if num_values > _MAX_VALUES:
            raise ValueError(f"the body has more than {_MAX_VALUES} values")
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not _CONTAINERS.isdisjoint(map(type, children)):  # fast for a million token ids
            todo += [child for child in children if isinstance(child, dict | list)]
        if num_containers + len(todo) > _MAX_CONTAINERS:
            raise ValueError(f"the body has more than {_MAX_CONTAINERS} lists and objects")
