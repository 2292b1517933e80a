"""Choose the executor that fits the config and the way this process was started.

tensor_parallel_size=1   `Executor`: one rank, in this process
under torchrun           `Executor`: every process is a rank and runs the same engine on the same requests
otherwise                `SpawnedExecutor`: rank 0 in this process, the other ranks in child processes
"""

import atexit
import os

import torch
import torch.distributed as dist

from nanovllm.checkpoints.hub import ModelSource
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
        ValueError: the ranks cannot split the model or lack GPUs, or the outside group has another size.
        RuntimeError: a rank was lost meanwhile.
    """
    if config.tensor_parallel_size == 1:
        return Executor(ModelRunner(config, source, TensorParallel(), rank_device(config.device_type)))
    # A model on the meta device takes no memory. It raises here, once, if the ranks cannot split it.
    with torch.device("meta"):
        Decoder(source.config, tp=TensorParallel(0, config.tensor_parallel_size))
    if "TORCHELASTIC_RUN_ID" in os.environ or dist.is_initialized():
        return _join_outside_group(config, source)
    return SpawnedExecutor(config, source)


def _join_outside_group(config: Config, source: ModelSource) -> Executor:
    """Join the ranks that torchrun, or the caller, has started."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if config.device_type == "cuda" else "gloo")
        # Exit handlers run in reverse order: the engine registers its own later and closes before the group does.
        atexit.register(_destroy_outside_group)
    size = dist.get_world_size()
    if size != config.tensor_parallel_size:
        raise ValueError(f"tensor_parallel_size={config.tensor_parallel_size} must equal the world size, {size}")
    device = rank_device(config.device_type, int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    tp = TensorParallel.default().with_peers(device, largest_all_reduce(config, source))
    return Executor(ModelRunner(config, source, tp, device), is_replicated=True)


def _destroy_outside_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
