"""How bytes of a connection become requests: uvicorn's protocol, with a bound for what it gathers."""

import asyncio
import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD_BYTES = 64 << 10
# How long a client may send nothing before its request is complete. uvicorn bounds the time between two requests.
_SILENT_SECONDS = 75
_UPGRADE_TO_HTTP2 = re.compile(rb"\r\nUpgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)


class HttpProtocol(HttpToolsProtocol):
    """Ends a connection whose client sends a head, a chunk's extension or trailers of more than 64 KiB.

    The parser would gather them without end, and copy them for each piece that comes. Bodies pass: `BodyLimit` bounds
    them. Also ends a connection whose client stops sending in the middle of a request, or never starts one.

    Ignores offers to go on in HTTP/2, with which Java's HttpClient sends its first request: the parser would drop the
    body. Drops pipelined requests, and closes the connection after the response to the first one: uvicorn would stop
    reading, and so not notice that the client has gone.

    Attributes:
        num_gathered: bytes that came since the parser last handed over a head, a piece of a body or a whole request.
        is_last: no further request of this connection is served.
        is_receiving: a request, or the rest of one, must come.
        is_silent: nothing has come since the last look at the connection.
    """

    num_gathered = 0
    is_last = False
    is_receiving = True
    is_silent = False
    _next_look: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._look()

    def _look(self) -> None:
        """Close the connection if it should have received something since the last look. Look again later."""
        if self.is_receiving and self.is_silent and not self.flow.read_paused:
            self.transport.close()
        else:
            self.is_silent = True
            self._next_look = self.loop.call_later(_SILENT_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.is_silent = False
        if self.is_last:
            return
        self.num_gathered += len(data)
        self.is_receiving = self.is_receiving or self._is_idle()
        if b"h2c" in data and self._is_idle():
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE_TO_HTTP2.sub(b"", head + end[:2]) + end[2:] + rest
        super().data_received(data)
        if self.num_gathered <= _MAX_HEAD_BYTES or self.transport.is_closing():
            return
        if self._is_idle():
            self.send_400_response(f"The head of a request must have at most {_MAX_HEAD_BYTES} bytes.")
        else:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self.num_gathered = 0
        if self._is_idle():
            super().on_headers_complete()
        else:
            self.cycle.keep_alive = False
            self.is_last = True

    def on_body(self, body: bytes) -> None:
        self.num_gathered = 0
        if not self.is_last:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self.num_gathered = 0
        if not self.is_last:
            self.is_receiving = False
            super().on_message_complete()

    def _is_idle(self) -> bool:
        """Return whether no earlier request of this connection is being served."""
        return self.cycle is None or self.cycle.response_complete
