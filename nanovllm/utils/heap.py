"""The memory of this process."""

import contextlib
import ctypes
import gc

import torch


def give_back_memory() -> None:
    """Return the memory of dropped tensors to the system.

    Parameters and their loaders refer to each other, so only the garbage collector frees them. glibc keeps blocks of up
    to 32 MiB, such as weights and KV caches on a CPU.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
