"""Run rank 0 in this process and the other ranks in its child processes."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from nanovllm.checkpoints.model_source import ModelSource
from nanovllm.config import Config
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.executor.channels import RankChannels
from nanovllm.executor.local import Executor
from nanovllm.executor.processes import RankProcesses
from nanovllm.executor.ranks import largest_all_reduce, make_group, open_store, rank_device
from nanovllm.messages import StepOutput
from nanovllm.runner.model_runner import ModelRunner

if TYPE_CHECKING:
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]


class SpawnedExecutor(Executor):
    """Run every call on rank 0 here and, by a message, on the ranks that `RankProcesses` has started."""

    def __init__(self, config: Config, source: ModelSource):
        self.config = config
        self.source = source
        self.device = rank_device(config.device_type, 0)
        self.channels = RankChannels()
        self.processes = RankProcesses(
            size=config.tensor_parallel_size,
            module="nanovllm.executor.worker",
            connect=self.channels.connect,
            on_failure=self._end_ranks,
        )
        try:
            with self._naming_lost_ranks():
                self.processes.start()
                self.channels.send(config)
                store = open_store(self.channels.store_file.fileno(), config.tensor_parallel_size)
                self._wait_for_ranks(store)
                tp = self._join_group(store)
                # The monitor may have noticed a lost rank before there was a group to abort.
                self.check()
                super().__init__(ModelRunner(config, source, tp, self.device, self.check))
        except BaseException:
            self.close()
            raise

    @property
    def error(self) -> str | None:
        return self.processes.failure or self.channels.error

    def check(self) -> None:
        """Raise RuntimeError if a rank is lost."""
        if self.error is not None:
            raise RuntimeError(self.error)

    def collect(self) -> StepOutput:
        with self._naming_lost_ranks():
            return super().collect()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        with self._naming_lost_ranks():
            self.channels.send("load_weights")
            shared = self.channels.share_weights(weights, self.runner.tp, self.device)
            with contextlib.closing(shared):
                return super().load_weights(shared)

    def _call(self, method: str, *arguments: object) -> Any:
        with self._naming_lost_ranks():
            self.channels.send(method, *arguments)
            return super()._call(method, *arguments)

    @contextlib.contextmanager
    def _naming_lost_ranks(self) -> Iterator[None]:
        """Raise a RuntimeError that names the lost rank in place of what its loss causes in this one.

        Such consequences are a broken pipe or a failed collective. Other errors are the caller's, such as weights of a
        wrong shape: they are raised at once.
        """
        self.check()
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError | EOFError | RuntimeError):
                self.processes.wait_for_failure()
            if self.error is not None:
                raise RuntimeError(self.error) from error
            raise

    # -- start -------------------------------------------------------------------------------------------------------

    def _wait_for_ranks(self, store: "FileStore") -> None:
        """Wait until all other ranks are about to join the group."""
        keys = [f"rank {rank}" for rank in range(1, self.config.tensor_parallel_size)]
        while not store.check(keys):
            self.check()
            time.sleep(0.02)

    def _join_group(self, store: "FileStore") -> TensorParallel:
        """Join the ranks' group in another thread. If a rank is lost, that thread may be left waiting for it."""
        joined: Future[TensorParallel] = Future()
        threading.Thread(target=self._make_group, args=(store, joined), daemon=True).start()
        while not joined.done():
            self.check()
            time.sleep(0.01)
        return joined.result()

    def _make_group(self, store: "FileStore", joined: Future[TensorParallel]) -> None:
        size = self.config.tensor_parallel_size
        device = self.device
        try:
            # Set the current GPU of this thread.
            rank_device(device.type, 0)
            group = make_group(0, size, store, device.type, self.channels.sockets)
            # Kept before the next call, so that the group can be aborted if a rank is lost in that call.
            tp = TensorParallel(0, size, group)
            self._tp = tp
            tp = tp.with_peers(device, largest_all_reduce(self.config, self.source))
            if device.type == "cuda":
                # The caller's stream may be another than this thread's.
                torch.cuda.current_stream().synchronize()
            self._tp = tp
            joined.set_result(tp)
            if self.processes.closing:
                # `close` has not seen this group.
                tp.abort(lambda: None)
                tp.close()
        except BaseException as error:
            if not joined.done():
                joined.set_exception(error)

    # -- end ---------------------------------------------------------------------------------------------------------

    def _end_ranks(self) -> None:
        """End all other ranks after one is lost, then this rank's waits for them. Called by the monitor's thread."""
        tp = self._tp
        try:
            if tp is not None:
                tp.stop()
        finally:
            # Even if this rank's GPU has failed.
            self.processes.kill()
        self._abort_collectives()

    def _abort_collectives(self) -> None:
        """End this rank's waits for other ranks. A step may be waiting in another thread."""
        tp = self._tp
        runner = self._runner
        if tp is not None:
            tp.abort(runner.free_graphs if runner is not None else lambda: None)

    def close(self) -> None:
        """End the other ranks and free what belongs to them, even if some of it fails. May be called again."""
        try:
            if self.processes.started:
                self._let_ranks_end()
        finally:
            self.processes.close()
            self.channels.close()
            super().close()

    def _let_ranks_end(self) -> None:
        """Finish the steps in flight, ask the other ranks to close, and give them 5 s if they listen by now."""
        try:
            # The monitor still watches: without it a lost rank's part of a step would be waited for in vain.
            with contextlib.suppress(Exception):
                while self._runner is not None and self._runner.in_flight:
                    self._runner.collect()
            self.processes.stop_watching()
            self.channels.close_ranks()
        finally:
            # Even after an interrupt no kernel may go on waiting for a rank.
            self._abort_collectives()
        listens = self.error is None and self._runner is not None
        self.processes.wait_for_exit(5 if listens else 0)
