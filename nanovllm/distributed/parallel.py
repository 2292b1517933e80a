"""The tensor-parallel group that layers talk through.

A group is an object that is handed around, not a global: two engines in one process have two groups.
"""

import json
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from nanovllm.ops.comm import cuda_ipc
from nanovllm.ops.comm.collectives import (
    PeerMemory,
    all_reduce_triton,
    all_to_all_triton,
    new_peer_memory,
    rows_of_rank,
)
from nanovllm.ops.comm.overlapped_all_reduce import OverlappedAllReduce
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.ops.triton_utils import HAVE_TRITON

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorParallel:
    """One rank's view of its tensor-parallel group.

    Args:
        rank, size: place of this rank and number of ranks.
        group: a `torch.distributed` process group (gloo or NCCL); None for a single rank, whose collectives do nothing.
        peers: GPU memory through which ranks that can reach each other's sum and exchange what it has room for.
        capturing: held while graphs are captured, for as long as nobody else can free them.
    """

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None
    peers: PeerMemory | None = None
    capturing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def default(cls) -> "TensorParallel":
        """The process's default `torch.distributed` group if there is one, else a single rank."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        return cls()

    def with_peers(self, device: torch.device, largest_sum: int = 0) -> "TensorParallel":
        """This group with `peers`, if all ranks are GPUs of one host that can write each other's memory.

        Args:
            largest_sum: bytes of the largest sum there will be.
        """
        if device.type != "cuda" or not HAVE_TRITON or self.size == 1:
            return self
        self.all_reduce_min(1, device)  # a rank that is lost by now keeps the others here, and with no memory yet
        own = new_peer_memory(self.size, device, largest_sum)
        host = Path("/proc/sys/kernel/random/boot_id").read_text()
        memory, failure = [], "they are on several hosts, or one cannot share its memory"
        try:
            handle = cuda_ipc.share(own)
        except RuntimeError as error:  # other allocators than torch's usual one may not know how
            handle, failure = None, error
        shared = self.all_gather_json([host, handle], device)
        with ExitStack() as useless:
            if all(other == host and handle for other, handle in shared):
                try:
                    for rank, (_, handle) in enumerate(shared):
                        memory.append(own if rank == self.rank else cuda_ipc.Mapping(handle))
                        if rank != self.rank:
                            useless.callback(memory[rank].close)
                except RuntimeError as error:
                    failure = error
            if self.all_reduce_min(len(memory), device) == self.size:
                peers = PeerMemory(self.rank, memory)
                useless.pop_all()
                return replace(self, peers=peers)
        logger.info("rank %d: NCCL makes all sums, as ranks cannot write each other's memory: %s", self.rank, failure)
        return self

    @property
    def overlapped(self) -> OverlappedAllReduce | None:
        """For large sums, which are sent while they are computed, where ranks can: `all_reduce` ends what it began."""
        return None if self.peers is None else self.peers.overlapped

    def all_reduce(
        self,
        x: torch.Tensor,
        norm: tuple[torch.Tensor, float] | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum `x` over the ranks, in place, and return it; or its RMSNorm.

        Args:
            norm: weight and epsilon of the RMSNorm.
            residual: contiguous, the same on all ranks; it is added once. None if `x` is on its way ahead.
        """
        if self.overlapped is not None:
            sent, self.overlapped.pending = self.overlapped.pending, None
            if sent is x:
                return self.overlapped.finish(x, norm)
        if self.peers is not None and self.peers.fits_all_reduce(x):
            return all_reduce_triton(x, self.peers, norm, residual)
        if self.size > 1:
            self.group.allreduce([x]).wait()
        if norm is not None:
            return rms_norm(x, *norm, residual)
        return x if residual is None else x.add_(residual)

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        if self.size == 1:
            return value
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        tensor = torch.tensor([value], dtype=torch.int64, device=device)
        self.group.allreduce([tensor], options).wait()
        return int(tensor.item())

    def all_gather_json(self, value: list, device: torch.device) -> list[list]:
        """Every rank's `value`, which JSON can express in 1024 bytes."""
        own = torch.tensor(list(json.dumps(value).encode().ljust(1024)), dtype=torch.uint8, device=device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self.group.allgather([parts], [own]).wait()
        return [json.loads(bytes(part.tolist())) for part in parts]

    def rows(self, count: int, rank: int | None = None) -> slice:
        """This rank's share of `count` rows, or another one's; the last ranks' may be smaller, or empty."""
        return rows_of_rank(self.rank if rank is None else rank, count, self.size)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' columns of all rows, x [R, N] -> all columns of its own `rows`, [S, size N]."""
        if self.size == 1:
            return x
        if self.peers is not None and self.peers.fits_all_to_all(x):
            return all_to_all_triton(x, self.peers)
        shares = [self.rows(len(x), rank) for rank in range(self.size)]
        counts = [share.stop - share.start for share in shares]
        own = counts[self.rank]
        out = x.new_empty((self.size * own, x.shape[1]))
        self.group.alltoall_base(out, x.contiguous(), [own] * self.size, counts).wait()
        return out.view(self.size, own, x.shape[1]).transpose(0, 1).reshape(own, self.size * x.shape[1])

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Give every rank all rows of x [R, ...], of which each has other ones, and zeros in the others' places."""
        if self.size > 1:
            self.all_reduce(x.view(len(x), -1).view(torch.int32))
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite `x` with rank 0's, in place."""
        if self.size > 1:
            self.group.broadcast([x]).wait()
        return x

    def stop(self) -> None:
        """End what goes through other ranks' memory, for good, before such a rank is ended. Safe in any thread."""
        if self.peers is not None:
            self.peers.stop()

    def abort(self, free_graphs: Callable[[], None]) -> None:
        """End all collectives of this rank, those that run included, for good: no rank need be there any more.

        Not for a group that is others' too.

        Args:
            free_graphs: frees the captured graphs, for which NCCL waits if they hold its kernels; and which waits for
                kernels that run, as CUDA then does with all else. So each kind of kernel is told to end before that.
        """
        self.stop()
        aborting = threading.Thread(target=self._abort, daemon=True)
        aborting.start()
        aborting.join(0.2)
        free_graphs()
        aborting.join()

    def close(self) -> None:
        """Give back what is mapped of other ranks, after the last step of all or `abort`."""
        if self.peers is not None:
            self.peers.close()

    def _abort(self) -> None:
        if isinstance(self.group, getattr(dist, "ProcessGroupNCCL", ())):
            with self.capturing:  # the next collective of one who captures would wait for this
                self.group.abort()
