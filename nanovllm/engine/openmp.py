"""Notices that torch's CPU threads waste the time of a machine that other programs use too.

Threads of OpenMP spin while they wait for each other. On cores that another program also uses, a thread spins while the
one it waits for cannot run, and a step takes ten times as long. The environment decides whether they spin or sleep, and
OpenMP reads it when torch is imported. So this can only say what to set.
"""

import logging
import os

logger = logging.getLogger("nanovllm")

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SECONDS = 2.0  # of steps, before there is a judgement
_BUSY = (
    0.6  # fraction of the time that spinning threads run for where nothing else uses the cores; it is nearly 1 there
)


class ThreadWatch:
    """Compares the CPU time of steps with the time that `num_threads` spinning threads would take.

    One line is logged if the threads cannot run for much of the time, unless the environment says how they should wait.
    """

    def __init__(self, num_threads: int):
        self.num_threads = num_threads
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self.done = num_threads == 1 or any(name in os.environ for name in _SETTINGS)

    def add(self, seconds: float, cpu_seconds: float) -> None:
        """Take in the time of a step, and the CPU time of all threads in it."""
        if self.done:
            return
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds
        if self.seconds < _SECONDS:
            return
        busy = self.cpu_seconds / (self.seconds * self.num_threads)
        self.seconds, self.cpu_seconds = 0.0, 0.0
        if busy < _BUSY:
            self.done = True
            logger.warning(
                f"torch's {self.num_threads} threads got only {busy:.0%} of the CPU time they ask for: other programs "
                "use the cores too. Start Python with OMP_WAIT_POLICY=PASSIVE in the environment, so threads sleep "
                "while they wait; or with OMP_NUM_THREADS=1"
            )
