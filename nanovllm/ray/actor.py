"""One replica: an engine in a Ray actor, and weights on their way to it."""

# Ray may be absent, and then pyright takes this folder for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
import ctypes
import signal
import warnings
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from nanovllm import AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams, TokensPrompt
from nanovllm.checkpoints.given_weights import checked_weights
from nanovllm.engine.llm_engine import LLMEngine, weight_pairs
from nanovllm.server.engine_messages import pack_error, unpack_error

# A tensor in the object store: its name, bytes, dtype and shape. The processes of a host read the same bytes.
PackedTensor = tuple[str, np.ndarray, torch.dtype, torch.Size]
_PART_BYTES = 1 << 28
# How many parts of each file `_fingerprint` reads, and how many bytes of each.
_FINGERPRINT_PARTS = 256
_FINGERPRINT_BYTES = 64
_MAX_ABANDONED = 1 << 12  # requests whose calls may still be on their way


class ReplicaActor(AsyncLLM):
    """An engine whose processes end with its actor.

    Args:
        options: the arguments of `AsyncLLM`.
    """

    def __init__(self, options: dict[str, Any]):
        end_with_raylet()
        self._options = options
        self._items: asyncio.Queue[tuple[str, RequestOutput | Exception]] = asyncio.Queue()
        self._answers: dict[str, asyncio.Task] = {}
        # Requests that were abandoned before they arrived here, the newest last: a dict, as an ordered set.
        self._abandoned: dict[str, None] = {}
        # Weights in the object store are read-only, and the engine does not write to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    async def start(self) -> None:
        """Make the engine. An error of `__init__` would reach the driver as the actor's death."""
        await asyncio.to_thread(AsyncLLM.__init__, self, **self._options)

    async def answer(self, request_id: str, kind: RequestOutputKind, message: bytes) -> None:
        """Answer a request, whose outputs or error `outputs` yields.

        Args:
            message: the pickled prompt, parameters, seed and template of a `Request`.
        """
        if request_id in self._abandoned:
            return
        self._answers[request_id] = asyncio.create_task(self._answer(request_id, kind, message))
        await asyncio.wait([self._answers[request_id]])
        del self._answers[request_id]

    async def abandon(self, request_ids: list[str]) -> None:
        """End abandoned requests. One that arrives later never starts: Ray may swap its call with this one."""
        for request_id in request_ids:
            if answer := self._answers.get(request_id):
                answer.cancel()
            else:
                self._abandoned[request_id] = None
        for request_id in list(self._abandoned)[:-_MAX_ABANDONED]:
            del self._abandoned[request_id]

    async def _answer(self, request_id: str, kind: RequestOutputKind, message: bytes) -> None:
        try:
            prompt, params, seed, template = ray.cloudpickle.loads(message)
            if template is not None:
                text, token_ids = await self._chat_text_and_ids(prompt, **template)
                prompt = TokensPrompt(prompt=text, prompt_token_ids=token_ids)
            params = self.get_default_sampling_params() if params is None else params
            if isinstance(params, SamplingParams):  # else the engine refuses it
                params.output_kind = kind
                if params.seed is None:
                    params.seed = seed
            is_first = True
            async for output in self.generate(prompt, params, request_id):
                if not is_first:  # the driver has the prompt, which may be long
                    output = replace(output, prompt=None, prompt_token_ids=[], prompt_logprobs=None)
                self._items.put_nowait((request_id, output))
                is_first = False
        except Exception as error:
            # Another error might not be picklable.
            self._items.put_nowait((request_id, unpack_error(pack_error(error))))

    async def outputs(self) -> AsyncIterator[list[tuple[str, RequestOutput | Exception]]]:
        """Yield outputs and errors of requests, in batches of what is there. Raise RuntimeError if the engine fails.

        Only a request's first output has its prompt.
        """
        for _ in range(10_000):  # Ray's memory of a generator grows until it ends
            batch = [await self._items.get()]
            while not self._items.empty():
                batch.append(self._items.get_nowait())
            if any(isinstance(item, Exception) for _, item in batch):
                await self.check_health()
            yield batch

    async def update(self, version: int, fingerprint: str | None, *source: Any) -> str:
        """Update the weights from a path or from lists of `PackedTensor`. Count this as `version`.

        Args:
            fingerprint: of the files that the other replicas have loaded; None if no replica has loaded them yet.

        Returns:
            The fingerprint of this replica's files; "" without files.
        """
        own_fingerprint = ""
        weights: Any = _unpack(source)
        if isinstance(source[0], str):
            weights = source[0]
            with suppress(OSError):  # the update reports what is wrong
                own_fingerprint = await asyncio.to_thread(_fingerprint, Path(weights))
            if fingerprint is not None and own_fingerprint != fingerprint:
                raise ValueError(f"the files of {weights} have changed since the other replicas have loaded them")
        await self.update_weights(weights)
        self.llm_engine.core.weight_version = version
        return own_fingerprint

    async def has_failed(self) -> bool:
        """Whether the engine has failed. One that could not be made has not."""
        engine = getattr(self, "llm_engine", None)
        return engine is not None and (engine.guard.closed or engine.guard.error is not None)

    async def lacks_weights(self) -> bool:
        """Whether an update has failed, so that the weights may be partly overwritten."""
        return self.llm_engine.guard.update_failed

    async def refuse(self, reason: str) -> None:
        """Refuse requests until the next update, as after one that has failed."""

        def fail(engine: LLMEngine) -> None:
            engine.guard.weight_error = engine.guard.weight_error or RuntimeError(reason)

        await self._call(fail)


def end_with_raylet() -> None:
    """Let Linux kill this process when its parent ends, if it is an actor. Ray keeps idle actors of a killed raylet."""
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _fingerprint(path: Path) -> str:
    """Return a hash of the sizes and of some bytes of a checkpoint's files. Training changes all weights a little."""
    digest = sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(1, size // _FINGERPRINT_PARTS)):
                stream.seek(start)
                digest.update(stream.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()


def pack(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[PackedTensor]]:
    """Yield tensors in lists of about 256 MiB. Raise TypeError or ValueError as `LLM.update_weights` does."""
    part = []
    for name, tensor in checked_weights(weight_pairs(weights)):
        copy = tensor.to("cpu", copy=True)  # the caller may overwrite the tensor once it makes the next one
        array = copy.contiguous().view(-1).view(torch.uint8).numpy()
        part.append((name, array, tensor.dtype, tensor.shape))
        if sum(array.nbytes for _, array, _, _ in part) >= _PART_BYTES:
            yield part
            part = []
    yield part


def _unpack(parts: Iterable[list[PackedTensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for part in parts:
        for name, array, dtype, shape in part:
            yield name, torch.from_numpy(array).view(dtype).view(shape)
