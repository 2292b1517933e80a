"""The program of a tensor-parallel rank other than 0: build a runner, then run what rank 0 sends."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from nanovllm.checkpoints.hub import open_model
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.executor.spawned import largest_sum, make_group, rank_device
from nanovllm.runner.model_runner import ModelRunner


def _end_with(parent: int) -> None:
    """End this process when rank 0's is gone, however it went and whatever this one waits for.

    Linux does so too when the thread that started this process ends (see the launcher). But rank 0 may have died before
    this was asked for, or have started a wrapper of Python instead.
    """
    starter = os.getppid()

    def watch():
        while os.getppid() == starter and os.path.exists(f"/proc/{parent}"):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(runner: ModelRunner, channel: Connection) -> None:
    """Do what rank 0 says until it says "close"."""
    while True:
        what, *arguments = channel.recv()
        if what == "close":
            return
        if what == "update_weights":
            # Rank 0 finds the same fault in the weights, and reports it to the caller.
            weights = received_weights(runner, channel)
            with contextlib.suppress(TypeError, ValueError):
                runner.update_weights(weights)
            with contextlib.suppress(ValueError):
                for _ in weights:
                    pass
            continue
        getattr(runner, what)(*arguments)
        while len(runner.in_flight) > (what == "launch"):  # staging buffers are used again two steps later
            runner.collect()


def received_weights(runner: ModelRunner, channel: Connection) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that rank 0 broadcasts; ValueError if it gives up, as it does not wait for other ranks then."""
    while len(message := channel.recv()) > 1:
        name, shape, dtype = message
        yield name, runner.tp.broadcast(torch.empty(shape, dtype=dtype, device=runner.device))
    if message != (True,):
        raise ValueError("rank 0 has given up")


def main(channel_fd: int, pipe_fd: int, store_fd: int, parent: int) -> None:
    """Be a rank.

    Args:
        channel_fd: the connection to rank 0 for messages.
        pipe_fd: the socket to rank 0 for collectives on the CPU.
        store_fd: the file where the ranks meet.
        parent: rank 0's process.
    """
    _end_with(parent)
    if sys.stderr is not None:
        faulthandler.enable()  # rank 0 can report the signal that ended this one, but not where
    channel = Connection(channel_fd)
    try:
        config, rank = channel.recv()
        size = config.tensor_parallel_size
        device = rank_device(config.device_type, rank)
        store = dist.FileStore(f"/proc/self/fd/{store_fd}", size)
        store.set(f"rank {rank}", "present")
        group = make_group(rank, size, store, config.device_type, [socket.socket(fileno=pipe_fd)])
        source = open_model(config.model, config.load_format)
        tp = TensorParallel(rank, size, group).with_peers(device, largest_sum(config, source))
        runner = ModelRunner(config, source, tp, device)
        serve(runner, channel)
        tp.abort(runner.free_graphs)
    except BaseException:
        try:
            channel.send(traceback.format_exc())
        except OSError:  # rank 0 is gone
            os._exit(1)
        time.sleep(5)  # rank 0 reads this and ends us; leaving at once would show it a broken collective first
        sys.exit(1)
