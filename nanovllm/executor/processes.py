"""Start, watch and end the processes of ranks on this host. This module does not know what the ranks do."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, Pipe

from nanovllm.utils.child_process import child_program, inheritable

# The monitor polls: a stopped process makes no pidfd readable, and some builds of Python have no `os.pidfd_open`.
_POLL_SECONDS = 0.2
# How long a dead process may take to show that it is dead after others have noticed.
_GRACE_SECONDS = 2.0


class RankProcesses:
    """Start the processes of ranks 1 to `size` - 1, watch them and end them.

    Each process runs `main(rank, parent, report, *descriptors)` of `module`, and not the caller's script again:
    - `parent` is the id of this process,
    - `report` is the descriptor of a `Connection` through which the rank may send one string, which is its error,
    - `descriptors` are those that `connect` yields.

    Args:
        size: number of ranks, including rank 0, which is this process.
        module: name of the module whose `main` the processes run.
        connect: makes a context manager that yields the descriptors the next rank's process inherits. It is entered
            before the process starts and left afterwards, in the monitor's thread.
        on_failure: called once, in the monitor's thread, when `failure` is set. It calls `kill` to end the other ranks,
            which may wait for the lost one.

    Attributes:
        failure: which ranks are lost and how, or what a rank has reported. None while all ranks run.
    """

    def __init__(
        self,
        size: int,
        module: str,
        connect: Callable[[], AbstractContextManager[tuple[int, ...]]],
        on_failure: Callable[[], None],
    ):
        self.failure: str | None = None
        self._size = size
        self._module = module
        self._connect = connect
        self._on_failure = on_failure
        self._processes: list[subprocess.Popen] = []
        self._report_pipes: list[Connection] = []
        self._reports: dict[int, str] = {}
        self._num_checks = 0
        self._started: Future[None] = Future()
        self._closing = threading.Event()
        self._all_ended = threading.Event()
        self._monitor = threading.Thread(target=self._run_monitor, name="nanovllm-monitor", daemon=True)

    def start(self) -> None:
        """Start the processes and return once they run."""
        self._monitor.start()
        self._started.result()

    @property
    def started(self) -> bool:
        """Whether `start` has finished, be it with an error."""
        return self._started.done()

    @property
    def closing(self) -> bool:
        """Whether the processes may end without that being a failure."""
        return self._closing.is_set()

    def wait_for_failure(self) -> None:
        """Wait until `failure` is set, if a lost rank may be the cause of an error in this one.

        Give up after two seconds, but not before the monitor has checked all ranks. A check that is running now may
        have missed the loss, so wait for two checks to finish.
        """
        deadline = time.monotonic() + _GRACE_SECONDS
        last_check = self._num_checks + 2
        while self.failure is None and self._monitor.is_alive():
            if time.monotonic() >= deadline and self._num_checks >= last_check:
                return
            time.sleep(0.05)

    def stop_watching(self) -> None:
        """Let the processes end without that being a failure."""
        self._closing.set()

    def wait_for_exit(self, seconds: float) -> None:
        """Give the processes some time to end by themselves."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """Kill the processes that still run. May be called again, and before `start` has finished."""
        self.stop_watching()
        if not self._started.cancel():
            # The monitor may still start some.
            wait([self._started])
        self.kill()
        for process in self._processes:
            process.wait()
        self._all_ended.set()

    def _run_monitor(self) -> None:
        """Start the processes and watch them.

        Linux kills the processes when the thread that started them ends (see `child_program`). The caller's thread may
        end long before the engine does, so this thread starts the processes and ends after them.
        """
        if not self._started.set_running_or_notify_cancel():
            return
        try:
            for rank in range(1, self._size):
                try:
                    self._start_rank(rank)
                except OSError as error:
                    raise RuntimeError(f"tensor-parallel rank {rank} cannot be started: {error}") from error
            self._started.set_result(None)
        except BaseException as error:
            self._started.set_exception(error)
        try:
            self._watch()
            self._all_ended.wait()
        finally:
            # Closed in the thread that reads them, so that no other file can get their descriptors before.
            for pipe in self._report_pipes:
                pipe.close()

    def _start_rank(self, rank: int) -> None:
        reports, rank_reports = Pipe(duplex=False)
        self._report_pipes.append(reports)
        with (
            rank_reports,
            self._connect() as connected,
            inheritable(rank_reports.fileno(), *connected) as descriptors,
        ):
            program = child_program(self._module, (rank, os.getpid(), *descriptors))
            num_threads = max(1, (os.cpu_count() or 1) // self._size)
            defaults = {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env=defaults | os.environ,
            )
        self._processes.append(process)

    def _watch(self) -> None:
        """Wait until a process has ended, stopped or reported an error, or until this object closes."""
        while not self._closing.wait(_POLL_SECONDS):
            failure = self._find_failure()
            # While this object closes, processes end because they should.
            if failure is not None and not self.closing:
                self.failure = failure
                self._on_failure()
                return
            self._num_checks += 1

    def _find_failure(self) -> str | None:
        """Say which ranks are lost, or else what a rank has reported.

        When a rank is lost, the collectives of the others fail, and they may report that before the loss shows. So a
        report alone is only returned if no loss has shown after another second.
        """
        deadline = None
        while True:
            # Look for lost processes first: a process reports before it ends.
            ends = {rank: self._describe_end(rank, process) for rank, process in enumerate(self._processes, start=1)}
            self._read_reports()
            lost = [end for rank, end in ends.items() if end is not None and rank not in self._reports]
            if lost:
                return "\n".join(lost)
            if not self._reports:
                return None
            if deadline is None:
                deadline = time.monotonic() + 1
            if time.monotonic() > deadline or self._closing.wait(_POLL_SECONDS):
                rank, report = next(iter(self._reports.items()))
                return f"tensor-parallel rank {rank} failed:\n{report}"

    def _read_reports(self) -> None:
        for rank, pipe in enumerate(self._report_pipes, start=1):
            # The end of the pipe means that the process has ended without a report.
            with contextlib.suppress(OSError, EOFError):
                if pipe.poll():
                    self._reports[rank] = pipe.recv()

    @staticmethod
    def _describe_end(rank: int, process: subprocess.Popen) -> str | None:
        """Say how a rank's process ended or that it is stopped. Return None if it runs."""
        name = f"tensor-parallel rank {rank} (process {process.pid})"
        try:
            state = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return f"{name} is gone"
        if state is None:
            return None
        if state.si_code == os.CLD_EXITED:
            return f"{name} ended with status {state.si_status}"
        verb = "was stopped" if state.si_code == os.CLD_STOPPED else "was ended"
        return f"{name} {verb} by signal {state.si_status}"
