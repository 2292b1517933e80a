"""Ranks as processes on the CPU: same tokens, clear errors, nothing left behind."""

import contextlib
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.executor import spawned
from nanovllm.executor.spawned import SpawnedRanks, rank_device
from nanovllm.runner.model_runner import ModelRunner
from tests.models.tiny import save_tiny

OPTIONS = dict(device="cpu", kvcache_block_size=16, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32)
SOON = 60  # seconds after which what has not come never will, on a busy machine too
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6] * 15, [5]]
PARAMS = [SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)] * 2
PARAMS += [SamplingParams(temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """12 query heads on 4 KV heads, and a vocabulary that neither 2 nor 4 divides."""
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2")


def tokens(llm, prompts=PROMPTS, params=PARAMS):
    return [out.token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def want(model):
    with LLM(model, **OPTIONS) as llm:
        return tokens(llm)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids):
    deadline = time.monotonic() + SOON
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(alive, pids))


@pytest.mark.parametrize("size", [2, 4])
def test_the_tokens_are_those_of_one_rank(model, want, size):
    with LLM(model, tensor_parallel_size=size, **OPTIONS) as llm:
        pids = [process.pid for process in llm.executor.processes]
        assert tokens(llm) == want  # a batch of 3, mixed with chunks
        assert tokens(llm, PROMPTS[:1], PARAMS[:1]) == want[:1]  # and of 1
    assert gone(pids)


def test_dummy_weights_are_those_of_one_rank(model, want):
    with LLM(model, load_format="dummy", **OPTIONS) as llm:
        dummy = tokens(llm)
    with LLM(model, load_format="dummy", tensor_parallel_size=2, **OPTIONS) as llm:
        assert tokens(llm) == dummy != want


def test_messages_may_be_large_and_a_rank_slow(tmp_path, monkeypatch):
    path = save_tiny(tmp_path, "qwen2", vocab_size=140_000, num_hidden_layers=1)
    options = {**OPTIONS, "max_num_seqs": 64, "max_num_batched_tokens": 64}
    prompts = [[i + 1] for i in range(64)]
    allowed = [SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[i, i + 70_000]) for i in range(64)]
    with LLM(path, **options) as llm:
        want = tokens(llm, prompts, allowed)
    (tmp_path / "sitecustomize.py").write_text(  # a rank imports this first
        "import time\nfrom multiprocessing.connection import Connection\nreceive = Connection.recv\n"
        "Connection.recv = lambda self: time.sleep(0.3) or receive(self)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with LLM(path, tensor_parallel_size=2, **options) as llm:
        tell, sizes = llm.executor._tell, []

        def measured(*message):
            sizes.append(len(ForkingPickler.dumps(message)))
            tell(*message)

        llm.executor._tell = measured
        start = time.monotonic()
        assert tokens(llm, prompts, allowed) == want
        assert max(sizes) > 1 << 20 and time.monotonic() - start > 0.3 * (len(sizes) - 2)


def sockets_of(pid):
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(descriptor)


def listening(pids, ignored=()):
    """Addresses on which these processes listen."""
    sockets = {name for pid in pids for name in sockets_of(pid)}.difference(ignored)
    for file in ("/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp", "/proc/net/udp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            address, _, state, *_, inode = line.split()[1:10]
            if f"socket:[{inode}]" in sockets and state in ("0A", "07"):  # TCP's listening, UDP's unconnected
                yield address


def test_ranks_on_the_cpu_listen_on_no_port(model):
    """Any local user could connect to it, and abort the process with more connections than it may have."""
    others = set(sockets_of(os.getpid()))  # of other tests
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        tokens(llm)  # now rank 1 has all its sockets, too
        pids = os.getpid(), *(process.pid for process in llm.executor.processes)
        assert not [*listening(pids, others)]
        with socket.create_server(("127.0.0.1", 0)):
            assert len([*listening(pids, others)]) == 1  # such a port would be found


def test_kv_heads_are_replicated_where_there_are_more_ranks(tmp_path):
    path = save_tiny(tmp_path, "llama")  # a single KV head
    with LLM(path, **OPTIONS) as llm:
        want = tokens(llm)
    with LLM(path, tensor_parallel_size=2, **OPTIONS) as llm:
        assert tokens(llm) == want


def test_two_engines_of_two_ranks(model, want):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as one, LLM(model, tensor_parallel_size=2, **OPTIONS) as two:
        assert tokens(one) == tokens(two) == want


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_rank_is_a_clear_error_in_seconds(model, want, how):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        (process,) = llm.executor.processes
        assert tokens(llm) == want
        llm.add_request(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
        llm.step()
        os.kill(process.pid, how)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 1"):
            while llm.has_unfinished():
                llm.step()
        assert time.monotonic() - start < SOON
        with pytest.raises(RuntimeError, match="has failed"):
            llm.generate(PROMPTS)
    assert gone([process.pid])
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:  # and a new start is clean
        assert tokens(llm) == want


def rank_of(parent):
    """The process of a rank that `parent` has just started."""
    while parent.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # threads and children come and go
            for children in Path(f"/proc/{parent.pid}/task").glob("*/children"):
                for pid in map(int, children.read_text().split()):
                    if b"runner.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return pid
        time.sleep(0.01)
    raise AssertionError("the parent has ended before")


def test_a_parent_killed_while_ranks_start_leaves_nothing(model, tmp_path):
    script = f"from nanovllm import LLM; LLM({str(model)!r}, tensor_parallel_size=2)"
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment() | {"TMPDIR": str(tmp_path)})
    pid = rank_of(parent)
    parent.kill()
    parent.wait()
    assert gone([pid]) and not [*tmp_path.iterdir()]


def test_ranks_import_nothing_from_the_working_folder(model, want, tmp_path):
    (tmp_path / "queue.py").write_text("raise SystemExit('not the standard library')")
    script = tmp_path / "scripts" / "mine.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    arguments = [str(model), json.dumps(OPTIONS), json.dumps(PROMPTS[:1])]
    command = [sys.executable, str(script), *arguments]
    environment = dict(os.environ, PYTHONPATH=os.getcwd())
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert f"tokens {want[:1]}" in done.stdout, done.stderr


def test_a_rank_that_crashes_says_where(model, capfd):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        tokens(llm)  # rank 0 may be ready while rank 1 still builds its runner
        os.kill(llm.executor.processes[0].pid, signal.SIGSEGV)
        with pytest.raises(RuntimeError, match=r"rank 1 .* signal 11"):
            tokens(llm)
    assert re.search(r"Segmentation fault(.|\n)*worker\.py.* in serve", capfd.readouterr().err)


def test_ranks_need_nowhere_to_tell_errors(model, want, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    command = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, str(script)]
    command += [str(model), json.dumps(OPTIONS), json.dumps(PROMPTS[:1])]
    environment = dict(os.environ, PYTHONPATH=os.getcwd())
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=300)
    assert f"tokens {want[:1]}" in done.stdout


def test_ranks_know_no_classes_of_the_caller(model, want):
    class Text(str):
        __slots__ = ()

    class Params(SamplingParams):
        pass

    with LLM(Text(model), tensor_parallel_size=2, **{**OPTIONS, "dtype": Text("float32")}) as llm:
        params = Params(
            temperature=0.0,
            max_tokens=12,
            ignore_eos=True,
            cache_salt=Text("mine"),
            logprobs_mode=Text("raw_logprobs"),
            bad_words=(),
        )
        assert tokens(llm, PROMPTS[:1], params) == want[:1]
        assert llm.update_weights(
            (Text(name), tensor) for name, tensor in load_file(model / "model.safetensors").items()
        )
        assert tokens(llm, PROMPTS[:1], params) == want[:1]


def test_python_may_be_started_by_a_wrapper(model, want, tmp_path, monkeypatch):
    wrapper = tmp_path / "my python"
    wrapper.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        assert tokens(llm) == want


def test_a_rank_lost_while_weights_are_updated_is_a_clear_error(model):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        (process,) = llm.executor.processes
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"rank 1 .* signal 9"):
            llm.update_weights(model)
        with pytest.raises(RuntimeError, match="has failed and must be made anew"):
            llm.update_weights(model)


def test_the_error_names_the_rank_that_is_lost_and_not_those_that_fail_for_it(model):
    with LLM(model, tensor_parallel_size=4, **OPTIONS) as llm:
        process = llm.executor.processes[2]

        def weights():
            for i, pair in enumerate(load_file(model / "model.safetensors").items()):
                if i == 3:
                    process.kill()
                    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                yield pair

        with pytest.raises(RuntimeError, match=r"^tensor-parallel rank 3 .* signal 9$"):
            llm.update_weights(weights())


def test_a_lost_rank_comes_before_reports_of_others():
    """Its loss may show only after their reports."""
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    ours, theirs = Pipe()
    with ours, theirs, contextlib.ExitStack() as stack:
        for child in children:
            stack.callback(child.wait)
            stack.callback(child.kill)
        theirs.send("Traceback: connection closed by peer")
        waits = []

        def wait(seconds):
            waits.append(seconds)
            children[1].kill()
            os.waitid(os.P_PID, children[1].pid, os.WEXITED | os.WNOWAIT)

        ranks = SimpleNamespace(
            processes=children, channels=[ours, theirs], reports={}, closing=SimpleNamespace(wait=wait)
        )
        ranks._end_of = lambda *arguments: SpawnedRanks._end_of(ranks, *arguments)
        failure = SpawnedRanks._failure(ranks)
        assert waits and "rank 2" in failure and "signal 9" in failure


def test_a_second_interrupt_while_weights_are_sent_ends_the_engine(model, monkeypatch):
    """The ranks wait for different things then."""
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        (process,) = llm.executor.processes
        monkeypatch.setattr(TensorParallel, "broadcast", fail)
        with pytest.raises(KeyboardInterrupt):
            llm.update_weights(model)
        with pytest.raises(RuntimeError, match="has failed and must be made anew"):
            llm.update_weights(model)
    assert not alive(process.pid)


def test_an_interrupted_close_ends_the_collectives(model):
    llm, ended = LLM(model, tensor_parallel_size=2, **OPTIONS), []
    llm.add_request(PROMPTS[0], PARAMS[0])
    llm.step()
    (process,), end = llm.executor.processes, llm.executor._end_collectives
    llm.executor.runner.collect = fail
    llm.executor._end_collectives = lambda: ended.append(end())
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    assert ended and not alive(process.pid)


def test_close_goes_on_where_it_was_interrupted(model, monkeypatch):
    llm = LLM(model, tensor_parallel_size=2, **OPTIONS)
    (process,) = llm.executor.processes
    with monkeypatch.context() as patch:
        patch.setattr(SpawnedRanks, "close", fail)
        with pytest.raises(KeyboardInterrupt):
            llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate(PROMPTS)
    llm.close()
    assert not alive(process.pid)


def fail(*_):
    raise KeyboardInterrupt("in the middle of close")  # or what CUDA says once it has failed


def is_closed(end):
    return end.closed if isinstance(end, Connection) else end.fileno() < 0


def test_a_close_that_fails_leaves_nothing(model):
    llm = LLM(model, tensor_parallel_size=2, **OPTIONS)
    (process,), ends = llm.executor.processes, [*llm.executor.channels, *llm.executor.pipes]
    llm.executor._failure = lambda *_: None  # the monitor is not to end it first
    os.kill(process.pid, signal.SIGSTOP)  # it will not end by itself
    llm.executor._end_collectives = fail
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    assert not alive(process.pid) and len(ends) == 2 and all(map(is_closed, ends))
    del llm.executor._end_collectives
    llm.close()


def test_a_monitor_that_looks_while_ranks_are_closed_sees_no_failure(model):
    def late(*arguments):
        looking.set()
        assert closed.wait(SOON)
        return failure(*arguments)

    looking, closed = threading.Event(), threading.Event()
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        ranks, failure = llm.executor, llm.executor._failure
        ranks._failure = late
        assert looking.wait(SOON)
    closed.set()
    ranks.monitor.join(SOON)
    assert not ranks.monitor.is_alive() and ranks.error is None


def test_what_a_slow_monitor_has_to_tell_is_waited_for(monkeypatch):
    def sleep(seconds):
        clock.append(clock[-1] + 1)
        ranks.looks = clock[-1] // 20
        ranks.error = "rank 1 is gone" if clock[-1] == 39 else None

    clock = [15]
    ranks = SimpleNamespace(error=None, looks=0, monitor=SimpleNamespace(is_alive=lambda: clock[-1] < 100))
    monkeypatch.setattr(spawned, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[-1]))
    SpawnedRanks._await_news(ranks)
    assert ranks.error and clock[-1] == 39
    SpawnedRanks._await_news(ranks)  # there is no need
    assert clock[-1] == 39


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_other_ranks_are_ended_even_if_this_one_s_gpu_fails(model, monkeypatch):
    with LLM(model, tensor_parallel_size=4, **OPTIONS) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(TensorParallel, "stop", fail)
            pids = [process.pid for process in llm.executor.processes]
            os.kill(pids[0], signal.SIGKILL)
            assert gone(pids)
            llm.executor.monitor.join(SOON)  # its error is this test's, and this patch for it
        with pytest.raises(RuntimeError, match=r"rank 1 .* signal 9"):
            tokens(llm)


def test_a_rank_that_dies_before_it_joins_is_a_clear_error_in_seconds(model, monkeypatch):
    spawn, processes = SpawnedRanks._spawn, []

    def spawn_and_kill(self, rank, size):
        spawn(self, rank, size)
        processes.append(self.processes[-1].pid)
        if rank == 3:
            self.processes[-1].kill()

    monkeypatch.setattr(SpawnedRanks, "_spawn", spawn_and_kill)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 3 .* signal 9"):
        LLM(model, tensor_parallel_size=4, **OPTIONS)
    assert time.monotonic() - start < SOON
    assert len(processes) == 3 and gone(processes)


def test_a_rank_that_dies_while_others_join_is_a_clear_error_in_seconds(model, monkeypatch):
    spawn, make_group, processes = SpawnedRanks._spawn, spawned.make_group, []

    def note(self, rank, size):
        spawn(self, rank, size)
        processes.append(self.processes[-1])

    def kill_and_join(*arguments):
        processes[0].kill()
        return make_group(*arguments)

    monkeypatch.setattr(SpawnedRanks, "_spawn", note)
    monkeypatch.setattr(spawned, "make_group", kill_and_join)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 .* signal 9"):
        LLM(model, tensor_parallel_size=2, **OPTIONS)
    assert time.monotonic() - start < SOON
    assert gone([processes[0].pid])


def test_a_group_that_fails_or_comes_too_late_is_ended(model, monkeypatch):
    def note(what):
        return lambda tp, *arguments: ended.append((what, tp.rank)) or closed.set()

    def with_peers(tp, *arguments):
        if late:
            threads.append(threading.current_thread())
            joining.set()
            assert closed.wait(SOON)
            return replace(tp)
        raise RuntimeError("no room for peers")

    def interrupted(self):
        if joining.is_set():
            raise KeyboardInterrupt

    ended, threads, joining, closed = [], [], threading.Event(), threading.Event()
    monkeypatch.setattr(TensorParallel, "abort", note("abort"))
    monkeypatch.setattr(TensorParallel, "close", note("close"))
    monkeypatch.setattr(TensorParallel, "with_peers", with_peers)
    late = False
    with pytest.raises(RuntimeError, match="no room for peers"):
        LLM(model, tensor_parallel_size=2, **OPTIONS)
    assert ended == [("abort", 0), ("close", 0)]
    late = True
    ended.clear()
    closed.clear()
    monkeypatch.setattr(SpawnedRanks, "check", interrupted)
    monkeypatch.setattr(SpawnedRanks, "_end_children", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        LLM(model, tensor_parallel_size=2, **OPTIONS)
    threads[0].join(SOON)
    assert ended == [("close", 0), ("abort", 0), ("close", 0)]  # what was there, then what came late


def test_a_worker_s_error_reaches_the_caller_with_its_traceback(model, monkeypatch):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        llm.executor.channels[0].send("not a batch")
        with pytest.raises(RuntimeError, match=r"rank 1 failed:\n.*Traceback"):
            while True:
                tokens(llm)


def test_tokens_of_a_step_that_the_monitor_ended_are_not_given():
    """On GPUs the wait for a step ends when the collectives are ended: what lies there then was never drawn."""
    failed = []

    def query():  # between two looks the monitor has ended the collectives
        failed.append("rank 1 is gone")
        return True

    def check():
        if failed:
            raise RuntimeError(*failed)

    runner = SimpleNamespace(tp=SimpleNamespace(size=2), check_ranks=check)
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        ModelRunner.wait(runner, SimpleNamespace(query=query, synchronize=lambda: None))


def test_each_rank_has_a_gpu_of_its_own_and_one_alone_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert rank_device("cuda", None) == torch.device("cuda", 1) and not chosen
    assert [rank_device("cuda", rank) for rank in range(2)] == chosen == [torch.device("cuda", i) for i in range(2)]
    with pytest.raises(ValueError, match="needs GPU 2, but torch sees 2"):
        rank_device("cuda", 2)


def test_heads_that_ranks_do_not_divide_are_refused(model):
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not fit"):
        LLM(model, tensor_parallel_size=3, **OPTIONS)


def test_the_pool_is_the_smallest_rank_s(model, tmp_path):
    """Ranks that have room for 100 and 63 blocks both take 63."""
    code = """
        import sys, torch, torch.distributed as dist
        from nanovllm.config import Config
        from nanovllm.runner import model_runner
        from nanovllm.checkpoints.hub import open_model
        from nanovllm.distributed.parallel import TensorParallel
        rank, path, model = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        tp = TensorParallel(rank, 2, dist.ProcessGroupGloo(dist.FileStore(path, 2), rank, 2))
        config, source = Config(model, device="cpu", max_model_len=64, kvcache_block_size=16), open_model(model, "auto")
        per_token = 2 * 4 * source.config.num_layers * source.config.num_kv_heads // 2 * source.config.head_dim
        model_runner.CPU_CACHE_BYTES = [100, 63][rank] * 16 * per_token
        print(model_runner.ModelRunner(config, source, tp, torch.device("cpu")).num_blocks)
    """
    path = str(tmp_path / "store")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(rank), path, str(model)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [int(rank.communicate(timeout=300)[0]) for rank in ranks] == [63, 63]


SCRIPT = """
import json, sys, time
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, **json.loads(sys.argv[2]))
processes = getattr(llm.executor, "processes", [])
sys.stdout.write(" ".join(["pids", *[str(p.pid) for p in processes]]) + "\\n")  # one write: ranks share the pipe
sys.stdout.flush()
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
outs = llm.generate(json.loads(sys.argv[3]), params, use_tqdm=False)
sys.stdout.write("tokens " + json.dumps([out.token_ids for out in outs]) + "\\n")
sys.stdout.flush()
if len(sys.argv) > 4:
    time.sleep(600)
scored = SamplingParams(seed=1, max_tokens=5, ignore_eos=True, n=2, logprobs=2, prompt_logprobs=1, logit_bias={5: 2.0})
scored = llm.generate(json.loads(sys.argv[3]), scored, use_tqdm=False)
summary = [[s.token_ids, round(s.cumulative_logprob, 3)] for out in scored for s in out.outputs]
summary += [round(sum(token.logprob for row in out.prompt_logprobs[1:] for token in row.values()), 3) for out in scored]
sys.stdout.write("scored " + json.dumps(summary) + "\\n")
llm.close()
"""


@pytest.fixture
def script(tmp_path, model):
    import json

    path = tmp_path / "script.py"  # without a __main__ guard: spawned ranks must not run it again
    path.write_text(SCRIPT)
    return [str(path), str(model), json.dumps(OPTIONS), json.dumps(PROMPTS[:2])]


def environment():
    return dict(os.environ, PYTHONPATH=os.getcwd())


def test_nothing_outlives_a_killed_parent(script, tmp_path):
    (temporary := tmp_path / "temporary").mkdir()
    options = dict(stdout=subprocess.PIPE, text=True, env=environment() | {"TMPDIR": str(temporary)})
    parent = subprocess.Popen([sys.executable, *script, "stay"], **options)
    pids = [int(pid) for pid in parent.stdout.readline().split()[1:]]
    assert pids and parent.stdout.readline().startswith("tokens")
    parent.kill()
    parent.wait()
    assert gone(pids) and not [*temporary.iterdir()]


def test_a_stopped_rank_does_not_outlive_its_killed_parent(script):
    parent = subprocess.Popen([sys.executable, *script, "stay"], stdout=subprocess.PIPE, text=True, env=environment())
    (pid,) = (int(pid) for pid in parent.stdout.readline().split()[1:])
    assert parent.stdout.readline().startswith("tokens")
    os.kill(parent.pid, signal.SIGSTOP)  # else it would end the stopped rank first
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    try:
        assert gone([pid])
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_ranks_outlive_the_thread_that_made_their_engine(model, want):
    with ThreadPoolExecutor(1) as threads:
        llm = threads.submit(LLM, model, tensor_parallel_size=2, **OPTIONS).result()
    with llm:
        assert tokens(llm) == want


def test_a_forked_child_can_neither_use_nor_end_its_parent_s_engine(model, want):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        child = os.fork()
        if child == 0:
            gc.disable()  # other tests' engines may still be garbage, and have threads that are not here
            try:
                with pytest.raises(RuntimeError, match="forked"):
                    tokens(llm)
                llm.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert tokens(llm) == want


def test_an_engine_that_is_not_closed_leaves_nothing_when_python_ends(model, tmp_path):
    code = f"""import sys; from nanovllm import LLM
sys.kept = LLM({str(model)!r}, tensor_parallel_size=2, **{OPTIONS})
sys.kept.generate([[5, 6]])"""
    environ = environment() | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not [*tmp_path.glob("nanovllm-*")]


def test_under_torchrun_every_rank_has_the_results(script, want):
    import json

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("tokens")]
    assert [json.loads(line.split(" ", 1)[1]) for line in lines] == [want[:2]] * 2
    lines = [line for line in done.stdout.splitlines() if line.startswith("scored")]
    assert len(lines) == 2 and lines[0] == lines[1]


@pytest.mark.parametrize("before", [None, "1"])
def test_a_variable_set_for_a_while_touches_no_other(before, monkeypatch):
    """Threads of native code read the environment meanwhile: emptied and filled again, it crashed them."""
    name, touched = "NANOVLLM_TEST", []
    monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
    monkeypatch.setattr(os, "putenv", lambda key, value: touched.append(key))
    monkeypatch.setattr(os, "unsetenv", touched.append)
    with spawned.environment_variable(name, "0"):
        assert os.environ[name] == "0"
    assert os.environ.get(name) == before
    assert set(touched) == {name.encode()}


def test_two_threads_may_have_a_variable_set(monkeypatch):
    """As engines that start at once: each has it to the end of its while, and none is left behind."""
    name, seen, left = "NANOVLLM_TEST", [], threading.Event()
    monkeypatch.delenv(name, raising=False)

    def other():
        with spawned.environment_variable(name, "0"):
            left.wait(60)
            seen.append(os.environ.get(name))

    thread = threading.Thread(target=other)
    with spawned.environment_variable(name, "0"):
        thread.start()
        thread.join(0.2)
    left.set()
    thread.join(60)
    assert seen == ["0"] and name not in os.environ
