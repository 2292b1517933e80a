"""How the threads of this process share Python's lock."""

import sys


def switch_threads_often() -> None:
    """Let a thread that waits for the GIL have it after 0.1 ms. Only for processes that nanovllm starts.

    A step gives the GIL away with each operation of torch. While another thread computes in Python, such as one that
    prepares a request, each wait for the GIL would take 5 ms, Python's default.
    """
    sys.setswitchinterval(1e-4)
