"""Steps that the messages and responses APIs share, from a request to its response."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Response
from pydantic import BeforeValidator

from nanovllm.checks import shown
from nanovllm.server.errors import ApiError
from nanovllm.server.generation import Piece
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import JsonResponse, sse


def text_or_list(as_list: Callable[[str], list[Any]]) -> BeforeValidator:
    """Return the validator of a field that is a text or a list. `as_list` makes the list that a text stands for."""

    def validate(value: Any) -> list[Any]:
        if not isinstance(value, str | list):
            raise ValueError("must be a text or a list")
        return as_list(value) if isinstance(value, str) else value

    return BeforeValidator(validate)


def function_tool(name: str, description: str | None, parameters: dict | None, strict: bool | None) -> dict[str, Any]:
    """Return a tool in the form of OpenAI's chat completions."""
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def add_user_text(messages: list[dict[str, Any]], text: str) -> None:
    """Add a user's text. Successive texts are one message, because some templates want a turn of the model between.

    Its content is a list of texts until `join_texts`.
    """
    if not messages or messages[-1]["role"] != "user":
        messages.append({"role": "user", "content": []})
    messages[-1]["content"].append(text)


def join_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join texts that are lists, in place, and return the messages.

    `add_user_text` does not join them itself: that would take quadratic time.
    """
    for message in messages:
        separator = "\n" if message["role"] == "user" else ""
        for name in ("content", "reasoning_content"):
            if isinstance(texts := message.get(name), list):
                message[name] = separator.join(texts)
    return messages


def checked_choice(choice: str, tools: list[dict[str, Any]]) -> str:
    """Return the tool choice "none", "auto" or "required". Raise ApiError if there is nothing that could be called."""
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice asks for a tool call, but tools has no function", param="tool_choice")
    return choice


def checked_name(name: str, tools: list[dict[str, Any]]) -> str:
    """Return the name of the function that must be called. Raise ApiError if there is no such function."""
    if name not in [tool["function"]["name"] for tool in tools]:
        raise ApiError(400, f"tool_choice must name a function of tools, got {shown(name)}", param="tool_choice")
    if name in ("none", "auto", "required"):  # these have a meaning of their own
        raise ApiError(400, f"a function that must be called cannot be named {name}", param="tool_choice")
    return name


def thinking_option(state: ServerState, is_on: bool) -> dict[str, Any]:
    """Return the arguments of the chat template that switch thinking on or off, if the template has the switch."""
    if "enable_thinking" in str(state.llm.tokenizer.chat_template):
        return {"chat_template_kwargs": {"enable_thinking": is_on}}
    return {}


class Writer(Protocol):
    """A response that grows by pieces."""

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Add the next piece, and return the events that show it."""
        ...

    def body(self) -> dict[str, Any]:
        """Return the response so far."""
        ...


async def reply(
    pieces: AsyncGenerator[Piece, None],
    writer: Writer,
    *,
    is_stream: bool,
    error_event: Callable[[ApiError], dict[str, Any]],
) -> Response:
    """Return the HTTP response: pieces as events with names, or as a whole.

    Args:
        error_event: makes the event of an error in a stream.
    """
    if is_stream:
        return await sse(_events(pieces, writer), names_events=True, sends_done=False, error_event=error_event)
    async with aclosing(pieces):
        async for piece in pieces:
            writer.add(piece)
    return JsonResponse(writer.body())


async def _events(pieces: AsyncGenerator[Piece, None], writer: Writer) -> AsyncGenerator[list[dict[str, Any]], None]:
    async with aclosing(pieces):
        async for piece in pieces:
            if events := writer.add(piece):
                yield events
