"""The heap of this process."""

import contextlib
import ctypes


def trim_heap() -> None:
    """Return freed memory to the system. glibc keeps blocks of up to 32 MiB, such as weights and KV caches on a CPU."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
