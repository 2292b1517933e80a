"""Errors that an HTTP client gets."""

import re
from dataclasses import dataclass
from typing import Any

_QUEUE_FULL = re.compile(r"\d+ sequences would wait; max_num_waiting=\d+")


@dataclass
class ApiError(Exception):
    """A response with a status other than 200. The app turns it into JSON in the form of the client's API.

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


def as_api_error(error: BaseException) -> ApiError:
    """Return the response to an exception. An internal error has a plain message, without its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RecursionError):
        return ApiError(400, "the request is nested too deeply")
    if isinstance(error, TypeError | ValueError):
        message = f"{error!s:.1000}"
        # The engine's process sends exceptions of builtin types, so that only the text says which error this is.
        if _QUEUE_FULL.fullmatch(message):
            return ApiError(429, message, code="queue_full", retry_after=1)
        code = "context_length_exceeded" if "maximum context length" in message else None
        return ApiError(400, message, code=code)
    # Exactly this class: the engine raises it if it is closed, asleep or has failed. Subclasses, such as
    # NotImplementedError, are faults of the server.
    if type(error) is RuntimeError:
        return ApiError(503, f"{error!s:.1000}", code="engine_unavailable")
    return ApiError(500, "the server has failed to answer; its log says why", code="internal_error")


# Names of errors by status, in the two forms.
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def openai_error(error: ApiError) -> dict:
    """Return an error in the form of OpenAI's API."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    kind = _OPENAI_TYPES.get(error.status, kind)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def aborted(stop_reason: int | str | None) -> ApiError:
    """Return the error of a request with a sample whose finish_reason is "abort"."""
    if stop_reason is None:
        return ApiError(503, "the server has ended this request")
    return ApiError(400, f"the output was given up: {stop_reason}")


def endpoint_path(scope: Any) -> str:
    """Return the path of a request, without the prefix under which Ray Serve or a proxy has the whole app."""
    path = scope["path"]
    prefix = scope.get("root_path", "").rstrip("/")
    if path == prefix or path.startswith(f"{prefix}/"):
        return path.removeprefix(prefix) or "/"
    return path


def error_body(error: ApiError, scope: Any) -> dict:
    """Return an error in the form of the API that the request belongs to."""
    return anthropic_error(error) if endpoint_path(scope).startswith("/v1/messages") else openai_error(error)


def anthropic_error(error: ApiError) -> dict:
    """Return an error in the form of Anthropic's API."""
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, kind)
    details = {"details": {"error_code": error.code}} if error.code else {}
    return {"type": "error", "error": {"type": kind, "message": error.message, **details}}
