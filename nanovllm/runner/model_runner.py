"""One rank: its shards of the weights, the layers' state, and the steps that it runs."""

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.attention import select_backend
from nanovllm.checkpoints.loader import WeightUpdate, dummy_weights, load_weights
from nanovllm.checkpoints.model_source import ModelSource
from nanovllm.config import Config
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.messages import Batch, Row, StepOutput
from nanovllm.models.decoder import Decoder
from nanovllm.ops.attention.shared_prefix import SharedPrefixPlan
from nanovllm.ops.inputs.step_rows import StepRows
from nanovllm.ops.linear.gemm import MAX_TILES
from nanovllm.ops.sampling.logprobs import LogprobTensors
from nanovllm.ops.triton_utils import compile_in_parallel, compile_without_launch
from nanovllm.outputs import TokenLogprobs
from nanovllm.runner.batch_state import BatchState, host_buffer
from nanovllm.runner.cuda_graphs import StepGraphs
from nanovllm.runner.forward import Forward
from nanovllm.runner.state_pool import StatePool, StateSizes
from nanovllm.utils.heap import give_back_memory
from nanovllm.weights.parameter import Storage, storage_of

logger = logging.getLogger(__name__)

# Memory for the layers' state on a CPU, apart from a configured number of KV blocks. The KV of one sequence is
# allocated even if it needs more.
CPU_CACHE_BYTES = 1 << 30
# GPU memory that the state leaves free, for the captured graphs and the workspaces of libraries.
GRAPH_BYTES = 256 << 20


class InFlight(NamedTuple):
    """A launched step. Its results are on the host once `event` is done."""

    batch: Batch
    tokens: torch.Tensor
    logprobs: list[LogprobTensors]
    prompt_logprobs: list[LogprobTensors]
    event: torch.cuda.Event | None


class ModelRunner:
    """Executes batches: `launch` starts a step without waiting, `collect` returns the results of the oldest one.

    Args:
        config: the engine's Config.
        source: the model to load.
        tp: this rank's tensor-parallel group.
        device: where this rank runs.
        check_ranks: raises if another rank has failed.

    Attributes:
        config: the engine's Config, with as many `max_num_seqs` as fit: perhaps fewer than configured.
        max_rows: most rows of a step: `max_num_seqs`, or more in the step that measures the memory.
        sizes: numbers of KV blocks, sequences and snapshots.

    Raises:
        ValueError: the free GPU memory does not hold the KV of one sequence of `max_model_len` tokens;
            `num_kvcache_blocks` cannot be allocated; or the attention backend does not fit (see `select_backend`).
    """

    def __init__(
        self,
        config: Config,
        source: ModelSource,
        tp: TensorParallel,
        device: torch.device,
        check_ranks: Callable[[], None] = lambda: None,
    ):
        self.config, self.tp, self.device = config, tp, device
        self.check_ranks = check_ranks
        self.dtype = config.torch_dtype(source.config.dtype)
        self.max_model_len = min(config.max_model_len, source.config.max_position)
        # The step that measures the memory has the whole token budget in rows of up to max_model_len tokens.
        self.max_rows = max(config.max_num_seqs, ceil_div(config.max_num_batched_tokens, self.max_model_len))
        self.block_size = config.kvcache_block_size
        self.max_blocks = ceil_div(self.max_model_len, self.block_size)
        self.kv_dtype = config.torch_kv_dtype(self.dtype)
        self.backend = select_backend(
            config.attention_backend, device, source.config.head_dim, self.block_size, self.dtype, self.kv_dtype
        )
        self.graphs: StepGraphs | None = None
        self.weight_update: WeightUpdate | None = None
        self.in_flight: deque[InFlight] = deque()
        try:
            with self._device_context():
                self._build(source)
        except BaseException:
            self.free_graphs()
            vars(self).clear()  # the error's traceback refers to this
            give_back_memory()
            raise

    @contextmanager
    def _device_context(self) -> Iterator[None]:
        """Disable gradients, and ignore the calling thread's current device and autocast.

        Triton's kernels and events would use the thread's current GPU, and some operations its autocast dtype.
        """
        kind = self.device.type
        gpu = torch.cuda.device(self.device) if kind == "cuda" else nullcontext()
        autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with torch.inference_mode(), gpu, autocast:
            yield

    def _build(self, source: ModelSource) -> None:
        """Load the model, size and allocate the state, and capture graphs."""
        with torch.device(self.device):
            self.model = Decoder(
                source.config,
                dtype=self.dtype,
                state_dtype=getattr(torch, self.config.state_dtype),
                tp=self.tp,
                max_position=self.max_model_len,
            )
        self._log_dequantized(source)
        if self.device.type == "cpu" and self.config.dtype == "auto" and source.has_quantized_gguf:
            self.model.compress()  # a quantized GGUF file's weights, to 4 or 8 bits while they load
        self.pool = StatePool(self.model, self.block_size, self.device, self.kv_dtype)
        max_kv_heads = max(kind.kv_heads for kind in self.pool.kv_kinds)
        # Attention uses a counter for each row and KV head, and a graph may have a padding row. GEMMs use one per tile.
        num_counters = (self.max_rows + 1) * max_kv_heads
        self.counters = torch.zeros(max(num_counters, MAX_TILES), dtype=torch.int32, device=self.device)
        # Kernels compile in other threads while the weights load.
        with self._compiling() if self.backend.compiles_while_loading else nullcontext():
            if self.config.load_format == "dummy":
                load_weights(self.model, dummy_weights(self.model, self.config.seed))
            else:
                load_weights(self.model, source.weights())
        self.sizes = self._size_state()
        self._limit_sequences()
        self._allocate(self.sizes)
        self._capture()
        self._synchronize()

    def _log_dequantized(self, source: ModelSource) -> None:
        """Log it if no weight of a quantized checkpoint stays quantized."""
        scheme = source.config.quantization
        storages = set(map(storage_of, self.model.parameters()))
        if scheme is not None and self.tp.rank == 0 and Storage.QUANTIZED not in storages:
            logger.info(
                "%s weights are dequantized to %s: no kernel on %s computes with them",
                scheme.name.upper(),
                self.dtype,
                self.device,
            )

    def _limit_sequences(self) -> None:
        """Run no more sequences at once than have recurrent state."""
        max_num_seqs = self.sizes.num_seqs
        if max_num_seqs < self.config.max_num_seqs:
            logger.info(
                "%d sequences run at once: the recurrent state of more would take over half of the memory for KV cache "
                "and state",
                max_num_seqs,
            )
            self.config = replace(self.config, max_num_seqs=max_num_seqs)

    @property
    def num_blocks(self) -> int:
        """Number of KV blocks."""
        return self.sizes.num_blocks

    @property
    def snapshot_slots(self) -> range | None:
        """The slots for snapshots of recurrent state; None if the model has no such state."""
        return self.sizes.snapshot_slots if self.pool.slot_bytes else None

    # -- steps -------------------------------------------------------------------------------------------------------

    def launch(self, batch: Batch) -> None:
        """Start a step: apply the batch's changes, run it, and start the copy of its results.

        This waits for the device in three cases: the changes do not fit in the staging buffers, the batch wants prompt
        logprobs (it sends their indices), or the torch attention backend reads lengths.
        """
        with self._device_context():
            self.state.apply(batch)
            self._copy_state(batch.state_loads)
            if self.graphs is not None and self.graphs.fits(batch):
                result = self.graphs.replay(batch)
            else:
                result = self.forward.run(batch)
            self._copy_state(batch.state_saves)
            logprobs = self.forward.logprobs(batch, result)
            prompt_logprobs = self.forward.prompt_logprobs(batch, result)
            self._start_copy_to_host(batch, result.tokens, logprobs, prompt_logprobs)

    def _copy_state(self, pairs: list[tuple[int, int]]) -> None:
        """Copy recurrent state between slots: pairs of source and target."""
        if pairs:
            sources = np.array([source for source, _ in pairs], dtype=np.int64)
            targets = np.array([target for _, target in pairs], dtype=np.int64)
            to_device = self.state.staging.to_device
            self.pool.copy_slots(to_device(sources), to_device(targets))

    def _start_copy_to_host(
        self,
        batch: Batch,
        tokens: torch.Tensor,
        logprobs: list[LogprobTensors],
        prompt_logprobs: list[LogprobTensors],
    ) -> None:
        """Start the copy of results to the host, into the host buffer that the last step did not use.

        That one is free: the step before the last has been collected.
        """
        if self.device.type == "cpu":
            self.in_flight.append(InFlight(batch, tokens, logprobs, prompt_logprobs, event=None))
            return
        self.token_ring.rotate(-1)
        host = self.token_ring[0][: len(tokens)]
        host.copy_(tokens, non_blocking=True)
        logprobs = _to_host(logprobs)
        prompt_logprobs = _to_host(prompt_logprobs)
        event = torch.cuda.Event()
        event.record()
        self.in_flight.append(InFlight(batch, host, logprobs, prompt_logprobs, event))

    def collect(self) -> StepOutput:
        """Return the results of the oldest launched step. Waits for that step only."""
        step = self.in_flight[0]
        if step.event is not None:
            self.wait(step.event)
        self.in_flight.popleft()
        sampled = zip(step.batch.rows, step.tokens.tolist(), strict=True)
        token_ids = [(token_id,) if row.yields_token else () for row, token_id in sampled]
        return StepOutput(token_ids, _packed(step.logprobs), _packed(step.prompt_logprobs))

    def wait(self, event: torch.cuda.Event | torch.Event) -> None:
        """Wait for `event`. Raise what `check_ranks` raises, because a dead rank would make the wait endless."""
        while self.tp.size > 1 and not event.query():
            self.check_ranks()
            time.sleep(20e-6)
        event.synchronize()
        self.check_ranks()  # aborted collectives finish the wait too, but without results

    # -- memory ------------------------------------------------------------------------------------------------------

    def _allocate(self, sizes: StateSizes) -> None:
        """Allocate what depends on `sizes`: the state of the layers and of the slots, and the Forward over them.

        If `sizes` has fewer sequences than the config, only the first slots have recurrent state.
        """
        try:
            self.pool.allocate(sizes)
        except RuntimeError as error:
            if sizes.num_blocks != self.config.num_kvcache_blocks:
                raise
            message = f"num_kvcache_blocks={sizes.num_blocks} is more than can be allocated"
            raise ValueError(f"{message}: {error}") from error
        vocab_size = self.model.config.vocab_size
        self.state = BatchState(self.config, self.max_blocks, sizes.scratch_block, vocab_size, self.device)
        self.batch_state_bytes = self.state.num_bytes
        self.forward = Forward(self.model, self.state, self.backend, self.pool, self.counters)
        self.token_ring = deque(host_buffer(self.config.max_num_seqs, torch.int64, self.device) for _ in range(2))

    def _size_state(self) -> StateSizes:
        """Return how many KV blocks, sequences and snapshots fit, the same on all ranks."""
        config = self.config
        num_bytes = self._measure_state_bytes()
        sizes = self.pool.divide(
            num_bytes, config.max_num_seqs, config.num_kvcache_blocks, caches_prefixes=config.enable_prefix_caching
        )
        if self.device.type == "cpu" and config.num_kvcache_blocks is None:
            # No more blocks than all sequences can fill, but at least those of one.
            num_fitting = max(sizes.num_blocks, self.max_blocks)
            sizes = sizes._replace(num_blocks=min(sizes.num_seqs * self.max_blocks, num_fitting))
        sizes = StateSizes(*(self.tp.all_reduce_min(size, self.device) for size in sizes))
        num_blocks = sizes.num_blocks
        if num_blocks < self.max_blocks and self.config.num_kvcache_blocks is None:
            raise ValueError(
                f"gpu_memory_utilization={self.config.gpu_memory_utilization} leaves room for {max(num_blocks, 0)} KV "
                f"blocks, but one sequence of max_model_len={self.max_model_len} needs {self.max_blocks}; raise the "
                "first or lower the second"
            )
        return sizes

    def _measure_state_bytes(self) -> int:
        """Return the bytes that `StatePool.divide` may use.

        On a GPU, the scratch block and a configured number of KV blocks are already subtracted.
        """
        if self.device.type == "cpu":
            return CPU_CACHE_BYTES
        num_blocks = self.config.num_kvcache_blocks
        if num_blocks is not None and not self.pool.slot_bytes:
            return 0  # nothing depends on it
        num_reserved = 1 + (num_blocks or 0)
        return max(0, self._measure_free_bytes() - num_reserved * self.pool.block_bytes)

    def _measure_free_bytes(self) -> int:
        """Return the bytes that `gpu_memory_utilization` leaves after weights and the largest step's activations."""
        self._synchronize()
        self._allocate(StateSizes(self.max_blocks, num_seqs=1))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.forward.run(self._largest_batch())
        self._synchronize()
        activations = torch.cuda.max_memory_allocated() - before
        self.pool.free()
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return int(free - total * (1 - self.config.gpu_memory_utilization)) - activations - GRAPH_BYTES

    def _largest_batch(self) -> Batch:
        """Return a step with the whole token budget in prefill rows, `max_rows` of them.

        All rows have slot 0, the only one that certainly has recurrent state. Its blocks are the scratch block. The
        rows overwrite each other's state, but nobody reads what this step computes.
        """
        length, num_longer = divmod(self.config.max_num_batched_tokens, self.max_rows)
        lengths = [length + 1] * num_longer + [length] * (self.max_rows - num_longer)
        return Batch([Row(slot=0, start=0, token_ids=[0] * length, yields_token=False) for length in lengths])

    # -- kernels and graphs ------------------------------------------------------------------------------------------

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Compile the kernels of all kinds of steps while the body runs.

        The largest step comes first, because its kernels take longest.
        """
        self._allocate(StateSizes(self.max_blocks, num_seqs=1))
        with compile_in_parallel():
            with compile_without_launch(), self.model.few_layers():
                self.forward.run(self._largest_batch())
                self._trace_decode_steps()
                self._trace_mixed_steps()
                self._copy_state([(0, 1)])  # to the scratch slot
                self.forward.load_logprob_kernels()
            yield

    def _trace_decode_steps(self) -> None:
        """Run decode steps of 1, 2, 4, ... and `max_num_seqs` rows, with and without shared prefixes.

        Steps with other numbers of rows use the same kernels.
        """
        max_num_seqs = self.config.max_num_seqs
        slots = torch.full((max_num_seqs,), self.state.scratch_slot, dtype=torch.int32, device=self.device)
        powers_of_2 = {1 << i for i in range(max_num_seqs.bit_length())}
        for size in sorted(powers_of_2 | {max_num_seqs}):
            plan = torch.zeros(SharedPrefixPlan.size(size), dtype=torch.int32, device=self.device)
            for shared in (None, SharedPrefixPlan.split(plan, size)):
                self.forward.step(StepRows(slots[:size]), size, shared=shared)

    def _trace_mixed_steps(self) -> None:
        """Run mixed steps with each number of tokens that has kernels of its own."""
        for num_tokens in self.model.compile_sizes(self.config.max_num_batched_tokens):
            num_rows = min(num_tokens, self.config.max_num_seqs) + 1
            packed = torch.from_numpy(self.state.pack(Batch(), num_rows, num_tokens)).to(self.device)
            self.forward.mixed_step(packed, num_rows, num_tokens, self.max_model_len)

    def _capture(self) -> None:
        self.free_graphs()
        if self.device.type != "cuda" or self.config.enforce_eager or not self.backend.capturable:
            return
        graphs = StepGraphs(self.forward, self.config, self.max_model_len, self.wait)
        try:
            with self.tp.capture_lock:
                graphs.capture()
                self.check_ranks()
        except BaseException:
            self.tp.abort(graphs.free)  # another rank may be lost, and launched kernels may wait for it
            raise
        self.graphs = graphs

    def free_graphs(self) -> None:
        """Free the captured graphs. NCCL's communicators cannot be destroyed before graphs that hold their kernels."""
        graphs, self.graphs = self.graphs, None  # the thread that watches the ranks may do so at the same time
        if graphs is not None:
            graphs.free()

    # -- weights, sleep ----------------------------------------------------------------------------------------------

    def start_weight_update(self) -> None:
        """Start to overwrite the parameters in place; an unfinished update ends. See `WeightUpdate`."""
        self.weight_update = WeightUpdate(self.model)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy some of an update's tensors. Return their names."""
        assert self.weight_update is not None  # the engine has checked it
        names = self.weight_update.load(weights)
        self._synchronize()
        return names

    def finish_weight_update(self) -> None:
        """Check and convert the weights of an update."""
        assert self.weight_update is not None  # the engine has checked it
        self.weight_update.finish()
        self.weight_update = None
        self._synchronize()

    def sleep(self, parts: Collection[str]) -> None:
        """Free graphs, state and buffers ("kv_cache"); move the weights to the host's memory ("weights")."""
        self.free_graphs()
        if "kv_cache" in parts:
            del self.state, self.forward
            self.backend.free_buffers()
            self.token_ring.clear()
            self.pool.free()
        if "weights" in parts and self.device.type == "cuda":
            self._move_weights(torch.device("cpu"))
        self._synchronize()
        give_back_memory()

    def lacking_memory(self, parts: Collection[str]) -> int:
        """Return how many bytes `wake_up` of `parts` lacks on the device, the most of all ranks; 0 if there is enough.

        The memory of the graphs is not known before, so it is not counted.
        """
        if self.device.type == "cpu":
            return 0
        with self._device_context():
            torch.cuda.empty_cache()  # the caller may have freed tensors, whose memory torch keeps
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            spare = torch.cuda.mem_get_info()[0] + unused
            if "weights" in parts:
                spare -= sum(param.nbytes for param in self.model.parameters())
            if "kv_cache" in parts:
                spare -= self.pool.num_bytes(self.sizes) + self.batch_state_bytes
            return max(0, -self.tp.all_reduce_min(spare, self.device))

    def wake_up(self, parts: Collection[str], capture: bool) -> None:
        """Undo `sleep` for `parts`.

        Args:
            capture: whether nothing sleeps afterwards, so that the graphs can be captured again.
        """
        with self._device_context():
            if "weights" in parts:
                self._move_weights(self.device)
            if "kv_cache" in parts:
                self._allocate(self.sizes)
            if capture:
                self._capture()
            self._synchronize()

    def _move_weights(self, device: torch.device) -> None:
        with torch.inference_mode():
            for param in self.model.parameters():
                param.data = param.data.to(device)

    def _synchronize(self) -> None:
        """Wait for everything launched on the current stream, because the caller may use another stream next.

        Not for the whole device: another engine may be capturing.
        """
        if self.device.type == "cuda":
            self.wait(torch.cuda.current_stream(self.device).record_event())


def _to_host(results: list[LogprobTensors]) -> list[LogprobTensors]:
    """Start asynchronous copies to pinned host memory."""
    return [LogprobTensors(*(tensor.to("cpu", non_blocking=True) for tensor in tensors)) for tensors in results]


def _packed(results: list[LogprobTensors]) -> list[TokenLogprobs]:
    """Return the logprobs in compact copies, because requests keep them for long, and pinned memory is scarce."""
    return [TokenLogprobs.pack(*(tensor.numpy() for tensor in tensors)) for tensors in results]
