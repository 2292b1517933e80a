"""Guards the state of an engine: who may use it now, and that each change is atomic."""

import atexit
import copy
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

from nanovllm.engine.interrupts import DeferInterrupts
from nanovllm.engine.memory_parts import MEMORY


class _Forks:
    """Number of forks between this process and the one that imported this module.

    Reading it is cheaper than `os.getpid`, which is a system call.

    Attributes:
        has_engine: an engine was made in this process.
        had_engine: one was made in the process that this one was forked from.
    """

    count = 0
    has_engine = had_engine = False

    @classmethod
    def add(cls) -> None:
        cls.count += 1
        cls.had_engine |= cls.has_engine


os.register_at_fork(after_in_child=_Forks.add)


def without_traceback(error: BaseException) -> BaseException:
    """Return a copy of an error that can be kept: the traceback's frames hold the model and a caller's tensors."""
    try:
        return copy.copy(error)
    except Exception:  # copying calls the class with `args`, which may not be its arguments
        return RuntimeError(f"{type(error).__name__}: {error}")


def is_forked_from_engine() -> bool:
    """Whether this process was forked from one in which an engine was made."""
    return _Forks.had_engine


class Guard:
    """Knows why an engine cannot be used, and lets one thread at a time change it.

    A weight update is started, loads in any number of calls, and is finished. The weights are:

    - whole: `weight_error` is None.
    - being updated: `update_open` from the start to the finish; `weight_error` is set already, in case nobody finishes.
      Within each of the calls, `updating` is true.
    - perhaps partly overwritten, after an error in one of the calls: `weight_error` is that error, and `update_open` is
      false. Only a new update makes them whole.

    Attributes:
        closed: the engine is closed.
        error: why the engine has failed; None if it has not.
        asleep: the parts of the memory that are given back: "weights", "kv_cache".
        updating: a call is overwriting weights.
        update_open: a weight update has started and neither finished nor failed.
        weight_error: why the weights may be partly overwritten; None if they are whole.
        lock: held within a section.
        in_section: a section is open.
    """

    def __init__(self):
        self.closed = False
        self.error: BaseException | None = None
        self.asleep: set[str] = set()
        self.updating = False
        self.update_open = False
        self.weight_error: BaseException | None = None
        self.lock = threading.RLock()
        self.in_section = False
        self.reserving_thread: int | None = None
        self._forks = _Forks.count
        _Forks.has_engine = True

    @property
    def is_forked(self) -> bool:
        """Whether this is a forked child, which cannot use what its parent made."""
        return self._forks != _Forks.count

    @property
    def update_failed(self) -> bool:
        """Whether a weight update has failed, and none has started since."""
        return self.weight_error is not None and not self.update_open

    def check_process(self) -> None:
        """Raise RuntimeError in a forked child."""
        if self.is_forked:
            raise RuntimeError("the engine belongs to the process that this one was forked from; make a new one here")

    def check_usable(self, needs: Collection[str] = MEMORY, allow_partial_weights: bool = False) -> None:
        """Raise RuntimeError if the engine cannot be used now.

        Args:
            needs: the parts of the memory that must be awake.
            allow_partial_weights: accept weights that may be partly overwritten.
        """
        if self.error is not None:
            raise RuntimeError(f"the engine has failed; make a new one: {self.error!r:.500}") from self.error
        if self.closed:
            raise RuntimeError("the engine is closed")
        self.check_process()
        if self.updating:
            raise RuntimeError("update_weights is running; the code that makes its weights cannot use the engine")
        if self.asleep and (asleep := sorted(self.asleep.intersection(needs))):
            raise RuntimeError(f"the engine is asleep ({', '.join(asleep)}); call wake_up() first")
        if allow_partial_weights:
            return
        if self.update_open:
            raise RuntimeError("a weight update is open; call finish_weight_update() first")
        if self.weight_error is not None:
            message = (
                "the last update_weights failed, and the weights may be partly overwritten; run a whole weight update"
            )
            raise RuntimeError(f"{message}: {self.weight_error!r:.500}") from self.weight_error

    def take(self) -> None:
        """Take the lock. Raise RuntimeError if another thread uses the engine."""
        if self.reserving_thread in (None, threading.get_ident()) and self.lock.acquire(blocking=False):
            return
        self.check_process()
        if self.closed:
            raise RuntimeError("the engine is closed")
        raise RuntimeError("another thread is using the engine; call it from one at a time, or use AsyncLLM")

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Refuse other threads in the whole `with` block, which may have several sections. Let interrupts through.

        Blocks of one thread may be nested.
        """
        thread = threading.get_ident()
        outer = thread if self.reserving_thread == thread else None
        try:
            with Section(self):
                self.reserving_thread = thread
            try:
                yield
            finally:
                self._unreserve(outer)
        finally:
            self._unreserve(outer)  # again, because an interrupt may have come just before the first time

    def _unreserve(self, outer: int | None) -> None:
        if self.reserving_thread == threading.get_ident():
            self.reserving_thread = outer

    @contextmanager
    def updating_weights(self) -> Iterator[None]:
        """Refuse all use of the engine in the `with` block, which does a part of a weight update.

        An error in the block ends the update. `weight_error` is set before the first weight is overwritten, because an
        interrupt may come at any time.
        """
        self.updating = True
        if self.weight_error is None:
            self.weight_error = RuntimeError("it was interrupted")
        try:
            yield
        except BaseException as error:
            self.weight_error = without_traceback(error)
            self.update_open = False
            raise
        finally:
            self.updating = False


class Section(DeferInterrupts):
    """Make a `with` block a critical section of the engine: refuse other threads, and hold back interrupts.

    Sections may be nested.

    Args:
        guard: the engine's Guard.
        at_end: called at the end, if this is the outermost section.
    """

    def __init__(self, guard: Guard, at_end: Callable[[], None] | None = None):
        super().__init__()
        self.guard = guard
        self.at_end = at_end
        self.is_outermost = False

    def __enter__(self):
        super().__enter__()
        try:
            self.guard.take()
        except BaseException:
            self._finish()
            raise
        self.is_outermost = not self.guard.in_section
        self.guard.in_section = True
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self.is_outermost and self.at_end is not None:
                self.at_end()
        finally:
            if self.is_outermost:
                self.guard.in_section = False
            self.guard.lock.release()
            self._finish()


class Closable(Protocol):
    def close(self) -> None: ...


def close_at_exit(engine: Closable) -> None:
    """Close the engine when Python ends, if it still exists. Later, the modules that closing needs may be gone."""
    reference = weakref.ref(engine)

    def close() -> None:
        existing = reference()
        if existing is not None:
            existing.close()

    atexit.register(close)
