"""A progress bar that can fail or be interrupted without harm."""

import sys
from typing import Any, ClassVar
from weakref import WeakSet

from tqdm import tqdm


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
        try:
            super().display(*args, **kwargs)
        except Exception:
            self.disable = True

    def close(self) -> None:
        try:
            super().close()
        except Exception:
            self.disable = True


ProgressBar.set_lock(_NoLock())
