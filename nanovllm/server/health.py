"""GET /health, /version and /metrics."""

import asyncio

from fastapi import APIRouter, Response

import nanovllm
from nanovllm.server.errors import ApiError
from nanovllm.server.metrics import CONTENT_TYPE
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import JsonResponse

# How long the engine may take to reply. It replies between steps, which are far shorter on a GPU.
_REPLY_SECONDS = 60


def routes(state: ServerState) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    # Load balancers and `wget --spider` send HEAD. In the schema, each method would need an id of its own.
    @router.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
    async def health() -> Response:
        """Respond with 200 if requests can be served now, else 503."""
        if state.admission.draining:
            raise ApiError(503, "the server is about to stop", code="draining")
        try:
            is_asleep = await asyncio.wait_for(_check(state), _REPLY_SECONDS)
        except asyncio.TimeoutError:  # Python 3.10 has two kinds
            message = f"the engine has not replied for {_REPLY_SECONDS} s"
            raise ApiError(503, message, code="engine_unavailable") from None
        if is_asleep:
            raise ApiError(503, "the engine is asleep", code="asleep")
        return Response()

    @router.get("/version")
    async def version() -> JsonResponse:
        return JsonResponse({"version": nanovllm.__version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        try:
            engine = await asyncio.wait_for(state.llm.metrics(), _REPLY_SECONDS)
        except (RuntimeError, asyncio.TimeoutError):  # closed, failed or stopped
            engine = None
        return Response(state.metrics.render(engine), media_type=CONTENT_TYPE)

    return router


async def _check(state: ServerState) -> bool:
    """Return whether the engine is asleep. Raise RuntimeError if it is closed or has failed."""
    await state.llm.check_health()
    return await state.llm.is_sleeping()
