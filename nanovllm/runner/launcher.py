"""Starts the ranks, tells them what to run, and notices when one dies.

    tensor_parallel_size=1   one runner, in this process
    under torchrun           every process is a rank and runs the same engine on the same requests: nothing to send
    otherwise                rank 0 is this process; the others are children that read batches from an inherited socket

Children run `nanovllm.runner.worker`, not the caller's script again, and import from where the caller does. Nothing is
pickled from outside the process tree, and nothing listens beyond loopback: the ranks meet in a temporary file.
"""

import atexit
import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.engine.scheduler import Batch, StepOutput
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import checked_weights
from nanovllm.ops.triton_utils import preload_triton
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.utils.hub import ModelSource

_POLL_SECONDS = 0.2
# The path first: Python's begins with the working folder, which may not be in the caller's. Ctrl-C goes to all of a
# terminal's processes; the parent decides.
_WORKER = (
    "import sys; sys.path = {!r}; import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from nanovllm.runner.worker import main; main(*{!r})"
)


def make_group(rank: int, size: int, store: "dist.Store", device_type: str) -> "dist.ProcessGroup":
    """A process group of its own (no global default group), bound to loopback."""
    if device_type == "cpu":
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
        return dist.ProcessGroupGloo(store, rank, size, options)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # A rank that dies is noticed by whoever started it; NCCL's watchdog would end this process, the caller's, for it.
    with environment_variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
        return dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())


_environment = threading.Lock()


@contextlib.contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Have a variable set for a while, by one thread after the other.

    No other is touched: `unittest.mock.patch.dict` empties the environment and fills it again, and a thread that NCCL
    has begun meanwhile, and that reads it, crashes.
    """
    with _environment:
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def rank_device(device_type: str, local_rank: int | None) -> torch.device:
    """The device of a rank, or of the only one (None): on CUDA the current one, which that of a rank becomes."""
    if device_type == "cpu":
        return torch.device("cpu")
    preload_triton()
    if local_rank is None:
        return torch.device("cuda", torch.cuda.current_device())
    if local_rank >= (count := torch.cuda.device_count()):
        raise ValueError(f"tensor_parallel_size needs GPU {local_rank}, but torch sees {count} GPUs here")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def largest_sum(config: Config, source: ModelSource) -> int:
    """Bytes of the largest sum over the ranks: a full step's hidden states."""
    itemsize = config.torch_dtype(source.config.dtype).itemsize
    return config.max_num_batched_tokens * source.config.hidden_size * itemsize


def start(config: Config, source: ModelSource) -> "Executor":
    """The executor that fits `config` and the way this process was started."""
    if config.tensor_parallel_size == 1:
        return Executor(ModelRunner(config, source, TensorParallel(), rank_device(config.device_type, None)))
    with torch.device("meta"):  # allocates nothing: refuses here, once, what the ranks cannot share
        Decoder(source.config, tp=TensorParallel(0, config.tensor_parallel_size))
    if "TORCHELASTIC_RUN_ID" in os.environ or dist.is_initialized():
        return _join_outside_group(config, source)
    return SpawnedRanks(config, source)


def _join_outside_group(config: Config, source: ModelSource) -> "Executor":
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if config.device_type == "cuda" else "gloo")
    if (size := dist.get_world_size()) != config.tensor_parallel_size:
        raise ValueError(f"tensor_parallel_size={config.tensor_parallel_size} must equal the world size, {size}")
    device = rank_device(config.device_type, int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    tp = TensorParallel.default().with_peers(device, largest_sum(config, source))
    executor = Executor(ModelRunner(config, source, tp, device))
    if joined:  # when the interpreter ends: before that, as it registers after this, the engine ends
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return executor


class Executor:
    """Runs batches on the ranks; here, on the only one that is this process's business.

    Attributes:
        error: why another rank, and with it the engine, is lost.
    """

    error: str | None = None

    def __init__(self, runner: ModelRunner):
        self.runner: ModelRunner | None = runner
        self.tp: TensorParallel | None = runner.tp

    def launch(self, batch: Batch) -> None:
        self._run("launch", batch)

    def sleep(self, level: int) -> None:
        self._run("sleep", level)

    def wake_up(self) -> None:
        self._run("wake_up")

    def _run(self, what: str, *arguments: Any) -> None:
        """Let every rank's runner do it."""
        getattr(self.runner, what)(*arguments)

    def collect(self) -> StepOutput:
        return self.runner.collect()

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.runner.update_weights(weights)

    def close(self) -> None:
        """Give back the device's memory. Parameters and their loaders refer to each other: the collector frees them."""
        if self.runner is not None:
            self.runner.free_graphs()
            self.runner = None
        if self.tp is not None:
            self.tp.close()
            self.tp = None
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


class SpawnedRanks(Executor):
    """Rank 0 in this process and the other ranks in children."""

    def __init__(self, config: Config, source: ModelSource):
        self.processes: list[subprocess.Popen] = []
        self.channels: list[Connection] = []
        self.tp: TensorParallel | None = None
        self.runner = None
        self.closing = threading.Event()
        self.looks = 0  # of the monitor, at all children
        size = config.tensor_parallel_size
        device = rank_device(config.device_type, 0)
        self.folder = tempfile.mkdtemp(prefix="nanovllm-")
        try:
            self.monitor = threading.Thread(target=self._watch, name="nanovllm-monitor", daemon=True)
            self.monitor.start()
            with self._explained():
                for rank in range(1, size):
                    self._spawn(rank, size)
                    self.channels[-1].send((config, rank))
                store = dist.FileStore(os.path.join(self.folder, "store"), size)
                self._await_children(store)
                tp = self._join(config, source, store, device)
                self.check()  # the monitor may have looked for `tp` before
                super().__init__(ModelRunner(config, source, tp, device, self.check))
        except BaseException:
            self.close()
            raise

    def _spawn(self, rank: int, size: int) -> None:
        ours, theirs = Pipe()
        path = [p or os.getcwd() for p in sys.path if isinstance(p, str)]
        program = _WORKER.format(path, (theirs.fileno(), os.getpid(), self.folder))
        num_threads = str(max(1, (os.cpu_count() or 1) // size))
        environment = {"OMP_NUM_THREADS": num_threads, "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        with theirs:
            options = {"pass_fds": [theirs.fileno()], "stdin": subprocess.DEVNULL, "env": environment}
            process = subprocess.Popen([sys.executable, "-c", program], **options)
        self.channels.append(ours)
        self.processes.append(process)  # from now on the monitor watches it

    def _await_children(self, store: "dist.Store") -> None:
        """Wait until all children are about to join."""
        present = [f"rank {rank}" for rank in range(1, len(self.processes) + 1)]
        while not store.check(present):
            self.check()
            time.sleep(0.02)

    def _join(self, config: Config, source: ModelSource, store: "dist.Store", device: torch.device) -> TensorParallel:
        """Make the group, in a thread that is left behind if a child is lost: nothing ends its wait for that one."""
        size, joined = config.tensor_parallel_size, Future()

        def join() -> None:
            try:
                rank_device(device.type, 0)  # this thread's, too
                tp = TensorParallel(0, size, make_group(0, size, store, device.type))
                self.tp = tp  # from now on it can be ended
                tp = tp.with_peers(device, largest_sum(config, source))
                if device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # the caller's stream may be another than this thread's
                self.tp = tp
                joined.set_result(tp)
                if self.closing.is_set():
                    tp.abort(lambda: None)
                    tp.close()
            except BaseException as error:
                if not joined.done():
                    joined.set_exception(error)

        threading.Thread(target=join, daemon=True).start()
        while not joined.done():
            self.check()
            time.sleep(0.01)
        return joined.result()

    def _run(self, what: str, *arguments: Any) -> None:
        with self._explained():
            self._tell(what, *arguments)
            super()._run(what, *arguments)

    def collect(self) -> StepOutput:
        with self._explained():
            return super().collect()

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        with self._explained():
            self._tell("update_weights")
            with contextlib.closing(self._shared(weights)) as shared:
                super().update_weights(shared)

    def _tell(self, *message: Any) -> None:
        for channel in self.channels:
            channel.send(message)

    def _shared(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights`, each of which is also broadcast to the other ranks; whatever ends them ends theirs."""
        runner, complete = self.runner, False
        try:
            for name, tensor in checked_weights(weights):
                tensor = tensor.detach().to(runner.device).contiguous()
                self._tell(name, tensor.shape, tensor.dtype)
                yield name, runner.tp.broadcast(tensor)
            complete = True
        finally:
            self._tell(complete)

    def check(self) -> None:
        """Raise RuntimeError if a rank has failed."""
        if self.error:
            raise RuntimeError(self.error)

    @contextlib.contextmanager
    def _explained(self):
        """Turn what a dead rank does to this one (a broken pipe, a failed collective) into an error that says so.

        Other errors are the caller's, such as weights that do not fit: they wait for nothing.
        """
        self.check()
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError | EOFError | RuntimeError):
                self._await_news()
            if self.error:
                raise RuntimeError(self.error) from error
            raise

    def _await_news(self) -> None:
        """Give the monitor time to see what may be behind an error: 2 s, but a whole look at least if it is slow."""
        deadline, looks = time.monotonic() + 2, self.looks + 2  # one may have begun before
        while not self.error and self.monitor.is_alive() and (time.monotonic() < deadline or self.looks < looks):
            time.sleep(0.05)

    def _watch(self) -> None:
        """Wait for a child that ended, stopped or sent a traceback; then end the others, which may wait for it."""
        while not self.closing.wait(_POLL_SECONDS):
            looked_at = zip(self.processes, self.channels, strict=False)  # `close` may empty both meanwhile
            for rank, (process, channel) in enumerate(looked_at, start=1):
                what = self._failure(rank, process, channel)
                if what and not self.closing.is_set():  # else it is `close` that ends them
                    self.error = what
                    tp = self.tp  # `close` may forget it meanwhile
                    try:
                        if tp is not None:
                            tp.stop()
                    finally:  # a GPU may have failed
                        for other in self.processes:
                            other.kill()
                    self._end_collectives()
                    return
            self.looks += 1

    def _failure(self, rank: int, process: subprocess.Popen, channel: Connection) -> str | None:
        with contextlib.suppress(OSError, EOFError):
            if channel.poll():
                return f"tensor-parallel rank {rank} failed:\n{channel.recv()}"
        try:
            flags = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            state = os.waitid(os.P_PID, process.pid, flags)
        except ChildProcessError:
            return f"tensor-parallel rank {rank} (process {process.pid}) is gone"
        if state is None:
            return None
        verb = "was stopped by" if state.si_code == os.CLD_STOPPED else "ended with status or"
        return f"tensor-parallel rank {rank} (process {process.pid}) {verb} signal {state.si_status}"

    def _end_collectives(self) -> None:
        """Let nothing on this rank wait for the others any more. The monitor may do so beside a step that does."""
        tp, runner = self.tp, self.runner
        if tp is not None:
            tp.abort(runner.free_graphs if runner is not None else lambda: None)

    def close(self) -> None:
        """End the children and remove what was made for them, whatever fails meanwhile. May be called again."""
        try:
            self._end_children()
        finally:
            self.closing.set()
            for process in self.processes:
                process.kill()
                process.wait()
            self.channels, self.processes = [], []
            shutil.rmtree(self.folder, ignore_errors=True)
            super().close()

    def _end_children(self) -> None:
        """Give them what they wait for, then 5 s to end by themselves."""
        try:
            with contextlib.suppress(Exception):  # while the monitor still looks: a lost rank's part would never come
                while self.runner is not None and self.runner.in_flight:
                    self.runner.collect()
            self.closing.set()
            for channel in self.channels:
                with contextlib.suppress(OSError):
                    channel.send(("close",))
                channel.close()
        finally:  # an interrupt, too, must leave no kernel that waits for a rank
            self._end_collectives()
        deadline = time.monotonic() + (0 if self.error else 5)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
