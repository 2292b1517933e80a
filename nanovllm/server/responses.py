"""POST /v1/responses and /v1/responses/input_tokens: OpenAI's newer API, for its clients and for Codex.

The server keeps no response.
"""

import time
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nanovllm import RequestOutputKind, StructuredOutputsParams
from nanovllm.server.body import MAX_TOOLS, ToolName
from nanovllm.server.errors import ApiError
from nanovllm.server.generation import Conversation, generate_turn, prompt_token_ids
from nanovllm.server.models import check_model
from nanovllm.server.responses_writer import ResponseWriter
from nanovllm.server.sampling import ANY, NEUTRAL, SamplingFields
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import JsonResponse
from nanovllm.server.translation import (
    add_user_text,
    checked_choice,
    checked_name,
    function_tool,
    join_texts,
    reply,
    text_or_list,
    thinking_option,
)

# -- requests --------------------------------------------------------------------------------------------------------


class Part(BaseModel):
    """A part of a message."""

    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: str


class Refusal(BaseModel):
    """A text that another model has given in place of a response."""

    type: Literal["refusal"]
    text: str = Field(alias="refusal")


Parts = Annotated[
    list[Annotated[Part | Refusal, Field(discriminator="type")]],
    text_or_list(lambda text: [{"type": "input_text", "text": text}]),
]


class MessageItem(BaseModel):
    """A message."""

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class CallItem(BaseModel):
    """A tool call of the model."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(BaseModel):
    """The result of a tool call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Parts


class ReasoningItem(BaseModel):
    """The model's thinking. Encrypted thinking, which only another server can read, is left out."""

    type: Literal["reasoning"]
    content: Parts | None = None


def _with_type(item: Any) -> Any:
    """Return an item with a type, which messages may lack."""
    return {"type": "message", **item} if isinstance(item, dict) and "role" in item else item


AnyItem = Annotated[MessageItem | CallItem | CallOutputItem | ReasoningItem, Field(discriminator="type")]
Items = Annotated[
    list[Annotated[AnyItem, BeforeValidator(_with_type)]],
    text_or_list(lambda text: [{"role": "user", "content": text}]),
]


class _Strict(BaseModel):
    """A part of a request in which unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Tool(BaseModel):
    """A tool. Only functions are used."""

    type: str
    name: ToolName = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(_Strict):
    """The function that the model must call."""

    type: Literal["function"]
    name: str


class TextFormat(_Strict):
    """The form of the response."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(_Strict):
    """Options of the response. Only a medium verbosity is supported."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(_Strict):
    """Whether the model thinks: the effort "none" switches it off. There are no summaries, but the thinking itself."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None
    generate_summary: None = None  # the older name of `summary`, which the openai package sends


class ResponsesRequest(SamplingFields):
    """A request of POST /v1/responses.

    Besides the fields of OpenAI's API there are those of `SamplingFields`.
    """

    NEUTRAL: ClassVar[dict[str, Any]] = NEUTRAL | {
        "background": (False,),
        "client_metadata": ANY,  # Codex
        "context_management": (),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }
    input: Items
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None  # Codex. There is no such content
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    store: bool | None = None


# Fields that are refused, but at these values, and why.
_REFUSED: dict[str, tuple[tuple, str]] = {
    "previous_response_id": ((None,), "the server keeps no responses; send the whole conversation as input"),
    "store": ((None, False), "the server keeps no responses; leave it out or send false"),
    "max_tokens": ((None,), "the field is called max_output_tokens here"),
    "n": ((None, 1), "a response has one sample"),
}


# -- from a request to a conversation --------------------------------------------------------------------------------


def chat_messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the messages of a request in the form that chat templates take.

    Templates take one system message, at the start, so instructions and all system and developer messages go there.
    """
    system = [request.instructions] if request.instructions else []
    messages: list[dict[str, Any]] = []
    for item in request.input:
        if isinstance(item, MessageItem) and item.role in ("system", "developer"):
            system.append(_text(item.content))
        elif isinstance(item, MessageItem) and item.role == "user":
            add_user_text(messages, _text(item.content))
        elif isinstance(item, CallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        else:
            _add_to_turn(messages, item)
    join_texts(messages)
    return [{"role": "system", "content": "\n\n".join(system)}, *messages] if system else messages


def _add_to_turn(messages: list[dict[str, Any]], item: MessageItem | CallItem | ReasoningItem) -> None:
    """Add what the model has written. Thinking, text and calls that follow each other are one message."""
    turn: dict[str, Any] = messages[-1] if messages and messages[-1]["role"] == "assistant" else {}
    is_next = bool(turn.get("content") or "tool_calls" in turn) and not isinstance(item, CallItem)
    if not turn or is_next:
        messages.append(turn := {"role": "assistant", "content": ""})
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif isinstance(item, ReasoningItem):
        turn.setdefault("reasoning_content", []).append(_text(item.content or []))
    else:
        turn["content"] = _text(item.content)


def _text(parts: list[Part | Refusal]) -> str:
    return "\n".join(part.text for part in parts)


def tool_list(request: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the functions among the tools in the form of chat completions."""
    return [
        function_tool(tool.name, tool.description, tool.parameters, tool.strict)
        for tool in request.tools or []
        if tool.type == "function"
    ]


def _tool_choice(request: ResponsesRequest, tools: list[dict[str, Any]]) -> str:
    if isinstance(request.tool_choice, NamedTool):
        return checked_name(request.tool_choice.name, tools)
    return checked_choice(request.tool_choice or "auto", tools)


def structured_outputs(form: TextFormat | None) -> dict[str, StructuredOutputsParams]:
    """Return the argument of the sampling parameters for the form that the response must have."""
    if form is None or form.type == "text":
        return {}
    if form.type == "json_object":
        return {"structured_outputs": StructuredOutputsParams(json_object=True)}
    if form.schema_ is None:
        raise ApiError(400, "text.format of type json_schema needs a schema", param="text.format")
    return {"structured_outputs": StructuredOutputsParams(json=form.schema_)}


def conversation(state: ServerState, request: ResponsesRequest, http: Request) -> Conversation:
    """Return the conversation of a request. Raise ApiError if a field is wrong."""
    for name, (accepted, message) in _REFUSED.items():
        if getattr(request, name) not in accepted:
            raise ApiError(400, f"{name}: {message}", param=name)
    form = structured_outputs(request.text and request.text.format)
    if form and request.structured_outputs is not None:
        message = "text.format and structured_outputs cannot be used together; send one of them"
        raise ApiError(400, message, param="text")
    messages = chat_messages(request)
    tools = tool_list(request)
    if not messages:
        raise ApiError(400, "input must have at least one item", param="input")
    effort = request.reasoning and request.reasoning.effort
    params = request.to_params(
        state,
        {"max_tokens": "max_output_tokens"},
        max_tokens=request.max_output_tokens,
        output_kind=None if request.stream else RequestOutputKind.FINAL_ONLY,
        **form,
    )
    return Conversation(
        http=http,
        messages=messages,
        params=params,
        tools=tools,
        tool_choice=_tool_choice(request, tools),
        parallel_tool_calls=request.parallel_tool_calls is not False,
        template=thinking_option(state, effort != "none") if effort else {},
        form_field="text" if form else "structured_outputs",
    )


# -- endpoints -------------------------------------------------------------------------------------------------------


def routes(state: ServerState) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def create_response(request: ResponsesRequest, http: Request) -> Response:
        check_model(state, request.model)
        asked = conversation(state, request, http)
        writer = ResponseWriter(_fixed_fields(state, request, asked))
        pieces = generate_turn(state, asked, writer.fields["id"])
        return await reply(pieces, writer, is_stream=bool(request.stream), error_event=writer.failed)

    @router.post("/v1/responses/input_tokens")
    async def count_input_tokens(request: ResponsesRequest, http: Request) -> Response:
        check_model(state, request.model)
        async with state.tokenizing(http):
            prompt_ids = await prompt_token_ids(state, conversation(state, request, http))
        return JsonResponse({"object": "response.input_tokens", "input_tokens": len(prompt_ids)})

    return router


def _fixed_fields(state: ServerState, request: ResponsesRequest, asked: Conversation) -> dict[str, Any]:
    """Return the fields of a response that do not change while it grows."""
    reasoning = request.reasoning or Reasoning()
    form = (request.text and request.text.format) or TextFormat(type="text", schema=None)
    choice = request.tool_choice or "auto"
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "background": False,
        "error": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": state.model_names[0],
        "parallel_tool_calls": asked.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": reasoning.model_dump(exclude={"generate_summary"}),
        "store": False,
        "temperature": asked.params.temperature,
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": choice.model_dump() if isinstance(choice, NamedTool) else choice,
        "tools": [{"type": "function", "strict": False} | tool["function"] for tool in asked.tools],
        "top_p": asked.params.top_p,
        "truncation": "disabled",
    }
