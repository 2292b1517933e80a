"""A rank gets its GPU, and environment variables are only set for a moment."""

import os
import threading
from multiprocessing import Pipe

import pytest
import torch

from nanovllm.executor import worker
from nanovllm.executor.ranks import environment_variable, open_store, rank_device
from tests.helpers import SOON

NAME = "NANOVLLM_TEST"


def test_each_rank_gets_its_own_gpu_and_a_single_one_the_current_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert rank_device("cuda") == torch.device("cuda", 1)
    assert not chosen
    devices = [torch.device("cuda", i) for i in range(2)]
    assert [rank_device("cuda", rank) for rank in range(2)] == devices
    assert chosen == devices
    with pytest.raises(ValueError, match="needs GPU 2, but torch sees 2"):
        rank_device("cuda", 2)


@pytest.mark.parametrize("before", [None, "1"])
def test_setting_a_variable_touches_no_other(before, monkeypatch):
    """Threads of native code read the environment meanwhile. They crashed when it was emptied and filled again."""
    if before is None:
        monkeypatch.delenv(NAME, raising=False)
    else:
        monkeypatch.setenv(NAME, before)
    touched = []
    monkeypatch.setattr(os, "putenv", lambda key, value: touched.append(key))
    monkeypatch.setattr(os, "unsetenv", touched.append)
    with environment_variable(NAME, "0"):
        assert os.environ[NAME] == "0"
    assert os.environ.get(NAME) == before
    assert set(touched) == {NAME.encode()}


def test_two_threads_set_a_variable_one_after_the_other(monkeypatch):
    """Engines that start at the same time do so. Each keeps its value to the end, and none is left behind."""
    monkeypatch.delenv(NAME, raising=False)
    seen, first_has_left = [], threading.Event()

    def set_second():
        with environment_variable(NAME, "0"):
            first_has_left.wait(SOON)
            seen.append(os.environ.get(NAME))

    thread = threading.Thread(target=set_second)
    with environment_variable(NAME, "0"):
        thread.start()
        thread.join(0.2)
    first_has_left.set()
    thread.join(SOON)
    assert seen == ["0"] and NAME not in os.environ


def test_a_store_leaves_a_file_alone_that_takes_the_number_of_its_closed_descriptor(tmp_path):
    with open(os.memfd_create("store"), "wb") as memory:
        store = open_store(memory.fileno(), 2)
        store.set("rank 1", "present")
        number = memory.fileno()
    before = set(os.listdir("/proc/self/fd"))
    with open(tmp_path / "text", "w") as other:
        assert other.fileno() == number
        del store
        assert not (tmp_path / "text").read_bytes()
    assert len(before - set(os.listdir("/proc/self/fd"))) == 1  # the store's own descriptor


def test_a_rank_that_can_start_no_thread_reports_it(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    (received, report), (messages, sender) = Pipe(duplex=False), Pipe(duplex=False)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with received, report, messages, sender:
        sender.send(("launch",))
        sender.send(("close",))
        connection = os.dup(messages.fileno())
        with pytest.raises(SystemExit):
            worker.main(1, os.getpid(), os.dup(report.fileno()), connection, sock=-1, store=-1)
        assert not messages.poll()  # it has waited for the end
        assert "can't start new thread" in received.recv()
