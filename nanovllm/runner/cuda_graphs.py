"""Steps as CUDA graphs: from the slots' inputs to the drawn tokens, one replay each."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from nanovllm.engine.scheduler import Batch
from nanovllm.layers.attention import Attention
from nanovllm.ops.attention.shared_prefix import MIN_SEQUENCES, SharedPrefixPlan, plan_shared_prefixes
from nanovllm.ops.inputs.step_rows import StepRows
from nanovllm.ops.linear.dispatch import capture_sizes
from nanovllm.ops.triton_utils import sm_count

if TYPE_CHECKING:
    from nanovllm.runner.model_runner import ModelRunner, StepTensors


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes of decode steps that get a graph: 1, 2, 4, every 8, every 16 from 256 on, and the maximum itself."""
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs, 16), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def shared_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes of decode steps with shared prefixes that get a graph: powers of two, and the maximum itself."""
    return sorted({*(size for size in (16, 32, 64, 128, 256, 512, 1024) if size < max_num_seqs), max_num_seqs})


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device for captures: cuBLAS keeps a workspace of 32 MiB for each stream it ever saw."""
    return torch.cuda.Stream(device)


_capturing = threading.Lock()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No other engine captures within: it has the same stream. Nor does the collector run.

    It could free CUDA memory, which capture forbids.
    """
    with _capturing:
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


class _Memory:
    """Memory that belongs to another tensor, in the form that torch takes it in."""

    def __init__(self, x: torch.Tensor):
        strides = tuple(stride * x.element_size() for stride in x.stride())
        kind = {1: "|u1", 2: "<i2", 4: "<i4"}[x.element_size()]
        elements = {"shape": tuple(x.shape), "strides": strides, "typestr": kind}
        self.__cuda_array_interface__ = {**elements, "data": (x.data_ptr(), False), "version": 3}


def borrow(x: torch.Tensor) -> torch.Tensor:
    """A view of `x` that does not keep its memory: graphs of one pool share it, each valid until the next replay."""
    return torch.as_tensor(_Memory(x), device=x.device).view(x.dtype)


class StepGraphs:
    """Captures `ModelRunner.step` and replays it.

    A decode step is told its slots, and only when they change. A step with prompt tokens is told its rows; decode rows
    among them are attended as prompts of one token, so that one graph does for any mixture.

    Decode steps whose rows share long prefixes have graphs of their own, as finding out on the device that they do not
    would cost the others.

    Rows beyond the batch are given the scratch slot, whose state never advances.
    """

    def __init__(self, runner: "ModelRunner"):
        self.state, max_num_seqs = runner.state, runner.config.max_num_seqs
        self.few_layers, self.wait = runner.model.few_layers, runner.wait
        self.pool, self.stream = torch.cuda.graph_pool_handle(), capture_stream(runner.device)
        self.slots = torch.full((max_num_seqs,), self.state.scratch_slot, dtype=torch.int32, device=runner.device)
        self.current: list[int] = []  # what `slots` holds
        self.shares = False  # whether these rows share prefixes, told by `plan`
        self.num_admissions = 0  # when that was found out
        self.plan = torch.zeros(SharedPrefixPlan.size(max_num_seqs), dtype=torch.int32, device=runner.device)
        layers = [layer for layer in runner.model.modules() if isinstance(layer, Attention)]
        group = max(layer.num_heads // layer.num_kv_heads for layer in layers)
        self.heads = group, min(layer.num_kv_heads for layer in layers)
        self.decode: dict[int, tuple[torch.cuda.CUDAGraph, StepTensors]] = {}
        self.shared: dict[int, tuple[torch.cuda.CUDAGraph, StepTensors]] = {}
        self.mixed: dict[int, tuple[torch.cuda.CUDAGraph, StepTensors, int, torch.Tensor]] = {}

    def capture(self, runner: "ModelRunner") -> None:
        """Capture all graphs. Those that there are when it fails can still be freed."""
        max_num_seqs = len(self.slots)
        with _undisturbed():
            if runner.backend.capturable_prefill:
                for size in reversed(capture_sizes(runner.config.max_num_batched_tokens)):
                    self._capture_mixed(runner, size, min(size, max_num_seqs) + 1)
            if runner.backend.shares_prefixes and runner.config.enable_prefix_caching and max_num_seqs >= MIN_SEQUENCES:
                for size in reversed(shared_sizes(max_num_seqs)):
                    self._capture_shared(runner, size)
            for size in reversed(decode_sizes(max_num_seqs)):  # the largest first: the others fit in its memory
                slots = self.slots[:size]
                self.decode[size] = self._capture(lambda slots=slots: runner.step(slots, len(slots)))
            runner.check_ranks()

    def free(self) -> None:
        """Give the graphs back, whoever else knows of this object."""
        for graphs in (self.decode, self.shared, self.mixed):
            graphs.clear()

    def _capture_mixed(self, runner: "ModelRunner", num_tokens: int, num_rows: int) -> None:
        packed = torch.from_numpy(self.state.pack(Batch(), num_rows, num_tokens)).to(runner.device)
        rows = StepRows.split(packed, num_rows, num_tokens)
        graph, result = self._capture(lambda: runner.step(rows, 0, num_tokens, runner.max_model_len))
        self.mixed[num_tokens] = graph, result, num_rows, packed

    def _capture_shared(self, runner: "ModelRunner", size: int) -> None:
        slots, plan = self.slots[:size], SharedPrefixPlan.split(self.plan, len(self.slots))
        plan = SharedPrefixPlan(plan.sequences[:size], plan.groups[: max(1, size // MIN_SEQUENCES)])
        self.shared[size] = self._capture(lambda: runner.step(slots, size, shared=plan))

    def _capture(self, run: Callable[[], "StepTensors"]) -> tuple[torch.cuda.CUDAGraph, "StepTensors"]:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            with self.few_layers():
                run()  # loads kernels and sets up libraries
            self.wait(self.stream.record_event())
            # Other threads, as the one that watches the ranks, may call what is forbidden to this one meanwhile.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = run()
                graph.capture_end()
            except BaseException:  # left open, a capture forbids the process most of CUDA; NCCL waits for what it holds
                self._give_up(graph)
                raise
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph, result._replace(logits=borrow(result.logits) if len(result.logits) else result.logits)

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed, whatever CUDA thinks of it."""
        try:
            graph.capture_end()
        except RuntimeError:  # which torch raises before it tells its allocator, where an open capture breaks much
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self.slots.device.index, self.pool)
                torch._C._cuda_releasePool(self.slots.device.index, self.pool)
        graph.reset()

    def fits(self, batch: Batch) -> bool:
        """Whether there is a graph that holds `batch`."""
        return not batch.chunks or (batch.num_tokens <= max(self.mixed, default=0) and not batch.has_scores)

    def replay(self, batch: Batch) -> "StepTensors":
        """Run `batch`; what it leaves is valid until the next replay."""
        to_device = self.state.staging.to_device
        if batch.chunks:
            size = min(size for size in self.mixed if size >= batch.num_tokens)
            graphs, (num_rows, packed) = self.mixed, self.mixed[size][2:]
            packed.copy_(to_device(self.state.pack(batch, num_rows, size)))
        else:
            slots = batch.decode_slots
            if slots != self.current or self.num_admissions != self.state.num_admissions:
                self._set_slots(slots)
            graphs = self.shared if self.shares else self.decode
            size = min(size for size in graphs if size >= len(slots))
        result = graphs[size][1]
        graphs[size][0].replay()  # in no variable: an error's traceback would keep the graph, and NCCL wait for its end
        return result._replace(tokens=result.tokens[: batch.num_rows])

    def _set_slots(self, slots: list[int]) -> None:
        """Tell the device the rows of the decode steps from now on, and what they share."""
        state, to_device = self.state, self.state.staging.to_device
        padded = np.full(len(self.slots), state.scratch_slot, dtype=np.int32)
        padded[: len(slots)] = slots
        self.slots.copy_(to_device(padded))
        self.current, self.num_admissions, self.shares = list(slots), state.num_admissions, False
        if self.shared and len(slots) >= MIN_SEQUENCES:
            tables = state.host_tables[slots]
            sms = sm_count(self.slots.device)
            plan = plan_shared_prefixes(
                tables, state.scratch_block, state.block_size, *self.heads, sms, len(self.slots)
            )
            if plan is not None:
                self.shares = True
                self.plan.copy_(to_device(plan))
