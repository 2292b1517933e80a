"""Memory of all tensor-parallel ranks of one host that every rank can write."""

from contextlib import ExitStack
from typing import Any

import torch

from nanovllm.ops.comm.cuda_ipc import Mapping
from nanovllm.ops.comm.overlapped_all_reduce import OverlappedAllReduce, inbox_words
from nanovllm.ops.dispatch import MAX_GEMV_TOKENS
from nanovllm.ops.triton_utils import launch_options, sm_count, tl, triton

CAPACITY = 32 << 20  # bytes that a rank can send to another in one launch; larger all-reduces take several launches
MAX_ONE_SHOT_BYTES = 4 << 20  # bytes that a rank sends in total; with three ranks or more, NCCL's ring sends fewer
MAX_TOKEN_BYTES = 64 << 10  # bytes of a token in an all-reduce
UNIT = 512  # words that share a count of calls
ALL_TO_ALL_BLOCK = 2048  # words of a row that a program exchanges at once
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int32: tl.int32}
EMPTY_WORD = -0x7FFF8000  # two 16-bit values -0.0; as a float32, -4.6e-41


class PeerMemory:
    """Memory of all ranks that every rank can write, with this rank's counters and stop flags.

    Args:
        rank: this rank's index.
        memory: each rank's memory as this process sees it; this rank's own is a tensor from `new_peer_memory`.

    Attributes:
        overlapped: all-reduce of large tensors while they are computed, or None.
    """

    def __init__(self, rank: int, memory: list[torch.Tensor | Mapping]):
        own = memory[rank]
        if not isinstance(own, torch.Tensor):
            raise TypeError(f"memory[{rank}] must be the tensor of this rank, got {type(own).__name__}")
        self.rank, self.size, self.memory = rank, len(memory), memory
        self.device = own.device
        addresses = [part.data_ptr() for part in memory]
        self.num_words = CAPACITY // 4
        self.buffers = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self.calls = torch.zeros(self.num_words // UNIT, dtype=torch.int32, device=self.device)
        num_local_words = MAX_GEMV_TOKENS * MAX_TOKEN_BYTES // 4
        self.local_words = torch.full((num_local_words,), EMPTY_WORD, dtype=torch.int32, device=self.device)
        on_gpu = self.device.type == "cuda"
        # A waiting kernel polls host memory: other ways to reach the GPU may be blocked by work queued behind it.
        self.host_stop = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        self.device_stop = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.num_sms = sm_count(self.device)
        self.max_programs = 4 * self.num_sms  # all must run at once, because they wait for other ranks
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # for `stop`; other streams may be blocked
        self.overlapped: OverlappedAllReduce | None = None
        inbox_start = _buffer_words(self.size)
        if len(own) > inbox_start:
            other_inbox = addresses[1 - rank] + 4 * inbox_start
            self.overlapped = OverlappedAllReduce(own[inbox_start:], other_inbox, self.host_stop, self.device_stop)

    def launch_arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Return what every kernel here needs: tensors, then constants and launch options."""
        constants = {"RANK": self.rank, "SIZE": self.size, "NUM_WORDS": self.num_words, "UNIT": UNIT}
        return (self.buffers, self.calls, self.host_stop, self.device_stop), constants | launch_options(self.device)

    def fits_all_reduce(self, x: torch.Tensor) -> bool:
        """Return whether `all_reduce_triton` accepts `x` and is the fastest way to all-reduce it."""
        if x.dtype not in DTYPES or x.ndim != 2 or not x.is_contiguous():
            return False
        token_bytes = x.shape[1] * x.itemsize
        is_small = self.size == 2 or x.nbytes * (self.size - 1) <= MAX_ONE_SHOT_BYTES
        return is_small and token_bytes % 4 == 0 and 0 < token_bytes <= MAX_TOKEN_BYTES

    def fits_all_to_all(self, x: torch.Tensor) -> bool:
        """Return whether `all_to_all_triton` accepts `x`."""
        row_bytes = x.shape[1] * x.itemsize
        block_bytes = 4 * ALL_TO_ALL_BLOCK
        num_blocks = triton.cdiv(len(x), self.size) * triton.cdiv(row_bytes, block_bytes)
        return num_blocks * block_bytes <= CAPACITY and row_bytes % 4 == 0 and x.is_contiguous()

    def stop(self) -> None:
        """Stop this rank's waits for good, and all its later writes to other ranks. Safe in any thread."""
        # The flags may be inference tensors, which only this mode may change.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self.host_stop.fill_(1)
            self.device_stop.copy_(self.host_stop, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Unmap the other ranks' memory after this rank's running kernels, which must finish without the others."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        memory = self.memory
        self.memory = []
        self.overlapped = None
        with ExitStack() as stack:  # closes all even if one fails
            for part in memory:
                if isinstance(part, Mapping):
                    stack.callback(part.close)


def _buffer_words(num_ranks: int) -> int:
    """Return the size of a buffer: [3 regions, ranks - 1, words that each other rank sends]."""
    return 3 * (num_ranks - 1) * (CAPACITY // 4)


def new_peer_memory(num_ranks: int, device: torch.device, largest_all_reduce: int = 0) -> torch.Tensor:
    """Allocate a rank's own part of a PeerMemory: its buffer, and an inbox for overlapped all-reduces.

    Args:
        largest_all_reduce: bytes of the largest all-reduce there will be. Only two ranks have an inbox, and only if
            this is large enough.
    """
    num_buffer_words = _buffer_words(num_ranks)
    num_inbox_words = inbox_words(largest_all_reduce) if num_ranks == 2 else 0
    memory = torch.full((num_buffer_words + num_inbox_words,), EMPTY_WORD, dtype=torch.int32, device=device)
    memory[num_buffer_words:].zero_()
    return memory
