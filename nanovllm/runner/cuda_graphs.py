"""Steps as CUDA graphs: one replay runs a step from the batch state to sampled tokens."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.layers.attention import Attention
from nanovllm.messages import Batch
from nanovllm.ops.attention.shared_prefix import MIN_SEQUENCES, SharedPrefixPlan, plan_shared_prefixes
from nanovllm.ops.dispatch import mixed_capture_sizes
from nanovllm.ops.inputs.step_rows import StepRows
from nanovllm.ops.triton_utils import sm_count
from nanovllm.runner.forward import Forward, StepTensors


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes of decode steps that get a graph: 1, 2, 4, every 8, from 256 every 16, the maximum."""
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs, 16), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def shared_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes of decode steps with shared prefixes that get a graph: powers of two, the maximum."""
    sizes = {size for size in (16, 32, 64, 128, 256, 512, 1024) if size < max_num_seqs}
    return sorted(sizes | {max_num_seqs})


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device for captures. cuBLAS keeps a workspace of 32 MiB for every stream it saw."""
    return torch.cuda.Stream(device)


_capture_lock = threading.Lock()


@contextmanager
def _exclusive_capture() -> Iterator[None]:
    """Let no other engine capture, because it has the same stream, and disable the garbage collector.

    The collector could free CUDA memory, which a capture forbids.
    """
    with _capture_lock:
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


class _Memory:
    """Expose a tensor's memory through `__cuda_array_interface__` without a reference to the tensor."""

    def __init__(self, x: torch.Tensor):
        self.__cuda_array_interface__ = {
            "shape": tuple(x.shape),
            "strides": tuple(stride * x.element_size() for stride in x.stride()),
            "typestr": {1: "|u1", 2: "<i2", 4: "<i4"}[x.element_size()],
            "data": (x.data_ptr(), False),
            "version": 3,
        }


def borrow(x: torch.Tensor) -> torch.Tensor:
    """Return a view of `x` that does not keep its memory alive.

    So graphs that are captured later can use the same memory of the pool: each result is valid until the next replay of
    any of them. A view by torch would keep the memory of every graph's logits.
    """
    return torch.as_tensor(_Memory(x), device=x.device).view(x.dtype)


@dataclass(frozen=True)
class CapturedStep:
    """A graph and the tensors that its replay writes."""

    graph: torch.cuda.CUDAGraph
    result: StepTensors


@dataclass(frozen=True)
class CapturedMixedStep(CapturedStep):
    """A graph of a mixed step, which reads `packed`, the `StepRows` of `num_rows` rows."""

    num_rows: int
    packed: torch.Tensor


class StepGraphs:
    """Captures `Forward.step` at many sizes, and replays it.

    There are three kinds of graphs:

    - `decode`: reads only the slots, which the host sends when they change.
    - `shared`: the same for decode rows that share long prefixes. Graphs that decide on the device whether there are
      such prefixes would be slower for batches without them.
    - `mixed`: for mixed steps. The host sends their rows, and attention treats decode rows as prefill rows of one
      token, so that one graph runs any mixture.

    Rows beyond the batch have the scratch slot, whose state never advances.

    Args:
        forward: runs the steps that are captured.
        config: the engine's Config, with the runner's `max_num_seqs`.
        max_model_len: longest context.
        wait: waits for an event.
    """

    def __init__(
        self,
        forward: Forward,
        config: Config,
        max_model_len: int,
        wait: Callable[[torch.cuda.Event | torch.Event], None],
    ):
        self.forward = forward
        self.config = config
        self.max_model_len = max_model_len
        self.wait = wait
        self.state = forward.state
        self.device = forward.counters.device
        max_num_seqs = config.max_num_seqs
        self.pool, self.stream = torch.cuda.graph_pool_handle(), capture_stream(self.device)
        self.slots = torch.full((max_num_seqs,), self.state.scratch_slot, dtype=torch.int32, device=self.device)
        self.current_slots: list[int] = []  # the content of `slots`, without padding
        self.has_shared_prefixes = False  # whether the sequences in these slots share prefixes; `plan` then has them
        # The state's epoch when the slots were sent. After a later admission, a slot may have a sequence with another
        # prefix.
        self.admission_epoch = 0
        self.plan = torch.zeros(SharedPrefixPlan.size(max_num_seqs), dtype=torch.int32, device=self.device)
        layers = [layer for layer in forward.model.modules() if isinstance(layer, Attention)]
        self.queries_per_kv_head = max(layer.num_heads // layer.num_kv_heads for layer in layers)
        self.min_kv_heads = min(layer.num_kv_heads for layer in layers)
        self.decode: dict[int, CapturedStep] = {}
        self.shared: dict[int, CapturedStep] = {}
        self.mixed: dict[int, CapturedMixedStep] = {}

    def capture(self) -> None:
        """Capture all graphs. If this fails, `free` still frees those that exist."""
        backend = self.forward.backend
        max_num_seqs = len(self.slots)
        shares = backend.shares_prefixes and self.config.enable_prefix_caching and max_num_seqs >= MIN_SEQUENCES
        shares = shares and any(not kind.window for kind in self.forward.pool.kv_kinds)
        with _exclusive_capture():  # the largest of each kind first: the others fit in its memory
            if backend.capturable_prefill:
                for size in reversed(mixed_capture_sizes(self.config.max_num_batched_tokens)):
                    self._capture_mixed(size, min(size, max_num_seqs) + 1)
            if shares:
                for size in reversed(shared_sizes(max_num_seqs)):
                    self._capture_shared(size)
            for size in reversed(decode_sizes(max_num_seqs)):
                self._capture_decode(size)

    def free(self) -> None:
        """Free the graphs, even if this object lives on."""
        for graphs in (self.decode, self.shared, self.mixed):
            graphs.clear()

    def _capture_decode(self, size: int) -> None:
        self.decode[size] = CapturedStep(*self._capture(lambda: self.forward.step(StepRows(self.slots[:size]), size)))

    def _capture_shared(self, size: int) -> None:
        rows = StepRows(self.slots[:size])
        whole = SharedPrefixPlan.split(self.plan, len(self.slots))
        plan = SharedPrefixPlan(whole.sequences[:size], whole.groups[: max(1, size // MIN_SEQUENCES)])
        self.shared[size] = CapturedStep(*self._capture(lambda: self.forward.step(rows, size, shared=plan)))

    def _capture_mixed(self, num_tokens: int, num_rows: int) -> None:
        packed = torch.from_numpy(self.state.pack(Batch(), num_rows, num_tokens)).to(self.device)
        graph, result = self._capture(lambda: self.forward.mixed_step(packed, num_rows, num_tokens, self.max_model_len))
        self.mixed[num_tokens] = CapturedMixedStep(graph, result, num_rows, packed)

    def _capture(self, run: Callable[[], StepTensors]) -> tuple[torch.cuda.CUDAGraph, StepTensors]:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            with self.forward.model.few_layers():
                run()  # loads kernels and sets up libraries
            self.wait(self.stream.record_event())
            # thread_local: the thread that watches the ranks may call what this thread must not call in a capture.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = run()
                graph.capture_end()
            except BaseException:
                self._abort_capture(graph)
                raise
        torch.cuda.current_stream().wait_stream(self.stream)
        if len(result.logits):  # else this rank samples no row
            result = result._replace(logits=borrow(result.logits))
        return graph, result

    def _abort_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a failed capture. An open one would forbid the process most of CUDA, and NCCL would wait for it."""
        try:
            graph.capture_end()
        except RuntimeError:  # raised before torch tells its allocator that the capture has ended
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                torch._C._cuda_releasePool(self.device.index, self.pool)
        graph.reset()

    # -- replay ------------------------------------------------------------------------------------------------------

    def fits(self, batch: Batch) -> bool:
        """Whether a graph can run `batch`."""
        is_decode = batch.num_decode == len(batch.rows)
        return is_decode or (batch.num_tokens <= max(self.mixed, default=0) and not batch.wants_prompt_logprobs)

    def replay(self, batch: Batch) -> StepTensors:
        """Run `batch`. Its results are valid until the next replay."""
        if batch.num_decode < len(batch.rows):
            graphs = self.mixed
            size = self._prepare_mixed(batch)
        else:
            if batch.slots != self.current_slots or self.admission_epoch != self.state.admission_epoch:
                self._set_slots(batch.slots)
            graphs = self.shared if self.has_shared_prefixes else self.decode
            size = min(size for size in graphs if size >= len(batch.rows))
        result = graphs[size].result
        # Do not bind the graph to a local variable: an error's traceback would keep it alive, and NCCL's teardown waits
        # until graphs are freed.
        graphs[size].graph.replay()
        return result._replace(tokens=result.tokens[: len(batch.rows)])

    def _prepare_mixed(self, batch: Batch) -> int:
        """Send the rows of `batch` to the smallest mixed graph that fits. Return its size."""
        size = min(size for size in self.mixed if size >= batch.num_tokens)
        step = self.mixed[size]
        packed = self.state.pack(batch, step.num_rows, size)
        step.packed.copy_(self.state.staging.to_device(packed))
        return size

    def _set_slots(self, slots: list[int]) -> None:
        """Send the slots of the next decode steps, and which prefixes they share."""
        state = self.state
        to_device = self.state.staging.to_device
        padded = np.full(len(self.slots), state.scratch_slot, dtype=np.int32)
        padded[: len(slots)] = slots
        self.slots.copy_(to_device(padded))
        self.current_slots = slots
        self.admission_epoch = state.admission_epoch
        self.has_shared_prefixes = False
        if not self.shared or len(slots) < MIN_SEQUENCES:
            return
        plan = plan_shared_prefixes(
            state.host_tables,
            slots,
            state.scratch_block,
            state.block_size,
            self.queries_per_kv_head,
            self.min_kv_heads,
            sm_count(self.device),
            len(self.slots),
        )
        if plan is not None:
            self.has_shared_prefixes = True
            self.plan.copy_(to_device(plan))
