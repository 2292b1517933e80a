"""The engine in a process of its own gives the outputs of AsyncLLM, and its end is an error and not a hang."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from nanovllm import AsyncLLM, CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from nanovllm.outputs import merge_deltas
from nanovllm.server import health
from nanovllm.server.engine_client import EngineClient
from nanovllm.server.engine_host import _Host
from nanovllm.server.engine_messages import keep_newest_packed, merge_packed_deltas, pack_output, unpack_output
from tests.helpers import all_end
from tests.models.tiny import save_tiny_with_tokenizer
from tests.server.serving import call, error_of

pytestmark = pytest.mark.xdist_group("engine process")  # one worker starts the engine

OPTIONS = {"device": "cpu", "max_model_len": 256, "max_num_seqs": 8, "num_kvcache_blocks": 64, "kvcache_block_size": 16}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_with_tokenizer(tmp_path_factory.mktemp("model"), "qwen3", TEMPLATE)


@pytest.fixture(scope="module")
def client(model):
    client = EngineClient(model=str(model), **OPTIONS)
    yield client
    client.close()


async def texts(llm, prompts, params):
    async def answer(prompt):
        samples, last = {}, None
        async for last in llm.generate(prompt, params):
            for sample in last.outputs:
                old = samples.get(sample.index, ("", [], []))
                logprobs = [
                    *old[2],
                    *({i: round(x.logprob, 3) for i, x in row.items()} for row in sample.logprobs or []),
                ]
                samples[sample.index] = (old[0] + sample.text, old[1] + sample.token_ids, logprobs)
        assert last.finished
        return samples, last.prompt_token_ids, last.outputs[-1].finish_reason, last.metrics.num_generation_tokens

    return await asyncio.gather(*map(answer, prompts))


def test_log_steps_logs_steps_as_the_level_of_the_parent_says(model, caplog, capfd):
    caplog.set_level("INFO", logger="nanovllm")
    client = EngineClient(model=str(model), log_steps=True, **OPTIONS)
    asyncio.run(texts(client, ["a"], SamplingParams(max_tokens=2)))
    client.close()
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("INFO attention backend:") for line in lines)
    assert sum(line.startswith("INFO step ") for line in lines) == 2


def test_outputs_are_those_of_async_llm(model, client):
    prompts = ["a", "once upon a time", "zzz" * 30, [5, 6, 7]]
    llm = AsyncLLM(model, **OPTIONS)
    try:
        assert client.get_default_sampling_params() == llm.get_default_sampling_params()
        for params in (
            SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
            SamplingParams(temperature=1, seed=3, max_tokens=9, n=3, logprobs=2, ignore_eos=True),
        ):
            assert asyncio.run(texts(client, prompts, params)) == asyncio.run(texts(llm, prompts, params))
    finally:
        llm.close()


def test_health_and_metrics_do_not_wait_for_ever_for_an_engine_that_is_stopped(client, monkeypatch):
    monkeypatch.setattr(health, "_REPLY_SECONDS", 0.2)
    os.kill(client._process.pid, signal.SIGSTOP)
    try:
        answer = call(client, "GET", "/health")
        assert answer.status_code == 503 and error_of(answer) == "the engine has not replied for 0.2 s"
        assert call(client, "GET", "/metrics").status_code == 200
    finally:
        os.kill(client._process.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert call(client, "GET", "/health").status_code == 200


def test_calls_return_what_async_llm_returns(client):
    async def calls():
        await client.check_health()
        assert not await client.is_sleeping()
        token_ids = await client.chat_prompt([{"role": "user", "content": "hé"}])
        assert await client.decode(token_ids) == "user: hé\n"
        assert await client.encode("user: hé\n") == token_ids
        return await client.metrics()

    assert asyncio.run(calls()).num_running == 0
    assert client.tokenizer.chat_template == TEMPLATE
    assert client.max_model_len == 256


def test_errors_keep_their_kind_and_text(client):
    async def first(*arguments):
        async for _ in client.generate(*arguments):
            break

    with pytest.raises(ValueError, match="prompt has 999 tokens"):
        asyncio.run(first([1] * 999))
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams"):
        asyncio.run(first("a", "b"))
    with pytest.raises(ValueError, match="messages"):
        asyncio.run(client.chat_prompt([[{}], [{}]]))
    with pytest.raises(ValueError, match="max_num_seqs"):
        EngineClient(max_num_seqs=-1)
    with pytest.raises(ValueError, match="nowhere"):
        EngineClient(model="/nowhere/at/all", **OPTIONS)


def test_a_client_that_leaves_frees_its_blocks(client):
    async def leave_early():
        async def one():
            async for _ in client.generate("abc", SamplingParams(max_tokens=200, ignore_eos=True)):
                return

        await asyncio.gather(*[one() for _ in range(20)])
        tasks = [asyncio.create_task(one()) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        while (metrics := await client.metrics()).kv_usage or metrics.num_running or metrics.num_waiting:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave_early(), 60))


def test_a_call_that_its_caller_leaves_ends_in_the_engine_s_process(client, monkeypatch):
    sent = []
    monkeypatch.setattr(client, "_send", lambda *message: sent.append(message))

    async def leave_early():
        call = asyncio.create_task(client.encode("abc"))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])

    asyncio.run(leave_early())
    (kind, key, *_), end = sent
    assert (kind, end) == ("call", ("leave", key))

    class Waiting:
        async def encode(self):
            await asyncio.Event().wait()

    async def left():
        host = _Host(Waiting(), None)  # it has no connection, so it must not send anything
        host.loop = asyncio.get_running_loop()
        host._handle("call", 7, "encode", {})
        await asyncio.sleep(0)
        (call,) = host.calls.values()
        host._handle("leave", 7)
        await asyncio.wait([call])
        assert call.cancelled() and not host.calls

    asyncio.run(asyncio.wait_for(left(), 60))


def test_a_killed_engine_ends_what_waits_for_it(model):
    client = EngineClient(model=str(model), **OPTIONS)

    async def killed():
        async for _ in client.generate("a", SamplingParams(max_tokens=200, ignore_eos=True)):
            os.kill(client._process.pid, signal.SIGKILL)

    try:
        with pytest.raises(RuntimeError, match=r"the engine's process \(\d+\) was ended by signal 9"):
            asyncio.run(asyncio.wait_for(killed(), 60))
        with pytest.raises(RuntimeError, match="signal 9"):
            asyncio.run(client.check_health())
    finally:
        client.close()
        client.close()


def test_the_engine_does_not_outlive_a_killed_server(model):
    program = (
        "import sys, time; from nanovllm.server.engine_client import EngineClient; "
        f"client = EngineClient(model={str(model)!r}, **{OPTIONS!r}); "
        "print(client._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    assert all_end([pid])


def test_merged_logprobs_keep_the_texts_of_all_their_tokens(client):
    async def read_late():
        params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0, prompt_logprobs=0, temperature=0)
        stream = client.generate("Zab", params)
        first = await anext(stream)
        while (await client.metrics()).num_running:  # so that the other outputs are merged
            await asyncio.sleep(0.01)
        outputs = [first, *[output async for output in stream]]
        assert len(outputs) == 2
        prompt = first.prompt_logprobs
        rows = [output.outputs[0].logprobs for output in outputs]
        token_ids = [token_id for output in outputs for token_id in output.outputs[0].token_ids]
        for each in rows[1:]:
            rows[0] += each
        assert [prompt.text(token_id) for token_id in first.prompt_token_ids] == ["Z", "a", "b"]
        joined = prompt + rows[0]
        for token_id in first.prompt_token_ids + token_ids:
            assert joined.text(token_id) == await client.decode([token_id])

    asyncio.run(asyncio.wait_for(read_late(), 60))


def test_a_message_that_is_nested_too_deeply_fails_alone(client):
    nested = []
    for _ in range(5000):
        nested = [nested]

    async def calls():
        with pytest.raises(RecursionError):
            await client.chat_prompt([{"role": "user", "content": "a", "other": nested}])
        with pytest.raises(RecursionError):
            async for _ in client.generate({"prompt_token_ids": nested}, SamplingParams()):
                pass
        assert not client._waiting
        assert await client.decode(await client.encode("a")) == "a"

    asyncio.run(asyncio.wait_for(calls(), 60))


def _outputs_of_two_samples() -> list[RequestOutput]:
    steps = [
        [CompletionOutput(0, "a", [1], None, cumulative_logprob=-1.0)],
        [
            CompletionOutput(1, "b", [2], None, cumulative_logprob=-2.0),
            CompletionOutput(0, "c", [3], "length", cumulative_logprob=-3.0),
        ],
        [CompletionOutput(1, "d", [4, 5], "stop", 5)],
    ]
    metrics = RequestMetrics()
    return [
        RequestOutput(
            "r", "x", [7], samples, finished=i == 2, num_cached_tokens=1, total_time=float(i), metrics=metrics
        )
        for i, samples in enumerate(steps)
    ]


def test_outputs_that_are_merged_while_packed_equal_merged_outputs():
    first, second, third = _outputs_of_two_samples()
    expected = merge_deltas(merge_deltas(first, second), third)
    packed = [pack_output(output, is_first=output is first) for output in (first, second, third)]
    samples, progress, prompt = merge_packed_deltas(merge_packed_deltas(packed[0], packed[1]), packed[2])
    assert progress is not None and prompt is not None
    assert unpack_output(samples, progress, prompt, "r") == expected


def test_the_newest_of_packed_outputs_keeps_the_prompt_of_the_first():
    first, second, third = _outputs_of_two_samples()
    packed = [pack_output(output, is_first=output is first) for output in (first, second, third)]
    samples, progress, prompt = keep_newest_packed(keep_newest_packed(packed[0], packed[1]), packed[2])
    assert progress is not None and prompt is not None
    assert unpack_output(samples, progress, prompt, "r") == third
