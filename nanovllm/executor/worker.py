"""Run a rank other than 0: build its model runner, then do what rank 0 sends."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from nanovllm.checkpoints.model_source import open_model_of
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.executor.channels import receive_weights
from nanovllm.executor.ranks import largest_all_reduce, make_group, open_store, rank_device
from nanovllm.runner.model_runner import ModelRunner


def main(rank: int, parent: int, report: int, connection: int, sock: int, store: int) -> None:
    """Run a rank until rank 0 closes it. On an error, report the traceback to rank 0 and exit with status 1.

    Args:
        rank: index of this rank.
        parent: process id of rank 0.
        report: descriptor of the connection for the traceback.
        connection: descriptor of the connection for messages from rank 0.
        sock: descriptor of the socket for collectives on the CPU.
        store: descriptor of the file where the ranks meet.
    """
    if sys.stderr is not None:
        # Rank 0 can say which signal ended this process, but not where.
        faulthandler.enable()
    messages = Connection(connection, writable=False)
    try:
        _end_with(parent)
        collectives = socket.socket(fileno=sock)
        _run_rank(rank, messages, collectives, store)
        collectives.close()
    except BaseException:
        try:
            Connection(report, readable=False).send(traceback.format_exc())
        except OSError:
            # Rank 0 is gone.
            os._exit(1)
        # Rank 0 reads the report and kills this process. Exiting now would show it a broken collective first.
        _wait_for_close(messages, 5)
        sys.exit(1)


def _run_rank(rank: int, connection: Connection, sock: socket.socket, store_descriptor: int) -> None:
    (config,) = connection.recv()
    size = config.tensor_parallel_size
    device = rank_device(config.device_type, rank)
    store = open_store(store_descriptor, size)
    store.set(f"rank {rank}", "present")
    group = make_group(rank, size, store, config.device_type, [sock])
    source = open_model_of(config)
    tp = TensorParallel(rank, size, group).with_peers(device, largest_all_reduce(config, source))
    runner = ModelRunner(config, source, tp, device)
    serve(runner, connection)
    tp.abort(runner.free_graphs)


def serve(runner: ModelRunner, connection: Connection) -> None:
    """Call the runner's methods that rank 0 names, until rank 0 sends "close"."""
    while True:
        method, *arguments = connection.recv()
        if method == "close":
            return
        if method == "load_weights":
            _load_weights(runner, connection)
        elif method == "finish_weight_update":
            # Rank 0 finds the same faults and raises them to the caller.
            with contextlib.suppress(ValueError):
                runner.finish_weight_update()
        else:
            getattr(runner, method)(*arguments)
        # Results are of no use here, but must be collected: a staging buffer is used again two steps later.
        keep = 1 if method == "launch" else 0
        while len(runner.in_flight) > keep:
            runner.collect()


def _wait_for_close(connection: Connection, seconds: float) -> None:
    """Wait until rank 0 closes the ranks, but at most this many seconds. Ignore its other messages."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(EOFError, OSError):
        while connection.poll(max(0, deadline - time.monotonic())):
            method, *_ = connection.recv()
            if method == "close":
                return


def _load_weights(runner: ModelRunner, connection: Connection) -> None:
    """Load the weights that rank 0 shares. Rank 0 finds the same faults in them and raises them to the caller."""
    weights = receive_weights(connection, runner.tp, runner.device)
    with contextlib.suppress(TypeError, ValueError):
        runner.load_weights(weights)
    # Receive the rest of what rank 0 sends.
    with contextlib.suppress(ValueError):
        for _ in weights:
            pass


def _end_with(parent: int) -> None:
    """End this process when rank 0's process is gone, whatever either of them was doing.

    Linux also kills this process when the thread that started it ends; see `nanovllm.executor.processes`. But rank 0
    may have died before this process asked for that, or may have started a wrapper of Python.
    """
    starter = os.getppid()

    def watch() -> None:
        while os.getppid() == starter and os.path.exists(f"/proc/{parent}"):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
