"""Set up one rank, in rank 0's process and in the others: its device, its process group and the sizes it needs."""

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from nanovllm.checkpoints.model_source import ModelSource
from nanovllm.config import Config
from nanovllm.distributed.socket_group import SocketGroup
from nanovllm.ops.triton_utils import preload_triton

if TYPE_CHECKING:
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

_environment_lock = threading.Lock()


def rank_device(device_type: str, local_rank: int | None = None) -> torch.device:
    """Return the device of a rank. On CUDA it becomes the calling thread's current GPU.

    Args:
        local_rank: index of the rank on this host. None for a single rank, which takes the current GPU.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    preload_triton()
    if local_rank is None:
        return torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"tensor_parallel_size needs GPU {local_rank}, but torch sees {count} GPUs here")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def open_store(descriptor: int, size: int) -> "FileStore":
    """Open the store through which `size` ranks meet. All of them inherit `descriptor`, a file in memory.

    A store opens its file again, by the path of a descriptor, for each operation and when it ends. Were the descriptor
    closed before, its number could belong to another file, such as one of the caller's. So the store has a descriptor
    of its own, which is closed after the store has ended.
    """
    duplicate = os.dup(descriptor)
    store = dist.FileStore(f"/proc/self/fd/{duplicate}", size)  # pyright: ignore[reportPrivateImportUsage]
    weakref.finalize(store, os.close, duplicate).atexit = False
    return store


def make_group(
    rank: int, size: int, store: "FileStore", device_type: str, sockets: Sequence[socket.socket] = ()
) -> "dist.ProcessGroup":
    """Make this engine's own process group. torch's global default group is not used.

    Args:
        store: where NCCL's ranks meet.
        sockets: the sockets between the CPU's ranks; see `SocketGroup`.
    """
    if device_type == "cpu":
        group = SocketGroup(rank, sockets)
    else:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        # The executor notices a dead rank. NCCL's watchdog would end the caller's process because of it.
        with environment_variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
            group = dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
        # The group uses the store until it ends, without a reference that `open_store` could see.
        weakref.finalize(group, lambda store: None, store).atexit = False
    # Both have the methods of a ProcessGroup that the engine calls, but neither is a subclass.
    return cast("dist.ProcessGroup", group)


@contextlib.contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within the body, one thread at a time, and restore it afterwards.

    No other variable is touched. `unittest.mock.patch.dict` would empty the whole environment and fill it again: a
    thread of NCCL that reads the environment meanwhile crashes.
    """
    with _environment_lock:
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def largest_all_reduce(config: Config, source: ModelSource) -> int:
    """Return the bytes of the largest all-reduce: the hidden states of a full step."""
    itemsize = config.torch_dtype(source.config.dtype).itemsize
    return config.max_num_batched_tokens * source.config.hidden_size * itemsize
