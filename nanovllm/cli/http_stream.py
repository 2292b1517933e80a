"""A small HTTP client for load generators: one request for each connection, and answers that are streams of events.

A general client takes about 100 µs of CPU for each chunk of a stream. A few hundred streams keep a core busy, and then
the figures show the client instead of the server. This one takes a fifth: it reads only what the figures need.
"""

import asyncio
import base64
import json
import os
import ssl
import time
from array import array
from typing import Any
from urllib.parse import unquote, urlsplit

_MAX_MESSAGE_CHARS = 500
_MAX_HEAD_BYTES = 1 << 16
# More tokens than a stream can have: a server that counts more is wrong.
_MAX_TOKENS = 1 << 40
# Only events with one of these words are parsed. Generated text may have the words too.
_MARKS = (b'"completion_tokens"', b'"error"', b"[DONE]")


def base_url(url: str) -> str:
    """Return the URL of a server without the "/v1" at its end.

    Raises:
        ValueError: it is no URL of a server.
    """
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a wrong port or IPv6 address
        is_valid = False
    if not is_valid or not url.isascii() or not url.isprintable() or any(character in url for character in " ?#"):
        raise ValueError(f"url must be like http://127.0.0.1:8000, got {public_url(url)!r:.200}")
    parts = urlsplit(url)
    return parts._replace(path=parts.path.rstrip("/").removesuffix("/v1")).geturl()


def public_url(url: str) -> str:
    """Return a URL without the user and password in it, for messages and reports. It may be wrong, or lack a scheme."""
    login, _, address = url.rpartition("@")
    scheme, has_scheme, _ = login.partition("://")
    return f"{scheme}://{address}" if has_scheme else address


def check_key(api_key: str, url: str) -> str:
    """Return an API key. Raise ValueError if it cannot be sent in a header, or the URL has a user."""
    if not api_key or not api_key.isascii() or not api_key.isprintable():
        raise ValueError("api_key must have printable ASCII characters only")
    if "@" in urlsplit(url).netloc:
        raise ValueError("api_key cannot be sent beside a user in the url: both need the Authorization header")
    return api_key


class Server:
    """A server's address, and the headers of each request to it.

    Args:
        url: see `base_url`. The user and password in it are sent with Basic authentication.
        api_key: sent as a Bearer token.

    Raises:
        ValueError: see `base_url` and `check_key`.
    """

    def __init__(self, url: str, api_key: str | None = None):
        parts = urlsplit(base_url(url))
        assert parts.hostname
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.path = parts.path
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Content-Type: application/json", "Connection: close"]
        if api_key is not None:
            lines.append(f"Authorization: Bearer {check_key(api_key, url)}")
        elif "@" in parts.netloc:
            login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
            lines.append(f"Authorization: Basic {base64.b64encode(login.encode()).decode()}")
        self._lines = lines

    def request(self, method: str, path: str, body: Any = None, request_id: str | None = None) -> bytes:
        """Return the bytes of a request."""
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        lines = [f"{method} {self.path}{path} HTTP/1.1", *self._lines, f"Content-Length: {len(content)}"]
        if request_id is not None:
            lines.append(f"X-Request-Id: {request_id}")
        return "\r\n".join([*lines, "", ""]).encode() + content

    async def send(self, request: bytes) -> "Answer":
        """Send a request and return its answer when it is complete, has failed, or the connection is lost."""
        answer = Answer(request)
        transport = None
        try:
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: answer, self.host, self.port, ssl=self.tls
            )
            await answer.complete
        except OSError as error:
            answer.error = f"no connection to {self.host}:{self.port}: {_reason(error)}"
        finally:
            if transport is not None:
                transport.abort()
        return answer


class Answer(asyncio.Protocol):
    """Reads the answer to one request.

    Attributes:
        start: when the request was sent, before the connection was made. Times are those of `time.perf_counter`.
        times: when text came. A server may send the text of several tokens at once.
        end: when the answer was complete.
        error: why there is no complete answer.
        complete: a future that is done when nothing else will come.
    """

    def __init__(self, request: bytes):
        self.request = request
        self.start = time.perf_counter()
        self.times = array("d")
        self.end = self.start
        self.status = 0
        self.error: str | None = None
        self.complete = asyncio.get_running_loop().create_future()
        self._received = bytearray()  # what cannot be read before more has come
        self._is_chunked = False
        self._length: int | None = None  # bytes of the body, if the server says
        self._body = bytearray()  # the body of an answer that is no stream, or the start of a line of a stream
        self._is_stream = False
        self._usage = b""  # the last event that has the number of tokens

    def connection_made(self, transport: Any) -> None:
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._received += data
        try:
            if self.status == 0 and not self._read_head():
                return
            if self._is_chunked:
                self._read_chunks(now)
            else:
                self._read_body(self._received, now)
                self._received.clear()
        except (ValueError, IndexError):
            self._finish(now, "the answer is not HTTP")

    def connection_lost(self, exc: Exception | None) -> None:
        now = time.perf_counter()
        if self.status == 0:
            self._finish(now, "the server closed the connection without an answer")
        elif self._is_stream:
            self._finish(now, f"the stream ended after {len(self.times)} pieces without [DONE]")
        else:
            self._finish(now)

    def _read_head(self) -> bool:
        """Read the status and the headers. Return whether they are complete."""
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            if len(self._received) > _MAX_HEAD_BYTES:
                raise ValueError("the head never ends")
            return False
        status, *headers = self._received[:end].decode("latin-1").lower().split("\r\n")
        del self._received[: end + 4]
        if not status.startswith("http/1."):
            raise ValueError("not HTTP")
        self.status = int(status.split()[1])
        values = dict(header.split(":", 1) for header in headers)
        self._length = _size(values["content-length"], 10) if "content-length" in values else None
        self._is_chunked = "chunked" in values.get("transfer-encoding", "")
        self._is_stream = self.status == 200 and "text/event-stream" in values.get("content-type", "")
        return True

    def _read_chunks(self, now: float) -> None:
        received = self._received
        start = 0
        payload = []
        while (end := received.find(b"\r\n", start)) >= 0:
            size = _size(received[start:end].split(b";")[0], 16)
            if len(received) < end + size + 4:
                break
            payload.append(received[end + 2 : end + 2 + size])
            start = end + size + 4
            if size == 0:
                break
        del received[:start]
        self._read_body(b"".join(payload), now)
        if payload and not payload[-1]:  # the last chunk is empty
            self.connection_lost(None)

    def _read_body(self, data: bytes | bytearray, now: float) -> None:
        self._body += data
        if not self._is_stream:
            if self._length is not None and len(self._body) >= self._length:
                self._finish(now)
            return
        end = self._body.rfind(b"\n") + 1
        lines = bytes(self._body[:end])
        del self._body[:end]
        if b'"text"' in lines:
            self.times.append(now)
        if any(mark in lines for mark in _MARKS):
            self._read_events(lines, now)

    def _read_events(self, lines: bytes, now: float) -> None:
        """Read events that have the number of tokens, an error or the stream's end."""
        for line in lines.splitlines():
            if b'"completion_tokens"' in line:
                self._usage = line
            if line.removeprefix(b"data:").strip() == b"[DONE]":
                self._finish(now)
            elif b'"error"' in line and (error := _json(line.removeprefix(b"data:")).get("error")):
                self._finish(now, _message({"error": error}))

    def _finish(self, now: float, error: str | None = None) -> None:
        if self.complete.done():
            return
        self.end = now
        if error is None and self.status != 200:
            error = f"status {self.status}: {message_of(self._body)}"
        self.error = error
        self.complete.set_result(None)

    def json(self) -> dict[str, Any]:
        """Return the JSON object of an answer that is no stream; an empty one if it has none."""
        return _json(self._body)

    @property
    def num_tokens(self) -> int:
        """How many tokens the stream had, as the server counts them; 0 if it does not say."""
        return count_tokens(_json(self._usage.removeprefix(b"data:")))


def count_tokens(chunk: dict[str, Any]) -> int:
    """Return the number of tokens in the usage of a chunk; 0 if it has no valid one."""
    usage = chunk.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 < count < _MAX_TOKENS else 0


def _size(digits: str | bytes | bytearray, base: int) -> int:
    """Return a number of bytes. `int` alone would also accept signs and underscores."""
    if not digits.strip().isalnum():
        raise ValueError("not a size")
    return int(digits, base)


def _json(text: bytes | bytearray) -> dict[str, Any]:
    """Return a JSON object, or an empty one if the text is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _reason(error: OSError) -> str:
    """Return the words for an error number; asyncio's own are longer.

    The numbers of name resolution are below 0. Those of TLS are OpenSSL's.
    """
    if isinstance(error, ssl.SSLError) or not error.errno or error.errno < 0:
        return str(error)
    return os.strerror(error.errno)


def message_of(body: bytes | bytearray) -> str:
    """Return the message in the answer of a server that refuses a request, or the answer's text."""
    return _message(_json(body)) or _shortened(body.decode(errors="replace")) or "no message"


def _message(content: dict[str, Any]) -> str:
    """Return the message of an error, in one of the forms that servers use."""
    error = content.get("error", content)
    message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return _shortened(str(message or ""))


def _shortened(text: str) -> str:
    """Return the start of a server's text, in one line and without characters that change a terminal's state."""
    words = " ".join(text.split())[:_MAX_MESSAGE_CHARS]
    return "".join(filter(str.isprintable, words))
