"""The times of an engine's steps, as `LLM.on_step` receives them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from nanovllm.messages import Batch

P = ParamSpec("P")
T = TypeVar("T")


class Phase(NamedTuple):
    """A part of a step on the host: schedule, launch, collect or update. Times are those of `time.perf_counter`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of the engine: the batch that it launched, and its times.

    If steps overlap, a step launches one batch and collects the tokens of the batch before it.

    Args:
        batch: the launched batch, or None if there was nothing to launch.
        phases: the parts of the step, in the order in which they ran.
        gpu_events: CUDA events before and after the launched batch; only with `LLM.time_gpu`, on a GPU.
    """

    batch: Batch | None
    phases: tuple[Phase, ...]
    gpu_events: tuple[torch.cuda.Event, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds that the step took on the host."""
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
    """Runs the parts of a step and notes their times.

    Args:
        gpu: where to record CUDA events around the launch; None records none.
    """

    def __init__(self, gpu: torch.device | None = None):
        self.gpu = gpu
        self.gpu_events: list[torch.cuda.Event] = []
        self.phases: list[Phase] = []
        self.phase_start = time.perf_counter()

    def run(self, name: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `call`, record its time as a phase, and return its result. A phase starts when the one before ends."""
        result = call(*args, **kwargs)
        now = time.perf_counter()
        self.phases.append(Phase(name, self.phase_start, now))
        self.phase_start = now
        return result

    def run_timing_gpu(self, name: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a phase as `run` does. Also measure the GPU work that it launches."""
        if self.gpu is None:
            return self.run(name, call, *args, **kwargs)
        self._record_event(self.gpu)
        result = self.run(name, call, *args, **kwargs)
        self._record_event(self.gpu)
        return result

    def stats(self, batch: Batch | None) -> StepStats:
        """Return the times of the whole step."""
        return StepStats(batch, tuple(self.phases), tuple(self.gpu_events))

    def _record_event(self, gpu: torch.device) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(gpu))
        self.gpu_events.append(event)
