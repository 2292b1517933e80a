"""Many engines as one: `Replicas` sends requests to engines in Ray actors."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
import logging
import random
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from nanovllm import Metrics, RequestOutput, RequestOutputKind, SamplingParams
from nanovllm.checks import is_list, length, number, shown
from nanovllm.config import check_names
from nanovllm.engine.memory_parts import MEMORY, parts_of_level, parts_of_tags
from nanovllm.inputs import Prompt, list_prompts
from nanovllm.llm import Chat, pair_params
from nanovllm.output_stream import OutputStream, call_soon, keep_newest
from nanovllm.outputs import merge_deltas
from nanovllm.progress import GenerationBar
from nanovllm.ray.actor import ReplicaActor, pack
from nanovllm.ray.request import Replica, Request
from nanovllm.sampling_params import copy_params

logger = logging.getLogger("nanovllm")

# After so many seconds without a process for a replica, a warning is logged. Ray usually starts one within some.
_PATIENCE_S = 30
# How often to look whether Ray still runs, in seconds.
_WATCH_S = 1.0

Params = SamplingParams | Sequence[SamplingParams] | None


class Replicas(AbstractContextManager["Replicas"]):
    """Engines in Ray actors, on one host or many, with methods of `LLM`.

        with Replicas(8, "Qwen/Qwen3-8B") as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=64))

    A request goes to the replica that then has the fewest tokens in flight. A prompt's tokens do not count where its
    prefix was before. If a replica is lost, others answer its unfinished requests, and a new one takes its place.
    Sampled requests get the same tokens again: each has a seed, its own or one that follows from the option `seed`.

    Any thread may call any method, and coroutines of any event loop may use `stream`.

    Args:
        num_replicas: number of engines.
        model: see `Config`. A path must exist on every host.
        max_restarts: how many replicas may be lost in each place.
        max_concurrent_requests: how many requests a replica has at once. Others wait here for a replica with room.
        actor_options: Ray's options of the actors, such as `resources` and `scheduling_strategy`. By default an actor
            takes a CPU and, unless the device is a CPU, `tensor_parallel_size` GPUs of one host.
        **options: the other fields of `Config`.

    Raises:
        TypeError, ValueError, RuntimeError: the engines cannot be made.
    """

    def __init__(
        self,
        num_replicas: int,
        model: str | Path | None = None,
        *,
        max_restarts: int = 3,
        max_concurrent_requests: int = 1024,
        actor_options: dict[str, Any] | None = None,
        **options: Any,
    ):
        check_names(options)
        num_replicas = number("num_replicas", num_replicas, int, 1, 1 << 16)
        self._max_restarts = number("max_restarts", max_restarts, int, 0, 1 << 30)
        self._max_requests = number("max_concurrent_requests", max_concurrent_requests, int, 1, 1 << 20)
        if "tokenizer" in options:
            options["tokenizer"] = _absolute(options["tokenizer"])
        self._options = {"model": _absolute(model), "max_concurrent_requests": self._max_requests, **options}
        device = options.get("device") or "auto"
        num_ranks = options.get("tensor_parallel_size") or 1
        on_cpus = device == "cpu" or (device == "auto" and "GPU" not in ray.cluster_resources())
        # Calls that are no requests never wait for them.
        defaults = {"num_cpus": 1, "num_gpus": 0 if on_cpus else num_ranks, "max_concurrency": self._max_requests + 64}
        if not isinstance(actor_options, dict | None):
            raise TypeError(f"actor_options must be a dict or None, got {shown(actor_options)}")
        self._actor_options = defaults | (actor_options or {})
        self._actor_class: Any = ray.remote(ReplicaActor).options(**self._actor_options)
        self._ray_ids = _ray_ids()
        self._seeds = random.Random(options.get("seed") or 0)
        # Only the loop's thread uses these.
        self._version = 0  # the weights' version
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self._asleep: set[str] = set()  # the parts of the replicas' memory that sleep
        self._replicas = [Replica(self._actor_class.remote(self._options)) for _ in range(num_replicas)]
        # The call that gives a new replica the weights of the others: `update` or `refuse`.
        self._weights_call: tuple[str, tuple] | None = None
        self._changing = asyncio.Lock()  # held while the weights change, or which parts sleep
        self._joined = asyncio.Event()  # some replica is up
        self._joined.set()
        self._next_update = asyncio.Event()
        self._end_reason: str | None = None
        self._loop = _event_loop()
        self._keepers = [asyncio.run_coroutine_threadsafe(self._keep(each), self._loop) for each in self._replicas]
        self._keepers.append(asyncio.run_coroutine_threadsafe(self._watch_ray(), self._loop))
        try:
            self._wait(self._on_all("start"))
        except BaseException:
            self.close()
            raise

    # -- requests ----------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Answer all `prompts`, in their order; see `LLM.generate`. The first error of a request ends the others."""
        return self._answer(pair_params(list_prompts(prompts), sampling_params), use_tqdm)

    def chat(
        self, messages: Chat | Sequence[Chat], sampling_params: Params = None, use_tqdm: bool = True, **template: Any
    ) -> list[RequestOutput]:
        """Answer conversations; see `LLM.chat`. `template` has options of `LLM.chat_prompts`."""
        chats: Any = messages if is_list(messages) and length(messages) and is_list(messages[0]) else [messages]
        return self._answer(pair_params(chats, sampling_params), use_tqdm, template)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """Answer one prompt step by step; see `AsyncLLM.generate`. Leaving the iteration ends the request."""
        return self._stream(prompt, copy_params(sampling_params))

    async def _stream(self, prompt: Prompt, sampling_params: SamplingParams | None) -> AsyncIterator[RequestOutput]:
        kind = getattr(sampling_params, "output_kind", None) or RequestOutputKind.DELTA
        is_delta = kind is RequestOutputKind.DELTA
        stream = OutputStream(merge_deltas if is_delta else keep_newest, copies=is_delta)
        request = Request(self._seeds, partial(call_soon, stream.loop, stream.put), kind, prompt, sampling_params)
        try:
            self._loop.call_soon_threadsafe(self._submit, [request])
            while True:
                output = await stream.get()
                yield output
                if output.finished:
                    return
        finally:
            self._loop.call_soon_threadsafe(self._abandon, {request})

    def _answer(self, pairs: list[tuple[Any, Any]], use_tqdm: bool, template: Any = None) -> list[RequestOutput]:
        """Return the whole outputs of prompts, or of conversations with options of their template."""
        if not isinstance(use_tqdm, bool):
            raise TypeError(f"use_tqdm must be a bool, got {shown(use_tqdm)}")
        items = SimpleQueue()
        outputs = {}
        kind = RequestOutputKind.FINAL_ONLY
        requests = [Request(self._seeds, items.put, kind, *pair, template) for pair in pairs]
        try:
            self._loop.call_soon_threadsafe(self._submit, requests)
            with GenerationBar(len(requests), enabled=use_tqdm) as bar:
                while len(outputs) < len(requests):
                    item = items.get()
                    if isinstance(item, Exception):
                        raise item
                    outputs[item.request_id] = item
                    bar.add(sum(len(sample.token_ids) for sample in item.outputs))
        finally:
            self._loop.call_soon_threadsafe(self._abandon, set(requests))
        return [outputs[request.id] for request in requests]

    def _submit(self, requests: Iterable[Request]) -> None:
        """Take requests of a caller. Sleeping replicas refuse them."""
        if self._asleep and not self._error():
            parts = ", ".join(sorted(self._asleep))
            for request in requests:
                request.receive(RuntimeError(f"the replicas are asleep ({parts}); call wake_up() first"))
        else:
            self._dispatch(requests)

    def _dispatch(self, requests: Iterable[Request] = ()) -> None:
        """Send requests to replicas that are awake and have room for them. The others wait."""
        self._waiting.update(dict.fromkeys(requests))
        while self._waiting and (error := self._error()):
            self._waiting.popitem(last=False)[0].receive(error)
        while self._waiting and not self._asleep:
            free = [replica for replica in self._replicas if len(replica.requests) < self._max_requests]
            if not free:
                return
            request, _ = self._waiting.popitem(last=False)
            least_loaded = min(free, key=lambda replica: replica.num_tokens + replica.cost(request))
            least_loaded.send(request)

    def _abandon(self, abandoned: set[Request]) -> None:
        """End those of these requests that have not finished."""
        ids_by_replica: dict[Replica, list[str]] = {}
        for request in abandoned:
            self._waiting.pop(request, None)
            replica = request.replica
            if replica and request.id in replica.requests:
                replica.remove(request)
                ids_by_replica.setdefault(replica, []).append(request.id)
        if self._is_same_ray():
            for replica, request_ids in ids_by_replica.items():
                replica.actor.abandon.remote(request_ids)
        self._dispatch()

    # -- replicas ----------------------------------------------------------------------------------------------------

    async def _keep(self, replica: Replica) -> None:
        """Give the outputs of a replica to their requests. When it is lost, start another one in its place."""
        num_losses = 0
        is_first = True
        while True:
            try:
                if not is_first:
                    replica = Replica(self._actor_class.remote(self._options))
                await self._wait_for_place(replica)
                if not is_first and not await self._joins(replica):
                    self._drop(replica)
                    await self._next_update.wait()
                    continue
                while True:
                    self._dispatch()
                    async for batch in replica.actor.outputs.remote():
                        self._receive(replica, await batch)
            except Exception as error:
                if ended := self._error():
                    return await self._end(str(ended))
                reason = str(getattr(error, "cause", error)).partition("\n")[0][:300]
                if num_losses == self._max_restarts:
                    return await self._end(f"a replica is lost after max_restarts={num_losses} in its place: {reason}")
                num_losses += 1
                logger.warning(f"A replica is lost, and another one starts in its place: {reason}")
            finally:
                is_first = False
                self._drop(replica)

    async def _joins(self, replica: Replica) -> bool:
        """Bring a new replica to the state of the others, and let it answer requests.

        Return False if it cannot have their weights.
        """
        actor = replica.actor
        await actor.start.remote()
        async with self._changing:
            if not await self._takes_weights(actor):
                return False
            if self._asleep:
                await actor.sleep.remote(2 if "weights" in self._asleep else 1)
                await actor.wake_up.remote([part for part in MEMORY if part not in self._asleep])
            self._replicas.append(replica)
            self._joined.set()
            return True

    async def _takes_weights(self, actor: Any) -> bool:
        """Give a new replica, which is awake, the newest weights. Return False if it cannot have them."""
        if self._weights_call is None:
            return True
        method, arguments = self._weights_call
        try:
            await getattr(actor, method).remote(*arguments)
        except RayTaskError as error:
            reason = str(error.cause).partition("\n")[0][:300]
            if self._replicas:
                self._next_update.clear()
                message = "A new replica cannot have the newest weights, so it waits for the next update"
                logger.warning(f"{message}: {reason}")
                return False
            # Nobody has these weights any more.
            self._weights_call = "refuse", (reason,)
            await actor.refuse.remote(reason)
        return True

    async def _wait_for_place(self, replica: Replica) -> None:
        """Wait until Ray has started a replica's process. Say so if it cannot, because its resources are not free."""
        started = asyncio.ensure_future(replica.actor.__ray_ready__.remote())
        started.add_done_callback(lambda each: each.cancelled() or each.exception())  # marks it as seen
        done, _ = await asyncio.wait([started], timeout=_PATIENCE_S)
        if not done:
            logger.warning(
                f"A replica has waited {_PATIENCE_S} s for Ray to start its process. It needs {self._actor_options}; "
                f"free are {ray.available_resources()}"
            )
        await started

    def _receive(self, replica: Replica, items: list[tuple[str, Any]]) -> None:
        for request_id, item in items:
            if request := replica.requests.get(request_id):  # else it is abandoned
                if isinstance(item, Exception) or item.finished:
                    replica.remove(request)
                request.receive(item)
        self._dispatch()

    def _drop(self, replica: Replica) -> None:
        """Kill a replica, which may be lost already, and let others answer its requests."""
        if self._is_same_ray():
            ray.kill(replica.actor)
        if replica in self._replicas:
            self._replicas.remove(replica)
            if not self._replicas and not self._end_reason:
                self._joined.clear()
            self._dispatch(replica.requests.values())
            replica.requests.clear()

    async def _watch_ray(self) -> None:
        """End all requests once Ray has been shut down, which nothing else tells."""
        while self._is_same_ray():
            await asyncio.sleep(_WATCH_S)
        await self._end("Ray has been shut down")

    async def _end(self, reason: str) -> None:
        """Kill all replicas, and let all requests and calls raise RuntimeError."""
        self._end_reason = reason
        for keeper in self._keepers:
            keeper.cancel()
        self._joined.set()
        self._dispatch()

    def _is_same_ray(self) -> bool:
        """Whether the Ray in which the replicas were made still runs."""
        return ray.is_initialized() and _ray_ids() == self._ray_ids

    def _error(self) -> RuntimeError | None:
        """Return an error that says why no replica can answer any more. A call of Ray would start it again."""
        reason = self._end_reason if self._is_same_ray() else "Ray has been shut down"
        return RuntimeError(reason) if reason else None

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """Change the weights or the memory of all replicas, of which at least one is up.

        Raise RuntimeError once no replica can be up any more.
        """
        while True:
            if error := self._error():
                raise error
            await self._joined.wait()
            async with self._changing:
                if self._replicas:  # the last one may have been lost meanwhile
                    yield
                    return

    async def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all actors. Return the results of those that are not lost meanwhile, or raise an error."""
        results = await self._on_each(method, *arguments)
        for error in results:
            if isinstance(error, Exception):
                raise error
        return results

    async def _on_each(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all actors. Return the results, or errors, of those that are not lost meanwhile.

        A replica whose engine has failed counts as lost. Without requests, nothing else notices it.
        """

        async def has_failed(replica: Replica) -> bool:
            try:
                return await replica.actor.has_failed.remote()
            except RayError:
                return True

        async def call(replica: Replica) -> Any:
            try:
                return await getattr(replica.actor, method).remote(*arguments)
            except RayTaskError as error:
                if not await has_failed(replica):
                    raise error.cause from None
            except RayError:
                pass
            self._drop(replica)

        calls = map(call, self._replicas)
        results = [] if self._error() else await asyncio.gather(*calls, return_exceptions=True)
        if error := self._error():
            raise error
        return [result for result in results if result is not None]

    # -- weights, memory, state --------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str | Path) -> int:
        """Update the weights of all replicas, of each between two steps. Return their new version.

        Args:
            weights: as in `LLM.update_weights`. Tensors go through Ray's object store, once to each host. They stay
                there until the next update, for replicas that start later.

        Raises:
            TypeError, ValueError: as in `LLM.update_weights`, with the same effect on all replicas.
        """
        if error := self._error():
            raise error
        is_path = isinstance(weights, str | Path)
        source = [str(_absolute(weights))] if is_path else [ray.put(part) for part in pack(weights)]
        return self._wait(self._update(source))

    async def _update(self, source: list[Any]) -> int:
        while True:
            async with self._change():
                if await self._try_update(source):
                    return self._version

    async def _try_update(self, source: list[Any]) -> bool:
        """Update the weights of all replicas. Return False if all are lost meanwhile, so that none has checked them."""
        version = self._version + 1
        results = await self._on_each("update", version, None, *source)
        if not results:
            return False
        errors = [result for result in results if isinstance(result, Exception)]
        if not errors and len(set(results)) > 1:  # they are fingerprints of the files
            errors = [ValueError(f"the files of {source[0]} are not the same on all hosts")]
        if errors:
            # An update that all have refused before it began has changed nothing.
            if len(errors) < len(results) or any(await self._on_all("lacks_weights")):
                reason = str(errors[0])[:300]
                self._weights_call = "refuse", (reason,)
                await self._on_all("refuse", reason)
            raise errors[0]
        self._version = version
        fingerprint = results[0]  # all are equal
        self._weights_call = "update", (version, fingerprint, *source)
        self._next_update.set()
        return True

    def sleep(self, level: int = 1) -> None:
        """Give memory of all replicas back until `wake_up`; see `LLM.sleep`."""
        self._wait(self._sleep(level, parts_of_level(level)))

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Wake all replicas; see `LLM.wake_up`."""
        tags = list(tags) if isinstance(tags, Iterator) else tags
        self._wait(self._wake_up(list(parts_of_tags(tags))))

    async def _sleep(self, level: int, parts: Collection[str]) -> None:
        async with self._change():
            before = set(self._asleep)
            self._asleep.update(parts)  # from now on, requests wait here
            num_asked = len(self._replicas)
            errors = [result for result in await self._on_each("sleep", level) if isinstance(result, Exception)]
            if errors:
                if len(errors) == num_asked:  # else some are asleep: `wake_up` wakes them
                    self._asleep = before
                    self._dispatch()
                raise errors[0]

    async def _wake_up(self, parts: list[str]) -> None:
        async with self._change():
            await self._on_all("wake_up", parts)  # after an error, a second call wakes those that still sleep
            self._asleep.difference_update(parts)
            self._dispatch()

    def reset_prefix_cache(self) -> None:
        """Forget the cached prefixes of all replicas; see `LLM.reset_prefix_cache`."""
        self._wait(self._on_all("reset_prefix_cache"))

    def metrics(self) -> Metrics:
        """Return the sums of the replicas' metrics, and the mean of `kv_usage`. A new replica counts from 0."""
        found = self._wait(self._on_all("metrics"))
        values: dict[str, Any] = {}
        for each in fields(Metrics):
            values[each.name] = sum(getattr(metrics, each.name) for metrics in found)
        values["kv_usage"] /= max(1, len(found))
        return Metrics(**values)

    def close(self) -> None:
        """End all replicas. Calls that wait raise RuntimeError. May be called again."""
        self._wait(self._end("the replicas are closed"))

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wait(self, coroutine: Coroutine) -> Any:
        """Return the result of a coroutine that runs in the loop's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _absolute(path: Any) -> Any:
    """Return a path as actors find it, whose working folder is another. A hub id is no path."""
    return str(Path(path).absolute()) if isinstance(path, str | Path) and path and Path(path).exists() else path


def _ray_ids() -> tuple[str, str]:
    """Return ids that change when this process connects to Ray again: to the same cluster, or to another."""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop in a thread of its own, for all `Replicas` of this process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="nanovllm-replicas", daemon=True).start()
    return loop
