"""Holds back Ctrl-C, SIGTERM and alarms while work runs that must not stop half done."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")


class DeferInterrupts:
    """Hold back signals whose Python handlers may raise, until the end of a `with` block.

    They are SIGINT (Ctrl-C), SIGTERM, with which a cluster announces the end of a job, and SIGALRM, with which programs
    often stop a slow call.

    Keep the block short. If it hangs, a second signal of the same kind gets through. Blocks may be nested; the
    outermost one holds the signals back.
    """

    def __init__(self):
        self.active = True
        self.runs_callers_code = False
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.caught: dict[int, FrameType | None] = {}

    def __enter__(self):
        try:
            self._install()
        except BaseException:
            self._finish()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._finish()

    def pull(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`. While the caller's code makes an item, let alarms and SIGTERM through: it may rely on them."""
        iterator = iter(items)
        while True:
            self.runs_callers_code = True
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.runs_callers_code = False
            yield item

    def let_through(self) -> None:
        """Call the handlers of the signals that were held back so far. Later ones are held back again."""
        while self.caught:
            number, frame = self.caught.popitem()
            self.handlers[number](number, frame)

    def _install(self) -> None:
        """Replace the signals' Python handlers, except those of an enclosing block. Only the main thread has any."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM):
            handler = signal.getsignal(number)
            enclosing = getattr(handler, "__self__", None)
            if callable(handler) and not (isinstance(enclosing, DeferInterrupts) and enclosing.active):
                self.handlers[number] = handler
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note it, or pass it on to the handler that was replaced."""
        if not self.active:  # an interrupt kept `_finish` from putting the handler back
            signal.signal(number, self.handlers[number])
        passes = self.runs_callers_code and number != signal.SIGINT
        if passes or not self.active or number in self.caught:
            self.handlers[number](number, frame)
        else:
            self.caught[number] = frame

    def _finish(self) -> None:
        """Put the handlers back and call those whose signals were held back."""
        try:
            # Ctrl-C comes last: it is held back until then.
            for number in reversed(self.handlers):
                if signal.getsignal(number) == self._remember:  # else the caller has installed another one meanwhile
                    signal.signal(number, self.handlers[number])
        finally:
            self.active = False
            self._call_handlers()

    def _call_handlers(self) -> None:
        """Call the handlers of all signals that were held back, even if one of them raises."""
        while self.caught:
            number, frame = self.caught.popitem()
            try:
                self.handlers[number](number, frame)
            finally:
                self._call_handlers()
