"""Threads that take the shortest of the calls that wait."""

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class ShortestFirst:
    """Runs calls in threads. Of those that wait, the one with the least work is next, so long ones delay no short one.

    A long call waits as long as shorter ones keep all threads busy.

    Args:
        num_threads: calls that run at once.
        name: the start of the threads' names.
    """

    def __init__(self, num_threads: int, name: str):
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._waiting: list[tuple[int, int, Future, Callable[[], Any]]] = []
        self._order = itertools.count()  # calls of equal work keep theirs
        self._lock = threading.Lock()

    def submit(self, work: int, call: Callable[[], Any]) -> Future:
        """Run a call later.

        Args:
            work: an estimate, in any unit.

        Raises:
            RuntimeError: the threads are shut down.
        """
        future: Future = Future()
        try:
            with self._lock:
                heapq.heappush(self._waiting, (work, next(self._order), future, call))
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
