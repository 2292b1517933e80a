"""The engine: takes requests in, drives the steps, gives results out.

Overlap of depth 1 keeps the device busy while the host works:

    host    schedule 1 | launch 1 | schedule 2 | launch 2 | collect 1, update | schedule 3 | launch 3 | collect 2 ...
    device             |    step 1 ...............        |   step 2 ...............       |   step 3 ...
"""

import atexit
import logging
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceType
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from nanovllm.checkpoints.hub import open_model
from nanovllm.checkpoints.loader import iterate_weights
from nanovllm.checks import shown
from nanovllm.config import Config, check_names
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.interrupts import Deferral, interrupt_after
from nanovllm.engine.openmp import ThreadWatch
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.step_stats import StepStats, StepTimer
from nanovllm.executor.start import start_executor
from nanovllm.messages import Batch
from nanovllm.outputs import Metrics, RequestOutput
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger("nanovllm")


def checked_id(request_id: Any) -> int | str:
    if not isinstance(request_id, int | str) or isinstance(request_id, bool):
        raise TypeError(f"request_id must be a string or an integer, got {shown(request_id)}")
    return request_id


def close_at_exit(engine: Any) -> None:
    """Close it when Python ends, if it is still there: later, what closing needs has ended."""
    there = weakref.ref(engine)
    atexit.register(lambda: there() and there().close())


class LLMEngine:
    """Loads a model and answers requests.

    For one thread at a time: what another asks for meanwhile raises RuntimeError (`AsyncLLM` is for many at once). It
    is of no use to a forked child. Close it, or use it as a context manager, to give its memory and its processes back.

    Args:
        model: see `Config`.
        **kwargs: the other fields of `Config`; an unknown one raises TypeError.

    Attributes:
        on_step: called after each step with its `StepStats`; None by default. If it raises, `step` raises the same
            error; the engine stays usable, and the next `step` returns the outputs.
        time_gpu: also measure the GPU time of each step, which costs two CUDA events; False by default.
    """

    def __init__(self, model: str | Path | None = None, **kwargs):
        self.executor, self.closed, self.updating = None, False, False
        self.process = os.getpid()
        self.in_use = threading.RLock()  # held within a section
        self.owner: int | None = None  # the thread that holds the engine over several sections
        self.error: BaseException | None = None
        check_names(kwargs)
        self.config = Config(model=model, **kwargs)
        self.source = open_model(self.config.model, self.config.load_format)
        if self.source.has_tokenizer and not self.config.skip_tokenizer_init:
            self.source.tokenizer()  # loaded now: later its files may be gone, and a broken one must not cost a step
        self.executor = start_executor(self.config, self.source)
        self.sleep_level = 0
        self.weight_version = 0
        self.weight_error: BaseException | None = None  # what may have left the weights partly overwritten
        runner = self.executor.runner
        self.max_model_len = runner.max_model_len
        self.gpu = runner.device if runner.device.type == "cuda" else None
        self.num_kvcache_blocks = runner.num_blocks
        num_kv_tokens = runner.num_blocks * self.config.kvcache_block_size
        self.input_processor = InputProcessor(self.config, self.source, self.max_model_len, num_kv_tokens)
        blocks = BlockManager(runner.num_blocks, self.config.kvcache_block_size, self.config.enable_prefix_caching)
        self.scheduler = Scheduler(self.config.max_num_seqs, self.config.max_num_batched_tokens, blocks)
        self.requests: dict[int | str, Request] = {}
        self.in_flight: deque[ScheduledStep] = deque()
        self.outputs: list[tuple[Request, RequestOutput]] = []  # what the next `step` returns
        self.abandoned: dict[Request, Any] = {}  # requests that the next section ends: nobody waits for them
        self.in_section = False
        self.next_id = 0
        self.seeds = random.Random(self.config.seed)
        self.num_steps, self.step_time = 0, 0.0
        self.on_step: Callable[[StepStats], None] | None = None
        self.time_gpu = False
        self.threads = ThreadWatch(torch.get_num_threads() if self.config.device_type == "cpu" else 1)
        close_at_exit(self)

    @property
    def tokenizer(self):
        """The model's transformers tokenizer."""
        return self.input_processor.tokenizer

    # -- requests ----------------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: str | SequenceType[int],
        sampling_params: SamplingParams | None = None,
        request_id: int | str | None = None,
        stream: bool = False,
    ) -> int | str:
        """Queue a request; its id.

        Args:
            prompt: text, which is tokenised with the model's special tokens, or token ids.
            sampling_params: SamplingParams() if None.
            request_id: of no request that is unfinished or whose output waits for `step`; None numbers it.
            stream: `step` returns what is new of it each time there is something, instead of all at its end.

        Raises:
            TypeError, ValueError: the request cannot be served; nothing else is affected.
            RuntimeError: the engine is closed, asleep or has failed.
        """
        if not isinstance(stream, bool):
            raise TypeError(f"stream must be a bool, got {shown(stream)}")
        return self._queue(self._make_request(prompt, sampling_params, request_id, stream))

    def abort(self, request_id: int | str) -> RequestOutput | None:
        """End a request in whatever state it is.

        Returns:
            What it has so far (a stream: what is new), or None if it is unknown or already finished.
        """
        with self._section():
            request = self.requests.get(checked_id(request_id))
            return None if request is None else self._abort(request)

    def _abort(self, request: Request) -> RequestOutput:
        del self.requests[request.id]
        for seq in request.samples:
            self.scheduler.finish(seq, "abort")
        return request.output(self.weight_version)

    def _make_request(
        self, prompt, params: SamplingParams | None, request_id: int | str | None = None, stream: bool = False
    ) -> Request:
        """Check a request and prepare it on the host. Nothing is queued yet."""
        self._check_addable(request_id)
        return self.input_processor.process(prompt, params, request_id, stream)

    def _check_addable(self, request_id: int | str | None) -> None:
        """Check that requests can be added now, and that none has this id."""
        self._check_usable()
        if request_id is not None and self._is_taken(checked_id(request_id)):
            what = f"request_id {shown(request_id)}"
            raise ValueError(f"{what} is that of a request that is unfinished or whose output waits")

    def _is_taken(self, request_id: int | str) -> bool:
        return request_id in self.requests or any(output.request_id == request_id for _, output in self.outputs)

    def _queue(self, request: Request) -> int | str:
        with self._section():
            self._check_usable()
            self._enqueue(request)
        return request.id

    def _enqueue(self, request: Request) -> None:
        num_waiting = len(self.scheduler.waiting) + len(request.samples)
        if num_waiting > self.config.max_num_waiting:
            raise ValueError(f"{num_waiting} sequences would wait; max_num_waiting={self.config.max_num_waiting}")
        if request.id is None:
            request.id = self.next_id
        if isinstance(request.id, int):
            self.next_id = max(self.next_id, request.id + 1)  # beyond all that callers chose
        request.seed_samples(self.seeds)
        self.requests[request.id] = request
        for seq in request.samples:
            seq.request_id = request.id
            self.scheduler.add(seq)

    # -- steps -------------------------------------------------------------------------------------------------------

    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do or to give."""
        self._abandon(())
        return bool(self.requests or self.in_flight or self.outputs)

    @property
    def can_step(self) -> bool:
        """Whether `step` is of use now: there is something unfinished, and weights and memory to go on with."""
        return self.has_unfinished() and not self.sleep_level and self.weight_error is None

    def is_finished(self) -> bool:
        """The opposite of `has_unfinished`."""
        return not self.has_unfinished()

    def step(self) -> list[RequestOutput]:
        """Launch the next step, collect the one before; the requests that have finished, and what streams have new."""
        with self._section():
            self._check_usable()
            stats = self._advance()
        self._report(stats)
        try:
            return [output for _, output in self.outputs]
        finally:  # only now: if an interrupt comes before, the next step returns them
            self.outputs.clear()

    def _step_for(self, requests: Collection[Request]) -> list[RequestOutput]:
        """Run one step. Return the outputs of `requests`; keep the others for the next `step`."""
        with self._section():
            self._check_usable()
            stats = self._advance()
        self._report(stats)
        outputs = [output for request, output in self.outputs if request in requests]
        self.outputs = [(request, output) for request, output in self.outputs if request not in requests]
        return outputs

    def _report(self, stats: StepStats) -> None:
        """Log a step and call `on_step`. Should that raise, the engine stays usable and no output is lost."""
        if self.config.log_steps and stats.batch is not None:
            self._log(stats.batch, stats.seconds)
        if self.on_step is not None:
            self.on_step(stats)

    def _advance(self) -> StepStats:
        """Run one step; its outputs join `outputs`."""
        with self._failing():
            timer, cpu_begin = StepTimer(self.gpu if self.time_gpu else None), time.process_time()
            launched = self.scheduler.schedule()
            timer.finish("schedule")
            if launched:
                timer.mark_gpu()
                self.executor.launch(launched.batch)
                timer.mark_gpu()
                self.in_flight.append(launched)
                timer.finish("launch")
            if self.in_flight and (not launched or len(self.in_flight) > self.config.overlap):
                self._collect(timer)
            while self.in_flight and not self.requests:  # all have ended early: their blocks return now
                self._collect(timer)
            stats = timer.stats(launched.batch if launched else None)
            self.step_time += stats.seconds
            self.threads.add(stats.seconds, time.process_time() - cpu_begin)
        return stats

    @contextmanager
    def _section(self) -> Iterator[Deferral]:
        """Change the engine's state in the body, as one piece: interrupts wait for its end, other threads are refused.

        Sections may be nested. The outermost one ends the requests that were abandoned before or meanwhile.
        """
        with self._alone() as deferral:
            outermost, self.in_section = not self.in_section, True
            try:
                yield deferral
            finally:
                if outermost:
                    self._end_abandoned()
                    self.in_section = False

    @contextmanager
    def _alone(self) -> Iterator[Deferral]:
        """Refuse other threads in the body, and let interrupts wait for its end. RuntimeError if another came first."""
        with interrupt_after() as deferral:
            if self.owner not in (None, threading.get_ident()) or not self.in_use.acquire(blocking=False):
                other = "another thread is using the engine; call it from one at a time, or use AsyncLLM"
                raise RuntimeError("the engine is closed" if self.closed else other)
            try:
                yield deferral
            finally:
                self.in_use.release()

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Refuse other threads in the body, as `_alone` does, but let interrupts through."""
        try:
            with self._alone():
                self.owner = threading.get_ident()
            try:
                yield
            finally:
                self._disown()
        finally:
            self._disown()  # again: an interrupt may have come just before the first time

    def _disown(self) -> None:
        if self.owner == threading.get_ident():
            self.owner = None

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Close the engine on an error in the body: the ranks' state is unknown then, and no later result is sure."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        self.error = error
        try:
            self.close()
        except Exception as another:  # a GPU in a bad state fails in whatever it is asked
            logger.warning("After %r closing the engine failed, too: %r", error, another)

    def _collect(self, timer: StepTimer) -> None:
        """Take in the tokens of the oldest step in flight."""
        output = self.executor.collect()
        timer.finish("collect")
        self.num_steps += 1
        changed = self.scheduler.update(self.in_flight.popleft(), output)
        for request_id in dict.fromkeys(seq.request_id for seq in changed):
            request = self.requests[request_id]
            if request.time_to_first_token is None:
                request.time_to_first_token = time.perf_counter() - request.added
            finished = request.is_finished
            if finished or request.stream:
                self.outputs.append((request, request.output(self.weight_version)))
            if finished:
                del self.requests[request_id]
        timer.finish("update")

    def _abandon(self, requests: Iterable[Request]) -> None:
        """Note that nobody waits for these requests any more, and end them unless a section is going to."""
        self.abandoned.update(dict.fromkeys(requests))
        if self.abandoned and not self.in_section:  # Python's collector may end a stream's iterator within one
            with suppress(RuntimeError), self._section():  # else the thread that uses the engine ends them
                pass

    def _end_abandoned(self) -> None:
        """End the abandoned requests and forget their outputs."""
        while self.abandoned:
            abandoned = list(self.abandoned)  # in their order: the queue is searched from its front
            for request in abandoned:
                if self.requests.get(request.id) is request:
                    self._abort(request)
            self.outputs = [pair for pair in self.outputs if pair[0] not in self.abandoned]
            for request in abandoned:
                del self.abandoned[request]

    def metrics(self) -> Metrics:
        """Counters since the engine was made, and what it is doing now."""
        self._abandon(())
        scheduler, blocks = self.scheduler, self.scheduler.block_manager
        return Metrics(
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.num_preemptions,
            self.num_steps,
            self.step_time,
            scheduler.num_prompt_tokens,
            scheduler.num_cached_tokens,
            scheduler.num_generated_tokens,
            1 - blocks.num_free / blocks.num_blocks,
        )

    def _log(self, batch: Batch, seconds: float) -> None:
        now = self.metrics()
        logger.info(
            f"step {now.num_steps}: {batch.num_decode} decode rows, {len(batch.prefill_rows)} prompt rows, "
            f"{batch.num_tokens} tokens, {1e3 * seconds:.2f} ms; {now.num_running} running, {now.num_waiting} waiting, "
            f"KV {now.kv_usage:.0%} used"
        )

    # -- weights and memory, as training loops want them ---------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str | Path) -> int:
        """Overwrite the weights in place, on all ranks; captured graphs stay valid.

        The prefix cache is emptied. Requests that run go on from the tokens they have, recomputed with the new weights.

        Args:
            weights: every tensor of the checkpoint, whole, on any device, by its Hugging Face name; one at a time is
                held here. Or a folder with safetensors files, or a GGUF file. Under torchrun each rank gives them.

        Returns:
            The new weight version, which results carry.

        Raises:
            TypeError, ValueError: a tensor is missing, left over, given twice, of the wrong shape or dtype, or not
                finite; or the head differs from the embedding where both are one parameter. The old weights may be
                partly overwritten then, and the engine refuses to run until an update succeeds.
            RuntimeError: a rank is lost, and with it the engine; or what gives the weights uses the engine.
        """
        self._check_usable(weights=False)
        if isinstance(weights, str | Path):
            weights = iterate_weights(weights)
        elif not isinstance(weights, Iterable) or isinstance(weights, bytes | Mapping):
            raise TypeError(f"weights must be pairs (name, tensor) or a path, got {type(weights).__name__}")
        with self._section() as deferral:
            self._check_usable(weights=False)
            with self._failing():
                self._forget_computed()
            self.updating, self.weight_error = True, RuntimeError("it was interrupted")
            try:
                self.executor.update_weights(deferral.pull(weights))
            except BaseException as error:
                self.updating, self.weight_error = False, error
                if self.executor.error:  # a rank is lost
                    self._fail(error)
                raise
            self.updating, self.weight_error = False, None
            self.weight_version += 1
        return self.weight_version

    def sleep(self, level: int = 1) -> None:
        """Give device memory back until `wake_up`. Unfinished requests stay, and are recomputed later.

        Args:
            level: 1 frees the KV cache and the captured graphs; 2 also moves the weights to the host's memory (on a CPU
                they are there already and stay).
        """
        what = f"level must be the integer 1 (KV cache) or 2 (KV cache and weights), got {shown(level)}"
        if not isinstance(level, int) or isinstance(level, bool):
            raise TypeError(what)
        if level not in (1, 2):
            raise ValueError(what)
        with self._section():
            self._check_usable()
            with self._failing():
                self._forget_computed()
                self.executor.sleep(level)
                self.sleep_level = level

    def wake_up(self) -> None:
        """Undo `sleep`: weights and KV cache are back, and graphs are captured again. Does nothing when awake."""
        with self._section():
            if self.sleep_level:
                self._check_usable(awake=False)
                with self._failing():
                    self.executor.wake_up()
                    self.sleep_level = 0

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests keep their blocks."""
        with self._section():
            self._check_usable()
            self.scheduler.block_manager.reset_prefix_cache()

    def _forget_computed(self) -> None:
        """Collect what is in flight, and have all running requests computed again."""
        while self.in_flight:
            self._collect(StepTimer())
        self.scheduler.preempt_all()

    # -- life --------------------------------------------------------------------------------------------------------

    def _check_usable(self, awake: bool = True, weights: bool = True) -> None:
        if self.error is not None:
            raise RuntimeError(f"the engine has failed and must be made anew: {self.error!r}") from self.error
        if self.closed:
            raise RuntimeError("the engine is closed")
        self.check_process()
        with self._alone():
            pass
        if self.updating:
            raise RuntimeError("update_weights is running; what gives it its weights cannot use the engine")
        if awake and self.sleep_level:
            raise RuntimeError("the engine is asleep; call wake_up() first")
        if weights and self.weight_error is not None:
            what = "the last update_weights failed, and the weights may be partly overwritten; call it again"
            raise RuntimeError(f"{what}: {self.weight_error!r}") from self.weight_error

    def check_process(self) -> None:
        """Raise RuntimeError in a forked child, which has no use of what its parent made."""
        if self.process != os.getpid():
            raise RuntimeError("the engine is that of the process this one was forked from; make one here")

    def close(self) -> None:
        """Give back memory and processes. May be called again, and goes on where it was interrupted.

        Another thread's call, such as `generate`, raises RuntimeError at its next step, which this waits for.
        """
        if self.process != os.getpid():
            return  # what a forked child has of it is its parent's
        if self.updating:
            raise RuntimeError("update_weights is running; what gives it its weights cannot close the engine")
        with interrupt_after():
            self.closed = True
            if processor := getattr(self, "input_processor", None):
                processor.close()
            with self.in_use:
                if self.executor is not None:
                    for owned in (self.requests, self.in_flight, self.outputs):
                        owned.clear()
                    self.executor.close()
                    self.executor = None

    def __enter__(self):
        self._check_usable()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "executor", None) is not None:
            with suppress(Exception):  # it would only be printed
                self.close()
