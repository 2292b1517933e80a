"""Collectives of the CPU ranks of one host, through a socket pair between rank 0 and each other rank.

Every collective goes through rank 0, so sums have the same bits on all ranks. The socket pairs are inherited: no port
listens. gloo listens on a TCP port, and any local user can abort its process by opening more connections to that port
than it may have descriptors.
"""

import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist


class Done:
    """The handle of a collective that has finished."""

    def wait(self) -> None:
        pass


class PipeGroup:
    """The collectives of a `torch.distributed` process group that the engine uses, under the same names.

    Tensors are contiguous and on the CPU.

    Args:
        rank: this rank.
        pipes: on rank 0 the sockets to ranks 1, 2, ...; on another rank the one to rank 0.
    """

    def __init__(self, rank: int, pipes: Sequence[socket.socket]):
        self.rank = rank
        self.pipes = pipes

    def allreduce(self, tensors: list[torch.Tensor], options: "dist.AllreduceOptions | None" = None) -> Done:
        (x,) = tensors
        combine = torch.minimum if options and options.reduceOp == dist.ReduceOp.MIN else torch.add
        for other in self._gather(x):
            combine(x, other, out=x)
        return self.broadcast(tensors)

    def broadcast(self, tensors: list[torch.Tensor]) -> Done:
        (x,) = tensors
        for pipe in self.pipes:
            if self.rank == 0:
                pipe.sendall(_bytes(x))
            else:
                _receive(pipe, x)
        return Done()

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Done:
        (parts,), (x,) = outputs, inputs
        for part, gathered in zip(parts, [x, *self._gather(x)], strict=False):
            part.copy_(gathered)
        for part in parts:
            self.broadcast([part])
        return Done()

    def alltoall_base(
        self, output: torch.Tensor, x: torch.Tensor, output_sizes: list[int], input_sizes: list[int]
    ) -> Done:
        """Give each rank its rows, `input_sizes` of them, of every rank's `x`."""
        if self.rank > 0:
            self._gather(x)
            _receive(self.pipes[0], output)
            return Done()
        columns = zip(*(part.split(input_sizes) for part in [x, *self._gather(x)]), strict=True)
        own, *others = (torch.cat(parts) for parts in columns)
        output.copy_(own)
        for pipe, rows in zip(self.pipes, others, strict=True):
            pipe.sendall(_bytes(rows))
        return Done()

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Send `x` to rank 0, which returns those of ranks 1, 2, ...; the others return nothing."""
        if self.rank > 0:
            self.pipes[0].sendall(_bytes(x))
            return []
        return [_receive(pipe, torch.empty_like(x)) for pipe in self.pipes]


def _bytes(x: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return x.view(-1).view(torch.uint8).numpy().data


def _receive(pipe: socket.socket, x: torch.Tensor) -> torch.Tensor:
    """Fill `x` with what the other end sends."""
    memory = _bytes(x)
    while memory:
        count = pipe.recv_into(memory)
        if count == 0:
            raise ConnectionError("another rank has closed its end of the pipe")
        memory = memory[count:]
    return x
