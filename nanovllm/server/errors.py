"""Errors that an HTTP client gets."""

from dataclasses import dataclass


@dataclass
class ApiError(Exception):
    """An answer with a status other than 200. The app turns it into JSON in the form of the client's API.

    Args:
        status: HTTP status.
        message: what is wrong and what would be right.
        param: the field of the request that is wrong.
        code: a word for programs, such as "model_not_found".
        retry_after: seconds after which the client may try again.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def __post_init__(self):
        super().__init__(self.message)
