"""Choose the executor that fits the config and the way this process was started.

tensor_parallel_size=1   `Executor`: one rank, in this process
under torchrun           `Executor`: every process is a rank. Each `tensor_parallel_size` successive ranks of the world
                         run the same engine on the same requests
otherwise                `SpawnedExecutor`: rank 0 in this process, the other ranks in child processes

`distributed_executor_backend` names the second ("external_launcher") or the third ("mp").
"""

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.checkpoints.model_source import ModelSource
from nanovllm.config import Config
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.executor.local import Executor
from nanovllm.executor.ranks import largest_all_reduce, rank_device
from nanovllm.executor.spawned import SpawnedExecutor
from nanovllm.models.decoder import Decoder
from nanovllm.runner.model_runner import ModelRunner


def start_executor(config: Config, source: ModelSource) -> Executor:
    """Load the model on all ranks and return their executor.

    Raises:
        ValueError: the ranks cannot split the model or lack GPUs, or their number does not divide the outside world's.
        RuntimeError: a rank was lost meanwhile.
    """
    if config.tensor_parallel_size == 1:
        return Executor(ModelRunner(config, source, TensorParallel(), rank_device(config.device_type)))
    # A model on the meta device takes no memory. It raises here, once, if the ranks cannot split it.
    with torch.device("meta"):
        Decoder(source.config, tp=TensorParallel(0, config.tensor_parallel_size))
    return _join_outside_world(config, source) if is_replicated(config) else SpawnedExecutor(config, source)


def is_replicated(config: Config) -> bool:
    """Whether the ranks are processes that torchrun, or the caller, has started, and that run the same engine."""
    if config.tensor_parallel_size == 1:
        return False
    backend = config.distributed_executor_backend
    has_world = "TORCHELASTIC_RUN_ID" in os.environ or dist.is_initialized()
    return backend == "external_launcher" or (backend is None and has_world)


def _join_outside_world(config: Config, source: ModelSource) -> Executor:
    """Join the ranks that torchrun, or the caller, has started."""
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "distributed_executor_backend='external_launcher' needs torchrun or an initialized torch.distributed"
            )
        dist.init_process_group("nccl" if config.device_type == "cuda" else "gloo")
        # Exit handlers run in reverse order: the engine registers its own later and closes before the group does.
        atexit.register(_destroy_outside_group)
    size = config.tensor_parallel_size
    world_size = dist.get_world_size()
    if world_size % size:
        raise ValueError(f"tensor_parallel_size={size} must divide the world size, {world_size}")
    device = rank_device(config.device_type, int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    tp = TensorParallel.default() if size == world_size else _subgroup(size, device)
    tp = tp.with_peers(device, largest_all_reduce(config, source))
    return Executor(ModelRunner(config, source, tp, device), is_replicated=True)


def _subgroup(size: int, device: torch.device) -> TensorParallel:
    """Return the group of this rank and its neighbors: `size` successive ranks, which wait for nobody else.

    The group lives until the caller destroys the world: torch could mistake a later group of the same ranks for it.
    """
    first = dist.get_rank() // size * size
    backend = "nccl" if device.type == "cuda" else "gloo"
    ranks = list(range(first, first + size))
    group: Any = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
    return TensorParallel(dist.get_rank(group), size, group)


def _destroy_outside_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
