"""The loop: launch a step, then collect the step before it.

Overlap of depth 1 keeps the device busy while the host works:

    host    schedule 1 | launch 1 | schedule 2 | launch 2 | collect 1, update | schedule 3 | launch 3 | collect 2 ...
    device             |    step 1 ...............        |   step 2 ...............       |   step 3 ...
"""

import time
from collections import deque

from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.step_stats import StepStats, StepTimer
from nanovllm.executor.local import Executor
from nanovllm.messages import StepOutput
from nanovllm.outputs import Metrics, RequestOutput, merge_deltas


class EngineCore:
    """Runs the steps of requests, and gathers their outputs.

    It knows nothing of threads, interrupts and failures: `LLMEngine` calls its methods in a section (`guard.Section`).

    Args:
        overlap: how many launched steps may wait to be collected when the next one is scheduled, 0 or 1.

    Attributes:
        requests: the unfinished requests, by id.
        in_flight: steps that are launched and not collected yet, oldest first.
        outputs: the output of each request that nobody has taken yet. A new one joins it, or replaces it if the
            request's outputs are cumulative.
        weight_version: how many weight updates have succeeded.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, overlap: int):
        self.scheduler = scheduler
        self.executor = executor
        self.overlap = overlap
        self.requests: dict[str, Request] = {}
        self.in_flight: deque[ScheduledStep] = deque()
        self.outputs: dict[Request, RequestOutput] = {}
        self.weight_version = 0
        self.num_steps = 0
        self.step_time = 0.0

    # -- the loop ----------------------------------------------------------------------------------------------------

    def step(self, timer: StepTimer) -> StepStats:
        """Launch the next step, then collect the one before it."""
        step = timer.run("schedule", self.scheduler.schedule)
        if step is not None:
            timer.run_timing_gpu("launch", self.executor.launch, step.batch)
            self.in_flight.append(step)
        while self._must_collect(step):
            output = timer.run("collect", self.executor.collect)
            timer.run("update", self._update, self.in_flight.popleft(), output)
        stats = timer.stats(step.batch if step is not None else None)
        self.step_time += stats.seconds
        return stats

    def _must_collect(self, launched: ScheduledStep | None) -> bool:
        """Return whether to collect the oldest step in flight now.

        Args:
            launched: the step that was launched just before; None if there was nothing to launch.
        """
        if launched is None or not self.requests:
            # Nothing is left to overlap with. If all requests ended early, their blocks become free now.
            return bool(self.in_flight)
        return len(self.in_flight) > self.overlap

    @property
    def num_launched(self) -> int:
        """Number of launched steps."""
        return self.num_steps + len(self.in_flight)

    def _update(self, step: ScheduledStep, output: StepOutput) -> None:
        """Take in the tokens of a step, and gather the outputs of finished and streamed requests."""
        self.num_steps += 1
        changed = self.scheduler.update(step, output)
        now = time.monotonic()
        for request_id in dict.fromkeys(seq.request_id for seq in changed):
            request = self.requests[request_id]
            if not request.metrics.first_token_ts:
                request.mark_first_token(now)
            finished = request.is_finished
            if finished or (request.stream and not request.lacks_prompt_logprobs):
                self._add_output(request, request.take_output(self.weight_version, now))
            if finished:
                del self.requests[request_id]

    def _add_output(self, request: Request, output: RequestOutput) -> None:
        waiting = self.outputs.get(request)
        self.outputs[request] = merge_deltas(waiting, output) if waiting and request.is_delta else output

    def drain_and_preempt_all(self) -> None:
        """Collect the steps in flight. Then preempt all sequences, so that they are computed again."""
        while self.in_flight:
            output = self.executor.collect()
            self._update(self.in_flight.popleft(), output)
        self.scheduler.preempt_all()

    # -- requests ----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request that has an id."""
        self.requests[request.id] = request
        for seq in request.samples:
            self.scheduler.add(seq)

    def abort(self, request: Request) -> None:
        """End an unfinished request. What it has so far is its last output."""
        del self.requests[request.id]
        for seq in request.samples:
            self.scheduler.finish(seq, "abort")
        self._add_output(request, request.take_output(self.weight_version))

    def has_unfinished(self) -> bool:
        """Return whether a request is unfinished, a step is in flight, or an output waits for `step`.

        Outputs that wait for iterators do not count.
        """
        return bool(self.requests or self.in_flight) or any(not request.has_consumer for request in self.outputs)

    def is_unfinished(self, request: Request) -> bool:
        return self.requests.get(request.id) is request  # not only the id: another request may have it by now

    def has_output(self, request: Request) -> bool:
        """Return whether an output of `request` waits to be taken."""
        return request in self.outputs

    def has_id(self, request_id: str) -> bool:
        """Return whether a request with this id is unfinished, or has an output that nobody has taken."""
        return request_id in self.requests or any(request.id == request_id for request in self.outputs)

    def clear(self) -> None:
        """Drop all requests, steps and outputs."""
        self.requests.clear()
        self.in_flight.clear()
        self.outputs.clear()
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()

    def metrics(self) -> Metrics:
        """Return counters since the engine was made, and what it is doing now."""
        scheduler = self.scheduler
        blocks = scheduler.block_manager
        return Metrics(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_preemptions=scheduler.num_preemptions,
            num_steps=self.num_steps,
            step_time=self.step_time,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            generated_tokens=scheduler.num_generated_tokens,
            kv_usage=1 - blocks.num_free / blocks.num_blocks,
            num_free_slots=len(scheduler.free_slots),
            num_snapshots=len(blocks.snapshots.slot_of) if blocks.snapshots else 0,
            num_free_snapshots=len(blocks.snapshots.free_slots) if blocks.snapshots else 0,
        )
