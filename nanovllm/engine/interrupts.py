"""Ctrl-C and alarms in the middle of work that must not be left half done."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")


class Deferral:
    """Holds back signals until the end of a section of code; a second signal of a kind is not held back.

    Its handler stays in place for the whole section. Should an interrupt keep it there longer, it takes itself away.
    """

    def __init__(self):
        self.active = True
        self.alarms_pass = False
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.caught: dict[int, FrameType | None] = {}

    def install(self) -> None:
        """Take the place of Python handlers, except those of an enclosing section. Only the main thread has any."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGALRM):
            handler = signal.getsignal(number)
            enclosing = getattr(handler, "__self__", None)
            if callable(handler) and not (isinstance(enclosing, Deferral) and enclosing.active):
                self.handlers[number] = handler
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.active:
            signal.signal(number, self.handlers[number])
        passes = self.alarms_pass and number == signal.SIGALRM
        if passes or not self.active or number in self.caught:
            self.handlers[number](number, frame)
        else:
            self.caught[number] = frame

    def finish(self) -> None:
        """Put the handlers back and call those whose signals were held back."""
        try:
            for number in reversed(self.handlers):  # Ctrl-C last: until its turn comes it is still held back
                signal.signal(number, self.handlers[number])
        finally:
            self.active = False
        for number, frame in self.caught.items():
            self.handlers[number](number, frame)

    def pull(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`. Alarms are not held back while the caller's code makes an item, as it may rely on them."""
        iterator = iter(items)
        while True:
            self.alarms_pass = True
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.alarms_pass = False
            yield item


@contextmanager
def interrupt_after() -> Iterator[Deferral]:
    """Hold back Ctrl-C and alarms, by which programs often end a slow call, until the body has run to its end.

    The body must be short or able to hang only in a fault: a second Ctrl-C is raised at once. Sections may be nested;
    the outermost one holds the signals back.
    """
    deferral = Deferral()
    try:
        deferral.install()
        yield deferral
    finally:
        deferral.finish()
