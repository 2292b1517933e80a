"""Middlewares that guard the server: keys and sizes of bodies."""

import hashlib

from fastapi import Request


def key_salt(http: Request, cache_salt: str | None = None) -> str:
    """Return a salt of the prefix cache that belongs to the client's API key and to the salt that it has chosen."""
    parts = (sent_key(http.headers), cache_salt or "")
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()


def sent_key(headers) -> str:
    """Return the API key in a request's headers: a bearer token or `x-api-key`. "" if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
