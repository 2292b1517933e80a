"""The times of an engine's steps, as `LLMEngine.on_step` receives them."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanovllm.messages import Batch


class Phase(NamedTuple):
    """A part of a step on the host: schedule, launch, collect or update. Times are those of `time.perf_counter`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class StepStats:
    """One call of `LLMEngine.step`: the batch that it launched, and its times.

    If steps overlap, a call launches one batch and collects the tokens of the batch before it.

    Args:
        batch: the launched batch, or None if there was nothing to launch.
        phases: the parts of the call, in the order in which they ran.
        gpu_events: CUDA events before and after the launched batch; only with `LLMEngine.time_gpu`, on a GPU.
    """

    batch: Batch | None
    phases: tuple[Phase, ...]
    gpu_events: tuple[torch.cuda.Event, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds that the call took on the host."""
        return self.phases[-1].end - self.phases[0].start

    @property
    def wait_seconds(self) -> float:
        """Seconds that the host waited for tokens from the device."""
        return sum(phase.end - phase.start for phase in self.phases if phase.name == "collect")

    @property
    def gpu_seconds(self) -> float | None:
        """GPU seconds of the launched batch, or None if they were not measured. Waits until the GPU has run it."""
        if not self.gpu_events:
            return None
        start, end = self.gpu_events
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class StepTimer:
    """Measures one call of `LLMEngine.step`.

    Args:
        gpu: where to record CUDA events around the launch; None records none.
    """

    def __init__(self, gpu: torch.device | None = None):
        self.gpu = gpu
        self.gpu_events: list[torch.cuda.Event] = []
        self.phases: list[Phase] = []
        self.last = time.perf_counter()

    def finish(self, name: str) -> None:
        """End a phase, which started where the phase before it ended."""
        now = time.perf_counter()
        self.phases.append(Phase(name, self.last, now))
        self.last = now

    def mark_gpu(self) -> None:
        """Record a CUDA event after the work that was launched so far."""
        if self.gpu is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.gpu))
            self.gpu_events.append(event)

    def stats(self, batch: Batch | None) -> StepStats:
        return StepStats(batch, tuple(self.phases), tuple(self.gpu_events))
