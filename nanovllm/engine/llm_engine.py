"""The engine: guards the loop (engine_core.py), and adds what is not a step: requests, weights, memory."""

import logging
import random
import traceback
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanovllm.checkpoints.model_source import new_weights, open_model_of
from nanovllm.checks import shown
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.engine_core import EngineCore
from nanovllm.engine.guard import Guard, Section, close_at_exit, without_traceback
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.interrupts import DeferInterrupts
from nanovllm.engine.memory_parts import MEMORY, parts_of_level, parts_of_tags
from nanovllm.engine.openmp import ThreadWatch, use_one_thread_after_fork
from nanovllm.engine.request import Request, check_request_id
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.snapshots import Snapshots
from nanovllm.engine.step_stats import StepStats, StepTimer
from nanovllm.executor.local import Executor
from nanovllm.executor.start import start_executor
from nanovllm.inputs import Prompt
from nanovllm.messages import Batch
from nanovllm.outputs import Metrics, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams, copy_params

logger = logging.getLogger("nanovllm")

# A caller's numeric request id advances the engine's own numbering, unless it has more digits than this: the ids that
# the engine gives stay short.
_MAX_ID_DIGITS = 18

# The parts of the memory that must be awake for a weight update.
_UPDATE_NEEDS = ("weights",)


class LLMEngine:
    """Loads a model and serves requests.

    Only one thread at a time may use it: the calls of others raise RuntimeError meanwhile (`AsyncLLM` serves many at
    once). A forked child cannot use it. `close` gives back its memory and its processes.

    A method that changes the state does so in a section (`guard.Section`), so that neither an interrupt nor another
    thread sees half of a change. Sections may be nested. The state itself is in `core`, whose methods open none.

    Args:
        model: see `Config`.
        **kwargs: the other fields of `Config`; an unknown one raises TypeError.

    Attributes:
        on_step, time_gpu: see `LLM`.
        core: the requests and the loop over their steps.
        abandoned: requests whose callers have gone, an ordered set: the values mean nothing. The end of a section ends
            these requests.
        holds_resources: whether there is anything for `close` to give back.
    """

    holds_resources = False  # until the constructor has an executor

    def __init__(self, model: str | Path | None = None, **kwargs: Any):
        self.config = Config.from_options({"model": model, **kwargs})
        self.guard = Guard()
        if self.config.device_type == "cpu":
            use_one_thread_after_fork()
        self.source = open_model_of(self.config)
        if self.source.has_tokenizer and not self.config.skip_tokenizer_init:
            # Later its files may be gone, and a broken tokenizer must not cost a step.
            self.source.tokenizer()
        self.abandoned: dict[Request, Any] = {}
        self.executor = start_executor(self.config, self.source)
        self.holds_resources = True
        runner = self.executor.runner
        num_kv_tokens = runner.num_blocks * self.config.kvcache_block_size
        self.max_model_len = min(runner.max_model_len, num_kv_tokens)
        configured = self.config.max_model_len
        # No warning for the default's value: nobody may have asked for it.
        if configured > runner.max_model_len and configured != Config().max_model_len:
            message = "max_model_len is %d in place of %d: the model knows no more positions"
            logger.warning(message, runner.max_model_len, configured)
        if num_kv_tokens < runner.max_model_len:
            message = "max_model_len is %d in place of %d: num_kvcache_blocks=%d hold no more tokens"
            logger.warning(message, num_kv_tokens, runner.max_model_len, runner.num_blocks)
        self.input_processor = InputProcessor(self.config, self.source, self.max_model_len)
        self.scheduler = _make_scheduler(self.config, self.executor)
        self.core = EngineCore(self.scheduler, self.executor, self.config.overlap)
        self.next_id = 0
        self.seeds = random.Random(self.config.seed)
        self.on_step: Callable[[StepStats], None] | None = None
        self.time_gpu = False
        self.gpu = runner.device if runner.device.type == "cuda" else None
        self.thread_watch = ThreadWatch(torch.get_num_threads() if self.config.device_type == "cpu" else 1)
        close_at_exit(self)

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step. Return the outputs of finished requests, and what is new in streams."""
        self._advance()
        return self.take_outputs()

    def step_for(self, requests: Collection[Request]) -> list[RequestOutput]:
        """Run one step. Return the outputs of `requests`; keep those of other callers for their next `step`."""
        self._advance()
        return self.take_outputs(requests)

    def take_outputs(self, requests: Collection[Request] | None = None) -> list[RequestOutput]:
        """Return the waiting outputs of `requests`; with None, those of all requests that no iterator reads.

        No step runs. After an interrupt, nothing has been taken.
        """
        core = self.core
        before = None
        try:
            with Section(self.guard):
                before = core.outputs
                if requests is None:
                    # Iterators take their outputs themselves.
                    taken = {request: output for request, output in before.items() if not request.has_consumer}
                else:
                    taken = {request: output for request, output in before.items() if request in requests}
                core.outputs = {request: output for request, output in before.items() if request not in taken}
                return list(taken.values())
        except BaseException:
            if before is not None:
                core.outputs = before
            raise

    def has_unfinished(self) -> bool:
        """Return whether `step` has anything to do or to return."""
        return self.core.has_unfinished()

    def is_finished(self) -> bool:
        """Return the opposite of `has_unfinished`: nano-vLLM's name."""
        return not self.has_unfinished()

    @property
    def can_step(self) -> bool:
        """Whether `step` is useful now: it has something to do, and the engine has its weights and its memory."""
        return self.has_unfinished() and not self.guard.asleep and self.guard.weight_error is None

    def _advance(self) -> None:
        """Run one step. Its outputs join those of the core."""
        with self._section():
            self._ensure_usable()
            with self._closing_on_error(), self.thread_watch.measured():
                stats = self.core.step(StepTimer(self.gpu if self.time_gpu else None))
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
            f"step {self.core.num_launched}: {batch.num_decode} decode rows, {len(batch.prefill_rows)} prefill rows, "
            f"{batch.num_tokens} tokens, {1e3 * seconds:.2f} ms; {now.num_running} running, {now.num_waiting} waiting, "
            f"KV {now.kv_usage:.0%} used"
        )

    def metrics(self) -> Metrics:
        """Return counters since the engine was made, and what it is doing now."""
        return self.core.metrics()

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
        return self.input_processor.process(prompt, copy_params(sampling_params), request_id, stream)

    def queue(self, request: Request) -> str:
        """Queue a request that was prepared. Return its id."""
        with self._section():
            self._check_addable(request.chosen_id)
            num_samples = len(request.samples)
            most = self.config.max_num_waiting
            if num_samples > most:
                raise ValueError(f"n must be at most max_num_waiting={most}, got {num_samples}")
            num_waiting = len(self.scheduler.waiting) + num_samples
            if num_waiting > most:
                raise ValueError(f"{num_waiting} sequences would wait; max_num_waiting={most}")
            request.mark_queued(str(self.next_id) if request.chosen_id is None else request.chosen_id)
            if request.id.isascii() and request.id.isdigit() and len(request.id) <= _MAX_ID_DIGITS:
                # Numbers that the engine gives are larger than all that callers chose.
                self.next_id = max(self.next_id, int(request.id) + 1)
            request.seed_samples(self.seeds)
            self.core.add(request)
        return request.id

    def abort(self, request_id: int | str) -> RequestOutput | None:
        """End a request in whatever state it is; see `LLM.abort`."""
        with self._section():
            request = self.core.requests.get(check_request_id(request_id))
            if request is None:
                return None
            self.core.abort(request)
            (output,) = self.take_outputs((request,))
            return output

    def expects_output(self, request: Request) -> bool:
        """Return whether a request is unfinished, or an output of it waits for `step`."""
        return self.core.is_unfinished(request) or self.core.has_output(request)

    def abandon(self, requests: Iterable[Request]) -> None:
        """End requests whose callers have gone, and drop their outputs; see `end_abandoned`."""
        self.abandoned.update(dict.fromkeys(requests))
        self.end_abandoned()

    def end_abandoned(self) -> None:
        """End the abandoned requests now, or let the open section do it at its end."""
        # The garbage collector may end a stream's iterator within a section, whose end then ends the request.
        if self.abandoned and not self.guard.in_section:
            # RuntimeError: another thread uses the engine, and the end of its section ends the requests.
            with suppress(RuntimeError), self._section():
                self._end_abandoned()

    def abandon_with_consumer(self, request: Request, consumer: Any) -> None:
        """Abandon a request as soon as its consumer has been garbage-collected."""
        # The callback is `abandoned.setdefault(request, reference)`. An interrupt would end a callback in Python half
        # done, at any time; it cannot hit a method in C.
        request.consumer = weakref.ref(consumer, partial(self.abandoned.setdefault, request))

    def _check_addable(self, request_id: Any) -> None:
        """Check that requests can be added now, and that none has this id."""
        self._ensure_usable()
        if request_id is not None and self.core.has_id(check_request_id(request_id)):
            name = f"request_id {shown(request_id)}"
            raise ValueError(f"{name} belongs to a request that is unfinished or whose output waits for step()")

    def _end_abandoned(self) -> None:
        """End the abandoned requests and drop their outputs. Call this in a section."""
        core = self.core
        while self.abandoned:
            # A copy, because the garbage collector may abandon more requests meanwhile; the outer loop ends those.
            # `generate` abandons its oldest request first: `Scheduler.finish` searches `running` from the oldest on.
            abandoned = list(self.abandoned)
            for request in abandoned:
                if core.is_unfinished(request):
                    core.abort(request)
            core.outputs = {
                request: output for request, output in core.outputs.items() if request not in self.abandoned
            }
            for request in abandoned:
                del self.abandoned[request]

    # -- weights and memory ------------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str | Path) -> int:
        """Overwrite the weights in place, on all ranks; see `LLM.update_weights`."""
        with self._section():
            self._check_updatable()
        if isinstance(weights, str | Path):
            weights = new_weights(weights, self.source.config)
        weights = weight_pairs(weights)
        with self._section() as section:
            self.start_weight_update()
            self.load_weights(section.pull(weights))
            return self.finish_weight_update()

    def start_weight_update(self) -> None:
        """Start to overwrite the weights in parts; see `LLM.start_weight_update`."""
        with self._section():
            self._check_updatable()
            with self._closing_on_error():
                self.core.drain_and_preempt_all()
                self.scheduler.restart_prompt_logprobs()
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
            self.core.weight_version += 1
            return self.weight_version

    def _check_updatable(self) -> None:
        """Raise RuntimeError if weights cannot be overwritten now. Unlike `_ensure_usable`, this finishes no update."""
        self.guard.check_usable(_UPDATE_NEEDS, allow_partial_weights=True)

    def _check_update_open(self) -> None:
        self._check_updatable()
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
        wanted = parts_of_level(level)
        with self._section():
            self.guard.check_usable(needs=(), allow_partial_weights=True)
            if parts := tuple(part for part in wanted if part not in self.guard.asleep):
                with self._closing_on_error():
                    self.core.drain_and_preempt_all()
                    self.executor.sleep(parts)
                    self.guard.asleep.update(parts)

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Undo `sleep`, or a part of it; see `LLM.wake_up`."""
        wanted = parts_of_tags(tags)
        with self._section():
            self.guard.check_usable(needs=(), allow_partial_weights=True)
            if parts := tuple(part for part in wanted if part in self.guard.asleep):
                with self._closing_on_error():
                    lacking = self.executor.lacking_memory(parts)
                    if not lacking:
                        self.executor.wake_up(parts, capture=self.guard.asleep.issubset(parts))
                        self.guard.asleep.difference_update(parts)
                if lacking:
                    memory = f"{lacking / 2**30:.2f} GiB of device memory"
                    raise RuntimeError(f"the engine still sleeps: wake_up lacks {memory}; free it and call it again")

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; see `LLM.reset_prefix_cache`."""
        with self._section():
            self._ensure_usable(needs=(), allow_partial_weights=True)
            self.scheduler.block_manager.reset_prefix_cache()
        return True

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self.input_processor.codec.tokenizer

    @property
    def weight_version(self) -> int:
        """How many weight updates have succeeded."""
        return self.core.weight_version

    @property
    def is_sleeping(self) -> bool:
        """Whether a part of the memory sleeps."""
        return bool(self.guard.asleep)

    def ensure_usable(self, needs: Collection[str] = MEMORY, allow_partial_weights: bool = False) -> None:
        """Raise RuntimeError if the engine cannot be used now, or another thread uses it; see `Guard.check_usable`."""
        with self._section():
            self._ensure_usable(needs, allow_partial_weights)

    def _ensure_usable(self, needs: Collection[str] = MEMORY, allow_partial_weights: bool = False) -> None:
        """Raise as `ensure_usable` does. Call this in a section."""
        self._before_use()
        self.guard.check_usable(needs, allow_partial_weights)

    def _before_use(self) -> None:
        """Do what an engine has to do before it is used. Called in a section."""

    def reserved(self) -> AbstractContextManager[None]:
        """Refuse other threads in a `with` block of several calls."""
        return self.guard.reserved()

    def close(self) -> None:
        """Give back memory and processes; see `LLM.close`."""
        if self.guard.is_forked:
            return  # the resources are the parent's
        if self.guard.updating:
            # The code that makes the weights may be calling, or another thread, which could wait for it for ever.
            raise RuntimeError("update_weights is running; close the engine when it has ended")
        with DeferInterrupts():
            self.guard.closed = True
            if hasattr(self, "input_processor"):  # else the constructor did not get that far
                self.input_processor.close()
            with self.guard.lock:  # waits for the step that another thread runs
                if self.holds_resources:
                    if hasattr(self, "core"):
                        self.core.clear()
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
        self.guard.error = without_traceback(error)
        # The caller may keep the error. Its frames hold the model and a step's tensors.
        traceback.clear_frames(error.__traceback__)
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


def _make_scheduler(config: Config, executor: Executor) -> Scheduler:
    """Make the scheduler of the blocks, slots and snapshots that the executor's ranks have."""
    runner = executor.runner
    caches_prefixes = config.enable_prefix_caching
    snapshots = None
    if caches_prefixes and runner.snapshot_slots is not None:
        # Blocks of KV are of no use without the recurrent state at their end.
        snapshots = Snapshots(runner.snapshot_slots, config.kvcache_block_size)
        caches_prefixes = len(runner.snapshot_slots) > 0
    return Scheduler(
        runner.sizes.num_seqs,
        config.max_num_batched_tokens,
        BlockManager(runner.num_blocks, config.kvcache_block_size, caches_prefixes, snapshots),
        # Ranks that schedule for themselves must not depend on their clocks.
        limit_masks=not executor.is_replicated,
    )


def weight_pairs(weights: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Return weights. Raise TypeError if they cannot be pairs of names and tensors."""
    if not isinstance(weights, Iterable) or isinstance(weights, str | bytes | Mapping):
        raise TypeError(f"weights must be pairs (name, tensor), got {type(weights).__name__}")
    return weights
