"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from nanovllm import RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanovllm.checks import shown
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.server.body import MAX_TOOLS, ToolName
from nanovllm.server.chat_writer import ChunkWriter, Form, WholeResponse
from nanovllm.server.errors import ApiError
from nanovllm.server.generation import Conversation, Piece, generate_turn
from nanovllm.server.models import check_model
from nanovllm.server.sampling import NEUTRAL, SamplingFields
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import in_thread, long_response, sse

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# Clients send these fields back with an assistant's message, but no template prints them.
_UNREAD = ("refusal", "annotations")


class _Part(BaseModel):
    """A part of a request. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Function(_Part):
    """A function that the model may call. `parameters` is a JSON schema."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Part):
    """A tool of a conversation."""

    type: Literal["function"]
    function: Function

    def to_dict(self) -> dict[str, Any]:
        """Return the tool as it was sent, without fields that are null."""
        fields = {name: value for name, value in self.function if value is not None}
        return {"type": self.type, "function": fields}


class FunctionName(_Part):
    """The name of a function."""

    name: str


class NamedTool(_Part):
    """The tool that the model must call."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Part):
    """The JSON schema that a response follows, strict or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextForm(_Part):
    """A response of any form."""

    type: Literal["text"]

    def to_params(self) -> None:
        """Return no constraint."""


class JsonObjectForm(_Part):
    """A response that is a JSON object."""

    type: Literal["json_object"]

    def to_params(self) -> StructuredOutputsParams:
        """Return the constraint of the response."""
        return StructuredOutputsParams(json_object=True)


class JsonSchemaForm(_Part):
    """A response that follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def to_params(self) -> StructuredOutputsParams:
        """Return the constraint of the response."""
        return StructuredOutputsParams(json=self.json_schema.schema_)


class ChatRequest(SamplingFields):
    """The body of a request. See OpenAI's API. None is the default of each field but `messages`.

    Args:
        chat_template_kwargs: variables of the model's chat template.
        chat_template: Jinja text to use instead of the model's own, if the server allows that.
        reasoning_effort: a variable of the chat template.
    """

    NEUTRAL: ClassVar[dict[str, Any]] = {
        **NEUTRAL,
        "audio": (),
        "documents": (),
        "echo": (False,),
        "function_call": (),
        "functions": (),
        "include_reasoning": (True,),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextForm | JsonObjectForm | JsonSchemaForm, Field(discriminator="type")] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @property
    def num_top(self) -> int | None:
        """How many of the most likely tokens to return for each token; None returns no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self, state: ServerState, http: Request) -> Conversation:
        """Return the conversation to continue.

        Raises:
            ApiError: a field is wrong.
        """
        return Conversation(
            http=http,
            messages=[_message(message, i) for i, message in enumerate(self.messages)],
            params=self._sampling(state),
            tools=[tool.to_dict() for tool in self.tools or ()],
            tool_choice=self._tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            template=self._template(state),
            form_field="structured_outputs" if self.response_format is None else "response_format",
        )

    def _sampling(self, state: ServerState) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        overrides: dict[str, Any] = {"max_tokens": getattr(self, name), "logprobs": self.num_top}
        constraint = self.response_format and self.response_format.to_params()
        if constraint is not None:
            if self.structured_outputs is not None:
                message = "response_format and structured_outputs cannot be used together; send one of them"
                raise ApiError(400, message, param="response_format")
            overrides["structured_outputs"] = constraint
        if not self.stream and not self.logprobs:  # log-probabilities of many tokens at once would take long
            overrides["output_kind"] = RequestOutputKind.FINAL_ONLY
        return self.to_params(state, {"max_tokens": name}, **overrides)

    def _tool_choice(self) -> str:
        choice = self.tool_choice or "auto"
        if isinstance(choice, NamedTool):
            name = choice.function.name
            if name not in {tool.function.name for tool in self.tools or ()}:
                message = f"tool_choice must name one of the tools, got {shown(name)}"
                raise ApiError(400, message, param="tool_choice")
            if name in ("none", "auto", "required"):
                raise ApiError(400, f"a tool that must be called cannot have the name {name}", param="tool_choice")
            return name
        if choice == "required" and not self.tools:
            raise ApiError(400, "tool_choice is required, but there are no tools", param="tool_choice")
        return choice

    def _template(self, state: ServerState) -> dict[str, Any]:
        """Return the arguments of the chat template."""
        if self.chat_template is not None and not state.options.allow_chat_templates:
            message = "chat_template is not allowed; the server's option --allow-chat-templates allows it"
            raise ApiError(400, message, param="chat_template")
        if "tools" in (self.chat_template_kwargs or {}):
            raise ApiError(400, "chat_template_kwargs must not have tools; use the field tools", param="tools")
        fields = (
            "add_generation_prompt",
            "continue_final_message",
            "chat_template",
            "chat_template_kwargs",
            "reasoning_effort",
        )
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}


def _message(message: dict[str, Any], i: int) -> dict[str, Any]:
    """Return a message of OpenAI's API in the form that templates print. Contents are checked when it is rendered."""
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(400, f"messages[{i}].role must be one of {', '.join(_ROLES)}, got {shown(role)}", "messages")
    kept = {name: value for name, value in message.items() if value is not None and name not in _UNREAD}
    kept["role"] = _ROLES[role]
    if role != "assistant":
        return kept
    for name in ("audio", "function_call"):
        if name in kept:
            raise ApiError(400, f"messages[{i}].{name} is not supported", "messages")
    if "reasoning" in kept:  # templates read the other name
        kept.setdefault("reasoning_content", kept.pop("reasoning"))
    if isinstance(kept.get("content"), list):
        kept["content"] = [_refusal_as_text(part) for part in kept["content"]]
    return {"content": "", **kept}


def _refusal_as_text(part: Any) -> Any:
    """Return a part of a message, a refusal as text."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def routes(state: ServerState) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        check_model(state, request.model)
        form = Form(
            request_id=f"chatcmpl-{http.state.request_id}",
            model=state.model_names[0],
            num_top=request.num_top,
            bytes_of=lambda token_id: state.token_bytes[token_id],
            has_usage=request.include_usage,
            continuous_usage=request.continuous_usage,
        )
        pieces = generate_turn(state, request.conversation(state, http))
        if request.stream:
            return await sse(_chunks(pieces, form))
        return await _whole(pieces, form)

    return router


async def _chunks(pieces: AsyncGenerator[Piece, None], form: Form) -> AsyncGenerator[list[dict[str, Any]], None]:
    writer = ChunkWriter(form)
    async with aclosing(pieces):
        async for piece in pieces:
            writer.count(piece)
            if writer.takes_long(piece):  # such as all that a client did not read for a while
                for sample in piece.samples:
                    if chunks := await in_thread(writer.chunks, sample):
                        yield chunks
            elif chunks := [chunk for sample in piece.samples for chunk in writer.chunks(sample)]:
                yield chunks
    if chunks := writer.last():
        yield chunks


async def _whole(pieces: AsyncGenerator[Piece, None], form: Form) -> Response:
    whole = WholeResponse(form)
    async with aclosing(pieces):
        async for piece in pieces:
            whole.add(piece)
    return await long_response(whole.body, whole.num_logprobs)
