"""GET /v1/models: the names of the model."""

import time

from fastapi import APIRouter

from nanovllm.server.errors import ApiError
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import JsonResponse


def check_model(state: ServerState, name: str | None) -> None:
    """Raise ApiError unless `name` is one of the model's names. None is the model that there is."""
    if name is not None and name not in state.model_names:
        names = ", ".join(state.model_names)
        message = f"there is no model {name[:100]!r} here; the server has {names}"
        raise ApiError(404, message, param="model", code="model_not_found")


def routes(state: ServerState) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()
    created = int(time.time())

    def card(name: str) -> dict:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "nanovllm",
            "root": state.model_names[0],
            "parent": None,
            "max_model_len": state.llm.max_model_len,
        }

    @router.get("/v1/models")
    async def list_models() -> JsonResponse:
        return JsonResponse({"object": "list", "data": [card(name) for name in state.model_names]})

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> JsonResponse:
        check_model(state, name)
        return JsonResponse(card(name))

    return router
