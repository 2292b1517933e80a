"""Torch's CPU threads: detects that they spin on cores that other programs use too, and avoids them after a fork.

OpenMP's threads spin while they wait for each other. If other programs use the cores too, a thread may spin while the
thread it waits for cannot run, and a step takes ten times as long. The environment decides whether threads spin or
sleep, and OpenMP reads it when torch is imported. So the engine can only log what to set.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanovllm.engine.guard import is_forked_from_engine

logger = logging.getLogger("nanovllm")

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Steps are judged together until they have taken this many seconds, so that one slow step does not log a warning.
_SECONDS = 2.0
# Least fraction of the time that undisturbed threads run. They spin while they wait, so they run nearly always.
_BUSY = 0.6


class ThreadWatch:
    """Compares the CPU time of steps with the time that `num_threads` spinning threads would take.

    Logs one line if the threads often cannot run, unless the environment already sets how they wait.
    """

    def __init__(self, num_threads: int):
        self.num_threads = num_threads
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.done = num_threads == 1 or any(name in os.environ for name in _SETTINGS)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the times of the `with` block, which runs a step."""
        if self.done:
            yield
            return
        start = time.perf_counter()
        cpu_start = time.process_time()
        yield
        self.add(time.perf_counter() - start, time.process_time() - cpu_start)

    def add(self, seconds: float, cpu_seconds: float) -> None:
        """Add the time of a step, and the CPU time of all threads in it."""
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
                "use the cores too. Start Python with OMP_WAIT_POLICY=PASSIVE in the environment, which lets threads "
                "sleep while they wait, or with OMP_NUM_THREADS=1"
            )


def use_one_thread_after_fork() -> None:
    """Let torch use one thread if this process was forked from one that has used more: OpenMP would wait for them."""
    if is_forked_from_engine() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.warning(
            "torch uses one thread, because this process was forked from one with an engine; start processes with the "
            "method 'spawn' to use more"
        )
