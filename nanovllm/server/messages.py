"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, for its clients and for Claude Code."""

from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanovllm import RequestOutputKind, StructuredOutputsParams
from nanovllm.server.body import MAX_TOOLS, Body, ToolName
from nanovllm.server.errors import ApiError, anthropic_error
from nanovllm.server.generation import Conversation, generate_turn, prompt_token_ids
from nanovllm.server.messages_writer import MessageWriter
from nanovllm.server.models import check_model
from nanovllm.server.sampling import SamplingFields
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

# Claude Code starts its system prompt with a block that differs in each request, so no prefix would ever be cached.
_BILLING_HEADER = "x-anthropic-billing-header:"


class _Part(BaseModel):
    """A part of a request. Null is a missing field."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class TextBlock(_Part):
    """A text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(_Part):
    """A text of the model's thinking."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(_Part):
    """Thinking of another model, which nobody can read."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(_Part):
    """A tool call of the model."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


_TEXT_OR_BLOCKS = text_or_list(lambda text: [{"type": "text", "text": text}])
Texts = Annotated[list[TextBlock], _TEXT_OR_BLOCKS]


class ToolResultBlock(_Part):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool = False


AnyBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class Message(_Part):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[AnyBlock], _TEXT_OR_BLOCKS]


class Tool(_Part):
    """A function that the model may call. Tools that Anthropic's servers run have no schema, and are skipped."""

    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(_Part):
    """The tools that the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingSwitch(_Part):
    """Whether the model thinks before it responds. With "adaptive", the chat template decides."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(_Part):
    """A JSON schema that the response follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Part):
    """The form of the response."""

    format: OutputFormat | None = None


class MessagesRequest(_Part, Body):
    """A request of POST /v1/messages. Unknown fields are ignored here: clients add new ones often."""

    model: str
    max_tokens: int
    messages: list[Message]
    system: Texts = Field(default_factory=list)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: ThinkingSwitch = ThinkingSwitch(type="disabled")
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None  # the older name of `output_config.format`
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] = Field(default_factory=list)
    stream: bool = False
    thread: Any = None
    container: Any = None
    compaction: Any = None
    mcp_servers: list = Field(default_factory=list)


class CountTokensRequest(MessagesRequest):
    """A request of POST /v1/messages/count_tokens, which generates nothing."""

    max_tokens: int = 1


# Fields that are refused, because a response without them would be another than the client expects.
_REFUSED = {
    "thread": "the server keeps no messages; send the whole conversation",
    "container": "the server runs no tools",
    "compaction": "the server does not summarize conversations",
    "mcp_servers": "the server runs no tools",
}
# On this code, Anthropic's client sends the whole conversation again.
_CODES = {"thread": "thread_unsupported_request"}


# -- from a request to a conversation --------------------------------------------------------------------------------


def chat_messages(request: MessagesRequest) -> list[dict[str, Any]]:
    """Return the messages of a request in the form that chat templates take."""
    messages: list[dict[str, Any]] = []
    system = [block.text for block in request.system if not block.text.startswith(_BILLING_HEADER)]
    if system:
        messages.append({"role": "system", "content": "\n\n".join(system)})
    for message in request.messages:
        if message.role == "assistant":
            _add_assistant(messages, message.content)
        else:
            _add_user(messages, message.content, is_reminder=message.role == "system")
    return join_texts(messages)


def _add_assistant(messages: list[dict[str, Any]], blocks: list[Any]) -> None:
    """Add a turn of the model. Successive turns are one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": []})
    message = messages[-1]
    for block in blocks:
        if isinstance(block, TextBlock):
            message["content"].append(block.text)
        elif isinstance(block, ThinkingBlock):
            message.setdefault("reasoning_content", []).append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": block.input}
            call = {"id": block.id, "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif isinstance(block, ToolResultBlock):
            raise ApiError(400, "a tool_result block belongs in a message with the role user", param="messages")


def _add_user(messages: list[dict[str, Any]], blocks: list[Any], is_reminder: bool) -> None:
    """Add texts and results of tools. Templates take no system message but the first, so later ones are reminders."""
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            text = "\n".join(part.text for part in block.content or [])
            text = f"Error: {text}" if block.is_error else text
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
        elif isinstance(block, TextBlock):
            text = f"<system-reminder>\n{block.text}\n</system-reminder>" if is_reminder else block.text
            add_user_text(messages, text)
        else:
            message = f"a {block.type} block belongs in a message with the role assistant"
            raise ApiError(400, message, param="messages")


def tool_list(request: MessagesRequest) -> list[dict[str, Any]]:
    """Return the functions among the tools in OpenAI's form."""
    return [
        function_tool(tool.name, tool.description, tool.input_schema, tool.strict)
        for tool in request.tools
        if tool.input_schema is not None
    ]


def _tool_choice(choice: ToolChoice, tools: list[dict[str, Any]]) -> str:
    if choice.type == "tool":
        return checked_name(choice.name or "", tools)
    return checked_choice("required" if choice.type == "any" else choice.type, tools)


def template_options(state: ServerState, request: MessagesRequest, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the arguments of the chat template. A response continues the message that ends a conversation."""
    options = {} if request.thinking.type == "adaptive" else thinking_option(state, request.thinking.type != "disabled")
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and last["content"] and "tool_calls" not in last:
        options["continue_final_message"] = True
    return options


def conversation(state: ServerState, request: MessagesRequest, http: Request) -> Conversation:
    """Return the conversation of a request. Raise ApiError if a field is wrong."""
    for name, message in _REFUSED.items():
        if getattr(request, name):
            raise ApiError(400, f"{name}: {message}", param=name, code=_CODES.get(name))
    messages = chat_messages(request)
    tools = tool_list(request)
    if not messages:
        raise ApiError(400, "messages must have a text, a tool call or its result", param="messages")
    form = request.output_config.format or request.output_format
    fields = SamplingFields(
        temperature=request.temperature, top_p=request.top_p, top_k=request.top_k, stop=request.stop_sequences
    )
    params = fields.to_params(
        state,
        {"stop": "stop_sequences"},
        max_tokens=request.max_tokens,
        structured_outputs=form and StructuredOutputsParams(json=form.schema_),
        output_kind=None if request.stream else RequestOutputKind.FINAL_ONLY,
    )
    return Conversation(
        http=http,
        messages=messages,
        params=params,
        tools=tools,
        tool_choice=_tool_choice(request.tool_choice, tools),
        parallel_tool_calls=not request.tool_choice.disable_parallel_tool_use,
        template=template_options(state, request, messages),
        form_field="output_config",
    )


# -- endpoints -------------------------------------------------------------------------------------------------------


def routes(state: ServerState) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    @router.post("/v1/messages")
    async def create_message(request: MessagesRequest, http: Request) -> Response:
        check_model(state, request.model)
        writer = MessageWriter(f"msg_{uuid4().hex}", state.model_names[0], request.max_tokens)
        pieces = generate_turn(state, conversation(state, request, http), writer.message_id)
        return await reply(pieces, writer, is_stream=request.stream, error_event=anthropic_error)

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: CountTokensRequest, http: Request) -> Response:
        check_model(state, request.model)
        async with state.tokenizing(http):
            prompt_ids = await prompt_token_ids(state, conversation(state, request, http))
        return JsonResponse({"input_tokens": len(prompt_ids)})

    return router
