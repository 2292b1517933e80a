"""The server: puts the endpoints together, and runs them."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from nanovllm import AsyncLLM, __version__
from nanovllm.checkpoints.default_model import DEFAULT_FILE
from nanovllm.checks import shown
from nanovllm.server import chat, completions, health, messages, models, page, responses, tokenize
from nanovllm.server.admission import AdmissionControl
from nanovllm.server.chat import ChatRequest
from nanovllm.server.completions import CompletionRequest
from nanovllm.server.engine_client import EngineClient
from nanovllm.server.errors import ApiError, as_api_error, endpoint_path, error_body
from nanovllm.server.http_protocol import HttpProtocol
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.options import ServerOptions, listed
from nanovllm.server.responses import ResponsesRequest
from nanovllm.server.security import (
    ApiKeys,
    BodyLimit,
    CancelOnDisconnect,
    LocalHosts,
    RequestIds,
    TrailingSlashes,
    is_loopback,
)
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import JsonResponse
from nanovllm.server.text_format import TextFormat
from nanovllm.utils.open_files import allow_open_files
from nanovllm.utils.threads import switch_threads_often

logger = logging.getLogger("nanovllm")

_MAX_SHOWN_ERRORS = 3
_JSON_TYPE = re.compile(r"application/(?:[\w.+-]+\+)?json\b", re.IGNORECASE)
# Messages of errors start with the name of a field, or with the engine's word for the prompt. In requests, the prompt
# has another name for each path.
_BODIES = (ChatRequest, CompletionRequest, ResponsesRequest)
_NAMED_FIELDS = {name for body in _BODIES for name in (*body.model_fields, *body.NEUTRAL)}
_PROMPT_FIELDS = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input"}
_KEEP_ALIVE_S = 75
# How long responses may take to reach their clients when the engine is closed.
_CLOSE_S = 5
_TOOL_CALLS = "[TOOL_CALLS]"  # the token that starts calls in Mistral's formats
# How often the server checks its engine, in ticks of 0.1 s, and how long it waits for the reply, in seconds.
_HEALTH_TICKS = 50
_HEALTH_S = 1
# Each client is an open file, also one that gets status 429.
_OPEN_FILES = 1 << 16
# How long a server whose engine has failed still responds, with the reason, in seconds.
_FAILED_S = 20


# -- the app -----------------------------------------------------------------------------------------------------------


def create_app(state: ServerState) -> FastAPI:
    """Return the app with all endpoints."""
    # The documentation pages would load scripts from elsewhere.
    app = FastAPI(title="nanovllm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for module in (chat, completions, messages, responses, models, tokenize, health, page):
        # Else the schema would say that wrong requests get FastAPI's 422.
        app.include_router(module.routes(state), responses={"4XX": {"description": "the request is wrong"}})
    for kind in (ApiError, TypeError, ValueError, RuntimeError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _error_response)
    # From the innermost to the outermost.
    options = state.options
    app.add_middleware(_UnexpectedErrors)
    app.add_middleware(BodyLimit, max_bytes=options.max_body_mib << 20)
    app.add_middleware(CancelOnDisconnect, admission=state.admission)
    if keys := listed(options.api_key):
        app.add_middleware(ApiKeys, keys=keys)
    elif is_loopback(options.host):
        app.add_middleware(LocalHosts, own_host=options.host)
    if origins := listed(options.cors_origins):
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "retry-after"],
        )
    app.add_middleware(RequestIds, count_response=state.metrics.count_response)
    app.add_middleware(TrailingSlashes)
    return app


class _UnexpectedErrors:
    """Responds with an error to requests that raised something unexpected."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        has_started = False

        async def send_and_note(message: Any) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception as error:
            if has_started or scope["type"] != "http":
                raise
            response = await _error_response(Request(scope), error)
            await response(scope, receive, send)


async def _error_response(request: Request, error: Exception) -> JsonResponse:
    """Return the response to a request that has failed. Only the log has a traceback."""
    api_error = _api_error(request, error)
    if api_error.status == 500:
        logger.error(f"{request.method} {request.url.path} has failed", exc_info=error)
    if api_error.status == 400 and api_error.param is None:
        api_error.param = _named_field(api_error.message, endpoint_path(request.scope))
    headers = dict(getattr(error, "headers", None) or {})  # such as Allow, next to status 405
    if api_error.retry_after is not None:
        headers["retry-after"] = str(api_error.retry_after)
    return JsonResponse(error_body(api_error, request.scope), api_error.status, headers)


def _api_error(request: Request, error: Exception) -> ApiError:
    if isinstance(error, RequestValidationError | ValidationError):
        return _validation_error(request, error)
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, RecursionError):
            return as_api_error(error.__cause__)
        return ApiError(error.status_code, _http_message(request, error))
    return as_api_error(error)


def _named_field(message: str, path: str) -> str | None:
    """Return the field of a request that the first word of a message names, or None."""
    name = re.split(r"[ :\[]", message.removeprefix("each id of ").removeprefix("each bias of "), maxsplit=1)[0]
    # These are the engine's words for the prompt, unless the request has an unsupported field of that name.
    is_field = message.startswith(f"{name} is not supported")
    if name in ("prompt", "messages", "tokens") and not is_field:
        return _PROMPT_FIELDS.get(path, name)
    if name == "text":  # what it calls a text to tokenize
        return "prompt"
    return name if name in _NAMED_FIELDS else None


def _http_message(request: Request, error: HTTPException) -> str:
    """Return what is wrong with a request that FastAPI has refused."""
    path = request.url.path[:200]
    if error.status_code == 404:
        return f"there is nothing at {path}"
    if error.status_code == 405:
        return f"{path} takes {(error.headers or {}).get('Allow', 'other methods')}, not {request.method}"
    if error.status_code == 400 and (encoding := request.headers.get("content-encoding")):
        return f"the body must not be compressed, got {encoding[:100]!r}"
    if isinstance(error.__cause__, UnicodeDecodeError):
        return "the body is not UTF-8"
    if isinstance(error.__cause__, ValueError):  # an integer of too many digits
        return f"the body cannot be read: {error.__cause__!s:.200}"
    return error.detail


def _validation_error(request: Request, error: RequestValidationError | ValidationError) -> ApiError:
    """Return an error that names the fields that are wrong."""
    content_type = request.headers.get("content-type", "")
    if request.method == "POST" and not _JSON_TYPE.match(content_type):
        # Browsers let any page send other types, so they are not read as JSON.
        return ApiError(415, f"the Content-Type must be application/json, got {content_type[:100]!r}")
    faults = []
    params = []
    for fault in error.errors()[:_MAX_SHOWN_ERRORS]:
        if fault["type"] == "json_invalid":
            return ApiError(400, f"the body is not JSON: {fault.get('ctx', {}).get('error')} at {fault['loc'][-1]}")
        if fault["loc"] == ("body",) and fault["type"] in ("missing", "model_attributes_type"):
            got = "none" if fault["type"] == "missing" else shown(fault["input"])
            return ApiError(400, f"the body must be a JSON object, got {got}")
        field = _field(fault, getattr(error, "body", None))[:200]
        message = "there is no such field" if fault["type"] == "extra_forbidden" else fault["msg"]
        message = message.removeprefix("Value error, ")
        faults.append(f"{field}: {message}" if field else message)
        params.append(field)
    return ApiError(400, "; ".join(faults)[:1000], param=params[0] or None)


def _field(fault: Any, body: Any) -> str:
    """Return the path of a wrong field in the body, such as "messages.0.content".

    Args:
        fault: an error of pydantic. Its path also has names that the body does not have: of the kinds of a field that
            may be one of several.
        body: the JSON, or None if it is not known.
    """
    location = [part for i, part in enumerate(fault["loc"]) if i > 0 or part != "body"]
    path = []
    value = body
    for i, part in enumerate(location):
        is_here = part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))
        is_missing = fault["type"] == "missing" and i == len(location) - 1
        if is_here or is_missing or body is None:
            path.append(str(part))
            value = value[part] if is_here else {}
    return ".".join(path)


# -- the process -------------------------------------------------------------------------------------------------------


def serve(config_options: dict[str, Any], server_options: ServerOptions) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C, which let running requests finish.

    Args:
        config_options: fields of `Config`.

    Raises:
        OSError: the address cannot be listened on. Nothing was loaded.
        TypeError, ValueError, RuntimeError: the engine cannot be made, see `EngineClient`, or has failed later.
    """
    allow_open_files(_OPEN_FILES)
    switch_threads_often()
    with _listen(server_options.host, server_options.port) as listener:
        llm = EngineClient(**config_options)
        try:
            server = Server(make_state(llm, config_options.get("model"), server_options))
            gc.collect()
            gc.freeze()  # see engine_host.py
            server.run([listener])
            if server.failure is not None:
                raise RuntimeError(f"the engine has failed: {server.failure}")
        finally:
            llm.close()
            gc.unfreeze()  # else libraries take what is frozen for leaks


def make_state(llm: AsyncLLM | EngineClient, model: str | Path | None, options: ServerOptions) -> ServerState:
    """Return what the endpoints share.

    Args:
        model: the model's path or hub id, as in `Config`.

    Raises:
        ValueError: the tool parser of the options needs a token that the model does not have, or the model's
            generation_config.json is wrong.
    """
    llm.get_default_sampling_params()  # else each request would be refused
    if options.tool_parser == "mistral" and _TOOL_CALLS not in getattr(_tokenizer(llm), "get_vocab", dict)():
        raise ValueError(f"tool_parser mistral needs a model with the token {_TOOL_CALLS}; this one writes other calls")
    names = tuple(listed(options.served_model_name)) or (_model_name(model),)
    return ServerState(
        llm=llm,
        options=options,
        model_names=names,
        format=TextFormat.detect(_chat_template(llm), options.tool_parser, options.reasoning_parser),
        admission=AdmissionControl(options.max_concurrent_requests),
        metrics=ServerMetrics(names[0]),
    )


def _model_name(model: str | Path | None) -> str:
    """Return a model's name: a hub id, or the name of a folder or a file."""
    if model is None:
        return Path(DEFAULT_FILE).stem.partition(".")[0]
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)


def _tokenizer(llm: AsyncLLM | EngineClient) -> Any:
    """Return the model's tokenizer, or None if it has none."""
    try:
        return llm.tokenizer
    except ValueError:
        return None


def _chat_template(llm: AsyncLLM | EngineClient) -> str | None:
    """Return the text of the model's chat template. If it has another one for tools, that comes first."""
    template = getattr(_tokenizer(llm), "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(template[name] for name in ("tool_use", "default") if name in template) or None
    return template


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address. A port in use shows before a model is loaded for minutes."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Else Linux would let another server take the port while this one, which does not listen yet, loads its model.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from None
    return listener


class Server(uvicorn.Server):
    """Lets running requests finish after the first SIGTERM or Ctrl-C.

    Meanwhile new requests and /health get status 503. After `drain_seconds`, or after a second signal, the engine is
    closed, which ends requests with an error. A third signal ends the process without that.

    If the engine fails, requests and /health get 503 and the reason for a while. Then the server stops, so that a
    service manager starts another one.

    Attributes:
        deadline: when the server stops while it drains or its engine has failed, on the clock of `time.monotonic`.
        failure: why the engine has failed; None if it has not.
        warm_up: a task that prepares the engine for the first conversation.
    """

    def __init__(self, state: ServerState):
        config = uvicorn.Config(
            create_app(state),
            http=HttpProtocol,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_S,
        )
        super().__init__(config)
        self.state = state
        self.deadline = 0.0
        self.failure: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            # Connections of an earlier server may still be closing.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await super().startup(sockets)
        host, port = (sockets or self.servers[0].sockets)[0].getsockname()[:2]
        try:
            print(_greeting(self.state, host, port), flush=True)
        except OSError as error:  # a full disk, or a reader that has gone
            logger.warning(f"The greeting cannot be printed: {error}")
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Python would fail to flush the old one at the end
        self.warm_up = asyncio.create_task(_start_templates(self.state.llm))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.state.admission.draining:
            self.deadline = time.monotonic() + self.state.options.drain_seconds
            self.state.admission.draining = True
        elif self.deadline > time.monotonic():
            self.deadline = 0.0
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        must_exit = await super().on_tick(counter)
        admission = self.state.admission
        if self.failure is None and not admission.draining and counter % _HEALTH_TICKS == 0:
            await self._check_engine()
        if self.failure is not None and time.monotonic() > self.deadline:
            return True
        if admission.draining:
            admission.cancel_waiting()
            if time.monotonic() > self.deadline or not self._is_busy():
                await asyncio.to_thread(self.state.llm.close)
                return True
        return must_exit

    def _is_busy(self) -> bool:
        """Return whether a request runs, or a client has not read all of its response."""
        if self.state.admission.num_samples or self.server_state.tasks:
            return True
        transports = [getattr(connection, "transport", None) for connection in self.server_state.connections]
        return any(transport and transport.get_write_buffer_size() for transport in transports)

    async def _check_engine(self) -> None:
        try:
            await asyncio.wait_for(self.state.llm.check_health(), _HEALTH_S)
        except asyncio.TimeoutError:  # a long step; Python 3.10 has two kinds
            pass
        except RuntimeError as error:
            self.failure = str(error)
            self.deadline = time.monotonic() + _FAILED_S
            logger.error(f"The server stops in {_FAILED_S} s, because its engine has failed: {error!s:.500}")


async def _start_templates(llm: AsyncLLM | EngineClient) -> None:
    """Start the process that renders chat templates. Else the first conversation would wait a second for it."""
    with contextlib.suppress(Exception):  # the model has no template, or a wrong one: its requests report why
        await llm.chat_prompt([{"role": "user", "content": "Hello!"}])


def _greeting(state: ServerState, host: str, port: int) -> str:
    """Return the address, and a command that tries it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    if ":" in host:
        host = f"[{host}]"
    prompt = [1, 2, 3] if _tokenizer(state.llm) is None else "The capital of France is"
    path = "completions"
    body = {"prompt": prompt, "max_tokens": 16}
    if _chat_template(state.llm) is not None:
        path = "chat/completions"
        body = {"messages": [{"role": "user", "content": "Hello!"}]}
    key = ' \\\n    -H "Authorization: Bearer $API_KEY"' if listed(state.options.api_key) else ""
    return f"""\
Serving {", ".join(state.model_names)} at http://{host}:{port}

Open it in a browser to chat, or call it:

  curl http://{host}:{port}/v1/{path} -H "Content-Type: application/json"{key} \\
    -d '{json.dumps(body)}'
"""
