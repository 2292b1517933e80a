"""A progress bar that can fail or be interrupted without harm."""

import sys
import time
from typing import Any, ClassVar
from weakref import WeakSet

from tqdm import tqdm

from nanovllm.library_errors import handling


class _NoLock:
    """Replaces the lock that all of tqdm's bars share.

    tqdm keeps it after an interrupt or a write error, and every other bar of the process would wait for it for ever.
    """

    def acquire(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def release(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        pass


class ProgressBar(tqdm):
    """A bar on stderr; it switches itself off if stderr cannot be written.

    Args:
        enabled: False shows nothing, None shows the bar only on a terminal.
        options: tqdm's.
    """

    _instances: ClassVar[WeakSet] = WeakSet()
    monitor_interval = 0  # start no thread that refreshes bars

    def __init__(self, *args: Any, enabled: bool | None = True, **options: Any):
        disable = None if enabled is None else not enabled
        super().__init__(*args, disable=True if sys.stderr is None else disable, position=0, **options)

    def display(self, *args: Any, **kwargs: Any) -> None:
        with handling(self._switch_off, Exception):
            super().display(*args, **kwargs)

    def close(self) -> None:
        with handling(self._switch_off, Exception):
            super().close()

    def _switch_off(self, error: Exception) -> None:
        self.disable = True


ProgressBar.set_lock(_NoLock())


class GenerationBar(ProgressBar):
    """Counts the requests that have finished, and shows tokens/s."""

    def __init__(self, num_requests: int, enabled: bool):
        super().__init__(total=num_requests, desc="Generating", enabled=enabled, dynamic_ncols=True)
        self.num_tokens = 0
        self.start = time.perf_counter()

    def add(self, num_tokens: int) -> None:
        """Count a request that has generated so many tokens."""
        self.num_tokens += num_tokens
        self.set_postfix_str(f"{self.num_tokens / (time.perf_counter() - self.start):.0f} tok/s", refresh=False)
        self.update()
