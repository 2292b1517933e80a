"""The engine: queues requests, runs the steps, returns results.

Overlap of depth 1 keeps the device busy while the host works:

    host    schedule 1 | launch 1 | schedule 2 | launch 2 | collect 1, update | schedule 3 | launch 3 | collect 2 ...
    device             |    step 1 ...............        |   step 2 ...............       |   step 3 ...
"""

import logging
import random
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanovllm.checkpoints.hub import new_weights, open_config
from nanovllm.checks import is_list, shown
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.guard import MEMORY, Guard, Section, close_at_exit
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.interrupts import DeferInterrupts
from nanovllm.engine.openmp import ThreadWatch
from nanovllm.engine.request import Request, check_request_id
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.snapshots import Snapshots
from nanovllm.engine.step_stats import StepStats, StepTimer
from nanovllm.executor.start import start_executor
from nanovllm.inputs import Prompt
from nanovllm.messages import Batch, StepOutput
from nanovllm.outputs import Metrics, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger("nanovllm")

# Bounds the numbers among request ids that advance the engine's numbering, and so the length of the ids that it gives.
_MAX_ID_DIGITS = 18

# The parts of the memory that must be awake for a weight update.
_UPDATE_NEEDS = ("weights",)


class LLMEngine:
    """Loads a model and serves requests.

    Only one thread at a time may use it: the calls of others raise RuntimeError meanwhile (`AsyncLLM` serves many at
    once). A forked child cannot use it. `close` gives back its memory and its processes.

    Methods that change the state open a section (`guard.Section`), so that neither an interrupt nor another thread sees
    half of a change; sections may be nested. If `x` has a part `_x`, this part expects an open section. The guard's own
    checks change nothing.

    Args:
        model: see `Config`.
        **kwargs: the other fields of `Config`; an unknown one raises TypeError.

    Attributes:
        on_step, time_gpu: see `LLM`.
        requests: the unfinished requests, by id.
        in_flight: steps that are launched and not collected yet, oldest first.
        outputs: the outputs that the next `step` returns, each with its request.
        abandoned: requests whose callers have gone; the next section ends them.
        holds_resources: whether there is anything for `close` to give back.
        weight_version: how many weight updates have succeeded.
    """

    holds_resources = False  # until the constructor has an executor

    def __init__(self, model: str | Path | None = None, **kwargs: Any):
        self.config = Config.from_options({"model": model, **kwargs})
        self.guard = Guard()
        self.source = open_config(self.config)
        if self.source.has_tokenizer and not self.config.skip_tokenizer_init:
            # Later its files may be gone, and a broken tokenizer must not cost a step.
            self.source.tokenizer()
        self.requests: dict[str, Request] = {}
        self.in_flight: deque[ScheduledStep] = deque()
        self.outputs: list[tuple[Request, RequestOutput]] = []
        self.abandoned: dict[Request, Any] = {}
        self.executor = start_executor(self.config, self.source)
        self.holds_resources = True
        runner = self.executor.runner
        self.max_model_len = runner.max_model_len
        num_kv_tokens = runner.num_blocks * self.config.kvcache_block_size
        self.input_processor = InputProcessor(self.config, self.source, self.max_model_len, num_kv_tokens)
        block_size, caches_prefixes = self.config.kvcache_block_size, self.config.enable_prefix_caching
        snapshots = None
        if caches_prefixes and runner.snapshot_slots is not None:
            # Blocks of KV are of no use without the recurrent state at their end.
            snapshots = Snapshots(runner.snapshot_slots, block_size)
            caches_prefixes = len(runner.snapshot_slots) > 0
        blocks = BlockManager(runner.num_blocks, block_size, caches_prefixes, snapshots)
        self.scheduler = Scheduler(
            runner.config.max_num_seqs,
            self.config.max_num_batched_tokens,
            blocks,
            # Ranks that schedule for themselves must not depend on their clocks.
            limit_masks=not self.executor.is_replicated,
        )
        self.weight_version = 0
        self.next_id = 0
        self.seeds = random.Random(self.config.seed)
        self.num_steps = 0
        self.step_time = 0.0
        self.on_step: Callable[[StepStats], None] | None = None
        self.time_gpu = False
        self.gpu = runner.device if runner.device.type == "cuda" else None
        self.thread_watch = ThreadWatch(torch.get_num_threads() if self.config.device_type == "cpu" else 1)
        close_at_exit(self)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _run_step(self, timer: StepTimer) -> Batch | None:
        """Launch the next step, then collect the one before it. Return the batch that was launched."""
        step = timer.run("schedule", self.scheduler.schedule)
        if step is not None:
            timer.run_on_gpu("launch", self.executor.launch, step.batch)
            self.in_flight.append(step)
        while self._must_collect(step):
            output = timer.run("collect", self.executor.collect)
            timer.run("update", self._update, self.in_flight.popleft(), output)
        return step.batch if step is not None else None

    def _must_collect(self, launched: ScheduledStep | None) -> bool:
        """Whether the oldest step in flight must be collected before the next one is scheduled."""
        if launched is None or not self.requests:
            # Nothing is left to overlap with. If all requests ended early, their blocks become free now.
            return bool(self.in_flight)
        return len(self.in_flight) > self.config.overlap

    def _update(self, step: ScheduledStep, output: StepOutput) -> None:
        """Take in the tokens of a step, and gather the outputs of finished and streamed requests."""
        self.num_steps += 1
        changed, now = self.scheduler.update(step, output), time.monotonic()
        for request_id in dict.fromkeys(seq.request_id for seq in changed):
            request = self.requests[request_id]
            if not request.metrics.first_token_ts:
                request.mark_first_token(now)
            finished = request.is_finished
            if finished or request.stream:
                self.outputs.append((request, request.take_output(self.weight_version, now)))
            if finished:
                del self.requests[request_id]

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step. Return the outputs of finished requests, and what is new in streams."""
        self._advance()
        return self.take_outputs()

    def take_outputs(self) -> list[RequestOutput]:
        """Return the outputs that the next `step` would return, without a step."""
        try:
            return [output for _, output in self.outputs]
        finally:
            # Clear last: if an interrupt comes while the list is made, the next step still returns these outputs.
            self.outputs.clear()

    def step_for(self, requests: Collection[Request]) -> list[RequestOutput]:
        """Run one step. Return the outputs of `requests`; keep the others for the next `step`."""
        self._advance()
        outputs = [output for request, output in self.outputs if request in requests]
        self.outputs = [(request, output) for request, output in self.outputs if request not in requests]
        return outputs

    def has_unfinished(self) -> bool:
        """Return whether `step` has anything to do or to return."""
        return bool(self.requests or self.in_flight or self.outputs)

    def is_finished(self) -> bool:
        """The opposite of `has_unfinished`."""
        return not self.has_unfinished()

    @property
    def can_step(self) -> bool:
        """Whether `step` is useful now: it has something to do, and the engine has its weights and its memory."""
        return self.has_unfinished() and not self.guard.asleep and self.guard.weight_error is None

    def _advance(self) -> None:
        """Run one step. Its outputs join `self.outputs`."""
        with self._section():
            self._ensure_usable()
            with self._closing_on_error():
                watch = self.thread_watch
                cpu_start = 0.0 if watch.done else time.process_time()
                timer = StepTimer(self.gpu if self.time_gpu else None)
                stats = timer.stats(self._run_step(timer))
                self.step_time += stats.seconds
                if not watch.done:
                    watch.add(stats.seconds, time.process_time() - cpu_start)
        self._report(stats)

    def _report(self, stats: StepStats) -> None:
        """Log a step and call `on_step`. If that raises, the engine stays usable and no output is lost."""
        if self.config.log_steps and stats.batch is not None:
            self._log(stats.batch, stats.seconds)
        if self.on_step is not None:
            self.on_step(stats)

    def _log(self, batch: Batch, seconds: float) -> None:
        now = self.metrics()
        logger.info(
            f"step {now.num_steps}: {batch.num_decode} decode rows, {len(batch.prefill_rows)} prompt rows, "
            f"{batch.num_tokens} tokens, {1e3 * seconds:.2f} ms; {now.num_running} running, {now.num_waiting} waiting, "
            f"KV {now.kv_usage:.0%} used"
        )

    def metrics(self) -> Metrics:
        """Return counters since the engine was made, and what it is doing now."""
        scheduler, blocks = self.scheduler, self.scheduler.block_manager
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

    # -- requests ----------------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: int | str | None = None,
        stream: bool | None = None,
    ) -> str:
        """Queue a request and return its id; see `LLM.add_request`."""
        if not isinstance(stream, bool | None):
            raise TypeError(f"stream must be a bool or None, got {shown(stream)}")
        if stream is None:
            kind = getattr(sampling_params, "output_kind", None)
            stream = kind in (RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA)
        return self.queue(self.prepare(prompt, sampling_params, request_id, stream))

    def prepare(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: int | str | None = None,
        stream: bool = False,
    ) -> Request:
        """Check a request and prepare it on the host. Nothing is queued yet."""
        with self._section():
            self._check_addable(request_id)
        return self.input_processor.process(prompt, sampling_params, request_id, stream)

    def queue(self, request: Request) -> str:
        """Queue a request that was prepared. Return its id."""
        with self._section():
            self._check_addable(request.chosen_id)
            num_waiting = len(self.scheduler.waiting) + len(request.samples)
            if num_waiting > self.config.max_num_waiting:
                raise ValueError(f"{num_waiting} sequences would wait; max_num_waiting={self.config.max_num_waiting}")
            request.mark_queued(str(self.next_id) if request.chosen_id is None else request.chosen_id)
            if request.id.isascii() and request.id.isdigit() and len(request.id) <= _MAX_ID_DIGITS:
                # Numbers that the engine gives are larger than all that callers chose.
                self.next_id = max(self.next_id, int(request.id) + 1)
            request.seed_samples(self.seeds)
            self.requests[request.id] = request
            for seq in request.samples:
                self.scheduler.add(seq)
        return request.id

    def abort(self, request_id: int | str) -> RequestOutput | None:
        """End a request in whatever state it is; see `LLM.abort`."""
        with self._section():
            request = self.requests.get(check_request_id(request_id))
            return None if request is None else self._abort(request)

    def is_pending(self, request: Request) -> bool:
        """Whether a request is unfinished, or an output of it waits for `step`."""
        return self._is_unfinished(request) or any(owner is request for owner, _ in self.outputs)

    def abandon(self, requests: Iterable[Request]) -> None:
        """End requests whose callers have gone, and drop their outputs; see `end_abandoned`."""
        self.abandoned.update(dict.fromkeys(requests))
        self.end_abandoned()

    def end_abandoned(self) -> None:
        """End the abandoned requests now, or let the open section do it at its end."""
        # Python's garbage collector may end a stream's iterator within a section.
        if self.abandoned and not self.guard.in_section:
            # RuntimeError: another thread uses the engine, and its section ends them.
            with suppress(RuntimeError), self._section():
                pass

    def abandon_with_consumer(self, request: Request, consumer: Any) -> None:
        """Abandon a request as soon as its consumer has been garbage-collected."""
        # The callback is `abandoned.setdefault(request, reference)`. This is C code, so no interrupt can hit it.
        request.consumer = weakref.ref(consumer, partial(self.abandoned.setdefault, request))

    def _check_addable(self, request_id: Any) -> None:
        """Check that requests can be added now, and that none has this id."""
        self._ensure_usable()
        if request_id is not None and self._is_taken(check_request_id(request_id)):
            name = f"request_id {shown(request_id)}"
            raise ValueError(f"{name} belongs to a request that is unfinished or whose output waits for step()")

    def _is_taken(self, request_id: str) -> bool:
        return request_id in self.requests or any(output.request_id == request_id for _, output in self.outputs)

    def _is_unfinished(self, request: Request) -> bool:
        return self.requests.get(request.id) is request  # not only the id: another request may have it by now

    def _abort(self, request: Request) -> RequestOutput:
        del self.requests[request.id]
        for seq in request.samples:
            self.scheduler.finish(seq, "abort")
        return request.take_output(self.weight_version)

    def _end_abandoned(self) -> None:
        """End the abandoned requests and drop their outputs."""
        while self.abandoned:
            abandoned = list(self.abandoned)  # oldest first, because the queue is searched from its front
            for request in abandoned:
                if self._is_unfinished(request):
                    self._abort(request)
            self.outputs = [pair for pair in self.outputs if pair[0] not in self.abandoned]
            for request in abandoned:
                del self.abandoned[request]

    # -- weights and memory ------------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str | Path) -> int:
        """Overwrite the weights in place, on all ranks; see `LLM.update_weights`."""
        self.ensure_usable(_UPDATE_NEEDS, allow_partial_weights=True)
        weights = weight_pairs(new_weights(weights, self.source.config) if isinstance(weights, str | Path) else weights)
        with self._section() as section:
            self.start_weight_update()
            self.load_weights(section.pull(weights))
            return self.finish_weight_update()

    def start_weight_update(self) -> None:
        """Start to overwrite the weights in parts; see `LLM.start_weight_update`."""
        with self._section():
            self.guard.check_usable(_UPDATE_NEEDS, allow_partial_weights=True)
            with self._closing_on_error():
                self._forget_computed()
            with self._updating_weights():
                self.executor.start_weight_update()
                self.guard.update_open = True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Overwrite some of the weights and return their names; see `LLM.load_weights`."""
        with self._section() as section:
            self._check_update_open()
            with self._updating_weights():
                return self.executor.load_weights(section.pull(weight_pairs(weights)))

    def finish_weight_update(self) -> int:
        """Check the new weights and return their version; see `LLM.finish_weight_update`."""
        with self._section():
            self._check_update_open()
            with self._updating_weights():
                self.executor.finish_weight_update()
                self.guard.update_open = False
            self.guard.weight_error = None
            self.weight_version += 1
            return self.weight_version

    def _check_update_open(self) -> None:
        self.guard.check_usable(_UPDATE_NEEDS, allow_partial_weights=True)
        if not self.guard.update_open:
            raise RuntimeError("no weight update is open; call start_weight_update() first")

    @contextmanager
    def _updating_weights(self) -> Iterator[None]:
        """Do a part of a weight update in a `with` block. Close the engine if a rank is lost in it."""
        try:
            with self.guard.updating_weights():
                yield
        except BaseException as error:
            if self.executor.error:
                self._fail(error)
            raise

    def sleep(self, level: int = 1) -> None:
        """Give device memory back until `wake_up`; see `LLM.sleep`."""
        message = f"level must be the integer 1 (KV cache) or 2 (KV cache and weights), got {shown(level)}"
        if not isinstance(level, int) or isinstance(level, bool):
            raise TypeError(message)
        if level not in (1, 2):
            raise ValueError(message)
        with self._section():
            self.guard.check_usable(needs=(), allow_partial_weights=True)
            wanted = MEMORY if level == 2 else ("kv_cache",)
            if parts := tuple(part for part in wanted if part not in self.guard.asleep):
                with self._closing_on_error():
                    self._forget_computed()
                    self.executor.sleep(parts)
                    self.guard.asleep.update(parts)

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Undo `sleep`, or a part of it; see `LLM.wake_up`."""
        wanted = MEMORY if tags is None else _memory_parts(tags)
        with self._section():
            self.guard.check_usable(needs=(), allow_partial_weights=True)
            if parts := tuple(part for part in wanted if part in self.guard.asleep):
                with self._closing_on_error():
                    self.executor.wake_up(parts, capture=self.guard.asleep.issubset(parts))
                    self.guard.asleep.difference_update(parts)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; see `LLM.reset_prefix_cache`."""
        with self._section():
            self._ensure_usable(needs=(), allow_partial_weights=True)
            self.scheduler.block_manager.reset_prefix_cache()
        return True

    def _forget_computed(self) -> None:
        """Collect what is in flight, and let all running requests be computed again."""
        while self.in_flight:
            output = self.executor.collect()
            self._update(self.in_flight.popleft(), output)
        self.scheduler.preempt_all()

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self.input_processor.tokenizer

    @property
    def is_sleeping(self) -> bool:
        """Whether a part of the memory sleeps."""
        return bool(self.guard.asleep)

    def ensure_usable(self, needs: Collection[str] = MEMORY, allow_partial_weights: bool = False) -> None:
        """Raise RuntimeError if the engine cannot be used now, or another thread uses it; see `Guard.check_usable`."""
        with self._section():
            self._ensure_usable(needs, allow_partial_weights)

    def _ensure_usable(self, needs: Collection[str] = MEMORY, allow_partial_weights: bool = False) -> None:
        """Do the same in an open section. A subclass may first make the engine usable."""
        self.guard.check_usable(needs, allow_partial_weights)

    def reserved(self) -> AbstractContextManager[None]:
        """Refuse other threads in a `with` block of several calls."""
        return self.guard.reserved()

    def close(self) -> None:
        """Give back memory and processes; see `LLM.close`."""
        if self.guard.is_forked:
            return  # the resources are the parent's
        if self.guard.updating:
            raise RuntimeError("update_weights is running; the code that makes its weights cannot close the engine")
        with DeferInterrupts():
            self.guard.closed = True
            if hasattr(self, "input_processor"):  # else the constructor did not get that far
                self.input_processor.close()
            with self.guard.lock:  # waits for the step that another thread runs
                if self.holds_resources:
                    self.requests.clear()
                    self.in_flight.clear()
                    self.outputs.clear()
                    self.executor.close()
                    self.holds_resources = False

    def _section(self) -> Section:
        """Change the engine's state in a `with` block. At its end the abandoned requests end."""
        return Section(self.guard, self._end_abandoned)

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """Close the engine on an error in the block: then the ranks' state is unknown, and no later result is sure."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        self.guard.error = error
        try:
            self.close()
        except Exception as second_error:  # a GPU in a bad state fails at whatever it is asked
            logger.warning("After %r closing the engine failed, too: %r", error, second_error)

    def __enter__(self):
        self.ensure_usable()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self):
        if self.holds_resources:
            with suppress(Exception):  # Python would only print it
                self.close()


def weight_pairs(weights: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Return weights. Raise TypeError if they cannot be pairs of names and tensors."""
    if not isinstance(weights, Iterable) or isinstance(weights, str | bytes | Mapping):
        raise TypeError(f"weights must be pairs (name, tensor), got {type(weights).__name__}")
    return weights


def _memory_parts(tags: Any) -> tuple[str, ...]:
    is_listed = is_list(tags) or isinstance(tags, set | frozenset)
    if not is_listed or not all(isinstance(part, str) for part in tags):
        raise TypeError(f"tags must be None or a list of {' and '.join(MEMORY)}, got {shown(tags)}")
    parts = tuple(tags)
    if unknown := [part for part in parts if part not in MEMORY]:
        raise ValueError(f"tags must be None or a list of {' and '.join(MEMORY)}, got {shown(unknown[0])}")
    return parts
