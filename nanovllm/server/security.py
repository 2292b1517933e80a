"""Middlewares that stand before the endpoints. They are plain ASGI, so they neither read nor keep what passes."""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import HTTPException, Request

from nanovllm.server.admission import AdmissionControl, draining_error
from nanovllm.server.body import JsonCounter
from nanovllm.server.errors import ApiError, endpoint_path, error_body
from nanovllm.server.streaming import JsonResponse

# Everybody may read whether the server is well, and the chat page, which asks for a key.
_OPEN_PATHS = re.compile(r"/|/health|/favicon\.ico|/page/.*")
# Longer bodies, in bytes, take milliseconds to parse.
_LONG_BODY = 1 << 15
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def sent_keys(headers: Mapping[str, str]) -> list[str]:
    """Return the keys in a request's headers: a bearer token, `x-api-key`, or both if they differ."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    keys = dict.fromkeys((bearer, headers.get("x-api-key", "")))
    return [key for key in keys if key]


def key_salt(http: Request, cache_salt: str | None = None) -> str:
    """Return a salt of the prefix cache that belongs to the client's API keys and to the salt that it has chosen."""
    return _digest(repr((sent_keys(http.headers), cache_salt))).hex()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()


class RequestIds:
    """Give each request an id, the client's `x-request-id` if it sends one. Send it back, as Anthropic's header too.

    Args:
        count_response: called with the path of the endpoint and the status of its response.

    Endpoints read it as `request.state.request_id`.
    """

    def __init__(self, app: Any, count_response: Callable[[str, int], None]):
        self.app = app
        self.count_response = count_response

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = Request(scope).headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                ids = [(name, request_id.encode()) for name in (b"x-request-id", b"request-id")]
                message = {**message, "headers": [*message["headers"], *ids]}
                # Other paths have one label: clients can send any number of them.
                path = getattr(scope.get("route"), "path", "other")
                self.count_response(path, message["status"])
            await send(message)

        await self.app(scope, receive, send_with_id)


class TrailingSlashes:
    """Serve `/v1/models/` as `/v1/models`. A redirect would lead away from a proxy that has the app under a prefix."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and endpoint_path(scope) != "/":
            scope = {**scope, "path": scope["path"].removesuffix("/")}
        await self.app(scope, receive, send)


class ApiKeys:
    """Refuse requests without one of the keys. Digests are compared in constant time."""

    def __init__(self, app: Any, keys: list[str]):
        self.app = app
        self.digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or self._may_enter(scope):
            return await self.app(scope, receive, send)
        message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
        await _refuse(ApiError(401, message, code="invalid_api_key"), scope, receive, send)

    def _may_enter(self, scope: Any) -> bool:
        if _OPEN_PATHS.fullmatch(endpoint_path(scope)):
            return True
        sent = [_digest(key) for key in sent_keys(Request(scope).headers)]
        matches = [hmac.compare_digest(key, digest) for key in sent for digest in self.digests]
        return any(matches)


class LocalHosts:
    """Refuse requests whose Host header names another machine.

    This stops DNS rebinding: a web page lets its own name point to this machine. The browser then takes the server for
    a part of that page, which could read all responses.

    Args:
        own_host: the name or address of the option `host`.
    """

    def __init__(self, app: Any, own_host: str):
        self.app = app
        self.own_host = own_host.lower()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        host = Request(scope).headers.get("host", "") if scope["type"] == "http" else ""
        if _is_local(host, self.own_host):
            return await self.app(scope, receive, send)
        names = "localhost, IP addresses and its own host"
        message = f"without an API key this server responds to {names} only, not to {host[:100]!r}"
        await _refuse(ApiError(403, message), scope, receive, send)


def _is_local(host: str, own_host: str) -> bool:
    """Return whether a Host header is empty, or has an IP address, a local name or `own_host`, maybe with a port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = name.lower().removesuffix(".")
    is_local_name = name in ("", "localhost", own_host) or name.endswith(".localhost")
    return is_local_name or _ip_address(name) is not None


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`, a name or an address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    address = ipaddress.ip_address(str(found[0][4][0]).partition("%")[0])  # without the interface of an IPv6 address
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


class BodyLimit:
    """Refuse bodies of more than `max_bytes` bytes before they are read, or as soon as more has come.

    Also refuse those whose JSON has too many parts, before it is parsed. Long bodies take turns: each iteration of the
    event loop parses one of them, and gives other clients their tokens.
    """

    def __init__(self, app: Any, max_bytes: int):
        self.app = app
        self.max_bytes = max_bytes
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = Request(scope).headers.get("content-length", "0")
        message = f"the body must have at most {self.max_bytes} bytes"
        if not length.isdecimal() or len(length) > 15 or int(length) > self.max_bytes:
            return await _refuse(ApiError(413, message), scope, receive, send)
        num_bytes = 0
        counter = JsonCounter()

        async def receive_bounded() -> Any:
            nonlocal num_bytes
            event = await receive()
            chunk = event.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > self.max_bytes:
                raise HTTPException(413, message)  # FastAPI lets this one through
            try:
                counter.add(chunk)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            if num_bytes > _LONG_BODY and not event.get("more_body"):
                async with self._turn:
                    await asyncio.sleep(0)
            return event

        await self.app(scope, receive_bounded, send)


class CancelOnDisconnect:
    """Cancel the endpoint as soon as the client has gone, whether or not it has begun to respond.

    Args:
        admission: may cancel requests that wait for their bodies. They are refused.
    """

    def __init__(self, app: Any, admission: AdmissionControl):
        self.app = app
        self.admission = admission

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body_read = asyncio.Event()
        disconnected = asyncio.create_task(_wait_for_disconnect(body_read, receive))

        async def receive_body() -> Any:
            if body_read.is_set():
                await asyncio.shield(disconnected)
                return {"type": "http.disconnect"}
            with self.admission.waiting_for_body(responding):
                event = await receive()
            if event["type"] == "http.disconnect" or not event.get("more_body", False):
                body_read.set()
            return event

        responding = asyncio.ensure_future(self.app(scope, receive_body, send))
        try:
            await asyncio.wait((responding, disconnected), return_when=asyncio.FIRST_COMPLETED)
            if responding.cancelled() and self.admission.draining and not body_read.is_set():
                await _refuse(draining_error(), scope, receive, send)
            elif responding.done():
                responding.result()  # raises what it has raised
        finally:
            for task in (responding, disconnected):
                task.cancel()
            await asyncio.gather(responding, disconnected, return_exceptions=True)


async def _wait_for_disconnect(body_read: asyncio.Event, receive: Any) -> None:
    await body_read.wait()
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(error: ApiError, scope: Any, receive: Any, send: Any) -> None:
    await JsonResponse(error_body(error, scope), error.status)(scope, receive, send)
