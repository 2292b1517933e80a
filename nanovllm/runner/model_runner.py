"""One rank: its share of the weights, its KV cache, and the steps it runs."""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.attention import select_backend
from nanovllm.config import Config
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.engine.scheduler import Batch, Chunk, StepOutput
from nanovllm.layers.residual import Residual
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import dummy_weights, load_weights
from nanovllm.ops.attention.shared_prefix import SharedPrefixPlan
from nanovllm.ops.inputs.step_inputs import step_inputs
from nanovllm.ops.inputs.step_rows import StepRows
from nanovllm.ops.linear.dispatch import compile_sizes
from nanovllm.ops.linear.gemm import MAX_TILES
from nanovllm.ops.sampling.logprobs import process_logits, top_logprobs
from nanovllm.ops.sampling.sampling import advance_slots, sample
from nanovllm.ops.triton_utils import compile_in_parallel, compile_without_launch
from nanovllm.outputs import TokenLogprobs
from nanovllm.runner.batch_state import BatchState, host_buffer
from nanovllm.runner.cuda_graphs import StepGraphs
from nanovllm.runner.state_pool import StatePool
from nanovllm.utils.context import Context, set_context
from nanovllm.utils.hub import ModelSource

CPU_CACHE_BYTES = 1 << 30  # default KV pool on a CPU
SCORED_ROWS = 64  # rows whose logprobs are computed at once, which bounds the memory for them


class StepTensors(NamedTuple):
    """What a step leaves on the device.

    Args:
        tokens: [R] int64, one drawn for each row.
        own: this rank's share of the rows, for which it draws; those of a graph's padding are counted.
        logits: [S, V], what tokens of `own` were drawn from. After a graph's replay, valid until the next.
        hidden: the model's last hidden states before their norm, of all tokens; None but in a step told to keep them.
    """

    tokens: torch.Tensor
    own: slice
    logits: torch.Tensor
    hidden: Residual | None


class InFlight(NamedTuple):
    """Results of a step on their way to the host: all there once `event` is done."""

    tokens: torch.Tensor
    logprobs: tuple[torch.Tensor, ...] | None
    prompt_logprobs: tuple[torch.Tensor, ...] | None
    event: torch.cuda.Event | None


class ModelRunner:
    """Executes batches. `launch` starts one and does not wait; `collect` gives the tokens of the oldest one launched.

    Args:
        config: the engine's.
        source: the model to load.
        tp: this rank's tensor-parallel group.
        device: where this rank runs.
        check_ranks: raises if another rank has failed.

    Raises:
        ValueError: the KV pool would not hold one sequence of `max_model_len` tokens.
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
        self.dtype = config.torch_dtype(source.config.dtype)
        self.max_model_len = min(config.max_model_len, source.config.max_position)
        self.max_rows = max(config.max_num_seqs, -(-config.max_num_batched_tokens // self.max_model_len))
        self.block_size = config.kvcache_block_size
        self.max_blocks = -(-self.max_model_len // self.block_size)
        cache = source.config.head_dim, self.block_size, self.dtype
        self.backend = select_backend(config.attention_backend, device, *cache)
        self.check_ranks = check_ranks
        self.graphs: StepGraphs | None = None
        self.in_flight: deque[InFlight] = deque()
        with self._mode():
            self._build(source)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """No gradients, and nothing that the calling thread is set to.

        On its current GPU Triton's kernels would run and events be recorded. Its autocast's dtype some operations would
        take, and others not.
        """
        kind = self.device.type
        gpu = torch.cuda.device(self.device) if kind == "cuda" else nullcontext()
        autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with torch.inference_mode(), gpu, autocast:
            yield

    def _build(self, source: ModelSource) -> None:
        with torch.device(self.device):
            self.model = Decoder(source.config, dtype=self.dtype, tp=self.tp, max_position=self.max_model_len)
        self.pool = StatePool(self.model, self.block_size, self.device)
        num_counters = (self.max_rows + 1) * max(self.pool.kv_heads)  # attention's; a graph may have one row more
        self.counters = torch.zeros(max(num_counters, MAX_TILES), dtype=torch.int32, device=self.device)
        dummy = self.config.load_format == "dummy"
        with self._compiling() if self.backend.name == "triton" else nullcontext():
            load_weights(self.model, dummy_weights(self.model, self.config.seed) if dummy else source.weights())
        self.num_blocks = self._size_cache()
        self._allocate(self.num_blocks)
        self._capture()
        self._settle()

    # -- memory ------------------------------------------------------------------------------------------------------

    def _allocate(self, num_blocks: int) -> None:
        """Allocate the state of layers, with a scratch block for padding rows after the scheduler's, and of slots."""
        try:
            self.pool.allocate(num_blocks + 1)
        except RuntimeError as error:
            if num_blocks != self.config.num_kvcache_blocks:
                raise
            raise ValueError(f"num_kvcache_blocks={num_blocks} is more than can be allocated: {error}") from error
        self.state = BatchState(self.config, self.max_blocks, num_blocks, self.model.config.vocab_size, self.device)
        self.token_ring = deque(host_buffer(self.config.max_num_seqs, torch.int64, self.device) for _ in range(2))

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Compile the kernels that steps of all kinds have, while the body does other things.

        The largest step, whose kernels take longest, comes first.
        """
        self._allocate(self.max_blocks)
        state, most = self.state, self.config.max_num_seqs
        slots = torch.full((most,), state.scratch_slot, dtype=torch.int32, device=self.device)
        with compile_in_parallel():
            with compile_without_launch(), self.model.few_layers():
                self._eager(self._largest_batch())
                # However decode attention is built, a power of two of rows, or the most, is among what it is for.
                for size in sorted({min(1 << i, most) for i in range(most.bit_length() + 1)}):
                    plan = torch.zeros(SharedPrefixPlan.size(size), dtype=torch.int32, device=self.device)
                    for shared in (None, SharedPrefixPlan.split(plan, size)):
                        self.step(slots[:size], size, shared=shared)
                for num_tokens in compile_sizes(self.config.max_num_batched_tokens):
                    sizes = min(num_tokens, most) + 1, num_tokens
                    rows = StepRows.split(torch.from_numpy(state.pack(Batch(), *sizes)).to(self.device), *sizes)
                    self.step(rows, 0, num_tokens, self.max_model_len)
            yield

    def _size_cache(self) -> int:
        """Return the number of KV blocks: the configured one, or what fits; the same on all ranks."""
        if self.config.num_kvcache_blocks is not None:
            num_blocks = self.config.num_kvcache_blocks
        elif self.device.type == "cuda":
            num_blocks = self.pool.blocks_in(self._free_bytes()) - 1  # a scratch block
        else:
            most = self.config.max_num_seqs * self.max_blocks
            num_blocks = min(most, max(self.pool.blocks_in(CPU_CACHE_BYTES), self.max_blocks))
        num_blocks = self.tp.all_reduce_min(num_blocks, self.device)
        if num_blocks < self.max_blocks and self.config.num_kvcache_blocks is None:
            raise ValueError(
                f"gpu_memory_utilization={self.config.gpu_memory_utilization} leaves room for {max(num_blocks, 0)} KV "
                f"blocks, but one sequence of max_model_len={self.max_model_len} needs {self.max_blocks}; raise the "
                "first or lower the second"
            )
        return num_blocks

    def _free_bytes(self) -> int:
        """What `gpu_memory_utilization` leaves for the cache after weights and the largest step's activations."""
        self._settle()
        self._allocate(self.max_blocks)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._eager(self._largest_batch())
        self._settle()
        activations = torch.cuda.max_memory_allocated() - before
        self.pool.free()
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        graphs = 256 << 20  # graph pools and library workspaces
        return int(free - total * (1 - self.config.gpu_memory_utilization)) - activations - graphs

    def _largest_batch(self) -> Batch:
        """A full budget of prompt tokens, in at least as many rows as there are slots, all in the scratch slot."""
        lens = [len(part) for part in np.array_split(np.arange(self.config.max_num_batched_tokens), self.max_rows)]
        return Batch(chunks=[Chunk(self.state.scratch_slot, 0, [0] * n, True) for n in lens])

    # -- a step ------------------------------------------------------------------------------------------------------

    def launch(self, batch: Batch) -> None:
        """Start `batch`: differences in, forward, sample, results on their way to the host. Does not wait on a GPU."""
        with self._mode():
            self.state.apply(batch)
            if self.graphs is not None and self.graphs.fits(batch):
                result = self.graphs.replay(batch)
            else:
                result = self._eager(batch)
            logprobs = self._logprobs(batch, result) if batch.logprobs else None
            prompt_logprobs = self._prompt_logprobs(batch, result.hidden) if batch.has_scores else None
            self._send(result.tokens, logprobs, prompt_logprobs)

    def collect(self) -> StepOutput:
        """The results of the oldest launched step; waits for that step only."""
        tokens, *logprobs, event = self.in_flight[0]
        if event is not None:
            self.wait(event)
        self.in_flight.popleft()
        return StepOutput(tokens.tolist(), *(x and TokenLogprobs(*(part.tolist() for part in x)) for x in logprobs))

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait for `event`, or raise what `check_ranks` does: a dead rank would leave this one waiting for ever."""
        while self.tp.size > 1 and not event.query():
            self.check_ranks()
            time.sleep(20e-6)
        event.synchronize()
        self.check_ranks()  # the end of the collectives may have ended the wait: nothing that was waited for is there

    def _eager(self, batch: Batch) -> StepTensors:
        num_decode, to_device = len(batch.decode_slots), self.state.staging.to_device
        if not batch.chunks:
            return self.step(to_device(np.array(batch.decode_slots, dtype=np.int32)), num_decode)
        sizes = batch.num_rows, batch.num_tokens
        rows = StepRows.split(to_device(self.state.pack(batch, *sizes)), *sizes)
        longest = max(len(chunk.token_ids) for chunk in batch.chunks)
        context_len = max(chunk.start + len(chunk.token_ids) for chunk in batch.chunks)
        return self.step(rows, num_decode, longest, context_len, keep_hidden=batch.has_scores)

    def step(
        self,
        rows: StepRows | torch.Tensor,
        num_decode: int,
        max_seqlen_q: int = 0,
        max_context_len: int = 0,
        shared: SharedPrefixPlan | None = None,
        keep_hidden: bool = False,
    ) -> StepTensors:
        """One step, on the device from inputs to drawn tokens, and therefore capturable.

        Args:
            rows: the step's; or only the slots [B] int32 of decode rows.
            num_decode: how many of the rows, the first ones, are attended as decode rows.
            max_seqlen_q, max_context_len: at least the longest other row's tokens, and context.
            shared: what decode rows have in common, if that is to be made use of.
            keep_hidden: return the hidden states of all tokens.
        """
        state = self.state
        slots = rows if isinstance(rows, torch.Tensor) else rows.slots
        tables = state.last_token, state.length, state.block_tables
        inputs = step_inputs(rows, *tables, self.block_size, state.scratch_slot, state.sampling)
        context = Context(
            backend=self.backend,
            kv_heads=self.pool.kv_heads,
            num_decode=num_decode,
            slots=slots,
            context_lens=inputs.context_lens,
            block_tables=state.block_tables,
            slot_mapping=inputs.slot_mapping,
            cu_seqlens_q=None if num_decode == len(slots) else rows.cu_seqlens[num_decode:],
            max_seqlen_q=max_seqlen_q,
            max_context_len=max_context_len,
            shared=shared,
            last_indices=None if keep_hidden else inputs.last_indices,
            counters=self.counters,
        )
        self.backend.prepare(context)
        with set_context(context):
            hidden = self.model(inputs.input_ids, inputs.positions)
            logits = self.model.compute_logits(hidden[inputs.last_indices] if keep_hidden else hidden)
        own = self.tp.rows(len(slots))
        tokens = self._sample(logits, own, slots, inputs.context_lens)
        return StepTensors(tokens, own, logits, hidden if keep_hidden else None)

    def _sample(
        self, logits: torch.Tensor, own: slice, slots: torch.Tensor, context_lens: torch.Tensor
    ) -> torch.Tensor:
        """Draw, each rank for its own rows; every rank then holds all tokens and advances its state."""
        state = self.state
        last = state.last_token, state.length, state.scratch_slot
        if self.tp.size == 1:
            return sample(logits, slots, context_lens, state.sampling, last)
        tokens = torch.zeros(len(slots), dtype=torch.int64, device=self.device)
        tokens[own] = sample(logits, slots[own], context_lens[own], state.sampling)
        self.tp.merge(tokens)
        advance_slots(tokens, slots, context_lens, *last)
        return tokens

    def _logprobs(self, batch: Batch, result: StepTensors) -> tuple[torch.Tensor, ...]:
        """Those of the batch's `logprobs` rows: token ids, log-probabilities and ranks, as in `top_logprobs`."""
        wanted, to_device = np.array(batch.logprobs, dtype=np.int64), self.state.staging.to_device
        own = np.flatnonzero((wanted >= result.own.start) & (wanted < result.own.stop))
        parts, tokens = [], result.tokens[result.own]
        for start in range(0, max(1, len(own)), SCORED_ROWS):
            chosen = wanted[own[start : start + SCORED_ROWS]]
            rows = to_device(chosen - result.own.start)
            logits = result.logits[rows]
            if batch.processes_logprobs:
                slots = to_device(np.array(batch.slots)[chosen])
                logits = process_logits(logits, slots, self.state.length[slots], self.state.sampling)
            parts.append(top_logprobs(logits, tokens[rows], batch.num_logprobs))
        return self._merge(map(torch.cat, zip(*parts, strict=True)), own, len(wanted))

    def _prompt_logprobs(self, batch: Batch, hidden: Residual) -> tuple[torch.Tensor, ...]:
        """Those of the chunks' `scores`, one after the other."""
        places, wanted, start = [], [], len(batch.decode_slots)
        for chunk in batch.chunks:
            first = start + chunk.first_scored
            places += range(first, first + len(chunk.scores))
            wanted += chunk.scores
            start += len(chunk.token_ids)
        places, wanted = (torch.tensor(x, dtype=torch.int64, device=self.device) for x in (places, wanted))
        parts = []
        for rows, tokens in zip(places.split(SCORED_ROWS), wanted.split(SCORED_ROWS), strict=True):
            own = self.tp.rows(len(rows))
            result = top_logprobs(self.model.compute_logits(hidden[rows]), tokens[own], batch.num_logprobs)
            parts.append(self._merge(result, own, len(rows)))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _merge(self, parts: Iterable[torch.Tensor], own: slice | np.ndarray, count: int) -> tuple[torch.Tensor, ...]:
        """Tensors of `count` rows, of which this rank has the parts for the rows `own` [S]."""
        if self.tp.size == 1:
            return tuple(parts)
        if not isinstance(own, slice):
            own = self.state.staging.to_device(own)
        wholes = []
        for part in parts:
            wholes.append(part.new_zeros((count, *part.shape[1:])))
            wholes[-1][own] = part
        return tuple(map(self.tp.merge, wholes))

    def _send(self, tokens: torch.Tensor, *logprobs: tuple[torch.Tensor, ...] | None) -> None:
        """Start the copy of results to the host. The ring's oldest buffer is free: its step has been collected."""
        if self.device.type == "cpu":
            self.in_flight.append(InFlight(tokens, *logprobs, None))
            return
        self.token_ring.rotate(-1)
        host = self.token_ring[0][: len(tokens)]
        host.copy_(tokens, non_blocking=True)
        logprobs = (x and tuple(part.to("cpu", non_blocking=True) for part in x) for x in logprobs)
        event = torch.cuda.Event()
        event.record()
        self.in_flight.append(InFlight(host, *logprobs, event))

    # -- weights and memory ------------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite the parameters in place; see `load_weights`."""
        load_weights(self.model, weights)
        self._settle()

    def sleep(self, level: int) -> None:
        """Free the KV cache and what goes with it (1), and the weights' device memory too (2)."""
        self.free_graphs()
        self.state = None
        self.token_ring.clear()
        self.pool.free()
        if level == 2 and self.device.type == "cuda":
            self._move_weights(torch.device("cpu"))
        gc.collect()
        self._settle()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        """Undo `sleep`."""
        with self._mode():
            self._move_weights(self.device)
            self._allocate(self.num_blocks)
            self._capture()
            self._settle()

    def _settle(self) -> None:
        """Wait for all that was launched: later steps may be of another stream, as may be what a caller does next.

        Not for all that the device does: another engine may be capturing.
        """
        if self.device.type == "cuda":
            self.wait(torch.cuda.current_stream(self.device).record_event())

    def _move_weights(self, device: torch.device) -> None:
        with torch.inference_mode():
            for param in self.model.parameters():
                param.data = param.data.to(device)

    def free_graphs(self) -> None:
        """Forget the captured graphs. NCCL's communicators cannot end before the graphs that hold their kernels."""
        graphs, self.graphs = self.graphs, None  # a rank's monitor may do so at the same time
        if graphs is not None:
            graphs.free()

    def _capture(self) -> None:
        self.free_graphs()
        if self.device.type == "cuda" and not self.config.enforce_eager and self.backend.capturable:
            graphs = StepGraphs(self)
            try:
                with self.tp.capturing:
                    graphs.capture(self)
            except BaseException:
                self.tp.abort(graphs.free)  # another rank may be lost, and what was launched wait for it
                raise
            self.graphs = graphs
