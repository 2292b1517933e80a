"""The base class of request bodies."""

from typing import Any

from pydantic import BaseModel, ModelWrapValidatorHandler, ValidationError, model_validator

_MAX_ERRORS = 100


class Body(BaseModel):
    """The JSON of a request. Many errors become one: describing millions of them would hold up all other requests."""

    @model_validator(mode="wrap")
    @classmethod
    def _bound_errors(cls, data: Any, handler: ModelWrapValidatorHandler["Body"]) -> "Body":
        try:
            return handler(data)
        except ValidationError as error:
            num_errors = error.error_count()
            if num_errors <= _MAX_ERRORS:
                raise
        raise ValueError(f"{num_errors} values in the body are wrong")
