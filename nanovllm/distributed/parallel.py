"""The tensor-parallel group through which layers communicate.

A group is an object that is passed around, not a global: two engines in one process have two groups.
"""

import json
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.distributed.socket_group import SocketGroup
from nanovllm.ops.comm import cuda_ipc
from nanovllm.ops.comm.collectives import all_reduce_triton, all_to_all_triton, rows_of_rank
from nanovllm.ops.comm.overlapped_all_reduce import OverlappedAllReduce
from nanovllm.ops.comm.peer_memory import PeerMemory, new_peer_memory
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.ops.triton_utils import HAVE_TRITON

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorParallel:
    """One rank's view of its tensor-parallel group.

    Args:
        rank, size: index of this rank and number of ranks.
        group: a `torch.distributed` process group (gloo or NCCL), or a `SocketGroup`; None for a single rank, for which
            `all_reduce` only adds and norms.
        peers: GPU memory that all ranks can write; used for the collectives that fit, if the ranks can reach it.
        capture_lock: held while CUDA graphs are captured. `abort` waits for it, because only the capturing thread can
            end a capture.
    """

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None
    peers: PeerMemory | None = None
    capture_lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def default(cls) -> "TensorParallel":
        """Return the process's default `torch.distributed` group if there is one, else a single rank.

        The group is referred to weakly, so that `destroy_process_group` ends its threads although layers still exist. A
        thread that drops the tensors of a collective while Python exits would abort the process.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), weakref.proxy(dist.group.WORLD))
        return cls()

    def with_peers(self, device: torch.device, largest_all_reduce: int = 0) -> "TensorParallel":
        """Return this group with `peers`, if all ranks are GPUs of one host that can write each other's memory.

        Args:
            largest_all_reduce: bytes of the largest all-reduce there will be.
        """
        if device.type != "cuda" or not HAVE_TRITON or self.size == 1:
            return self
        self.all_reduce_min(1, device)  # a lost rank stops the others here, before they allocate memory
        own_memory = new_peer_memory(self.size, device, largest_all_reduce)
        host = Path("/proc/sys/kernel/random/boot_id").read_text()
        failure: object = "they are on several hosts, or one cannot share its memory"
        try:
            own_handle = cuda_ipc.share(own_memory)
        except RuntimeError as error:  # not every allocator supports sharing
            own_handle = None
            failure = error
        shared = self.all_gather_json([host, own_handle], device)
        memory: list[torch.Tensor | cuda_ipc.Mapping] = []
        with ExitStack() as cleanup:  # unmaps the memory unless all ranks succeed
            if all(other_host == host and handle for other_host, handle in shared):
                try:
                    for rank, (_, handle) in enumerate(shared):
                        if rank == self.rank:
                            memory.append(own_memory)
                        else:
                            mapping = cuda_ipc.Mapping(handle)
                            memory.append(mapping)
                            cleanup.callback(mapping.close)
                except RuntimeError as error:
                    failure = error
            if self.all_reduce_min(len(memory), device) == self.size:
                peers = PeerMemory(self.rank, memory)
                cleanup.pop_all()
                return replace(self, peers=peers)
        logger.info("rank %d: all-reduces use NCCL, as ranks cannot write each other's memory: %s", self.rank, failure)
        return self

    @property
    def overlapped(self) -> OverlappedAllReduce | None:
        """The all-reduce that overlaps with computation, if available. `all_reduce` finishes what it has sent."""
        return None if self.peers is None else self.peers.overlapped

    def all_reduce(
        self,
        x: torch.Tensor,
        norm: tuple[torch.Tensor, float] | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All-reduce `x` in place. Return it, or its RMSNorm as a new tensor.

        Args:
            x: [T, N], contiguous.
            norm: weight and epsilon of the RMSNorm.
            residual: [T, N], contiguous, the same on all ranks; added once. None if `overlapped` has sent `x`.
        """
        if self.overlapped is not None:
            pending, self.overlapped.pending = self.overlapped.pending, None
            if pending is x:
                return self.overlapped.finish(x, norm)
        if self.peers is not None and self.peers.fits_all_reduce(x):
            return all_reduce_triton(x, self.peers, norm, residual)
        if self.size > 1:
            self._process_group.allreduce([x]).wait()
        if norm is not None:
            return rms_norm(x, *norm, residual)
        return x if residual is None else x.add_(residual)

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        """Return the smallest of the ranks' values."""
        if self.size == 1:
            return value
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        tensor = torch.tensor([value], dtype=torch.int64, device=device)
        self._process_group.allreduce([tensor], options).wait()
        return int(tensor.item())

    def all_gather_json(self, value: list, device: torch.device) -> list[list]:
        """Return every rank's `value`, which must fit in 1024 bytes as JSON."""
        padded = json.dumps(value).encode().ljust(1024)  # with spaces, which JSON ignores
        own = torch.tensor(list(padded), dtype=torch.uint8, device=device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._process_group.allgather([parts], [own]).wait()
        return [json.loads(bytes(part.tolist())) for part in parts]

    def rows(self, count: int, rank: int | None = None) -> slice:
        """Return the slice of `count` rows that belongs to this rank, or to `rank`; see `rows_of_rank`."""
        return rows_of_rank(self.rank if rank is None else rank, count, self.size)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange x [B, N], this rank's columns of all rows, for [M, size * N], all columns of its `rows(B)`."""
        if self.size == 1:
            return x
        if self.peers is not None and self.peers.fits_all_to_all(x):
            return all_to_all_triton(x, self.peers)
        slices = [self.rows(len(x), rank) for rank in range(self.size)]
        counts = [rows.stop - rows.start for rows in slices]
        num_rows = counts[self.rank]
        num_columns = x.shape[1]
        received = x.new_empty((self.size, num_rows, num_columns))  # from each rank its columns of this rank's rows
        out = received.flatten(0, 1)
        self._process_group.alltoall_base(out, x.contiguous(), [num_rows] * self.size, counts).wait()
        return received.transpose(0, 1).reshape(num_rows, self.size * num_columns)

    def all_gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Give every rank all rows of x [B, ...], in place.

        Each rank has computed some of the rows. The others must be zeros on it, because rows are summed as int32 words.

        Args:
            x: contiguous, with at least one row. A row has whole 4-byte words.
        """
        if self.size > 1:
            self.all_reduce(x.view(len(x), -1).view(torch.int32))
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite the contiguous `x` with rank 0's, in place."""
        if self.size > 1:
            self._process_group.broadcast([x.view(-1).view(torch.uint8)]).wait()  # groups do not know every dtype
        return x

    def stop(self) -> None:
        """Stop all traffic through other ranks' memory for good, before such a rank is stopped. Safe in any thread."""
        if self.peers is not None:
            self.peers.stop()

    def abort(self, free_graphs: Callable[[], None]) -> None:
        """Abort all collectives of this rank for good, running ones included: the other ranks may be gone.

        Do not call this for a group that others use as well.

        Args:
            free_graphs: frees the captured graphs, which NCCL's abort waits for if they contain its kernels. Freeing
                waits for running kernels. So the kernels that wait for peers, and NCCL's, are stopped first.
        """
        self.stop()
        aborting = threading.Thread(target=self._abort, daemon=True)
        aborting.start()
        aborting.join(0.2)
        free_graphs()
        aborting.join()

    def close(self) -> None:
        """Unmap other ranks' memory, after the last step of all ranks or `abort`."""
        if self.peers is not None:
            self.peers.close()

    @property
    def _process_group(self) -> "dist.ProcessGroup":
        if self.group is None:
            raise ValueError(f"group must be a torch.distributed process group for size={self.size}, got None")
        return self.group

    def _abort(self) -> None:
        group: Any = self.group
        if isinstance(group, SocketGroup):
            group.abort()
        elif isinstance(group, getattr(dist, "ProcessGroupNCCL", ())):
            with self.capture_lock:  # during a capture, the capturing thread's next collective would wait for the abort
                group.abort()
