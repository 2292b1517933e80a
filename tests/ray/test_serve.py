"""Ray Serve: the HTTP server as a deployment."""

import asyncio
import contextlib
import random
import socket

import httpx
import openai
import pytest
from ray import serve

import nanovllm.ray.serve
from nanovllm.ray.serve import app, end_with_engine
from tests.helpers import greedy, wait_until
from tests.ray.conftest import OPTIONS

pytestmark = pytest.mark.xdist_group("ray")

CHAT = [{"role": "user", "content": "Hello"}]


def free_port():
    """Return a port that is free, and neither among those that the system chooses nor among those that Ray chooses."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def url(cluster, model):
    """The address of a deployment with two replicas."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    scaling = {"min_replicas": 2, "max_replicas": 2, "target_ongoing_requests": 4}
    options = {"model": model, "served_model_name": "tiny", "deployment": {"autoscaling_config": scaling}}
    serve.run(app({**OPTIONS, **options}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


def counters(url, session):
    """Return the prompt tokens and the running requests of the replica of a session."""
    lines = httpx.get(f"{url}/metrics", headers={"x-session-id": session}).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("vllm:"))
    label = '{model_name="tiny"}'
    return float(values[f"vllm:prompt_tokens_total{label}"]), float(values[f"vllm:num_requests_running{label}"])


def test_openai_client_streams_what_the_engine_says(client, one):
    (want,) = one.chat(CHAT, greedy(30), use_tqdm=False)
    options = {
        "model": "tiny",
        "messages": CHAT,
        "max_tokens": 30,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    assert client.chat.completions.create(**options).choices[0].message.content == want.text
    chunks = list(client.chat.completions.create(**options, stream=True))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == want.text and len([text for text in texts if text]) > 3
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="other", messages=CHAT)


def test_requests_of_a_session_go_to_one_replica(client, url):
    # A session's replica is what its own /metrics say, so all sessions' requests must show up there and nowhere else.
    sessions = [str(i) for i in range(12)]

    def complete():
        client.completions.create(model="tiny", prompt="x" * 10, max_tokens=1, extra_headers={"x-session-id": "0"})

    def both_are_known():
        complete()
        return len({counters(url, session)[0] for session in sessions}) == 2

    assert wait_until(both_are_known)
    before = {session: counters(url, session)[0] for session in sessions}
    assert all(counters(url, session)[0] == before[session] for session in sessions)
    for _ in range(5):
        complete()
    grown = {session: counters(url, session)[0] - before[session] for session in sessions}
    assert grown["0"] == 50 and set(grown.values()) == {0, 50}


def test_client_that_leaves_ends_its_request(client, url):
    headers = {"x-session-id": "left"}
    body = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    assert wait_until(lambda: counters(url, "left")[1] == 0)


def test_app_takes_the_key_of_the_environment_and_refuses_options_of_ray(monkeypatch):
    monkeypatch.setenv("NANOVLLM_API_KEY", "secret")
    for options, key in (({}, "secret"), ({"api_key": "given"}, "given")):
        config_options, server_options = app({"model": "m", **options})._bound_deployment.init_args
        assert config_options == {"model": "m"}
        assert server_options.api_key == key
    with pytest.raises(ValueError, match="drain_seconds and port"):
        app({"model": "m", "port": 8000, "drain_seconds": 3})


@pytest.mark.parametrize(
    ("deployment", "num_replicas", "num_cpus"),
    [({"num_replicas": 2}, 2, 1), ({"ray_actor_options": {"num_cpus": 4}}, None, 4)],
)
def test_options_of_the_deployment_keep_the_other_defaults(deployment, num_replicas, num_cpus):
    bound = app({"model": "m", "tensor_parallel_size": 2, "deployment": deployment})._bound_deployment
    assert bound.ray_actor_options == {"num_cpus": num_cpus, "num_gpus": 2}
    assert (bound._deployment_config.autoscaling_config is None) == (num_replicas is not None)
    assert num_replicas is None or bound.num_replicas == num_replicas


class FailingEngine:
    """An engine whose second and later health checks raise these errors."""

    def __init__(self, *errors):
        self.errors = [None, *errors]

    async def check_health(self):
        error = self.errors.pop(0)
        if error is not None:
            raise error


def test_a_replica_ends_when_its_engine_has_failed_and_not_for_a_long_step(monkeypatch):
    statuses = []

    def end(status):
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr(nanovllm.ray.serve, "_CHECK_S", 0)
    monkeypatch.setattr("os._exit", end)
    engine = FailingEngine(asyncio.TimeoutError(), RuntimeError("the engine is lost"))
    with pytest.raises(SystemExit):
        end_with_engine(engine)
    assert statuses == [1] and engine.errors == []
