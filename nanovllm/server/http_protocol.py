"""How bytes of a connection become requests: uvicorn's protocol, with a bound for what it gathers."""

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD_BYTES = 64 << 10
_UPGRADE_TO_HTTP2 = re.compile(rb"\r\nUpgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)


class HttpProtocol(HttpToolsProtocol):
    """Ends a connection whose client sends a head, a chunk's extension or trailers of more than 64 KiB.

    The parser would gather them without end, and copy them for each piece that comes. Bodies pass: `BodyLimit` bounds
    them.

    Ignores offers to go on in HTTP/2, with which Java's HttpClient sends its first request: the parser would drop the
    body. Drops pipelined requests, and closes the connection after the response to the first one: uvicorn would stop
    reading, and so not notice that the client has gone.

    Attributes:
        num_gathered: bytes that came since the parser last handed over a head, a piece of a body or a whole request.
        is_last: no further request of this connection is served.
    """

    num_gathered = 0
    is_last = False

    def data_received(self, data: bytes) -> None:
        if self.is_last:
            return
        self.num_gathered += len(data)
        if b"h2c" in data and (self.cycle is None or self.cycle.response_complete):
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE_TO_HTTP2.sub(b"", head + end[:2]) + end[2:] + rest
        super().data_received(data)
        if self.num_gathered <= _MAX_HEAD_BYTES or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(f"The head of a request must have at most {_MAX_HEAD_BYTES} bytes.")
        else:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self.num_gathered = 0
        if self.cycle is None or self.cycle.response_complete:
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
            super().on_message_complete()
