"""POST /v1/chat/completions."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import cache
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from nanovllm import RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanovllm.engine.detokenizer import TokenBytes
from nanovllm.server.chat_answer import ChunkWriter, Form, WholeAnswer
from nanovllm.server.errors import ApiError
from nanovllm.server.generation import Conversation, answer
from nanovllm.server.sampling import SamplingFields
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import JsonAnswer, sse


class _Strict(BaseModel):
    """A part of a request. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Function(_Strict):
    """A function that the model may call. `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool of a conversation."""

    type: Literal["function"]
    function: Function


class FunctionName(_Strict):
    """The name of a function."""

    name: str


class NamedTool(_Strict):
    """The tool that the model must call."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Strict):
    """The JSON schema that an answer must follow, strict or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(_Strict):
    """An answer in any form."""

    type: Literal["text"]


class JsonObjectFormat(_Strict):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(_Strict):
    """An answer that follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema
