"""The chat page at `/`: static files for browsers, which use the public API."""

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

from nanovllm.server.state import ServerState

_FOLDER = Path(__file__).parent / "page"

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Only the page's own files run or load, and only this server is called. Trusted Types keep text from becoming HTML.
_CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)

_HEADERS = {
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Browsers ask whether the file changed, so that an upgrade of the server reaches them at once.
    "cache-control": "no-cache",
}


def routes(state: ServerState) -> APIRouter:
    """Return the routes of the page: `/` and `/page/NAME`. They need no API key, because the page asks for it."""
    router = APIRouter(include_in_schema=False)
    for file in sorted(_FOLDER.iterdir()):
        if file.suffix in _MEDIA_TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            router.add_api_route(path, _file_endpoint(file), methods=["GET", "HEAD"])
    return router


def _file_endpoint(file: Path):
    """Return an endpoint that responds with a file, which is read once."""
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": tag}

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_MEDIA_TYPES[file.suffix], headers=headers)

    return endpoint
