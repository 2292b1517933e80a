"""One replica: an engine in a Ray actor, and weights on their way to it."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
import os
import signal
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch

from nanovllm import AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams

# A tensor in the object store: its name, bytes, dtype and shape. The processes of a host read the same bytes.
PackedTensor = tuple[str, np.ndarray, torch.dtype, torch.Size]
_PART_BYTES = 1 << 28


class EngineLostError(RuntimeError):
    """The engine of a replica has failed, for example because a rank was lost. Only a new actor helps."""


class ReplicaActor:
    """Owns an engine, whose processes end with the actor.

    Args:
        options: the arguments of `AsyncLLM`.
    """

    def __init__(self, options: dict[str, Any]):
        end_with_raylet()
        self._options = options
        self._version_offset = 0
        # Weights in the object store are read-only, and the engine does not write to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    async def start(self) -> None:
        """Make the engine. An error of `__init__` would reach the driver as the actor's death."""
        self._llm = await asyncio.to_thread(lambda: AsyncLLM(**self._options))

    async def answer(self, *request: Any) -> RequestOutput:
        """Return the whole output of a request; see `generate`. This costs the driver half of what a stream costs."""
        async with aclosing(self.generate(*request, kind=RequestOutputKind.FINAL_ONLY)) as outputs:
            return [output async for output in outputs][-1]

    async def generate(
        self, prompt: Any, chat: Any, template: dict, params: SamplingParams | None, seed: int, kind: RequestOutputKind
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a prompt, or a conversation with options of its template."""
        try:
            if chat is not None:
                prompt = await self._llm.chat_prompt(chat, **template)
            params = params or self._llm.get_default_sampling_params()
            params = replace(params, seed=seed if params.seed is None else params.seed, output_kind=kind)
            async with aclosing(self._llm.generate(prompt, params)) as outputs:  # pyright: ignore[reportArgumentType]
                async for output in outputs:
                    yield replace(output, weight_version=output.weight_version + self._version_offset)
        except Exception as error:
            try:
                await self._llm.check_health()
            except RuntimeError:
                raise EngineLostError(str(error)) from None
            raise

    async def update_weights(self, source: Any, version: int) -> None:
        """Update the weights from a path or from references to lists of `PackedTensor`. Count this as `version`."""
        if not isinstance(source, str):
            source = _unpack(await asyncio.gather(*source))
        self._version_offset = version - await self._llm.update_weights(source)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a coroutine of `AsyncLLM`."""
        return await getattr(self._llm, method)(*arguments)


def end_with_raylet() -> None:
    """Let this process end soon after its parent, if it is an actor. When a raylet is killed, Ray keeps idle actors."""
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        threading.Thread(target=watch, name="nanovllm-raylet", daemon=True).start()


def pack(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[PackedTensor]]:
    """Yield tensors in lists of about 256 MiB."""
    part, num_bytes = [], 0
    for name, tensor in weights:
        array = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        part.append((name, array, tensor.dtype, tensor.shape))
        num_bytes += array.nbytes
        if num_bytes >= _PART_BYTES:
            yield part
            part, num_bytes = [], 0
    yield part


def _unpack(parts: list[list[PackedTensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for part in parts:
        for name, array, dtype, shape in part:
            yield name, torch.from_numpy(array).view(dtype).view(shape)
