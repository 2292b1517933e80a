"""Separates errors of libraries from exceptions that a signal handler has raised, which belong to the caller.

Programs stop a slow call with an alarm whose handler raises, often a TimeoutError, which is an OSError too.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import CodeType
from typing import Any


def _text(error: Exception) -> str:
    return f"{error!s:.500}"


def refusing(
    what: str, *kinds: type[Exception], reason: Callable[[Exception], Any] = _text
) -> AbstractContextManager[None]:
    """Raise ValueError in place of a library's errors of these kinds.

    Args:
        what: the message up to the reason.
        reason: gives the reason for an error, by default its text, cut short.
    """

    def refuse(error: Exception) -> None:
        raise ValueError(f"{what}: {reason(error)}") from error

    return handling(refuse, *kinds)


@contextmanager
def refusing_panics(message: str) -> Iterator[None]:
    """Raise ValueError for what libraries in Rust raise: a bare Exception, or a panic, which is a BaseException."""
    try:
        yield
    except BaseException as error:
        # Each library has a PanicException of its own, which none exports. Everything else may be an interrupt.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{message}: {error!s:.200}") from error


@contextmanager
def handling(handle: Callable[[Exception], None], *kinds: type[Exception]) -> Iterator[None]:
    """Let `handle` deal with a library's errors of these kinds. What a signal handler has raised is raised as it is."""
    before = sys.exc_info()[1]
    try:
        yield
    except kinds as error:
        if (interrupt := _from_signal_handler(error, before)) is not None:
            raise interrupt  # noqa: B904
        handle(error)


def _from_signal_handler(error: BaseException | None, before: BaseException | None) -> BaseException | None:
    """Return the exception of a signal handler that is `error`, or in whose place `error` was raised; None if none is.

    Args:
        before: the exception that was being handled already.
    """
    codes = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    seen = {id(before)}
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in codes:
                return error
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return None


def _code(handler: Any) -> CodeType | None:
    """Return the Python code that a call of a signal handler runs; None for handlers in C."""
    while isinstance(handler, partial):
        handler = handler.func
    call = handler if hasattr(handler, "__code__") else getattr(type(handler), "__call__", None)  # noqa: B004
    return getattr(call, "__code__", None)
