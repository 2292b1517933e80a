"""A server whose answers the tests write, with the chat page in front of it. It needs no engine."""

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from nanovllm.server import page


@dataclass
class Script:
    """An answer of the server.

    Args:
        pieces: deltas of the stream; a text stands for {"content": text}.
        pause: seconds between two pieces.
        hold_after: wait for `ScriptedApi.released` after this many pieces.
        ends_early: close the connection before the stream is complete.
        status: HTTP status; other than 200 it comes with `message` and `retry_after`.
    """

    pieces: list[str | dict] = field(default_factory=list)
    pause: float = 0.0
    finish_reason: str = "stop"
    hold_after: int | None = None
    ends_early: bool = False
    status: int = 200
    message: str = "no"
    retry_after: int | None = None


class ScriptedApi:
    """Answers requests with `scripts`, one each, and keeps the requests."""

    def __init__(self):
        self.scripts: deque[Script] = deque()
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.models = ["tiny-model", "other-model"]
        self.models_status = 200
        self.wanted_key: str | None = None
        self.released = threading.Event()
        self.disconnected = threading.Event()
        self.url = ""

    def reset(self) -> None:
        self.__dict__.update({key: value for key, value in ScriptedApi().__dict__.items() if key != "url"})

    def app(self) -> FastAPI:
        app = FastAPI()
        state: Any = None
        app.include_router(page.routes(state))
        app.get("/v1/models")(self._models)
        app.post("/v1/chat/completions")(self._chat)
        return app

    async def _models(self, request: Request):
        if not self._is_allowed(request):
            return _error(401, "wrong API key")
        if self.models_status != 200:
            return _error(self.models_status, "the model is loading")
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}

    async def _chat(self, request: Request):
        self.requests.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        if not self._is_allowed(request):
            return _error(401, "wrong API key")
        script = self.scripts.popleft() if self.scripts else Script(["An answer."])
        if script.status != 200:
            return _error(script.status, script.message, script.retry_after)
        return StreamingResponse(self._stream(script), media_type="text/event-stream")

    def _is_allowed(self, request: Request) -> bool:
        return self.wanted_key is None or request.headers.get("authorization") == f"Bearer {self.wanted_key}"

    async def _stream(self, script: Script) -> AsyncIterator[str]:
        yield _event(delta={"role": "assistant", "content": ""})
        try:
            for count, piece in enumerate(script.pieces, start=1):
                yield _event(delta={"content": piece} if isinstance(piece, str) else piece)
                await asyncio.sleep(script.pause)
                while count == script.hold_after and not self.released.is_set():
                    await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.disconnected.set()
            raise
        if script.ends_early:
            return
        yield _event(delta={}, finish_reason=script.finish_reason)
        tokens = len(script.pieces)
        yield _event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens})
        yield "data: [DONE]\n\n"


def _event(**fields) -> str:
    if "choices" not in fields:
        fields = {"choices": [{"index": 0, "finish_reason": None, **fields}]}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', **fields})}\n\n"


def _error(status: int, message: str, retry_after: int | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return JSONResponse({"error": {"message": message}}, status, headers)


@contextmanager
def serve_scripts() -> Iterator[ScriptedApi]:
    """Serve a `ScriptedApi` on a free port of this machine."""
    api = ScriptedApi()
    config = uvicorn.Config(api.app(), host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    api.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    yield api
    api.released.set()
    server.should_exit = True
    thread.join(30)
