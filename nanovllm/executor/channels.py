"""The connections from rank 0 to the other ranks of its host, and how messages and weights travel over them.

Child processes inherit the connections. Ranks on the CPU listen on no port, and NCCL listens on loopback only. The
ranks meet in a file in memory that has no name. Nothing is unpickled that comes from outside the process tree.
"""

import contextlib
import os
import socket
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe

import torch

from nanovllm.checkpoints.given_weights import checked_weights
from nanovllm.distributed.parallel import TensorParallel


class RankChannels:
    """Hold rank 0's ends of the connections to the other ranks.

    Attributes:
        connections: a connection to each rank, for `send`.
        sockets: a socket to each rank, for collectives on the CPU; see `SocketGroup`.
        store_file: the file in memory where the ranks meet.
        error: why the ranks can no longer work together. None if they can.
    """

    def __init__(self):
        self.connections: list[Connection] = []
        self.sockets: list[socket.socket] = []
        try:
            # `close` closes it.
            self.store_file = open(os.memfd_create("nanovllm-store"), "wb")  # noqa: SIM115
        except OSError as error:
            raise RuntimeError(f"the file where tensor-parallel ranks meet cannot be made: {error}") from error
        self.error: str | None = None

    @contextlib.contextmanager
    def connect(self) -> Iterator[tuple[int, ...]]:
        """Connect the next rank. Yield the descriptors that its process inherits; this process closes them after."""
        # A duplex pipe is a pair of sockets, which buffer larger messages than a pipe.
        connection, rank_connection = Pipe()
        self.connections.append(connection)
        with rank_connection:
            sock, rank_sock = socket.socketpair()
            self.sockets.append(sock)
            with rank_sock:
                for end in (sock, rank_sock):
                    end.setblocking(True)  # whatever socket.setdefaulttimeout() says
                yield rank_connection.fileno(), rank_sock.fileno(), self.store_file.fileno()

    def send(self, *message: object) -> None:
        """Send a message to every other rank."""
        for connection in self.connections:
            connection.send(message)

    def share_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], tp: TensorParallel, device: torch.device
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yield `weights` on `device`, and send them to the other ranks, which call `receive_weights`.

        When this generator ends, whether with an error or without, the other ranks' generators end too.
        """
        complete = False
        try:
            for name, tensor in checked_weights(weights):
                tensor = tensor.detach().to(device).contiguous()
                self._broadcast(name, tensor, tp)
                yield name, tensor
            complete = True
        finally:
            self.send(complete)

    def _broadcast(self, name: str, tensor: torch.Tensor, tp: TensorParallel) -> None:
        try:
            self.send(name, tensor.shape, tensor.dtype)
            tp.broadcast(tensor)
        except BaseException as error:
            # Even after an interrupt, such as a second Ctrl-C: the ranks now wait for different things.
            self.error = f"sending weights to the other ranks failed: {error!r:.500}"
            raise

    def close_ranks(self) -> None:
        """Ask the other ranks to close. Nothing can be sent to them afterwards."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(("close",))
            connection.close()

    def close(self) -> None:
        """Close this process's ends. May be called again."""
        for connection in self.connections:
            connection.close()
        for sock in self.sockets:
            sock.close()
        self.store_file.close()


def receive_weights(
    connection: Connection, tp: TensorParallel, device: torch.device
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Yield the weights that rank 0's `share_weights` sends.

    Raises:
        ValueError: rank 0 has stopped before the last weight.
    """
    while len(message := connection.recv()) > 1:
        name, shape, dtype = message
        yield name, tp.broadcast(torch.empty(shape, dtype=dtype, device=device))
    if message != (True,):
        raise ValueError("rank 0 has stopped sending weights")
