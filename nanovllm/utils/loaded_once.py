"""A cached property for several threads."""

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any


class loaded_once(cached_property):
    """A cached property that one thread loads while others wait for it; cached_property has no lock since Python 3.12.

    Once it is loaded, reading it takes no lock: Python finds the value in the instance's `__dict__` first, and does not
    call `__get__`.
    """

    def __init__(self, load: Callable[[Any], Any]):
        super().__init__(load)
        self.loading = threading.RLock()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        with self.loading:
            return super().__get__(instance, owner)
