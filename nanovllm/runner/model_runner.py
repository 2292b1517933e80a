"""One rank: its share of the weights, its KV cache, and the steps it runs."""

import gc
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from nanovllm.attention import select_backend
from nanovllm.config import Config
from nanovllm.engine.scheduler import Batch
from nanovllm.kernels.decode_inputs import decode_inputs
from nanovllm.kernels.sampling import advance, sample
from nanovllm.layers.attention import Attention
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import init_dummy_weights, load_weights
from nanovllm.runner.batch_state import BatchState
from nanovllm.runner.cuda_graphs import DecodeGraphs
from nanovllm.utils.context import Context, set_context
from nanovllm.utils.hub import ModelSource
from nanovllm.utils.parallel import TensorParallel

CPU_CACHE_BYTES = 1 << 30  # default KV pool on a CPU


class ModelRunner:
    """Executes batches. `launch` starts one and does not wait; `collect` gives the tokens of the oldest one launched.

    Args:
        config: the engine's.
        source: the model to load.
        tp: this rank's tensor-parallel group.
        device: where this rank runs.

    Raises:
        ValueError: the KV pool would not hold one sequence of `max_model_len` tokens.
    """

    def __init__(self, config: Config, source: ModelSource, tp: TensorParallel, device: torch.device):
        self.config, self.tp, self.device = config, tp, device
        self.model_config = source.config
        self.dtype = config.torch_dtype(source.config.dtype)
        self.max_model_len = min(config.max_model_len, source.config.max_position)
        self.block_size = config.kvcache_block_size
        self.max_blocks = -(-self.max_model_len // self.block_size)
        self.backend = select_backend(
            config.attention_backend, device, source.config.head_dim, self.block_size, self.dtype
        )
        self.check_ranks: Callable[[], None] = lambda: None  # raises if another rank has failed
        self.in_flight: deque[tuple[torch.Tensor | None, torch.cuda.Event | None]] = deque()
        with torch.inference_mode():
            self._build(source)

    def _build(self, source: ModelSource) -> None:
        with torch.device(self.device):
            self.model = Decoder(source.config, dtype=self.dtype, tp=self.tp)
        if self.config.load_format == "dummy":
            init_dummy_weights(self.model, self.config.seed)
        else:
            load_weights(self.model, source.weights())
        self.attention_layers = [m for m in self.model.modules() if isinstance(m, Attention)]
        self.num_blocks = self._size_cache()
        self._allocate(self.num_blocks)
        self.graphs = None
        if self.device.type == "cuda" and not self.config.enforce_eager and self.backend.capturable:
            self.graphs = DecodeGraphs(self)

    # -- memory ------------------------------------------------------------------------------------------------------

    def _allocate(self, num_blocks: int) -> None:
        """The KV cache with one more block than the scheduler knows of, for padding rows, and the slots' state."""
        first = self.attention_layers[0]
        shape = (num_blocks + 1, self.block_size, first.num_kv_heads, first.head_dim)
        for layer in self.attention_layers:
            layer.k_cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
            layer.v_cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.state = BatchState(
            self.config.max_num_seqs,
            self.max_blocks,
            self.block_size,
            num_blocks,
            self.config.max_num_batched_tokens,
            self.device,
        )
        pin = self.device.type == "cuda"
        ring = [torch.empty(self.config.max_num_seqs, dtype=torch.int64, pin_memory=pin) for _ in range(2)]
        self.token_ring = deque(ring)

    def _size_cache(self) -> int:
        """Blocks in the pool: as told, or as fits, and the same on all ranks."""
        first = self.attention_layers[0]
        per_token = 2 * len(self.attention_layers) * first.num_kv_heads * first.head_dim * self.dtype.itemsize
        block_bytes = per_token * self.block_size
        if self.config.num_kvcache_blocks is not None:
            num_blocks = self.config.num_kvcache_blocks
        elif self.device.type == "cuda":
            num_blocks = self._free_bytes() // block_bytes - 1
        else:
            most = self.config.max_num_seqs * self.max_blocks
            num_blocks = min(most, max(CPU_CACHE_BYTES // block_bytes, self.max_blocks))
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
        torch.cuda.synchronize()
        self._allocate(self.max_blocks)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        # The largest step: a full budget of prompt tokens, and as many sampled rows as there are slots.
        num_tokens = self.config.max_num_batched_tokens
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        hidden = self._forward(ids, ids, self._warmup_context(num_tokens))
        slots = torch.full((self.config.max_num_seqs,), self.state.scratch_slot, dtype=torch.int32, device=self.device)
        rows = hidden[: self.config.max_num_seqs]
        self._sample(self.model.compute_logits(rows), slots, torch.ones_like(slots))
        torch.cuda.synchronize()
        activations = torch.cuda.max_memory_allocated() - before
        del hidden, rows
        for layer in self.attention_layers:
            layer.k_cache = layer.v_cache = torch.empty(0)
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        graphs = 256 << 20  # graph pools and library workspaces
        return int(free - total * (1 - self.config.gpu_memory_utilization)) - activations - graphs

    def _warmup_context(self, num_tokens: int) -> Context:
        """Prefill rows of at most max_model_len tokens, all in the scratch slot."""
        lens = [self.max_model_len] * (num_tokens // self.max_model_len)
        lens += [num_tokens - sum(lens)] if num_tokens > sum(lens) else []
        return Context(
            backend=self.backend,
            slots=torch.full((len(lens),), self.state.scratch_slot, dtype=torch.int32, device=self.device),
            context_lens=torch.tensor(lens, dtype=torch.int32, device=self.device),
            block_tables=self.state.block_tables,
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=self.device),
            cu_seqlens_q=torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=self.device),
            max_seqlen_q=max(lens),
            max_context_len=max(lens),
        )

    # -- a step ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Start `batch`: differences in, forward, sample, tokens on their way to the host. Does not wait on a GPU."""
        self.state.apply(batch)
        if not batch.chunks and self.graphs is not None:
            tokens = self.graphs.replay(batch.decode_slots)
        elif not batch.chunks:
            slots = self.state.staging.to_device(np.array(batch.decode_slots, dtype=np.int32))
            tokens = self.decode(slots)
        else:
            tokens = self._mixed(batch)
        self._send(tokens)

    def collect(self) -> list[int]:
        """The tokens of the oldest launched step, in its rows' order; waits for that step only."""
        host, event = self.in_flight[0]
        if event is not None and self.tp.size == 1:
            event.synchronize()
        while event is not None and not event.query():  # a dead rank would leave this one waiting for ever
            self.check_ranks()
            time.sleep(20e-6)
        self.in_flight.popleft()
        return host.tolist()

    def decode(self, slots: torch.Tensor) -> torch.Tensor:
        """One token for each of `slots` [B] int32. All inputs and all that changes are on the device: capturable."""
        state = self.state
        input_ids, positions, slot_mapping, context_lens = decode_inputs(
            slots, state.last_token, state.length, state.block_tables, self.block_size
        )
        context = Context(
            backend=self.backend,
            num_decode=len(slots),
            slots=slots,
            context_lens=context_lens,
            block_tables=state.block_tables,
            slot_mapping=slot_mapping,
        )
        hidden = self._forward(input_ids, positions, context)
        return self._sample(self.model.compute_logits(hidden), slots, context_lens)

    def _mixed(self, batch: Batch) -> torch.Tensor:
        """A step with prompt tokens: decode rows from the device's state, chunks from the host."""
        state, to_device = self.state, self.state.staging.to_device
        num_decode, chunks = len(batch.decode_slots), batch.chunks
        lens = np.array([len(c.token_ids) for c in chunks])
        starts = np.array([c.start for c in chunks])
        ends = np.cumsum(lens)
        rows = np.repeat(np.array([c.slot for c in chunks]), lens)
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - lens), lens)
        blocks = state.host_tables[rows, positions // self.block_size].astype(np.int64)
        slots = to_device(np.array([*batch.decode_slots, *(c.slot for c in chunks)], dtype=np.int32))
        inputs = (
            to_device(np.concatenate([c.token_ids for c in chunks]).astype(np.int64)),
            to_device(positions),
            to_device(blocks * self.block_size + positions % self.block_size),
            to_device((starts + lens).astype(np.int32)),
        )
        if num_decode:
            decoding = decode_inputs(
                slots[:num_decode], state.last_token, state.length, state.block_tables, self.block_size
            )
            inputs = tuple(torch.cat(pair) for pair in zip(decoding, inputs, strict=True))
        input_ids, positions, slot_mapping, context_lens = inputs

        samples = np.array([c.samples for c in chunks])
        wanted = np.concatenate([np.arange(num_decode), num_decode + ends[samples] - 1])  # tokens that get logits
        wanted_rows = to_device(np.concatenate([np.arange(num_decode), num_decode + np.flatnonzero(samples)]))
        context = Context(
            backend=self.backend,
            num_decode=num_decode,
            slots=slots,
            context_lens=context_lens,
            block_tables=state.block_tables,
            slot_mapping=slot_mapping,
            cu_seqlens_q=to_device(np.concatenate([[0], ends]).astype(np.int32)),
            max_seqlen_q=int(lens.max()),
            max_context_len=int((starts + lens).max()),
            last_indices=to_device(wanted),
        )
        hidden = self._forward(input_ids, positions, context)
        if not len(wanted):
            return input_ids[:0]
        with set_context(context):
            logits = self.model.compute_logits(hidden)
        return self._sample(logits, slots[wanted_rows], context_lens[wanted_rows])

    def _forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        self.backend.prepare(context)
        with set_context(context):
            return self.model(input_ids, positions)

    def _sample(self, logits: torch.Tensor | None, slots: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
        """Draw on rank 0, which has the logits; every rank then holds the tokens and advances its state."""
        state = self.state
        if logits is None:
            tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
        else:
            tokens = sample(logits, slots, context_lens, state.sampling)
        self.tp.broadcast(tokens)
        advance(tokens, slots, context_lens, state.last_token, state.length, state.scratch_slot)
        return tokens

    def _send(self, tokens: torch.Tensor) -> None:
        """Start the copy of `tokens` to the host. The ring's oldest buffer is free: its step has been collected."""
        if self.device.type == "cpu":
            self.in_flight.append((tokens, None))
            return
        self.token_ring.rotate(-1)
        host = self.token_ring[0][: len(tokens)]
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.in_flight.append((host, event))
