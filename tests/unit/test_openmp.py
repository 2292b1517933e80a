"""Threads that wait for each other leave the cores to other programs, or the log says how to make them."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine import openmp
from nanovllm.engine.openmp import ThreadWatch
from tests.helpers import SOON, running_ranks
from tests.models.tiny import save_tiny

ROOT = Path(__file__).parents[2]
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Run a script up to its import of torch, and print the setting that OpenMP would read then.
UP_TO_TORCH = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()
sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("script", ["example.py", "bench.py"])
@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_waiting_threads_of_scripts_sleep_unless_the_caller_chose_otherwise(script, chosen):
    environment = os.environ | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    command = [sys.executable, "-c", UP_TO_TORCH, script]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == f"{chosen or 'PASSIVE'}\n", result.stderr


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_waiting_threads_of_ranks_sleep_unless_the_caller_chose_otherwise(monkeypatch, tmp_path, chosen):
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    reported = threading.Event()
    body = "report(os.environ['OMP_WAIT_POLICY'])"
    with running_ranks(monkeypatch, tmp_path, 2, body, reported.set) as processes:
        assert reported.wait(SOON)
    assert processes.failure == f"tensor-parallel rank 1 failed:\n{chosen or 'PASSIVE'}"


@pytest.mark.parametrize(
    ("num_threads", "cpu_seconds", "setting", "lines"),
    [
        (2, 0.1, None, 1),
        (2, 0.19, None, 0),
        (16, 0.8, None, 1),
        (1, 0.01, None, 0),
        *((2, 0.1, name, 0) for name in SETTINGS),
    ],
)
def test_threads_that_cannot_run_are_logged_once(monkeypatch, caplog, num_threads, cpu_seconds, setting, lines):
    if setting:
        monkeypatch.setenv(setting, "0")
    watch = ThreadWatch(num_threads)
    with caplog.at_level(logging.WARNING, "nanovllm"):
        for _ in range(100):
            watch.add(0.1, cpu_seconds)
    assert caplog.text.count("OMP_WAIT_POLICY=PASSIVE") == lines == len(caplog.records)


def test_an_engine_watches_its_threads(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(openmp, "_SECONDS", 0.0)
    monkeypatch.setattr(openmp, "_BUSY", float("inf"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    path = save_tiny(tmp_path, "qwen3")
    with LLM(path, device="cpu", kvcache_block_size=16, max_model_len=64, max_num_seqs=2) as llm:
        llm.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert caplog.text.count("torch's 2 threads") == 1
