"""How bytes of a connection become requests: uvicorn's protocol, with a bound for what it gathers."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD_BYTES = 64 << 10


class HttpProtocol(HttpToolsProtocol):
    """Ends a connection whose client sends a head, a chunk's extension or trailers of more than 64 KiB.

    The parser would gather them without end, and copy them for each piece that comes. Bodies pass: `BodyLimit` bounds
    them.

    Attributes:
        num_gathered: bytes that came since the parser last handed over a head, a piece of a body or a whole request.
    """

    num_gathered = 0

    def data_received(self, data: bytes) -> None:
        self.num_gathered += len(data)
        super().data_received(data)
        if self.num_gathered <= _MAX_HEAD_BYTES or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(f"The head of a request must have at most {_MAX_HEAD_BYTES} bytes.")
        else:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self.num_gathered = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.num_gathered = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.num_gathered = 0
        super().on_message_complete()
