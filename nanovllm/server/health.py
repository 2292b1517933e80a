"""GET /health, /version and /metrics."""

from fastapi import APIRouter, Response

import nanovllm
from nanovllm.server.errors import ApiError
from nanovllm.server.metrics import CONTENT_TYPE
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import JsonResponse


def routes(state: ServerState) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    # Load balancers and `wget --spider` send HEAD. In the schema, each method would need an id of its own.
    @router.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
    async def health() -> Response:
        """Respond with 200 if requests can be served now, else 503."""
        if state.admission.draining:
            raise ApiError(503, "the server is about to stop", code="draining")
        await state.llm.check_health()
        if await state.llm.is_sleeping():
            raise ApiError(503, "the engine is asleep", code="asleep")
        return Response()

    @router.get("/version")
    async def version() -> JsonResponse:
        return JsonResponse({"version": nanovllm.__version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        try:
            engine = await state.llm.metrics()
        except RuntimeError:  # closed or failed
            engine = None
        return Response(state.metrics.render(engine), media_type=CONTENT_TYPE)

    return router
