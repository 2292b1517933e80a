"""Threads that take the shortest of the calls that wait."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# A call with 1,000 characters to read lets those that come in the next second overtake it, if they have none.
_PATIENCE_S = 1e-3
_MAX_PATIENCE_S = 60


class ShortestFirst:
    """Runs calls in threads. Of those that wait, a short one is next, so that long ones do not delay it.

    A call does not overtake one that has waited for long, so each gets its turn.

    Args:
        num_threads: calls that run at once.
        name: the start of the threads' names.
    """

    def __init__(self, num_threads: int, name: str):
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._waiting: list[tuple[float, int, Future, Callable[[], Any]]] = []
        self._order = itertools.count()  # calls of equal work keep theirs
        self._lock = threading.Lock()

    def submit(self, num_chars: int, call: Callable[[], Any]) -> Future:
        """Run a call later.

        Args:
            num_chars: an estimate of the work, as a number of characters to read.

        Raises:
            RuntimeError: the threads are shut down.
        """
        future: Future = Future()
        try:
            with self._lock:
                deadline = time.monotonic() + min(num_chars * _PATIENCE_S, _MAX_PATIENCE_S)
                heapq.heappush(self._waiting, (deadline, next(self._order), future, call))
            self._threads.submit(self._run_next)
        except BaseException:  # shut down, or interrupted: nobody waits for this call
            future.cancel()
            raise
        return future

    def shutdown(self) -> None:
        """Run the calls that wait, and end the threads."""
        self._threads.shutdown()

    def _run_next(self) -> None:
        """Run the next call that was not cancelled, if there is one."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                _, _, future, call = heapq.heappop(self._waiting)
            if future.set_running_or_notify_cancel():
                break
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
