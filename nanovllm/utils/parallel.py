"""The tensor-parallel group that layers talk through.

A group is an object that is handed around, not a global: two engines in one process have two groups.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TensorParallel:
    """One rank's view of its tensor-parallel group.

    Args:
        rank, size: place of this rank and number of ranks.
        group: a `torch.distributed` process group (gloo or NCCL); None for a single rank, whose collectives do nothing.
    """

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None

    @classmethod
    def default(cls) -> "TensorParallel":
        """The process's default `torch.distributed` group if there is one, else a single rank."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        return cls()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place."""
        if self.size > 1:
            self.group.allreduce([x]).wait()
        return x

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        if self.size == 1:
            return value
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        tensor = torch.tensor([value], dtype=torch.int64, device=device)
        self.group.allreduce([tensor], options).wait()
        return int(tensor.item())

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Concatenate the ranks' equally shaped `x` along the last dimension on rank 0; None on the others."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = [[torch.empty_like(x) for _ in range(self.size)]] if self.rank == 0 else []
        self.group.gather(parts, [x]).wait()
        return torch.cat(parts[0], dim=-1) if self.rank == 0 else None

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite `x` with rank 0's, in place."""
        if self.size > 1:
            self.group.broadcast([x]).wait()
        return x
