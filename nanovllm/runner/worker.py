"""The program of a tensor-parallel rank other than 0: build a runner, then run what rank 0 sends."""

import contextlib
import faulthandler
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.runner.launcher import largest_sum, make_group, rank_device
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.utils.hub import open_model


def _leave(folder: str) -> None:
    """End at once, and leave nothing: there is nobody to tell."""
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _end_with(parent: int, folder: str) -> None:
    """Leave when rank 0's process is gone, however it went and whatever this one waits for; its `folder` goes too."""
    starter = os.getppid()  # another than `parent` if that is gone already, or started a wrapper of Python's

    def watch():
        while os.getppid() == starter and os.path.exists(f"/proc/{parent}"):
            time.sleep(0.5)
        _leave(folder)

    threading.Thread(target=watch, daemon=True).start()


def serve(runner: ModelRunner, channel: Connection) -> None:
    """Do what rank 0 says until it says "close"."""
    while True:
        what, *arguments = channel.recv()
        if what == "close":
            return
        if what == "update_weights":
            # What is wrong with the weights is wrong on rank 0 too, which tells the caller.
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


def main(fd: int, parent: int, folder: str) -> None:
    """Be a rank.

    Args:
        fd: of the connection to rank 0.
        parent: rank 0's process.
        folder: where the ranks meet.
    """
    if sys.stderr is not None:
        faulthandler.enable()  # rank 0 can tell the signal that ended this one, not where
    channel = Connection(fd)
    try:
        # By its path a store waits minutes for a file that is gone, as when rank 0 is, and lets no thread end us.
        store_file = os.open(os.path.join(folder, "store"), os.O_RDWR | os.O_CREAT, 0o600)
        _end_with(parent, folder)  # not before: nothing is made in a folder that it removes
        config, rank = channel.recv()
        size = config.tensor_parallel_size
        device = rank_device(config.device_type, rank)
        store = dist.FileStore(f"/proc/self/fd/{store_file}", size)
        store.set(f"rank {rank}", "present")
        group = make_group(rank, size, store, config.device_type)
        source = open_model(config.model, config.load_format)
        tp = TensorParallel(rank, size, group).with_peers(device, largest_sum(config, source))
        runner = ModelRunner(config, source, tp, device)
        serve(runner, channel)
        tp.abort(runner.free_graphs)
    except BaseException:
        try:
            channel.send(traceback.format_exc())
        except OSError:  # rank 0 is gone
            _leave(folder)
        time.sleep(5)  # rank 0 reads this and ends us; leaving at once would show it a broken collective first
        sys.exit(1)
