"""The real clients of OpenAI and Anthropic, connected to a server in this process."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from nanovllm.server.admission import Admission
from nanovllm.server.app import create_app
from nanovllm.server.formats import TextFormat
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.options import ServerOptions
from nanovllm.server.state import ServerState

MODEL = "tiny"
# A model that writes tool calls as Qwen3 does, and whose thinking can be switched.
TEMPLATE = "{{ messages }}{{ tools }}<tool_call><think>{{ enable_thinking }}"


def make_state(llm: Any, tool_format: str = "hermes", reasoning_format: str = "think", **options: Any) -> ServerState:
    """Return the state of a server whose engine is `llm`."""
    if not hasattr(llm, "tokenizer"):
        llm.tokenizer = SimpleNamespace(chat_template=TEMPLATE)
    return ServerState(
        llm=llm,
        options=ServerOptions(**options),
        model_names=(MODEL,),
        format=TextFormat(tool_format, reasoning_format),
        admission=Admission(8),
        metrics=ServerMetrics(MODEL),
    )


def http_client(package: Any, state: ServerState) -> Any:
    """Return an HTTP client for the client of `package`, which calls a server with this state."""
    base = package.DefaultAsyncHttpxClient
    httpx = import_module(base.__base__.__module__.partition(".")[0])  # clients have used httpx and httpx2
    return base(transport=httpx.ASGITransport(app=create_app(state)))
