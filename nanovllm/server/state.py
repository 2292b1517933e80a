"""What the endpoints share."""

from dataclasses import dataclass

from nanovllm import AsyncLLM
from nanovllm.server.admission import Admission
from nanovllm.server.formats import TextFormat
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.options import ServerOptions


@dataclass(frozen=True)
class ServerState:
    """What the endpoints share.

    Args:
        llm: the engine. Endpoints use its public methods only.
        model_names: the model's names in the API; the first is the one that answers carry.
        format: how the model writes its thinking and its tool calls.
        admission: counts the requests that the engine has, and refuses those that are too many.
    """

    llm: AsyncLLM
    options: ServerOptions
    model_names: tuple[str, ...]
    format: TextFormat
    admission: Admission
    metrics: ServerMetrics
