"""A scripted HTTP server, for tests of clients."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ScriptedServer(ThreadingHTTPServer):
    """Answers requests as its test says, and keeps them.

    Args:
        answers: by path, a function that gets the handler and the request's JSON and sends the answer.

    Attributes:
        requests: path, headers and JSON of each request, in the order in which they came.
    """

    daemon_threads = True

    def __init__(self, answers: dict[str, Callable[["Handler", Any], None]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {"/v1/models": lambda handler, _: handler.send({"data": [{"id": "scripted"}]}), **answers}
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def bodies(self, path: str) -> list[Any]:
        """Return the JSON of the requests for a path."""
        return [body for each, _, body in self.requests if each == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about clients that have gone."""


class Handler(BaseHTTPRequestHandler):
    """Reads a request, and has ways to answer."""

    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, body: Any) -> None:
        self.server.requests.append((self.path, dict(self.headers), body))
        self.server.answers[self.path](self, body)

    def send(self, content: Any, status: int = 200) -> None:
        """Send JSON."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, events: list[Any]) -> None:
        """Send server-sent events: JSON, or text as it is."""
        self.start_stream()
        for event in events:
            text = event if isinstance(event, str) else json.dumps(event)
            self.write_chunk(f"data: {text}\n\n".encode())
        self.wfile.write(b"0\r\n\r\n")

    def start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def write_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def scripted_server(**answers: Callable[[Handler, Any], None]) -> Iterator[ScriptedServer]:
    """Run a server in a thread. Its answers have the names `chat` and `completions`."""
    paths = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "models": "/v1/models"}
    with ScriptedServer({paths[name]: answer for name, answer in answers.items()}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
