"""What the device knows of each running sequence, and how the host tells it what changed.

Each slot has its last token, its length, a row of the block table and its sampling parameters. A pure decode step needs
nothing else: the host sends the slots of the rows when they change, new block ids when a sequence crosses into a new
block, and nothing at all otherwise.
"""

import numpy as np
import torch

from nanovllm.engine.scheduler import Admission, Batch
from nanovllm.kernels.sampling import SamplingState
from nanovllm.sampling_params import MAX_STOP_IDS


class Staging:
    """A ring of pinned host buffers for copies to the device that do not wait.

    One buffer serves one step. It is used again `depth` steps later, when that step's tokens have been collected and
    its copies are therefore done.
    """

    def __init__(self, num_bytes: int, device: torch.device, depth: int = 2):
        pin = device.type == "cuda"
        self.buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin) for _ in range(depth)]
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
        max_num_seqs: S, the number of slots; row S is a scratch slot for the padding rows of captured graphs.
        max_blocks: W, block-table width.
        block_size: tokens in a block.
        scratch_block: a block no sequence owns, where padding rows write.
        max_tokens: most tokens of a step, which sizes the staging buffers.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        scratch_block: int,
        max_tokens: int,
        device: torch.device,
    ):
        rows = max_num_seqs + 1
        self.scratch_slot = max_num_seqs
        self.block_size = block_size
        self.device = device

        def full(shape, value, dtype):
            return torch.full(shape, value, dtype=dtype, device=device)

        self.last_token = full((rows,), 0, torch.int64)
        self.length = full((rows,), 0, torch.int32)
        self.block_tables = full((rows, max_blocks), scratch_block, torch.int32)
        self.sampling = SamplingState(
            temperature=full((rows,), 0.0, torch.float32),
            top_k=full((rows,), 0, torch.int32),
            top_p=full((rows,), 1.0, torch.float32),
            min_p=full((rows,), 0.0, torch.float32),
            seed=full((rows,), 0, torch.int64),
            min_length=full((rows,), 0, torch.int32),
            stop_ids=full((rows, MAX_STOP_IDS), -1, torch.int32),
        )
        # The host's copy of the block tables, from which prefill tokens' places in the cache are worked out.
        self.host_tables = np.full((rows, max_blocks), scratch_block, dtype=np.int32)
        self.staging = Staging(64 * max_tokens + 1024 * rows, device)

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

    def _admit(self, admissions: list[Admission]) -> None:
        params = [a.params for a in admissions]
        stop_ids = np.full((len(admissions), MAX_STOP_IDS), -1, dtype=np.int32)
        for row, a in zip(stop_ids, admissions, strict=True):
            if a.params.min_tokens:
                row[: len(a.end_ids)] = a.end_ids
        slots = self.staging.to_device(np.array([a.slot for a in admissions]))
        columns = {
            "temperature": np.array([p.temperature for p in params], dtype=np.float32),
            "top_k": np.array([p.top_k for p in params], dtype=np.int32),
            "top_p": np.array([p.top_p for p in params], dtype=np.float32),
            "min_p": np.array([p.min_p for p in params], dtype=np.float32),
            "seed": np.array([a.seed for a in admissions], dtype=np.int64),
            "min_length": np.array([a.min_length for a in admissions], dtype=np.int32),
            "stop_ids": stop_ids,
        }
        for name, values in columns.items():
            getattr(self.sampling, name).index_copy_(0, slots, self.staging.to_device(values))
