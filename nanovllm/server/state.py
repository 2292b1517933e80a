"""The state that all endpoints share."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fastapi import Request

from nanovllm import AsyncLLM, RequestOutput, SamplingParams
from nanovllm.engine.detokenizer import TokenBytes
from nanovllm.server.admission import AdmissionControl
from nanovllm.server.engine_client import EngineClient
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.options import ServerOptions
from nanovllm.server.security import key_salt
from nanovllm.server.text_format import TextFormat

# How many long requests that only tokenize run at once. They share the engine's threads for prompts with requests that
# generate, and leave some of them free.
_MAX_TOKENIZING = 2
_SHORT_BODY = 1 << 13  # bytes


@dataclass(frozen=True)
class ServerState:
    """The engine and the options of a server, for its endpoints.

    Args:
        llm: the engine, in this process or in its own. Endpoints use the methods that both have.
        model_names: the model's names in the API; the first is the one that responses carry.
        format: how the model writes its thinking and its tool calls.
        admission: counts the requests that the engine has, and refuses those that are too many.
    """

    llm: AsyncLLM | EngineClient
    options: ServerOptions
    model_names: tuple[str, ...]
    format: TextFormat
    admission: AdmissionControl
    metrics: ServerMetrics
    _tokenizing: asyncio.Semaphore = field(init=False, default_factory=lambda: asyncio.Semaphore(_MAX_TOKENIZING))

    def tokenizing(self, http: Request) -> AbstractAsyncContextManager[Any]:
        """Return a context manager for a request that only tokenizes. It bounds how many long ones run at once."""
        return nullcontext() if self.body_bytes(http) <= _SHORT_BODY else self._tokenizing

    def body_bytes(self, http: Request) -> int:
        """Return the size of a request's body in bytes; without a Content-Length, the largest that is allowed."""
        length = http.headers.get("content-length", "")
        return int(length) if length.isdecimal() else self.options.max_body_mib << 20

    @cached_property
    def token_bytes(self) -> Mapping[int, bytes]:
        """The bytes of each token, special ones included. Without a tokenizer, tokens have none."""
        return self._token_bytes(skip_special_tokens=False)

    @cached_property
    def text_bytes(self) -> Mapping[int, bytes]:
        """The bytes that each token adds to a text without special tokens."""
        return self._token_bytes(skip_special_tokens=True)

    def _token_bytes(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        try:
            tokenizer = self.llm.tokenizer
        except ValueError:
            return defaultdict(bytes)
        return TokenBytes(tokenizer.backend_tokenizer, skip_special_tokens)

    def generate(
        self, http: Request, prompt: Any, params: SamplingParams, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate as `AsyncLLM.generate` does, and count the request in the metrics.

        Args:
            http: has the client's API key. With the option `salt_prefix_cache`, keys do not share cached prompts.

        Raises:
            TypeError, ValueError: the request cannot be served. Some faults show at the first output only.
            RuntimeError: the engine is closed, asleep or has failed. This replaces any other error that it causes.
        """
        if self.options.salt_prefix_cache:
            params = replace(params, cache_salt=key_salt(http, params.cache_salt))
        return self.metrics.observe(self._outputs(self.llm.generate(prompt, params, request_id)), params.n)

    async def _outputs(self, outputs: Any) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(outputs):
            try:
                async for output in outputs:
                    yield output
            except Exception:
                await self.llm.check_health()  # raises RuntimeError if the engine is the reason
                raise
