"""Many engines as one: `Replicas` sends requests to engines in Ray actors."""

# Ray may be absent, and then pyright takes this folder for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
import contextlib
import itertools
import logging
import random
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError

from nanovllm.checks import is_list, length, number
from nanovllm.config import check_names
from nanovllm.inputs import Prompt, is_array, list_prompts, split_prompt
from nanovllm.llm import Chat, pair_params
from nanovllm.output_stream import OutputStream, keep_newest, merge_deltas
from nanovllm.outputs import CompletionOutput, Metrics, RequestOutput
from nanovllm.progress import GenerationBar
from nanovllm.ray.actor import EngineLostError, ReplicaActor, pack
from nanovllm.ray.routing import Replica, Work, estimate
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger("nanovllm")

_LOST = (RayActorError, ObjectLostError, NodeDiedError, EngineLostError)
_CLOSE_SECONDS = 30


@dataclass(eq=False)
class _Request:
    """A request. `arguments` are those of `ReplicaActor.generate`, without the kind of outputs."""

    id: str
    arguments: tuple
    work: Work


class Replicas:
    """Engines in Ray actors, on one host or many, with the methods of `LLM`.

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
        self._max_concurrent = number("max_concurrent_requests", max_concurrent_requests, int, 1, 1 << 20)
        self._options = {"model": model, "max_concurrent_requests": self._max_concurrent, **options}
        if not ray.is_initialized():
            ray.init()
        # Calls that are no requests never wait for them.
        defaults = {"num_cpus": 1, "num_gpus": _num_gpus(options), "max_concurrency": self._max_concurrent + 64}
        self._actor_class: Any = ray.remote(ReplicaActor).options(**defaults | (actor_options or {}))
        self._ids, self._seeds = itertools.count(), random.Random(options.get("seed") or 0)
        # Only the loop's thread uses these.
        self._replicas: list[Replica] = []
        self._changed, self._joining = asyncio.Condition(), asyncio.Lock()
        self._end_reason: str | None = None
        self._weights: Any = None
        self._version = 0
        self._sleep_calls: list[tuple] = []
        self._restarts: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nanovllm-replicas", daemon=True)
        self._thread.start()
        try:
            self._wait(_gather([self._start(0) for _ in range(num_replicas)]))
        except BaseException:
            self.close()
            raise

    # -- requests ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | SequenceType[Prompt],
        sampling_params: SamplingParams | SequenceType[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer all `prompts`, in their order; see `LLM.generate`. The first error of a request ends the others."""
        pairs = pair_params(list_prompts(prompts), sampling_params)
        return self._answer([self._request(prompt, params) for prompt, params in pairs], use_tqdm)

    def chat(
        self,
        messages: Chat | SequenceType[Chat],
        sampling_params: SamplingParams | SequenceType[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer conversations; see `LLM.chat`. `template` has options of `LLM.chat_prompts`."""
        chats: Any = messages if is_list(messages) and length(messages) and is_list(messages[0]) else [messages]
        pairs = pair_params(chats, sampling_params)
        return self._answer([self._request(None, params, chat, template) for chat, params in pairs], use_tqdm)

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Answer one prompt step by step; see `AsyncLLM.generate`. Leaving the iteration ends the request."""
        kind = (sampling_params and sampling_params.output_kind) or RequestOutputKind.DELTA
        request = self._request(prompt, sampling_params)
        stream = OutputStream(merge_deltas if kind is RequestOutputKind.DELTA else keep_newest)
        loop = asyncio.get_running_loop()

        async def forward() -> None:
            try:
                async for output in self._outputs(request, kind):
                    loop.call_soon_threadsafe(stream.put, output)
            except Exception as error:
                loop.call_soon_threadsafe(stream.put, error)

        task, finished = asyncio.run_coroutine_threadsafe(forward(), self._loop), False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            task.cancel()

    def _request(self, prompt: Any, params: SamplingParams | None, chat: Any = None, template: Any = None) -> _Request:
        if self._end_reason is not None:
            raise RuntimeError(self._end_reason)
        text, token_ids, _ = (str(chat), None, None) if chat is not None else split_prompt(prompt)
        content = text if token_ids is None else token_ids.tolist() if is_array(token_ids) else token_ids
        work = estimate(content if isinstance(content, str) or is_list(content) else "", params)
        return _Request(str(next(self._ids)), (prompt, chat, template, params, self._seeds.getrandbits(63)), work)

    def _answer(self, requests: list[_Request], use_tqdm: bool) -> list[RequestOutput]:
        results: dict[_Request, RequestOutput] = {}
        # As many tasks as requests can run. Each takes the next request.
        waiting = iter(requests)

        async def work() -> None:
            for request in waiting:
                results[request] = output = await self._output(request)
                bar.add(sum(len(sample.token_ids) for sample in output.outputs))

        with GenerationBar(len(requests), enabled=use_tqdm) as bar:
            num_tasks = min(len(requests), self._max_concurrent * max(1, len(self._replicas)))
            self._wait(_gather([work() for _ in range(num_tasks)]))
        return [results[request] for request in requests]

    async def _output(self, request: _Request) -> RequestOutput:
        """Return the whole output of a request, from another replica if one is lost."""
        while True:
            async with self._admitted(request) as replica:
                reference = replica.actor.answer.remote(*request.arguments)
                try:
                    return replace(await self._result(reference), request_id=request.id)
                except asyncio.CancelledError:
                    _cancel(reference)
                    raise

    async def _outputs(self, request: _Request, kind: RequestOutputKind) -> AsyncIterator[RequestOutput]:
        """Yield the outputs of a request, and go on with another replica if one is lost."""
        sent: dict[int, tuple[int, int]] = {}
        is_repeated = False
        while True:
            async with self._admitted(request) as replica:
                # A repeated stream has all of each sample, so that what was sent can be cut off.
                asked = RequestOutputKind.CUMULATIVE if is_repeated and kind is RequestOutputKind.DELTA else kind
                method = replica.actor.generate.options(num_returns="streaming")
                references = method.remote(*request.arguments, asked)
                try:
                    async for reference in references:
                        output = replace(await self._result(reference), request_id=request.id)
                        if kind is RequestOutputKind.DELTA:
                            samples = [_new_part(sample, sent, is_repeated) for sample in output.outputs]
                            output = replace(output, outputs=samples)
                        yield output
                    return
                finally:
                    _cancel(references)
            is_repeated = True

    @contextlib.asynccontextmanager
    async def _admitted(self, request: _Request) -> AsyncIterator[Replica]:
        """Choose a replica for a request in a `with` block. If the replica is lost, the block ends without an error."""
        async with self._changed:
            while not (free := [each for each in self._replicas if each.num_requests < self._max_concurrent]):
                if self._end_reason is not None:
                    raise RuntimeError(self._end_reason)
                await self._changed.wait()
        replica = min(free, key=lambda each: each.num_tokens + each.cost(request.work))
        cost = replica.add(request.work)
        try:
            yield replica
        except _LOST as error:
            self._lose(replica, error)
        finally:
            replica.remove(cost)
            async with self._changed:
                self._changed.notify()

    async def _result(self, reference: Any) -> Any:
        """Return the result of an actor's method, or raise its error without Ray's wrapping."""
        try:
            return await reference
        except RayTaskError as error:
            raise error.cause from None

    # -- replicas ----------------------------------------------------------------------------------------------------

    async def _start(self, num_restarts: int) -> None:
        """Start a replica, and let it have requests once it has the weights of the others."""
        actor = self._actor_class.remote(self._options)
        try:
            await self._result(actor.start.remote())
            async with self._joining:
                if self._weights is not None:
                    await self._result(actor.update_weights.remote(self._weights, self._version))
                for call in self._sleep_calls:
                    await self._result(actor.call.remote(*call))
                self._replicas.append(Replica(actor, num_restarts))
        except BaseException:
            ray.kill(actor)
            raise
        async with self._changed:
            self._changed.notify_all()

    def _lose(self, replica: Replica, error: Exception) -> None:
        """Start another replica in the place of one that is lost. Later calls for the same one do nothing."""
        if replica in self._replicas:
            self._replicas.remove(replica)
            ray.kill(replica.actor)
            task = self._loop.create_task(self._restart(replica.num_restarts, error))
            self._restarts.add(task)
            task.add_done_callback(self._restarts.discard)

    async def _restart(self, num_restarts: int, error: Exception) -> None:
        for time in range(num_restarts + 1, self._max_restarts + 1):
            logger.warning(
                f"A replica is lost: {_first_line(error)} Others answer its requests, and a new one starts (restart "
                f"{time} of at most {self._max_restarts} in this place)"
            )
            try:
                return await self._start(time)
            except Exception as start_error:
                error = start_error
        await self._end(
            f"more replicas were lost in one place than max_restarts={self._max_restarts}: {_first_line(error)}"
        )

    async def _end(self, reason: str) -> None:
        """Kill all replicas, and let all requests raise RuntimeError."""
        self._end_reason = self._end_reason or reason
        for replica in self._replicas:
            ray.kill(replica.actor)
        self._replicas.clear()
        async with self._changed:
            self._changed.notify_all()

    async def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all actors. Return the results of those that are not lost meanwhile."""

        async def call(replica: Replica) -> list[Any]:
            try:
                return [await self._result(getattr(replica.actor, method).remote(*arguments))]
            except _LOST as error:
                self._lose(replica, error)
                return []

        if self._end_reason is not None:
            raise RuntimeError(self._end_reason)
        return list(itertools.chain(*await _gather([call(replica) for replica in self._replicas])))

    # -- weights, memory, state --------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str | Path) -> int:
        """Update the weights of all replicas, of each between two steps. Return their new version.

        Args:
            weights: as in `LLM.update_weights`. Tensors go through Ray's object store, once to each host. They stay
                there until the next update, for replicas that start later.

        Raises:
            TypeError, ValueError: as in `LLM.update_weights`, with the same effect on all replicas.
        """
        source = str(weights) if isinstance(weights, str | Path) else [ray.put(part) for part in pack(weights)]

        async def update() -> int:
            async with self._joining:
                await self._on_all("update_weights", source, self._version + 1)
                self._weights, self._version = source, self._version + 1
                return self._version

        return self._wait(update())

    def sleep(self, level: int = 1) -> None:
        """Give memory of all replicas back until `wake_up`; see `LLM.sleep`."""
        self._wait(self._set_sleep("sleep", level))

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Wake all replicas; see `LLM.wake_up`."""
        self._wait(self._set_sleep("wake_up", None if tags is None else list(tags)))

    def reset_prefix_cache(self) -> None:
        """Forget the cached prefixes of all replicas; see `LLM.reset_prefix_cache`."""
        self._wait(self._on_all("call", "reset_prefix_cache"))

    async def _set_sleep(self, *call: Any) -> None:
        async with self._joining:
            await self._on_all("call", *call)
            # A replica that starts later repeats these calls.
            self._sleep_calls = [] if call == ("wake_up", None) else [*self._sleep_calls, call]

    def metrics(self) -> Metrics:
        """Return the sums of the replicas' metrics, and the mean of `kv_usage`. A new replica counts from 0."""
        found = self._wait(self._on_all("call", "metrics"))
        sums: dict[str, Any] = {
            each.name: sum(getattr(metrics, each.name) for metrics in found) for each in fields(Metrics)
        }
        return Metrics(**sums | {"kv_usage": sums["kv_usage"] / max(1, len(found))})

    def close(self) -> None:
        """End all replicas. Calls that wait raise RuntimeError. May be called again."""
        if self._thread.is_alive():
            self._wait(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _close(self) -> None:
        await self._end("the replicas are closed")
        for task in self._restarts:
            task.cancel()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=_CLOSE_SECONDS)
        await self._loop.shutdown_asyncgens()

    def _wait(self, coroutine: Coroutine) -> Any:
        """Run a coroutine in the loop's thread, and wait for its result. An interrupt cancels it."""
        if not self._thread.is_alive():
            coroutine.close()
            raise RuntimeError("the replicas are closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _num_gpus(options: dict[str, Any]) -> int:
    """Return how many GPUs a replica takes."""
    device = options.get("device") or "auto"
    has_gpus = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    return (options.get("tensor_parallel_size") or 1) if has_gpus else 0


def _new_part(sample: CompletionOutput, sent: dict[int, tuple[int, int]], is_whole: bool) -> CompletionOutput:
    """Return the part of a stream's sample that its consumer does not have, and count it in `sent`.

    Args:
        sent: number of tokens and characters of each sample that the consumer has.
        is_whole: the sample has all that was generated, not only what is new.
    """
    tokens, chars = sent.get(sample.index, (0, 0))
    if is_whole:
        logprobs = sample.logprobs and sample.logprobs[tokens:]
        sample = replace(sample, text=sample.text[chars:], token_ids=sample.token_ids[tokens:], logprobs=logprobs)
    sent[sample.index] = tokens + len(sample.token_ids), chars + len(sample.text)
    return sample


async def _gather(coroutines: list[Coroutine]) -> list[Any]:
    """Return the results of coroutines. At the first error, cancel the others, and raise it when they have ended."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _cancel(reference: Any) -> None:
    """End a call of an actor, or its generator, if it has not ended."""
    with contextlib.suppress(Exception):
        ray.cancel(reference)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
