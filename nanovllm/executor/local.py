"""The executor of this process's rank: the only one, or one of torchrun's.

`SpawnedExecutor` extends it to child processes.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.messages import Batch, StepOutput
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.utils.heap import give_back_memory


class Executor:
    """Run an engine's steps on this process's rank. `SpawnedExecutor` also runs them on the other ranks.

    Args:
        runner: the model runner of this process's rank.
        is_replicated: the other ranks are processes that run the same engine, whose decisions must all be the same.
    """

    _runner: ModelRunner | None = None
    _tp: TensorParallel | None = None

    def __init__(self, runner: ModelRunner, is_replicated: bool = False):
        self.is_replicated = is_replicated
        self._runner = runner
        self._tp = runner.tp

    @property
    def runner(self) -> ModelRunner:
        """The model runner of this process's rank."""
        if self._runner is None:
            raise RuntimeError("the executor is closed")
        return self._runner

    @property
    def error(self) -> str | None:
        """Why a rank, and the engine with it, is lost. None while all ranks can go on."""
        return None

    def launch(self, batch: Batch) -> None:
        """Start a step on every rank, without waiting for its results."""
        self._call("launch", batch)

    def collect(self) -> StepOutput:
        """Wait for the oldest launched step and return its results."""
        return self.runner.collect()

    def sleep(self, parts: Collection[str]) -> None:
        self._call("sleep", parts)

    def lacking_memory(self, parts: Collection[str]) -> int:
        """Return how many bytes of device memory `wake_up` of `parts` lacks on some rank; 0 if there is enough."""
        return self._call("lacking_memory", parts)

    def wake_up(self, parts: Collection[str], capture: bool) -> None:
        self._call("wake_up", parts, capture)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return self.runner.load_weights(weights)

    def finish_weight_update(self) -> None:
        self._call("finish_weight_update")

    def _call(self, method: str, *arguments: object) -> Any:
        """Call a method of every rank's runner. Return the result of this one."""
        return getattr(self.runner, method)(*arguments)

    def close(self) -> None:
        """Give memory back. May be called again."""
        if self._runner is not None:
            self._runner.free_graphs()
            self._runner = None
        if self._tp is not None:
            self._tp.close()
            self._tp = None
            give_back_memory()
