"""Collectives of the CPU ranks of one host, over a pair of sockets between rank 0 and each other rank.

Every collective goes through rank 0, so an all-reduce gives all ranks the same bits. The ranks inherit the sockets, and
no port listens. gloo would listen on a TCP port: any local user could abort its process by opening more connections to
that port than the process may have descriptors.
"""

import socket
from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.distributed as dist


class CompletedWork:
    """The handle of a collective that has finished."""

    def wait(self) -> None:
        pass


class SocketGroup:
    """Run the collectives that the engine uses. They are named as in a `torch.distributed` process group.

    Tensors are contiguous and on the CPU.

    Args:
        rank: index of this rank.
        sockets: on rank 0 the sockets to ranks 1, 2, ...; on another rank its socket to rank 0.
    """

    def __init__(self, rank: int, sockets: Sequence[socket.socket]):
        self.rank = rank
        self.sockets = sockets

    def abort(self) -> None:
        """End all collectives for good, running ones included: they raise ConnectionError. Safe in any thread.

        The end of a killed rank does not always end them. A process that the caller forked while the rank started may
        have a copy of its socket.
        """
        for sock in self.sockets:
            with suppress(OSError):  # it is closed
                sock.shutdown(socket.SHUT_RDWR)

    def allreduce(self, tensors: list[torch.Tensor], options: "dist.AllreduceOptions | None" = None) -> CompletedWork:
        (x,) = tensors
        combine = torch.minimum if options and options.reduceOp == dist.ReduceOp.MIN else torch.add
        for other in self._gather(x):
            combine(x, other, out=x)
        return self.broadcast(tensors)

    def broadcast(self, tensors: list[torch.Tensor]) -> CompletedWork:
        (x,) = tensors
        for sock in self.sockets:
            if self.rank == 0:
                sock.sendall(_bytes(x))
            else:
                _receive(sock, x)
        return CompletedWork()

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> CompletedWork:
        (parts,) = outputs
        (x,) = inputs
        # Rank 0 fills all parts here. Another rank gathers nothing: the broadcasts below fill its parts.
        for part, gathered in zip(parts, [x, *self._gather(x)], strict=False):
            part.copy_(gathered)
        for part in parts:
            self.broadcast([part])
        return CompletedWork()

    def alltoall_base(
        self, output: torch.Tensor, x: torch.Tensor, output_sizes: list[int], input_sizes: list[int]
    ) -> CompletedWork:
        """Give each rank its slice of every rank's `x`, concatenated. The slices have `input_sizes` rows."""
        if self.rank > 0:
            self._gather(x)
            _receive(self.sockets[0], output)
            return CompletedWork()
        slices_by_sender = [tensor.split(input_sizes) for tensor in [x, *self._gather(x)]]
        for rank in range(len(slices_by_sender)):
            rows = torch.cat([slices[rank] for slices in slices_by_sender])
            if rank == 0:
                output.copy_(rows)
            else:
                self.sockets[rank - 1].sendall(_bytes(rows))
        return CompletedWork()

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Send `x` to rank 0. Return the tensors of ranks 1, 2, ... on rank 0, and nothing on the others."""
        if self.rank > 0:
            self.sockets[0].sendall(_bytes(x))
            return []
        return [_receive(sock, torch.empty_like(x)) for sock in self.sockets]


def _bytes(x: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return x.view(-1).view(torch.uint8).numpy().data


def _receive(sock: socket.socket, x: torch.Tensor) -> torch.Tensor:
    """Fill `x` with the bytes that the other end sends, and return it."""
    memory = _bytes(x)
    while memory:
        count = sock.recv_into(memory)
        if count == 0:
            raise ConnectionError("another rank has closed its end of the connection")
        memory = memory[count:]
    return x
