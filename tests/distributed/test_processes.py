"""Ranks' processes start, are watched and end. Small programs run in place of model runners."""

import os
import signal
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext

import pytest

from nanovllm.executor import processes as processes_module
from nanovllm.executor.processes import RankProcesses
from tests.helpers import SOON, all_end, is_alive, open_files, running_ranks, threads_end, wait_until

_waitid = os.waitid


def wait_for_exit(pid):
    """Wait until a process is a zombie, and leave it one."""
    _waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def start_two(monkeypatch, tmp_path):
    """Return a function that starts ranks 1 and 2 and returns their processes and their ids."""
    files = [tmp_path / f"pid{rank}" for rank in (1, 2)]
    write_pid = f"open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(f'{{os.getpid()}}\\n')\n"
    with ExitStack() as stack:

        def start(body, on_failure=lambda: None):
            ranks = running_ranks(monkeypatch, tmp_path, 3, write_pid + body, on_failure)
            processes = stack.enter_context(ranks)
            assert wait_until(lambda: all(file.exists() and file.read_text().endswith("\n") for file in files))
            return processes, [int(file.read_text()) for file in files]

        yield start


@pytest.mark.parametrize(
    ("what", "number"),
    [("was ended by", signal.SIGKILL), ("was stopped by", signal.SIGSTOP)],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_is_named_with_its_signal(start_two, what, number):
    failed = threading.Event()
    processes, pids = start_two("", failed.set)
    os.kill(pids[1], number)
    assert failed.wait(SOON)
    assert processes.failure == f"tensor-parallel rank 2 (process {pids[1]}) {what} signal {int(number)}"
    processes.close()
    assert all_end(pids)


def test_a_rank_that_exits_is_named_with_its_status(start_two):
    failed = threading.Event()
    processes, pids = start_two("if rank == 2: os._exit(3)", failed.set)
    assert failed.wait(SOON)
    assert processes.failure == f"tensor-parallel rank 2 (process {pids[1]}) ended with status 3"


def test_a_rank_s_report_is_the_failure(start_two):
    failed = threading.Event()
    processes, _ = start_two("if rank == 2: report('Traceback: no memory')", failed.set)
    assert failed.wait(SOON)
    assert processes.failure == "tensor-parallel rank 2 failed:\nTraceback: no memory"


def test_a_lost_rank_is_named_even_if_other_ranks_report_first(start_two, monkeypatch, tmp_path):
    """Rank 2 is seen to run after rank 1's report is there, and ends only then."""
    reported, failed, checks_of_rank_2 = tmp_path / "reported", threading.Event(), []

    def end_rank_2_late(kind, pid, options):
        if reported.exists() and pid == pids[1]:
            checks_of_rank_2.append(pid)
            if len(checks_of_rank_2) == 2:
                os.kill(pid, signal.SIGKILL)
                wait_for_exit(pid)
        return _waitid(kind, pid, options)

    go = tmp_path / "go"
    body = f"""
while rank == 1 and not os.path.exists({str(go)!r}):
    time.sleep(0.01)
if rank == 1:
    report("Traceback: connection closed by peer")
    open({str(reported)!r}, "w").close()"""
    processes, pids = start_two(body, failed.set)
    monkeypatch.setattr(os, "waitid", end_rank_2_late)
    go.touch()
    assert failed.wait(SOON)
    assert len(checks_of_rank_2) >= 2
    assert processes.failure == f"tensor-parallel rank 2 (process {pids[1]}) was ended by signal 9"


def test_waiting_for_a_failure_outlasts_a_slow_check(start_two, monkeypatch):
    """A check that had begun before does not count, so the second one must be over."""
    checks, allowed = threading.Semaphore(0), threading.Semaphore(0)

    def wait_and_return_failure():
        processes.wait_for_failure()
        return processes.failure

    def slow(kind, pid, options):
        if pid == pids[0]:
            checks.release()
            assert allowed.acquire(timeout=SOON)
        return _waitid(kind, pid, options)

    processes, pids = start_two("")
    monkeypatch.setattr(processes_module, "_GRACE_SECONDS", 0)
    monkeypatch.setattr(os, "waitid", slow)
    assert checks.acquire(timeout=SOON)
    with ThreadPoolExecutor(1) as threads:
        failure = threads.submit(wait_and_return_failure)
        assert not wait([failure], timeout=0.5).done
        allowed.release()
        assert checks.acquire(timeout=SOON)
        assert not wait([failure], timeout=0.2).done
        os.kill(pids[0], signal.SIGKILL)
        wait_for_exit(pids[0])
        allowed.release()
        assert "rank 1" in failure.result(SOON)
    # It returns at once when the failure is known.
    processes.wait_for_failure()


def test_a_check_during_close_sees_no_failure(start_two, monkeypatch):
    checking, closed, failures = threading.Event(), threading.Event(), []

    def late(*arguments):
        checking.set()
        assert closed.wait(SOON)
        return _waitid(*arguments)

    processes, pids = start_two("", lambda: failures.append("called"))
    monkeypatch.setattr(os, "waitid", late)
    assert checking.wait(SOON)
    processes.close()
    closed.set()
    assert threads_end("nanovllm-monitor")
    assert processes.failure is None and not failures
    assert not any(map(is_alive, pids))


def test_a_start_that_fails_raises_its_error_and_leaves_nothing(monkeypatch, tmp_path):
    calls, before = [], open_files(os.getpid())

    def connect():
        calls.append("called")
        if len(calls) == 2:
            raise OSError("too many open files")
        return nullcontext(())

    (tmp_path / "sleeping_rank.py").write_text("import time\ndef main(*_): time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    processes = RankProcesses(size=3, module="sleeping_rank", connect=connect, on_failure=lambda: None)
    with pytest.raises(OSError, match="too many open files"):
        processes.start()
    processes.close()
    processes.close()
    assert threads_end("nanovllm-monitor")
    assert not open_files(os.getpid()) - before


def test_processes_that_are_closed_first_do_not_start():
    processes = RankProcesses(size=2, module="time", connect=pytest.fail, on_failure=lambda: None)
    processes.close()
    with pytest.raises(CancelledError):
        processes.start()
