"""The real clients of OpenAI and Anthropic, connected to a server in this process."""

import asyncio
from collections.abc import Awaitable, Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from tests.server.scripted import ScriptedLLM
from tests.server.serving import make_server

MODEL = "tiny"
# A model that writes tool calls as Qwen3 does, and whose thinking can be switched.
TEMPLATE = "{{ messages }}{{ tools }}<think>{{ enable_thinking }}"


def http_client(package: Any, llm: Any, **options: Any) -> Any:
    """Return an HTTP client for the client of `package`, which calls a server whose engine is `llm`.

    Args:
        options: of the server.
    """
    if isinstance(llm, ScriptedLLM):
        llm.tokenizer = SimpleNamespace(chat_template=TEMPLATE)
    _, app = make_server(llm, **{"tool_parser": "hermes", "reasoning_parser": "think", **options})
    base = package.DefaultAsyncHttpxClient
    httpx = import_module(base.__base__.__module__.partition(".")[0])  # clients have used httpx and httpx2
    return base(transport=httpx.ASGITransport(app=app))


def ask(package: Any, client: type, url: str, act: Callable[[Any], Awaitable[Any]], llm: Any, **options: Any) -> Any:
    """Return what `act` returns, which is called with a client of a server with this engine.

    Args:
        client: the class of `package` to make the client of.
        options: of the server.
    """

    async def main() -> Any:
        async with http_client(package, llm, **options) as http:
            return await act(client(base_url=url, api_key="-", max_retries=0, http_client=http))

    return asyncio.run(main())
