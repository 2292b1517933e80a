"""The HTTP server as a deployment of Ray Serve."""

# Ray may be absent, and then pyright takes this folder for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportFunctionMemberAccess=false

import asyncio
import os
import random
import threading
import time
from dataclasses import fields
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from nanovllm.config import check_names
from nanovllm.ray.actor import end_with_raylet
from nanovllm.server.app import create_app, make_state
from nanovllm.server.engine_client import EngineClient
from nanovllm.server.options import ServerOptions, with_key

# How often a replica checks its engine, and how long it waits for the reply, in seconds.
_CHECK_S = 1.0
_REPLY_S = 5.0
# How long the clients of a failed engine have to read their errors.
_LEAVE_S = 0.5


class SessionRouter(ConsistentHashRouter):
    """Sends requests of one session to one replica, whose cache has the prefix that they share.

    The header `x-session-id` names a request's session. If the replica of a session is full, the next one in the
    session's order gets the request; when replicas come and go, few sessions move. A request without a session goes to
    the one of two random replicas that has the shorter queue.
    """

    async def choose_replicas(self, candidate_replicas: list, pending_request: Any = None) -> list[list]:
        """Return groups of replicas: the router takes the shortest queue of the first group that has room."""
        groups = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or pending_request.metadata.session_id:
            return groups
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


@serve.deployment
@serve.ingress()
class HttpServer:
    """The endpoints of `nanovllm serve`, with an engine in a process of its own, which ends with the replica."""

    def __init__(self, config_options: dict[str, Any], server_options: ServerOptions):
        end_with_raylet()
        self._llm = EngineClient(**config_options)
        try:
            self._state = make_state(self._llm, config_options.get("model"), server_options)
        except BaseException:
            self._llm.close()
            raise
        threading.Thread(target=end_with_engine, args=(self._llm,), name="nanovllm-health", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self._state)

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine has failed. Then Ray starts another replica."""
        await self._llm.check_health()


def end_with_engine(llm: EngineClient) -> None:
    """End this process soon after its engine has failed.

    Ray checks the health of replicas every ten seconds. Until then a failed one would get most requests, because it
    refuses them at once, and so has the shortest queue.
    """
    while True:
        try:
            asyncio.run(asyncio.wait_for(llm.check_health(), _REPLY_S))
        except asyncio.TimeoutError:  # a long step; Python 3.10 has two kinds
            pass
        except RuntimeError:
            time.sleep(_LEAVE_S)
            os._exit(1)
        time.sleep(_CHECK_S)


def app(options: dict[str, Any]) -> serve.Application:
    """Return an application for `serve.run(app({"model": ...}))`, or for the `import_path` of a config file.

    Args:
        options: fields of `Config` and of `ServerOptions` except `port` and `drain_seconds`, and "deployment": options
            of Ray Serve's deployment, such as `autoscaling_config` and `ray_actor_options`. By default one replica has
            a CPU and, unless the device is "cpu", `tensor_parallel_size` GPUs, and the number of replicas follows the
            number of unfinished requests.
    """
    options = dict(options)
    deployment = options.pop("deployment", {})
    names = {each.name for each in fields(ServerOptions)}
    if unused := {"port", "drain_seconds"} & options.keys():
        raise ValueError(f"Ray Serve's own options decide about {' and '.join(sorted(unused))}: see its http_options")
    server = with_key(ServerOptions(**{name: options.pop(name) for name in names & options.keys()}))
    check_names(options)
    num_gpus = 0 if options.get("device") == "cpu" else options.get("tensor_parallel_size") or 1
    defaults = {
        "max_ongoing_requests": server.max_concurrent_requests,
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 64},
        "ray_actor_options": {"num_cpus": 1, "num_gpus": num_gpus},
        "request_router_config": RequestRouterConfig(request_router_class=SessionRouter),
    }
    if deployment.get("num_replicas", "auto") != "auto":
        del defaults["autoscaling_config"]
    actor_options = defaults["ray_actor_options"] | deployment.get("ray_actor_options", {})
    return HttpServer.options(**defaults | deployment | {"ray_actor_options": actor_options}).bind(options, server)
