"""What the device knows of each running sequence, and how the host tells it what changed.

Each slot has its last token, its length, a row of the block table and its sampling parameters. A pure decode step needs
nothing else: the host sends the slots of the rows when they change, new block ids when a sequence crosses into a new
block, and nothing at all otherwise.
"""

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.scheduler import Admission, Batch
from nanovllm.ops.inputs.step_rows import StepRows
from nanovllm.ops.sampling.state import (
    HAS_BIAS,
    HAS_MASK,
    HAS_PENALTIES,
    MAX_COUNT,
    PARAMS_DTYPE,
    PARAMS_STRIDE,
    PROCESSED_LOGPROBS,
    SamplingState,
    default_params,
)


def host_buffer(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of the host [size], whatever torch's default device is; pinned if `device`, which copies it, is a GPU."""
    return torch.empty(size, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


class Staging:
    """A ring of pinned host buffers for copies to the device that do not wait.

    One buffer serves one step. It is used again two steps later, when that step's tokens have been collected and its
    copies are therefore done.
    """

    def __init__(self, num_bytes: int, device: torch.device):
        self.buffers = [host_buffer(num_bytes, torch.uint8, device) for _ in range(2)]
        self.device = device
        self.step = self.used = 0

    def next_step(self) -> None:
        self.step, self.used = (self.step + 1) % len(self.buffers), 0

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """A device copy of `array`; the array may be changed as soon as this returns."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        end = self.used + array.nbytes
        if end > self.buffers[self.step].numel():
            return tensor.to(self.device)  # larger than any step plans for: correct, but it waits
        pinned = self.buffers[self.step][self.used : end].view(tensor.dtype).view(tensor.shape)
        pinned.copy_(tensor)
        self.used = -(-end // 16) * 16
        return pinned.to(self.device, non_blocking=True)


class BatchState:
    """The slots' state on the device.

    Args:
        config: the engine's. `max_num_seqs` is S, the number of slots; row S is a scratch slot for the padding rows of
            captured graphs. `max_num_batched_tokens` sizes the staging buffers.
        max_blocks: W, block-table width.
        scratch_block: a block no sequence owns, where padding rows write.
        vocab_size: V.
    """

    def __init__(self, config: Config, max_blocks: int, scratch_block: int, vocab_size: int, device: torch.device):
        rows, max_tokens = config.max_num_seqs + 1, config.max_num_batched_tokens
        self.scratch_slot, self.scratch_block = config.max_num_seqs, scratch_block
        self.block_size = config.kvcache_block_size
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.length = torch.zeros(rows, dtype=torch.int32, device=device)
        self.block_tables = torch.full((rows, max_blocks), scratch_block, dtype=torch.int32, device=device)
        self.sampling = SamplingState(default_params(rows), vocab_size, device)
        # The host's copy of the block tables, where an entry that a running sequence does not own is the scratch block.
        self.host_tables = np.full((rows, max_blocks), scratch_block, dtype=np.int32)
        self.num_admissions = 0
        num_bytes = (
            8 * max_tokens + (PARAMS_DTYPE.itemsize + vocab_size // 8 + 64) * rows + 32 * max_tokens // self.block_size
        )
        self.staging = Staging(num_bytes, device)

    def apply(self, batch: Batch) -> None:
        """Send what `batch` changes: the parameters of new slots and new block ids."""
        self.staging.next_step()
        if batch.admissions:
            self._admit(batch.admissions)
        if batch.new_blocks:
            slots, places, blocks = np.array(batch.new_blocks, dtype=np.int64).T
            self.host_tables[slots, places] = blocks
            flat = self.staging.to_device(slots * self.block_tables.shape[1] + places)
            values = self.staging.to_device(blocks.astype(np.int32))
            self.block_tables.view(-1).index_copy_(0, flat, values)
        if batch.masks:
            slots, masks = zip(*batch.masks, strict=True)
            slots, masks = self.staging.to_device(np.array(slots)), self.staging.to_device(np.stack(masks))
            self.sampling.masks.index_copy_(0, slots, masks)

    def _admit(self, admissions: list[Admission]) -> None:
        rows = default_params(len(admissions))
        for row, a in zip(rows, admissions, strict=True):
            params = a.params
            for name in ("temperature", "top_k", "top_p", "min_p"):
                row[name] = getattr(params, name)
            row["seed"], row["min_length"] = a.seed, a.min_length
            if params.min_tokens:
                row["stop_ids"][: len(a.end_ids)] = a.end_ids
            row["flags"] = HAS_MASK * a.is_filtered | PROCESSED_LOGPROBS * (
                params.logprobs_mode == "processed_logprobs"
            )
            if params.logit_bias:
                row["flags"] |= HAS_BIAS
                row["num_bias"] = len(params.logit_bias)
                self._set_bias(a.slot, params.logit_bias)
            if params.penalises:
                row["flags"] |= HAS_PENALTIES
                for name in ("repetition", "presence", "frequency"):
                    row[name] = getattr(params, f"{name}_penalty")
                self._set_counts(a)
        slots = np.array([a.slot for a in admissions])
        self.host_tables[slots] = self.scratch_block
        self.num_admissions += len(admissions)
        values = self.staging.to_device(rows.view(np.int32).reshape(-1, PARAMS_STRIDE))
        self.sampling.table.index_copy_(0, self.staging.to_device(slots), values)

    def _set_bias(self, slot: int, logit_bias: dict[int, float]) -> None:
        entries = np.zeros((len(logit_bias), 2), dtype=np.int32)
        entries[:, 0] = list(logit_bias)
        entries[:, 1] = np.array(list(logit_bias.values()), dtype=np.float32).view(np.int32)
        self.sampling.bias[slot, : len(entries)] = self.staging.to_device(entries)

    def _set_counts(self, admission: Admission) -> None:
        """Tell which tokens the sequence has so far; the device counts those that follow."""
        tokens, times = np.unique(np.array(admission.output_ids, dtype=np.int64), return_counts=True)
        prompt = np.unique(np.array(admission.prompt_ids, dtype=np.int64))
        counts = self.sampling.counts[admission.slot]
        counts.zero_()
        counts.index_add_(0, *map(self.staging.to_device, (prompt, np.ones(len(prompt), dtype=np.int16))))
        times = (2 * np.minimum(times, MAX_COUNT)).astype(np.int16)
        counts.index_add_(0, *map(self.staging.to_device, (tokens, times)))

    def pack(self, batch: Batch, num_rows: int, num_tokens: int) -> np.ndarray:
        """The StepRows of `batch` in one array, padded to the given sizes.

        Padding tokens belong to the last row, which must then be one of padding: it has the scratch slot and no tokens
        that attention sees.
        """
        packed = np.zeros(StepRows.size(num_rows, num_tokens), dtype=np.int32)
        rows, num_decode, chunks = StepRows.split(packed, num_rows, num_tokens), len(batch.decode_slots), batch.chunks
        used_rows, used_tokens = batch.num_rows, batch.num_tokens
        rows.slots[:used_rows] = batch.slots
        rows.slots[used_rows:] = self.scratch_slot
        rows.starts[:num_decode] = -1
        rows.starts[num_decode:used_rows] = [chunk.start for chunk in chunks]
        lens = np.array([1] * num_decode + [len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
        rows.cu_seqlens[1 : used_rows + 1] = lens.cumsum()
        rows.cu_seqlens[used_rows + 1 :] = used_tokens
        rows.token_rows[:used_tokens] = np.repeat(np.arange(used_rows), lens)
        rows.token_rows[used_tokens:] = num_rows - 1
        rows.token_ids[:num_decode] = -1
        for chunk, end in zip(chunks, rows.cu_seqlens[num_decode + 1 :], strict=False):
            rows.token_ids[end - len(chunk.token_ids) : end] = chunk.token_ids
        return packed
