"""The device's state of each running sequence, and how the host changes it.

Each slot has its last token, its length, a row of the block tables and its sampling parameters. A decode step needs
nothing else: the host sends the rows' slots when they change, a block id when a sequence needs a new block, and
otherwise nothing.
"""

from collections.abc import Mapping

import numpy as np
import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.config import Config
from nanovllm.messages import Admission, Batch
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
    """Return memory [size] of the host, not of torch's default device; pinned if `device` is a GPU."""
    return torch.empty(size, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


class Staging:
    """Two host buffers, pinned for a GPU, for asynchronous copies to the device.

    Each step uses one of them. It is used again two steps later, when the first step has been collected and its copies
    are therefore done.
    """

    def __init__(self, num_bytes: int, device: torch.device):
        self.buffers = [host_buffer(num_bytes, torch.uint8, device) for _ in range(2)]
        self.device = device
        self.index = 0  # which buffer the current step uses
        self.used = 0  # how many bytes of it are taken

    def next_step(self) -> None:
        """Switch to the other buffer, whose copies are done."""
        self.index = (self.index + 1) % len(self.buffers)
        self.used = 0

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """Return `array` on the device. Do not change it afterwards: on a CPU the tensor shares its memory."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        end = self.used + array.nbytes
        buffer = self.buffers[self.index]
        if end > len(buffer):
            return tensor.to(self.device)  # larger than the buffers are sized for: correct, but it waits
        pinned = buffer[self.used : end].view(tensor.dtype).view(tensor.shape)
        pinned.copy_(tensor)
        self.used = 16 * ceil_div(end, 16)  # keeps the next array aligned for any dtype
        return pinned.to(self.device, non_blocking=True)


class BatchState:
    """The slots' state on the device: S slots, and one scratch slot for the padding rows of CUDA graphs.

    Args:
        config: `max_num_seqs` is S; `max_num_batched_tokens` sizes the staging buffers.
        max_blocks: W, the width of the block tables.
        scratch_block: a block that no sequence owns; padding rows write to it.
        vocab_size: size of the vocabulary.
        device: where the state lives.

    Attributes:
        last_token: [S + 1] int64, the last sampled token. Its K and V are not in the cache yet.
        length: [S + 1] int32, the number of tokens before `last_token`, which is its position.
        block_tables: [S + 1, W] int32. Entries after a sequence's blocks are arbitrary.
        host_tables: the same on the host, with `scratch_block` in these entries: shared prefixes are found in it.
        sampling: the slots' sampling parameters.
        admission_epoch: grows whenever slots get new sequences.
    """

    def __init__(self, config: Config, max_blocks: int, scratch_block: int, vocab_size: int, device: torch.device):
        num_slots = config.max_num_seqs + 1
        self.scratch_slot, self.scratch_block = config.max_num_seqs, scratch_block
        self.block_size = config.kvcache_block_size
        self.last_token = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.length = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.block_tables = torch.full((num_slots, max_blocks), scratch_block, dtype=torch.int32, device=device)
        self.sampling = SamplingState(default_params(num_slots), vocab_size, device)
        self.host_tables = np.full((num_slots, max_blocks), scratch_block, dtype=np.int32)
        self.admission_epoch = 0
        # Bytes that a step usually sends. It may send more, such as penalties' counts, and then waits for their copy.
        bytes_per_row = PARAMS_DTYPE.itemsize  # sampling parameters of a new sequence
        bytes_per_row += vocab_size // 8  # a mask, one bit for each token
        bytes_per_row += 64  # slot, start and offset in StepRows; slots and indices of what else is sent
        bytes_per_token = 8  # row and token id in StepRows
        # A new block needs 12 bytes: index (int64) and id (int32). The rest is for cached blocks, which use no budget.
        bytes_per_token += 32 / self.block_size
        num_bytes = bytes_per_token * config.max_num_batched_tokens + bytes_per_row * num_slots
        self.staging = Staging(int(num_bytes) + 1, device)

    @property
    def num_bytes(self) -> int:
        """Bytes of the state on the device."""
        sampling = self.sampling
        tensors = [self.last_token, self.length, self.block_tables]
        tensors += [sampling.table, sampling.counts, sampling.masks, sampling.bias]
        return sum(tensor.nbytes for tensor in tensors)

    def apply(self, batch: Batch) -> None:
        """Send the changes in `batch`: parameters of new sequences, new block ids, new masks."""
        self.staging.next_step()
        if batch.admissions:
            self._admit(batch.admissions)
        if batch.new_blocks:
            slots, indices, blocks = np.array(batch.new_blocks, dtype=np.int64).T
            self.host_tables[slots, indices] = blocks
            flat = self.staging.to_device(slots * self.block_tables.shape[1] + indices)
            values = self.staging.to_device(blocks.astype(np.int32))
            self.block_tables.view(-1).index_copy_(0, flat, values)
        if batch.masks:
            slots = np.array([slot for slot, _ in batch.masks])
            masks = np.stack([mask for _, mask in batch.masks])
            self.sampling.masks.index_copy_(0, self.staging.to_device(slots), self.staging.to_device(masks))

    def _admit(self, admissions: list[Admission]) -> None:
        records = default_params(len(admissions))
        for record, admission in zip(records, admissions, strict=True):
            params = admission.params
            for name in ("temperature", "top_k", "top_p", "min_p"):
                record[name] = getattr(params, name)
            record["seed"] = admission.seed
            record["min_length"] = admission.min_length
            if params.min_tokens:
                record["stop_ids"][: len(admission.stop_ids)] = admission.stop_ids
            if admission.is_filtered:
                record["flags"] |= HAS_MASK
            if params.logprobs_mode == "processed_logprobs":
                record["flags"] |= PROCESSED_LOGPROBS
            if params.logit_bias:
                record["flags"] |= HAS_BIAS
                record["num_bias"] = len(params.logit_bias)
                self._send_bias(admission.slot, params.logit_bias)
            if params.penalizes:
                record["flags"] |= HAS_PENALTIES
                for name in ("repetition", "presence", "frequency"):
                    record[name] = getattr(params, f"{name}_penalty")
                self._send_counts(admission)
        slots = np.array([admission.slot for admission in admissions])
        self.host_tables[slots] = self.scratch_block
        self.admission_epoch += 1
        values = self.staging.to_device(records.view(np.int32).reshape(-1, PARAMS_STRIDE))
        self.sampling.table.index_copy_(0, self.staging.to_device(slots), values)

    def _send_bias(self, slot: int, logit_bias: Mapping[int, float]) -> None:
        # One int32 table holds both columns: the token id, and the bits of its float32 bias.
        entries = np.zeros((len(logit_bias), 2), dtype=np.int32)
        entries[:, 0] = list(logit_bias)
        entries[:, 1] = np.array(list(logit_bias.values()), dtype=np.float32).view(np.int32)
        self.sampling.bias[slot, : len(entries)] = self.staging.to_device(entries)

    def _send_counts(self, admission: Admission) -> None:
        """Count the tokens that the sequence has so far. The device counts those that follow."""
        self.sampling.counts[admission.slot].zero_()
        # A count is 2 for each output token, plus 1 if the prompt has the token.
        prompt_ids = np.unique(np.array(admission.prompt_ids, dtype=np.int64))
        self._add_counts(admission.slot, prompt_ids, np.ones_like(prompt_ids))
        output_ids, times = np.unique(np.array(admission.output_ids, dtype=np.int64), return_counts=True)
        self._add_counts(admission.slot, output_ids, 2 * np.minimum(times, MAX_COUNT))

    def _add_counts(self, slot: int, token_ids: np.ndarray, amounts: np.ndarray) -> None:
        to_device = self.staging.to_device
        self.sampling.counts[slot].index_add_(0, to_device(token_ids), to_device(amounts.astype(np.int16)))

    def pack(self, batch: Batch, num_rows: int, num_tokens: int) -> np.ndarray:
        """Return the StepRows of `batch` in one array, padded to the given sizes.

        Padding rows have the scratch slot. `cu_seqlens` gives them no tokens, so attention skips them. `token_rows`
        gives all padding tokens to the last row, so a batch with padding tokens needs a padding row.
        """
        packed = np.zeros(StepRows.size(num_rows, num_tokens), dtype=np.int32)
        rows = StepRows.split(packed, num_rows, num_tokens)
        num_decode = batch.num_decode
        used_rows = len(batch.rows)
        used_tokens = batch.num_tokens
        prefill_rows = batch.prefill_rows
        rows.slots[:used_rows] = batch.slots
        rows.slots[used_rows:] = self.scratch_slot
        rows.starts[:num_decode] = -1  # the device knows the length
        rows.starts[num_decode:used_rows] = [row.start for row in prefill_rows]
        lens = np.array([row.num_tokens for row in batch.rows], dtype=np.int64)
        rows.cu_seqlens[1 : used_rows + 1] = lens.cumsum()
        rows.cu_seqlens[used_rows + 1 :] = used_tokens
        rows.token_rows[:used_tokens] = np.repeat(np.arange(used_rows), lens)
        rows.token_rows[used_tokens:] = num_rows - 1
        rows.token_ids[:num_decode] = -1  # the device knows the last token
        start = num_decode
        for row in prefill_rows:
            end = start + row.num_tokens
            rows.token_ids[start:end] = row.token_ids
            start = end
        return packed
