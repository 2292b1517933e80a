"""POST /tokenize and /detokenize, as in vLLM."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict

from nanovllm.server.body import Body
from nanovllm.server.chat import ChatRequest
from nanovllm.server.errors import ApiError
from nanovllm.server.generation import prompt_token_ids
from nanovllm.server.models import check_model
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import JsonResponse, in_thread


class TokenizeRequest(Body):
    """A text, or a conversation with the options of its chat template, as in chat completions."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    tokens: list[int]


_CHAT_FIELDS = (
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
)


async def _token_ids(state: ServerState, request: TokenizeRequest, http: Request) -> list[int]:
    fields = {name: getattr(request, name) for name in _CHAT_FIELDS if getattr(request, name) is not None}
    if request.prompt is not None and request.messages is None:
        if fields:
            raise ApiError(400, f"{min(fields)} needs messages, but there is a prompt", param=min(fields))
        return await state.llm.encode(request.prompt, request.add_special_tokens is not False)
    if request.messages is None or request.prompt is not None:
        raise ApiError(400, "the request must have either prompt or messages", param="prompt")
    if request.add_special_tokens:
        message = "add_special_tokens must not be true with messages: the chat template writes the special tokens"
        raise ApiError(400, message, param="add_special_tokens")
    # The prompt is the one that chat completions would make.
    chat = ChatRequest(messages=request.messages, **fields)
    return await prompt_token_ids(state, chat.conversation(state, http))


def routes(state: ServerState) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: TokenizeRequest, http: Request) -> JsonResponse:
        check_model(state, request.model)
        async with state.tokenizing(http):
            token_ids = await _token_ids(state, request, http)
            names = None
            if request.return_token_strs:
                names = await in_thread(state.llm.tokenizer.convert_ids_to_tokens, token_ids)
        return JsonResponse(
            {
                "count": len(token_ids),
                "max_model_len": state.llm.max_model_len,
                "tokens": token_ids,
                "token_strs": names,
            }
        )

    @router.post("/detokenize")
    async def detokenize(request: DetokenizeRequest, http: Request) -> JsonResponse:
        check_model(state, request.model)
        async with state.tokenizing(http):
            return JsonResponse({"prompt": await state.llm.decode(request.tokens)})

    return router
