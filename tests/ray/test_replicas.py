"""Replicas give one engine's results, whatever happens to them."""

import asyncio
import json
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, RequestOutputKind, SamplingParams
from nanovllm.ray import Replicas
from nanovllm.ray.actor import _unpack, pack
from nanovllm.ray.request import Replica, Request
from tests.helpers import SOON, all_end, greedy, rank_pids, sampled, wait_until
from tests.models.test_model_source import FakeHub
from tests.models.tiny import save_tiny
from tests.ray.conftest import OPTIONS
from tests.ray.helpers import all_run, kill, make_replicas, mixed_requests, pid_of, samples, set_step_time, stop_after

pytestmark = pytest.mark.xdist_group("ray")

CHATS = [[{"role": "user", "content": f"Hello {i}"}] for i in range(5)]


@pytest.fixture(scope="module")
def replicas(cluster, model):
    """Two replicas whose weights do not change. Tests may kill them."""
    with make_replicas(model, max_restarts=1000) as replicas:
        yield replicas


# -- equal to one engine -----------------------------------------------------------------------------------------------


def test_replicas_give_the_results_of_one_engine_in_order(replicas, one):
    prompts, params = mixed_requests(60)
    outputs = replicas.generate(prompts, params, use_tqdm=False)
    assert samples(outputs) == samples(one.generate(prompts, params, use_tqdm=False))
    assert len({output.request_id for output in outputs}) == 60
    assert [output.prompt for output in outputs[1::2]] == prompts[1::2]
    metrics = ray.get([replica.actor.metrics.remote() for replica in replicas._replicas])
    assert all(each.generated_tokens for each in metrics)
    summed = replicas.metrics()
    assert summed.generated_tokens == sum(each.generated_tokens for each in metrics)
    assert (summed.num_running, summed.num_waiting) == (0, 0)


def test_chats_and_streams_are_those_of_one_engine(replicas, one):
    params = sampled(12, seed=5)
    assert samples(replicas.chat(CHATS, params, use_tqdm=False)) == samples(one.chat(CHATS, params, use_tqdm=False))
    (want,) = one.chat(CHATS[0], params, use_tqdm=False)
    (found,) = replicas.chat(CHATS[0], params, use_tqdm=False)
    assert samples([found]) == samples([want]) and found.prompt == want.prompt

    async def read(i):
        return [output async for output in replicas.stream(f"Stream {i}", params)]

    async def read_all():
        return await asyncio.gather(*map(read, range(4)))

    wants = one.generate([f"Stream {i}" for i in range(4)], params, use_tqdm=False)
    for outputs, want in zip(asyncio.run(read_all()), wants, strict=True):
        assert [token_id for output in outputs for token_id in output.token_ids] == want.token_ids
        assert "".join(output.text for output in outputs) == want.text
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_outputs_of_a_stream_share_its_prompt_and_are_sent_without_it(replicas, one):
    params = greedy(200, prompt_logprobs=2)  # so many that not all come as one
    (want,) = one.generate("A stream", params, use_tqdm=False)
    sent = []

    async def read():
        return [output async for output in replicas.stream("A stream", params)]

    receive = replicas._receive
    replicas._receive = lambda replica, items: (sent.extend(items), receive(replica, items))
    outputs = asyncio.run(read())
    del replicas._receive
    assert len(outputs) > 1 and outputs[0].prompt_logprobs == want.prompt_logprobs
    for output in outputs:
        assert (output.prompt, output.prompt_token_ids) == ("A stream", want.prompt_token_ids)
        assert output.prompt_token_ids is outputs[0].prompt_token_ids
        assert output.prompt_logprobs is outputs[0].prompt_logprobs
    assert [len(output.prompt_token_ids) for _, output in sent[1:]] == [0] * (len(sent) - 1)


def test_equal_prompts_without_seeds_get_different_samples(replicas):
    outputs = replicas.generate(["The same"] * 8, sampled(12), use_tqdm=False)
    assert len({tuple(output.token_ids) for output in outputs}) == 8


def test_leaving_a_stream_ends_its_request(replicas):
    async def leave():
        async for _ in replicas.stream("Long", greedy(400)):
            break

    before = replicas.metrics().generated_tokens
    for replica in replicas._replicas:
        set_step_time(replica, 0.1)
    asyncio.run(leave())
    assert wait_until(lambda: replicas.metrics().num_running == 0)
    assert replicas.metrics().generated_tokens < before + 400
    for replica in replicas._replicas:
        set_step_time(replica, 0)


def test_streams_that_are_left_at_once_hold_no_replica(replicas):
    async def leave(delay):
        first = asyncio.ensure_future(anext(replicas.stream("Long", greedy(400))))
        await asyncio.sleep(delay)
        first.cancel()
        await asyncio.wait([first])

    before = replicas.metrics().generated_tokens
    for replica in replicas._replicas:
        set_step_time(replica, 0.1)
    for delay in (0, 0.001, 0.002, 0.004, 0.008) * 4:
        asyncio.run(leave(delay))
    assert wait_until(lambda: replicas.metrics().num_running == 0)
    assert replicas.metrics().generated_tokens < before + 400
    for replica in replicas._replicas:
        set_step_time(replica, 0)


# -- routing -----------------------------------------------------------------------------------------------------------


def test_request_goes_where_least_is_to_do_and_its_prefix_counts():
    replicas = [Replica(actor=MagicMock()) for _ in range(2)]

    def send(prompt, max_tokens):
        request = Request(random.Random(), None, None, prompt, SamplingParams(max_tokens=max_tokens))
        chosen = min(replicas, key=lambda each: each.num_tokens + each.cost(request))
        chosen.send(request)
        return replicas.index(chosen)

    document = list(range(2000))
    assert send([*document, 1], 50) == 0
    assert send([5], 100) == 1
    assert send([*document, 2], 50) == 1  # waiting for 2,000 tokens and 50 costs as much as computing them there
    for replica in replicas:
        replica.num_tokens = 0
    text = "a long text " * 1000
    assert send(text, 10) == 0
    replicas[0].num_tokens = 0
    assert [send(text + tail, 10) for tail in ("one", "two", "three")] == [0, 0, 0]
    assert send("b" + text, 10) == 1


# -- faults of requests and options ------------------------------------------------------------------------------------


def test_wrong_requests_are_refused_and_the_others_served(replicas, one):
    for wrong, error in (("x" * 9999, ValueError), ([9999], ValueError), ({"prompt": 3}, TypeError), (None, TypeError)):
        with pytest.raises(error, match="prompt"):
            replicas.generate(["right", wrong], greedy(4), use_tqdm=False)
    with pytest.raises(ValueError, match="entries for 1 prompts"):
        replicas.generate(["right"], [greedy(4)] * 2, use_tqdm=False)
    want = one.generate("right", greedy(4), use_tqdm=False)
    assert samples(replicas.generate("right", greedy(4), use_tqdm=False)) == samples(want)
    assert wait_until(lambda: replicas.metrics().num_running == 0)


def test_options_that_no_engine_takes_are_refused_and_leave_no_actor(replicas, model):
    free = ray.cluster_resources()["CPU"] - len(replicas._replicas)
    with pytest.raises(TypeError, match="num_seqs"):
        Replicas(2, model, num_seqs=3)
    with pytest.raises(ValueError, match="num_replicas must be from 1"):
        Replicas(0, model)
    with pytest.raises(ValueError, match="is not a folder"):
        Replicas(2, "/there/is/nothing", device="cpu")
    assert wait_until(lambda: ray.available_resources()["CPU"] == free)


def test_replicas_of_a_host_download_a_model_once(cluster, model, tmp_path):
    class CountingHub(FakeHub):
        def do_GET(self):
            if self.command == "GET" and "/resolve/" in self.path:
                self.server.fetched.append(self.path.rpartition("/")[2])
            super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), CountingHub) as hub:
        hub.models, hub.requests, hub.fetched, hub.commit = {"owner/name": Path(model)}, [], [], "c0ffee" * 6 + "c0de"
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}).start()
        variables = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)}
        variables |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        try:
            options = {"actor_options": {"runtime_env": {"env_vars": variables}}}
            with make_replicas("owner/name", **options) as replicas:
                assert len(replicas.generate(["x"] * 4, greedy(2), use_tqdm=False)) == 4
        finally:
            hub.shutdown()
    assert sorted(hub.fetched) == sorted(set(hub.fetched)) and "model.safetensors" in hub.fetched


# -- lost replicas -----------------------------------------------------------------------------------------------------


def test_replicas_killed_at_random_times_lose_and_double_nothing(replicas, one, request, caplog):
    rng = random.Random(1)
    prompts, params = mixed_requests(80, seed=1)
    wants = samples(one.generate(prompts, params, use_tqdm=False))
    num_kills = request.config.getoption("--kills")
    killed, stop = set(), threading.Event()

    def keep_killing():
        while len(killed) < num_kills and not stop.wait(rng.random()):
            if alive := set(replicas._replicas) - killed:  # sometimes the last one
                replica = rng.choice(list(alive))
                killed.add(replica)
                kill(replica)

    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(keep_killing)
        try:
            while not killing.done():
                assert samples(replicas.generate(prompts, params, use_tqdm=False)) == wants
        finally:
            stop.set()
    killing.result()
    assert all_run(replicas, 2)
    assert sum("A replica is lost" in record.message for record in caplog.records) == len(killed)


def test_stream_goes_on_where_it_was_when_its_replica_is_killed(replicas, one):
    assert all_run(replicas, 2)
    params = sampled(300, seed=3, n=2, logprobs=0)
    (want,) = one.generate("A long stream", params, use_tqdm=False)
    tokens, texts, num_logprobs = {0: [], 1: []}, {0: "", 1: ""}, {0: 0, 1: 0}

    async def read():
        has_killed = False
        async for output in replicas.stream("A long stream", params):
            assert (output.prompt, output.prompt_token_ids) == (want.prompt, want.prompt_token_ids)
            for sample in output.outputs:
                tokens[sample.index] += sample.token_ids
                texts[sample.index] += sample.text
                num_logprobs[sample.index] += len(sample.logprobs)
            if not has_killed:
                (busy,) = [replica for replica in replicas._replicas if replica.requests]
                assert busy is first
                kill(busy)
                has_killed = True

    first = replicas._replicas[0]
    stop_after(first, 20)
    asyncio.run(read())
    assert [tokens[i] for i in range(2)] == [sample.token_ids for sample in want.outputs]
    assert [texts[i] for i in range(2)] == [sample.text for sample in want.outputs]
    assert num_logprobs == {0: 300, 1: 300}
    assert all_run(replicas, 2)


@pytest.mark.parametrize("is_delta", [True, False])
def test_a_resumed_stream_does_not_repeat_samples_that_have_ended(one, is_delta):
    """The first replica was lost after it had given one sample whole. The next one gives both from the start."""
    (whole,) = one.generate("Two", sampled(4, n=2, output_kind=RequestOutputKind.FINAL_ONLY), use_tqdm=False)
    received = []
    kind = RequestOutputKind.DELTA if is_delta else RequestOutputKind.CUMULATIVE
    request = Request(random.Random(), received.append, kind, "Two", SamplingParams(n=2))
    request.is_resumed = False
    request.receive(replace(whole, finished=False, outputs=whole.outputs[:1]))
    request.is_resumed = True
    if is_delta:
        request.receive(replace(whole, finished=False, outputs=whole.outputs[:1]))
    request.receive(whole)
    # Cumulative outputs have all samples.
    assert [[sample.index for sample in output.outputs] for output in received] == [[0], [1] if is_delta else [0, 1]]
    assert received[1].outputs[-1].token_ids == whole.outputs[1].token_ids and received[1].finished


def test_a_cumulative_stream_never_shrinks_when_its_replica_is_killed(replicas, one):
    assert all_run(replicas, 2)
    params = greedy(40, output_kind=RequestOutputKind.CUMULATIVE)
    (want,) = one.generate("Another", params.clone(output_kind=RequestOutputKind.FINAL_ONLY), use_tqdm=False)

    async def read():
        lengths = []
        async for output in replicas.stream("Another", params):
            lengths.append(len(output.token_ids))
            if len(lengths) == 1:
                kill(first)
        return lengths, output.token_ids

    first = replicas._replicas[0]
    stop_after(first, 20)
    lengths, token_ids = asyncio.run(read())
    assert lengths == sorted(lengths) and token_ids == want.token_ids
    assert all_run(replicas, 2)


def test_idle_replica_that_is_killed_is_replaced_without_a_call(replicas):
    assert all_run(replicas, 2)
    idle = replicas._replicas[0]
    kill(idle)
    assert wait_until(lambda: idle not in replicas._replicas and len(replicas._replicas) == 2)


def test_more_losses_than_max_restarts_are_one_clear_error(cluster, model):
    replicas = make_replicas(model, 1, max_restarts=0)
    set_step_time(replicas._replicas[0], 0.1)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(replicas.generate, ["x"] * 40, greedy(400), use_tqdm=False)
        assert wait_until(lambda: replicas.metrics().num_running)
        kill(replicas._replicas[0])
        with pytest.raises(RuntimeError, match="max_restarts=0"):
            waiting.result()
    for call in (lambda: replicas.generate("x"), replicas.metrics, lambda: replicas.sleep()):
        with pytest.raises(RuntimeError, match="max_restarts=0"):
            call()
    replicas.close()
    with pytest.raises(RuntimeError, match="closed"):
        replicas.metrics()
    replicas.close()


def test_requests_end_when_ray_is_shut_down(cluster, model, monkeypatch):
    replicas = make_replicas(model, 1)
    set_step_time(replicas._replicas[0], 0.1)
    with ThreadPoolExecutor(1) as threads, monkeypatch.context() as patch:
        waiting = threads.submit(replicas.generate, ["x"] * 3, greedy(400), use_tqdm=False)
        assert wait_until(lambda: replicas.metrics().num_running)
        patch.setattr(replicas, "_ray_ids", ("another", "job"))  # as after ray.shutdown() and ray.init()
        patch.setattr(ray, "kill", lambda actor: (_ for _ in ()).throw(ValueError("an actor of another Ray")))
        with pytest.raises(RuntimeError, match="Ray has been shut down"):
            waiting.result(SOON)
        replicas.close()


def test_no_call_starts_ray_again_after_its_shutdown(cluster, model, monkeypatch):
    replicas = make_replicas(model, 1)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        for call in (lambda: replicas.generate("x"), replicas.metrics, lambda: replicas.update_weights([])):
            with pytest.raises(RuntimeError, match="Ray has been shut down"):
                call()
    replicas.close()


def test_lost_replica_does_not_start_ray_again_after_its_shutdown(cluster, model, monkeypatch):
    replicas = make_replicas(model, 1)
    with monkeypatch.context() as patch:
        patch.setattr(replicas, "_actor_class", None)  # a new actor would raise
        patch.setattr(replicas, "_error", lambda: RuntimeError("Ray has been shut down"))
        kill(replicas._replicas[0])
        assert wait_until(lambda: all(keeper.done() for keeper in replicas._keepers))
    assert replicas._end_reason == "Ray has been shut down"
    replicas.close()


def test_replicas_belong_to_the_ray_in_which_they_were_made(cluster, model, monkeypatch):
    with make_replicas(model, 1) as replicas:
        monkeypatch.setattr(replicas, "_ray_ids", ("another", "job"))  # as after ray.shutdown() and ray.init()
        with pytest.raises(RuntimeError, match="Ray has been shut down"):
            replicas.generate("x")


def test_close_ends_calls_that_wait(cluster, model):
    replicas = make_replicas(model, 1)
    pid = pid_of(replicas._replicas[0])
    set_step_time(replicas._replicas[0], 0.1)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(replicas.generate, ["x"] * 40, greedy(400), use_tqdm=False)
        assert wait_until(lambda: replicas.metrics().num_running)
        replicas.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result()
    assert all_end([pid])


def test_lost_rank_makes_a_new_replica_and_a_killed_actor_leaves_no_process(cluster, model, one):
    prompts, params = mixed_requests(20)
    wants = samples(one.generate(prompts, params, use_tqdm=False))
    with make_replicas(model, 1, tensor_parallel_size=2) as replicas:
        pid = pid_of(replicas._replicas[0])
        (rank,) = rank_pids(pid)
        os.kill(rank, signal.SIGKILL)
        assert samples(replicas.generate(prompts, params, use_tqdm=False)) == wants
        assert all_end([pid, rank])
        pid = pid_of(replicas._replicas[0])
        (rank,) = rank_pids(pid)
        kill(replicas._replicas[0])
        assert all_end([pid, rank])
        assert samples(replicas.generate(prompts, params, use_tqdm=False)) == wants


def test_killed_raylet_leaves_no_process_and_its_replica_starts_on_another_host(
    cluster, model, one, monkeypatch, caplog
):
    prompts, params = mixed_requests(60)
    wants = samples(one.generate(prompts, params, use_tqdm=False))
    host_options = {"num_cpus": 1, "resources": {"spot": 1}, "object_store_memory": 80 << 20}
    hosts = [cluster.add_node(**host_options) for _ in range(2)]
    with make_replicas(model, actor_options={"resources": {"spot": 1}}) as replicas:
        pids = {_node_of(replica): pid_of(replica) for replica in replicas._replicas}
        assert pids.keys() == {host.node_id for host in hosts}
        monkeypatch.setattr("nanovllm.ray.replicas._PATIENCE_S", 1)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(replicas.generate, prompts, params, use_tqdm=False)
            os.kill(hosts[0].all_processes["raylet"][0].process.pid, signal.SIGKILL)
            assert samples(waiting.result()) == wants
        assert all_end([pids[hosts[0].node_id]])
        assert all_run(replicas, 1)  # another one waits for a host
        assert wait_until(
            lambda: "A replica has waited 1 s for Ray to start its process. It needs {'num_cpus': 1" in caplog.text
        )
        hosts.append(cluster.add_node(**host_options))
        assert all_run(replicas, 2)
        assert {_node_of(replica) for replica in replicas._replicas} == {host.node_id for host in hosts[1:]}
    for host in hosts:
        cluster.remove_node(host)


def _node_of(replica):
    return ray.get(replica.actor.__ray_call__.remote(lambda actor: ray.get_runtime_context().get_node_id()))


# -- weights and memory ------------------------------------------------------------------------------------------------


def test_packed_tensors_are_the_same_after_the_object_store():
    tensors = {
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "transposed": torch.randn(4, 6).t(),
        "scalar": torch.tensor(2.5),
        "fp8": torch.randn(8).to(torch.float8_e4m3fn),
    }
    unpacked = dict(_unpack(list(pack(tensors.items()))))
    assert unpacked.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert unpacked[name].dtype == tensor.dtype and unpacked[name].shape == tensor.shape
        assert unpacked[name].tolist() == tensor.tolist()


def test_weights_may_come_in_one_buffer():
    buffer = torch.empty(2)
    weights = ((f"w{i}", buffer.fill_(i)) for i in range(3))
    assert [tensor.tolist() for _, tensor in _unpack(list(pack(weights)))] == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (None, TypeError, "weights must be pairs"),
        ({"a": torch.zeros(2)}, TypeError, "weights must be pairs"),
        ([1], TypeError, "weights must be pairs"),
        ([("a", np.zeros(3))], TypeError, "weights must be pairs"),
        ([("a", torch.eye(3).to_sparse())], ValueError, "dense tensor"),
        ([("a", torch.zeros(3, device="meta"))], ValueError, "dense tensor"),
    ],
)
def test_weights_that_one_engine_refuses_are_refused_before_they_are_packed(weights, error, message):
    with pytest.raises(error, match=message):
        list(pack(weights))


def test_weights_are_updated_under_load_and_later_replicas_have_them(replicas, model, one, tmp_path):
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    new_model = save_tiny(tmp_path, "qwen3", 1, vocab_size=vocab_size)
    prompts, params = mixed_requests(40)
    old_wants = samples(one.generate(prompts, params, use_tqdm=False))
    with LLM(new_model, **OPTIONS, tokenizer=model) as new:
        new_wants = samples(new.generate(prompts, params, use_tqdm=False))
    runs, stop = [], threading.Event()

    def keep_generating():
        while not stop.is_set():
            runs.append(replicas.generate(prompts, params, use_tqdm=False))

    def versions(outputs):
        return {output.weight_version for output in outputs}

    with ThreadPoolExecutor(1) as threads:
        load = threads.submit(keep_generating)
        try:
            assert wait_until(lambda: len(runs) >= 2 or load.done())
            assert replicas.update_weights(load_file(new_model / "model.safetensors").items()) == 1
            num_runs = len(runs)
            assert wait_until(lambda: len(runs) >= num_runs + 3 or load.done())
        finally:
            stop.set()
        load.result()
    assert samples(runs[0]) == old_wants and versions(runs[0]) == {0}
    kill(replicas._replicas[0])
    assert all_run(replicas, 2)
    for outputs in (runs[-1], replicas.generate(prompts, params, use_tqdm=False)):
        assert samples(outputs) == new_wants and versions(outputs) == {1}
    with pytest.raises(ValueError, match="lacks"):
        replicas.update_weights([])
    kill(replicas._replicas[0])
    assert all_run(replicas, 2)

    async def read(i):
        return [output async for output in replicas.stream(f"Stream {i}", greedy(2))]

    async def read_all():
        return await asyncio.gather(*map(read, range(8)), return_exceptions=True)

    # The new replica refuses requests as the other one does.
    assert [type(result) for result in asyncio.run(read_all())] == [RuntimeError] * 8
    assert replicas.update_weights(model) == 2  # a folder
    outputs = replicas.generate(prompts, params, use_tqdm=False)
    assert samples(outputs) == old_wants
    assert versions(outputs) == {2}


def fail_update(actor):
    async def update_weights(weights):
        raise ValueError("there is no such folder")

    actor.update_weights = update_weights


def see_other_files(actor):
    from nanovllm.ray import actor as module

    del actor.update_weights
    module._fingerprint = lambda path: "other"


def test_a_new_replica_never_answers_with_other_weights_than_the_rest(cluster, model, tmp_path, caplog):
    prompts, params = [[5, 6, 7]] * 20, greedy(4)

    def answers():
        return {(out.text, out.weight_version) for out in replicas.generate(prompts, params, use_tqdm=False)}

    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    path = save_tiny(tmp_path / "new", "qwen3", 1, vocab_size=vocab_size)
    new = load_file(path / "model.safetensors")
    wrong = {name: tensor[..., :2] for name, tensor in new.items()}
    with make_replicas(model, max_restarts=3) as replicas:
        (old,) = answers()
        # An update that is refused before it begins changes nothing, now and later.
        replicas.sleep(2)
        with pytest.raises(RuntimeError, match="asleep"):
            replicas.update_weights(new.items())
        replicas.wake_up(tag for tag in ("weights", "kv_cache"))
        kill(replicas._replicas[0])
        assert all_run(replicas, 2) and answers() == {old}
        # One that fails half-way makes all refuse requests, also those that start later.
        with pytest.raises(ValueError, match="has shape"):
            replicas.update_weights(wrong.items())
        kill(replicas._replicas[0])
        assert all_run(replicas, 2)
        for replica in replicas._replicas:
            assert ray.get(replica.actor.lacks_weights.remote())
        # So does one that some have done and others not, or that has other files on another host.
        for break_actor in (fail_update, see_other_files):
            ray.get(replicas._replicas[1].actor.__ray_call__.remote(break_actor))
            with pytest.raises(ValueError, match=r"no such folder|not the same on all hosts"):
                replicas.update_weights(path)
            for replica in replicas._replicas:
                assert ray.get(replica.actor.lacks_weights.remote())
        kill(replicas._replicas[1])
        assert all_run(replicas, 2)
        # Files that have changed since are not loaded: the place stays empty until the next update.
        assert replicas.update_weights(path) == 1
        (updated,) = answers()
        assert updated[1] == 1 and updated[0] != old[0]
        save_file({name: tensor * 1.01 for name, tensor in new.items()}, path / "model.safetensors")
        kill(replicas._replicas[0])
        assert wait_until(lambda: "have changed since the other replicas have loaded them" in caplog.text)
        assert answers() == {updated} and len(replicas._replicas) == 1
        assert replicas.update_weights(path) == 2
        assert all_run(replicas, 2) and {version for _, version in answers()} == {2}


def test_requests_of_a_replica_that_is_lost_asleep_go_on_after_wake_up(replicas, one):
    prompts = [f"Asleep {i}" for i in range(6)]
    for replica in replicas._replicas:
        set_step_time(replica, 0.05)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(replicas.generate, prompts, greedy(40), use_tqdm=False)
        assert wait_until(lambda: replicas.metrics().num_running == 6)
        replicas.sleep(1)
        lost = replicas._replicas[0]
        kill(lost)
        assert wait_until(lambda: lost not in replicas._replicas and len(replicas._replicas) == 2)
        for replica in replicas._replicas:
            set_step_time(replica, 0)
        replicas.wake_up()
        outputs = waiting.result()
    assert samples(outputs) == samples(one.generate(prompts, greedy(40), use_tqdm=False))


def test_requests_that_wait_here_stay_while_replicas_sleep_and_go_on_after_a_loss(cluster, model, one):
    prompts = [f"Wait {i}" for i in range(6)]
    with make_replicas(model, 1, max_concurrent_requests=2) as replicas, ThreadPoolExecutor(1) as threads:
        set_step_time(replicas._replicas[0], 0.05)
        waiting = threads.submit(replicas.generate, prompts, greedy(20), use_tqdm=False)
        assert wait_until(lambda: replicas.metrics().num_running == 2)
        replicas.sleep(1)
        kill(replicas._replicas[0])
        replicas.wake_up()  # perhaps before the next replica has started
        assert samples(waiting.result()) == samples(one.generate(prompts, greedy(20), use_tqdm=False))
        with pytest.raises(RuntimeError, match="asleep"):
            replicas.sleep(2)
            replicas.generate("x", use_tqdm=False)


def test_calls_while_no_replica_is_up_wait_for_one_that_checks_them(replicas, one):
    assert all_run(replicas, 2)
    for replica in list(replicas._replicas):
        kill(replica)
    with pytest.raises(ValueError, match="/nowhere"):
        replicas.update_weights("/nowhere")
    for wrong in (lambda: replicas.sleep(9), lambda: replicas.wake_up(["weight"])):
        with pytest.raises(ValueError, match=r"level must be|tags must be"):
            wrong()
    want = samples(one.generate("x", greedy(5), use_tqdm=False))
    assert samples(replicas.generate("x", greedy(5), use_tqdm=False)) == want
    assert all_run(replicas, 2)


def test_a_sleep_that_fails_in_one_replica_is_undone_by_wake_up(replicas, one):
    def fail(actor):
        engine = actor.llm_engine

        def sleep(level):
            del engine.sleep
            raise RuntimeError("no sleep")

        engine.sleep = sleep

    assert all_run(replicas, 2)
    ray.get(replicas._replicas[1].actor.__ray_call__.remote(fail))
    with pytest.raises(RuntimeError, match="no sleep"):
        replicas.sleep(1)
    with pytest.raises(RuntimeError, match="the replicas are asleep"):
        replicas.generate("x", greedy(5), use_tqdm=False)
    replicas.wake_up()
    want = samples(one.generate("x", greedy(5), use_tqdm=False))
    assert samples(replicas.generate(["x"] * 8, greedy(5), use_tqdm=False)) == want * 8


@pytest.mark.parametrize("call", ["sleep", "wake_up", "update_weights"])
def test_a_replica_whose_engine_has_failed_is_replaced_by_the_next_call(replicas, one, model, call):
    assert all_run(replicas, 2)
    want = samples(one.generate("x", greedy(5), use_tqdm=False))
    if call == "wake_up":
        replicas.sleep(1)
    failed = replicas._replicas[0]
    ray.get(failed.actor.__ray_call__.remote(lambda actor: actor.llm_engine.close()))
    if call == "update_weights":
        assert replicas.update_weights(model) > 0
    elif call == "sleep":
        replicas.sleep(1)
    replicas.wake_up()
    assert wait_until(lambda: failed not in replicas._replicas and len(replicas._replicas) == 2)
    assert samples(replicas.generate(["x"] * 8, greedy(5), use_tqdm=False)) == want * 8


def test_a_new_replica_sleeps_as_far_as_the_others(replicas, one):
    want = samples(one.generate("x", greedy(5), use_tqdm=False))
    for part in ("weights", "kv_cache"):
        replicas.sleep(2)
        replicas.wake_up([part])
        lost = replicas._replicas[0]
        kill(lost)
        assert wait_until(lambda lost=lost: lost not in replicas._replicas and len(replicas._replicas) == 2)
        for replica in replicas._replicas:
            asleep = replica.actor.__ray_call__.remote(lambda actor: actor.llm_engine.guard.asleep)
            assert ray.get(asleep) == {"weights", "kv_cache"} - {part}
        replicas.wake_up()
        assert samples(replicas.generate(["x"] * 8, greedy(5), use_tqdm=False)) == want * 8


def test_close_ends_calls_that_wait_for_sleeping_replicas(cluster, model):
    with make_replicas(model, 1) as replicas, ThreadPoolExecutor(1) as threads:
        set_step_time(replicas._replicas[0], 0.05)
        waiting = threads.submit(replicas.generate, ["Asleep"] * 3, greedy(400), use_tqdm=False)
        assert wait_until(lambda: replicas.metrics().num_running == 3)
        replicas.sleep(1)
        replicas.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(SOON)


def test_sleeping_replicas_refuse_requests_and_a_new_one_sleeps_too(replicas, one):
    want = samples(one.generate("x", greedy(5), use_tqdm=False))
    assert all_run(replicas, 2)
    replicas.sleep(2)
    kill(replicas._replicas[0])
    assert all_run(replicas, 2)
    sleeping = ray.get([replica.actor.is_sleeping.remote() for replica in replicas._replicas])
    assert sleeping == [True, True]
    with pytest.raises(RuntimeError, match="asleep"):
        replicas.generate("x", greedy(5), use_tqdm=False)
    replicas.wake_up(["weights"])
    replicas.wake_up()
    assert samples(replicas.generate(["x"] * 8, greedy(5), use_tqdm=False)) == want * 8
