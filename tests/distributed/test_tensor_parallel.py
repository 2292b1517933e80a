"""Tensor-parallel ranks as processes on the CPU: the tokens of one rank, clear errors, nothing left behind."""

import contextlib
import errno
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
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.executor import spawned
from nanovllm.executor.channels import RankChannels
from nanovllm.executor.spawned import SpawnedExecutor
from nanovllm.runner.model_runner import ModelRunner
from tests.helpers import SOON, all_end, is_alive, open_files, rank_pids, threads_end, wait_until
from tests.models.tiny import save_tiny

OPTIONS = dict(device="cpu", kvcache_block_size=16, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32)
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


def test_two_ranks_return_the_tokens_of_one_and_listen_on_no_port(model, want):
    """Any local user could connect to a port, and abort the process with more connections than it may have."""
    files_of_other_tests = open_files(os.getpid())
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        (pid,) = rank_pids()
        # A batch of three sequences with chunked prefill, then a batch of one.
        assert tokens(llm) == want
        assert tokens(llm, PROMPTS[:1], PARAMS[:1]) == want[:1]
        # After a step rank 1 has all its sockets too.
        assert not listening([os.getpid(), pid], files_of_other_tests)
        with socket.create_server(("127.0.0.1", 0)):
            # Such a port would be found.
            assert len(listening([os.getpid(), pid], files_of_other_tests)) == 1
    assert all_end([pid])


def test_four_ranks_return_the_tokens_of_one(tmp_path):
    """The layers have Gated DeltaNet or attention, and an MLP or experts."""
    path = save_tiny(tmp_path, "qwen3-next", num_key_value_heads=4)
    with LLM(path, **OPTIONS) as llm:
        want = tokens(llm)
    with LLM(path, tensor_parallel_size=4, **OPTIONS) as llm:
        pids = rank_pids()
        assert len(pids) == 3
        assert tokens(llm) == want
    assert all_end(pids)


def test_dummy_weights_are_the_same_on_several_ranks(model, want):
    with LLM(model, load_format="dummy", **OPTIONS) as llm:
        dummy = tokens(llm)
    with LLM(model, load_format="dummy", tensor_parallel_size=2, **OPTIONS) as llm:
        assert tokens(llm) == dummy != want


@pytest.fixture
def rank_startup(tmp_path, monkeypatch):
    """Return a function that makes Python run some code when a rank starts, before anything else."""

    def run_first(code):
        (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return run_first


def test_large_messages_reach_a_slow_rank(tmp_path, monkeypatch, rank_startup):
    path = save_tiny(tmp_path, "qwen2", vocab_size=140_000, num_hidden_layers=1)
    options = {**OPTIONS, "max_num_seqs": 64, "max_num_batched_tokens": 64}
    prompts = [[i + 1] for i in range(64)]
    allowed = [SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[i, i + 70_000]) for i in range(64)]
    with LLM(path, **options) as llm:
        want = tokens(llm, prompts, allowed)
    rank_startup(
        """
        import time
        from multiprocessing.connection import Connection
        receive = Connection.recv
        Connection.recv = lambda self: time.sleep(0.3) or receive(self)
        """
    )
    send, sizes = RankChannels.send, []

    def measure_and_send(channels, *message):
        sizes.append(len(ForkingPickler.dumps(message)))
        send(channels, *message)

    with LLM(path, tensor_parallel_size=2, **options) as llm:
        monkeypatch.setattr(RankChannels, "send", measure_and_send)
        start = time.monotonic()
        assert tokens(llm, prompts, allowed) == want
        assert max(sizes) > 1 << 20
        # Two steps may be in flight before rank 1 has received them.
        assert time.monotonic() - start > 0.3 * (len(sizes) - 2)


def listening(pids, ignored=frozenset()):
    """Return the addresses on which these processes listen, except through the sockets `ignored`."""
    sockets = set()
    for pid in pids:
        sockets |= open_files(pid) - ignored
    addresses = []
    for file in ("/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp", "/proc/net/udp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            fields = line.split()
            address, state, inode = fields[1], fields[3], fields[9]
            # The states are TCP's "listening" and UDP's "unconnected".
            if f"socket:[{inode}]" in sockets and state in ("0A", "07"):
                addresses.append(address)
    return addresses


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("olmo3", {"num_key_value_heads": 1})])
def test_more_ranks_than_kv_heads_replicate_the_heads(tmp_path, name, options):
    """These models have a single KV head. The second one norms it, and has a window and norms of outputs."""
    path = save_tiny(tmp_path, name, **options)
    with LLM(path, **OPTIONS) as llm:
        want = tokens(llm)
    with LLM(path, tensor_parallel_size=2, **OPTIONS) as llm:
        assert tokens(llm) == want


def test_two_engines_of_two_ranks_live_side_by_side(model, want):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as one, LLM(model, tensor_parallel_size=2, **OPTIONS) as two:
        assert tokens(one) == tokens(two) == want


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_rank_raises_a_clear_error_in_seconds(model, want, number):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        (pid,) = rank_pids()
        assert tokens(llm) == want
        llm.add_request(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
        llm.step()
        os.kill(pid, number)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 1"):
            while llm.has_unfinished():
                llm.step()
        assert time.monotonic() - start < SOON
        with pytest.raises(RuntimeError, match="has failed"):
            llm.generate(PROMPTS)
    assert all_end([pid])
    if number == signal.SIGKILL:
        # A new engine is not affected.
        with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
            assert tokens(llm) == want


def test_a_killed_rank_is_noticed_although_another_process_has_a_copy_of_its_sockets(model, monkeypatch):
    """As a process that the caller forks while the rank starts."""
    copies = []

    @contextlib.contextmanager
    def connect(channels):
        with original(channels) as descriptors:
            copies.extend(map(os.dup, descriptors))
            yield descriptors

    original = RankChannels.connect
    monkeypatch.setattr(RankChannels, "connect", connect)
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        llm.add_request(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
        llm.step()
        os.kill(*rank_pids(), signal.SIGKILL)
        with pytest.raises(RuntimeError, match="rank 1"):
            while llm.has_unfinished():
                llm.step()
    for descriptor in copies:
        os.close(descriptor)


def test_signals_to_all_processes_of_a_job_end_no_rank(model, want):
    """Slurm and systemd send them. The program may have a handler that lets it finish its work."""
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(*rank_pids(), number)
        assert tokens(llm) == want


def test_a_parent_killed_while_ranks_start_leaves_nothing(model, tmp_path):
    script = f"from nanovllm import LLM; LLM({str(model)!r}, tensor_parallel_size=2)"
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment() | {"TMPDIR": str(tmp_path)})
    assert wait_until(lambda: rank_pids(parent.pid) or parent.poll() is not None)
    pids = rank_pids(parent.pid)
    assert pids, "the parent ended before it started a rank"
    parent.kill()
    parent.wait()
    assert all_end(pids) and not list(tmp_path.iterdir())


def test_ranks_import_nothing_from_the_working_folder_and_leave_nothing_if_not_closed(model, want, tmp_path):
    for name in ("work", "scripts", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "queue.py").write_text("raise SystemExit('not the standard library')")
    (script := tmp_path / "scripts" / "mine.py").write_text(f"""import sys; from nanovllm import LLM, SamplingParams
sys.kept = LLM({str(model)!r}, tensor_parallel_size=2, **{OPTIONS})
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
print("tokens", [out.token_ids for out in sys.kept.generate({PROMPTS[:1]}, params)])""")
    options = dict(cwd=tmp_path / "work", env=environment() | {"TMPDIR": str(tmp_path / "temporary")}, timeout=300)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, **options)
    assert done.returncode == 0 and f"tokens {want[:1]}" in done.stdout, done.stderr
    assert not [*(tmp_path / "temporary").glob("nanovllm-*")]


def test_a_rank_that_crashes_prints_where(model, capfd):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        # Rank 0 may be ready while rank 1 still builds its runner.
        tokens(llm)
        os.kill(*rank_pids(), signal.SIGSEGV)
        with pytest.raises(RuntimeError, match=r"rank 1 .* signal 11"):
            tokens(llm)
    assert re.search(r"Segmentation fault(.|\n)*worker\.py.* in serve", capfd.readouterr().err)


def test_ranks_run_without_standard_input_and_error(model, want, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    command = ["sh", "-c", 'exec "$0" "$@" 0<&- 2>&-', sys.executable, str(script)]
    command += [str(model), json.dumps(OPTIONS), json.dumps(PROMPTS[:1])]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, timeout=300)
    assert f"tokens {want[:1]}" in done.stdout


def test_ranks_need_no_classes_of_the_caller(model, want):
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


def test_ranks_start_through_a_wrapper_of_python_and_in_an_outside_world_if_told_to(model, want, tmp_path, monkeypatch):
    wrapper = tmp_path / "my python"
    wrapper.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with LLM(model, tensor_parallel_size=2, distributed_executor_backend="mp", **OPTIONS) as llm:
        assert len(rank_pids()) == 1 and tokens(llm) == want


def test_a_rank_lost_before_an_update_of_weights_raises_a_clear_error(model):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        os.kill(*rank_pids(), signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"rank 1 .* signal 9"):
            llm.update_weights(model)
        with pytest.raises(RuntimeError, match="the engine has failed; make a new one"):
            llm.update_weights(model)


def test_the_error_names_the_lost_rank_and_not_those_that_fail_because_of_it(model):
    with LLM(model, tensor_parallel_size=4, **OPTIONS) as llm:
        pid = rank_pids()[2]

        def weights():
            for i, pair in enumerate(load_file(model / "model.safetensors").items()):
                if i == 3:
                    os.kill(pid, signal.SIGKILL)
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                yield pair

        with pytest.raises(RuntimeError, match=r"^tensor-parallel rank 3 .* signal 9$"):
            llm.update_weights(weights())


def test_a_second_interrupt_while_weights_are_sent_ends_the_engine(model, monkeypatch):
    """The ranks wait for different things afterwards."""
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        pids = rank_pids()
        monkeypatch.setattr(TensorParallel, "broadcast", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.update_weights(model)
        with pytest.raises(RuntimeError, match="the engine has failed; make a new one"):
            llm.update_weights(model)
    assert not any(map(is_alive, pids))


def test_an_interrupted_close_aborts_the_collectives(model, monkeypatch):
    abort, aborted = TensorParallel.abort, []

    def note_and_abort(tp, free_graphs):
        aborted.append(tp.rank)
        abort(tp, free_graphs)

    monkeypatch.setattr(TensorParallel, "abort", note_and_abort)
    llm = LLM(model, tensor_parallel_size=2, **OPTIONS)
    llm.add_request(PROMPTS[0], PARAMS[0])
    llm.step()
    pids = rank_pids()
    llm.llm_engine.executor.runner.collect = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    assert aborted and not any(map(is_alive, pids))


def test_an_interrupted_close_can_be_called_again(model, monkeypatch):
    llm = LLM(model, tensor_parallel_size=2, **OPTIONS)
    pids = rank_pids()
    with monkeypatch.context() as patch:
        patch.setattr(SpawnedExecutor, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate(PROMPTS)
    llm.close()
    assert pids and not any(map(is_alive, pids))


def interrupt(*_):
    """Raise what Ctrl-C does, in place of a call."""
    raise KeyboardInterrupt


def test_a_close_that_fails_leaves_nothing(model, monkeypatch, rank_startup):
    # The rank stops instead of ending by itself. Rank 0 no longer watches it by then.
    rank_startup(
        """
        import os, signal
        from multiprocessing.connection import Connection
        receive = Connection.recv
        def stop_at_close(self):
            message = receive(self)
            if message == ("close",):
                os.kill(os.getpid(), signal.SIGSTOP)
            return message
        Connection.recv = stop_at_close
        """
    )
    before = open_files(os.getpid())
    llm = LLM(model, tensor_parallel_size=2, **OPTIONS)
    pids = rank_pids()
    assert len(channel_files(before)) >= 4
    with monkeypatch.context() as patch:
        patch.setattr(TensorParallel, "abort", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.close()
    assert pids and not any(map(is_alive, pids))
    assert wait_until(lambda: not channel_files(before))
    llm.close()


def channel_files(before):
    """Return the sockets, pipes and files in memory that this process has opened since `before`."""
    kinds = ("socket:", "pipe:", "/memfd:nanovllm")
    return [name for name in open_files(os.getpid()) - before if name.startswith(kinds)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_other_ranks_end_even_if_the_gpu_of_this_one_fails(model, monkeypatch):
    with LLM(model, tensor_parallel_size=4, **OPTIONS) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(TensorParallel, "stop", interrupt)
            pids = rank_pids()
            os.kill(pids[0], signal.SIGKILL)
            assert all_end(pids)
            # The thread ends with this test's error, which must come while the patch is there.
            assert threads_end("nanovllm-monitor")
        with pytest.raises(RuntimeError, match=r"rank 1 .* signal 9"):
            tokens(llm)


def test_a_rank_that_dies_before_it_joins_raises_a_clear_error_in_seconds(model, monkeypatch):
    popen, pids = subprocess.Popen, []

    def start_and_kill_the_third(*arguments, **options):
        process = popen(*arguments, **options)
        pids.append(process.pid)
        if len(pids) == 3:
            process.kill()
        return process

    monkeypatch.setattr(subprocess, "Popen", start_and_kill_the_third)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 3 .* signal 9"):
        LLM(model, tensor_parallel_size=4, **OPTIONS)
    assert time.monotonic() - start < SOON
    assert len(pids) == 3 and all_end(pids)


def test_a_rank_that_dies_while_others_join_raises_a_clear_error_in_seconds(model, monkeypatch):
    make_group, pids = spawned.make_group, []

    def kill_and_join(*arguments):
        pids.extend(rank_pids())
        os.kill(pids[0], signal.SIGKILL)
        return make_group(*arguments)

    monkeypatch.setattr(spawned, "make_group", kill_and_join)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 .* signal 9"):
        LLM(model, tensor_parallel_size=2, **OPTIONS)
    assert time.monotonic() - start < SOON
    assert len(pids) == 1 and all_end(pids)


@pytest.fixture
def ended_groups(monkeypatch):
    """Record the calls of `TensorParallel.abort` and `close` as pairs of a name and a group."""
    calls = []
    monkeypatch.setattr(TensorParallel, "abort", lambda tp, free_graphs: calls.append(("abort", tp)))
    monkeypatch.setattr(TensorParallel, "close", lambda tp: calls.append(("close", tp)))
    return calls


@pytest.mark.parametrize(
    ("module", "name", "calls"), [(os, "memfd_create", 0), (socket, "socketpair", 1), (socket, "socketpair", 3)]
)
def test_ranks_without_free_descriptors_raise_a_clear_error_and_leave_nothing(model, monkeypatch, module, name, calls):
    """`Pipe` makes a pair of sockets of each rank, and then the executor makes another."""
    function, called = getattr(module, name), []

    def fail(*arguments):
        called.append(arguments)
        if len(called) > calls:
            raise OSError(errno.EMFILE, "Too many open files")
        return function(*arguments)

    gc.collect()
    before = open_files(os.getpid())
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(RuntimeError, match=r"tensor-parallel rank.* cannot be .*Too many open files") as caught:
        LLM(model, **OPTIONS, tensor_parallel_size=4)
    assert threads_end("nanovllm-monitor") and not rank_pids()
    assert not open_files(os.getpid()) - before, caught  # although the error still refers to its frames


def test_a_group_that_fails_to_share_memory_is_ended(model, monkeypatch, ended_groups):
    def fail(*_):
        raise RuntimeError("no room for peers")

    monkeypatch.setattr(TensorParallel, "with_peers", fail)
    with pytest.raises(RuntimeError, match="no room for peers"):
        LLM(model, tensor_parallel_size=2, **OPTIONS)
    assert [name for name, _ in ended_groups] == ["abort", "close"]


def test_a_group_that_is_made_after_an_interrupt_is_ended(model, monkeypatch, ended_groups):
    late_groups, threads = [], []

    def share_memory_after_an_interrupt(tp, *_):
        threads.append(threading.current_thread())
        os.kill(os.getpid(), signal.SIGINT)
        # The main thread closes the engine meanwhile.
        assert wait_until(lambda: any(name == "close" for name, _ in ended_groups))
        late_groups.append(replace(tp))
        return late_groups[0]

    monkeypatch.setattr(TensorParallel, "with_peers", share_memory_after_an_interrupt)
    with pytest.raises(KeyboardInterrupt):
        LLM(model, tensor_parallel_size=2, **OPTIONS)
    threads[0].join(SOON)
    assert [name for name, _ in ended_groups] == ["abort", "close", "abort", "close"]
    assert [group is late_groups[0] for _, group in ended_groups] == [False, False, True, True]


def test_a_rank_s_error_reaches_the_caller_with_its_traceback(model):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        llm.llm_engine.executor.channels.send("no_method_of_a_runner")
        with pytest.raises(RuntimeError, match=r"rank 1 failed:\n.*Traceback(.|\n)*no_method_of_a_runner"):
            while True:
                tokens(llm)


def test_tokens_of_a_step_whose_collectives_were_aborted_are_not_returned():
    """On GPUs the abort ends the wait for the step, but the tokens were never sampled."""
    failed = []

    def abort_and_finish():
        # The monitor aborts the collectives just before the step's event is queried.
        failed.append("rank 1 is gone")
        return True

    def check():
        if failed:
            raise RuntimeError(failed[0])

    runner = SimpleNamespace(tp=SimpleNamespace(size=2), check_ranks=check)
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        ModelRunner.wait(runner, SimpleNamespace(query=abort_and_finish, synchronize=lambda: None))


def test_a_number_of_ranks_that_does_not_divide_the_heads_of_linear_attention_is_refused(tmp_path):
    path = save_tiny(tmp_path, "qwen3.5", linear_num_key_heads=1)
    with pytest.raises(ValueError, match="size=2 does not divide the model's linear_num_key_heads=1"):
        LLM(path, tensor_parallel_size=2, **OPTIONS)


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused(model):
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not fit"):
        LLM(model, tensor_parallel_size=3, **OPTIONS)


def test_the_kv_pool_has_the_size_of_the_smallest_rank_s(model, tmp_path):
    """Ranks that have room for 100 and 63 blocks both take 63."""
    code = """
        import sys, torch, torch.distributed as dist
        from nanovllm.config import Config
        from nanovllm.runner import model_runner
        from nanovllm.checkpoints.model_source import open_model
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
from tests.helpers import rank_pids
llm = LLM(sys.argv[1], tensor_parallel_size=2, **json.loads(sys.argv[2]))
# Each line is one write, as the ranks of torchrun share the pipe.
sys.stdout.write(" ".join(["pids", *map(str, rank_pids())]) + "\\n")
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
    # It has no __main__ guard: spawned ranks must not run it again.
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return [str(path), str(model), json.dumps(OPTIONS), json.dumps(PROMPTS[:2])]


def environment():
    """Return an environment in which scripts anywhere can import this repository."""
    return dict(os.environ, PYTHONPATH=os.getcwd())


def test_nothing_outlives_a_killed_parent(script, tmp_path):
    (temporary := tmp_path / "temporary").mkdir()
    options = dict(stdout=subprocess.PIPE, text=True, env=environment() | {"TMPDIR": str(temporary)})
    parent = subprocess.Popen([sys.executable, *script, "stay"], **options)
    pids = [int(pid) for pid in parent.stdout.readline().split()[1:]]
    assert pids and parent.stdout.readline().startswith("tokens")
    parent.kill()
    parent.wait()
    assert all_end(pids) and not [*temporary.iterdir()]


def test_a_stopped_rank_does_not_outlive_its_killed_parent(script):
    parent = subprocess.Popen([sys.executable, *script, "stay"], stdout=subprocess.PIPE, text=True, env=environment())
    (pid,) = (int(pid) for pid in parent.stdout.readline().split()[1:])
    assert parent.stdout.readline().startswith("tokens")
    # Otherwise the parent would end the stopped rank first.
    os.kill(parent.pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    try:
        assert all_end([pid])
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_ranks_outlive_the_thread_that_made_their_engine_and_work_with_a_default_timeout_for_sockets(model, want):
    socket.setdefaulttimeout(30)
    try:
        with ThreadPoolExecutor(1) as threads:
            llm = threads.submit(LLM, model, tensor_parallel_size=2, **OPTIONS).result()
        with llm:
            assert tokens(llm) == want
    finally:
        socket.setdefaulttimeout(None)


def test_a_forked_child_can_neither_use_nor_end_its_parent_s_engine(model, want):
    with LLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
        child = os.fork()
        if child == 0:
            # Engines of other tests may still be garbage, and their threads do not exist in this process.
            gc.disable()
            try:
                with pytest.raises(RuntimeError, match="forked"):
                    tokens(llm)
                llm.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert tokens(llm) == want


def test_under_torchrun_every_rank_has_the_results(script, want):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("tokens")]
    assert [json.loads(line.split(" ", 1)[1]) for line in lines] == [want[:2]] * 2
    lines = [line for line in done.stdout.splitlines() if line.startswith("scored")]
    assert len(lines) == 2 and lines[0] == lines[1]


TRAINER = """
import json, os, sys
import torch.distributed as dist
from safetensors.torch import load_file
from nanovllm import LLM, SamplingParams
dist.init_process_group("gloo")
rank, (old, new, options, prompts) = dist.get_rank(), sys.argv[1:]
prompts = json.loads(prompts)
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
def tokens():
    return [out.token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
llm = LLM(old, tensor_parallel_size=2, distributed_executor_backend="external_launcher", enable_sleep_mode=True,
          **json.loads(options))
result = [tokens()]
# The two engines do different work: neither waits for the other.
for _ in range(rank // 2 * 3):
    tokens()
llm.sleep(level=2)
dist.barrier()
llm.wake_up(tags=["weights"])
for name, tensor in load_file(f"{new if rank < 2 else old}/model.safetensors").items():
    llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights([(name, tensor)])
llm.reset_prefix_cache()
llm.wake_up(tags=["kv_cache"])
result.append(tokens())
llm.close()
with LLM(old, tensor_parallel_size=2, **json.loads(options)) as llm:
    result.append(tokens())
sys.stdout.write(json.dumps([rank, result]) + "\\n")
sys.stdout.flush()
dist.barrier()
dist.destroy_process_group()
"""


def test_two_engines_of_two_ranks_share_a_world_of_four(model, want, tmp_path):
    """TRL's trainer does this with colocated engines."""
    other = save_tiny(tmp_path / "other", "qwen2", seed=1)
    with LLM(other, **OPTIONS) as llm:
        want_of_other = tokens(llm, PROMPTS[:2], PARAMS[:2])
    (path := tmp_path / "trainer.py").write_text(TRAINER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(path)]
    command += [str(model), str(other), json.dumps(OPTIONS), json.dumps(PROMPTS[:2])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    results = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    for rank in range(4):
        assert results[rank] == [want[:2], want_of_other if rank < 2 else want[:2], want[:2]], rank


def test_ranks_of_an_outside_world_need_one_that_fits(model, monkeypatch):
    external = {**OPTIONS, "tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    with pytest.raises(ValueError, match="'external_launcher' needs torchrun"):
        LLM(model, **external)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 must divide the world size, 3"):
        LLM(model, **external)
