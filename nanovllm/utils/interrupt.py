"""Ctrl-C and alarms in the middle of what must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupt_after(alarm: bool = True) -> Iterator[None]:
    """Let Ctrl-C wait for the end of what is done within, so that it can be used again; a second one does not wait.

    Args:
        alarm: so do alarms, by which programs often end a call that takes too long.
    """
    numbers = (signal.SIGINT, signal.SIGALRM) if alarm else (signal.SIGINT,)
    in_main = threading.current_thread() is threading.main_thread()  # no other is interrupted
    handlers = {number: handler for number in numbers if in_main and callable(handler := signal.getsignal(number))}
    caught = []

    def remember(number: int, frame: Any) -> None:
        caught.append((number, frame))
        signal.signal(number, handlers[number])

    try:
        for number in handlers:
            signal.signal(number, remember)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in caught:
        handlers[number](number, frame)
