"""Bounds how many samples the engine has at once."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm.server.errors import ApiError

_RETRY_AFTER_S = 1


class AdmissionControl:
    """Counts the samples that the engine has, and refuses requests that do not fit.

        with state.admission.enter(num_samples):
            ...  # generate

    A request's samples no longer count when the block ends, also if the client has gone and the block is cancelled.
    In a generator, the block starts with the first item. Use it in one thread, the event loop's.

    Args:
        limit: most samples at once.

    Attributes:
        num_samples: samples that the engine has now.
        draining: refuse all requests, because the server is about to stop.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.num_samples = 0
        self.draining = False
        self._waiting: set[asyncio.Future] = set()

    @contextmanager
    def enter(self, num_samples: int = 1) -> Iterator[None]:
        """Count a request's samples in a `with` block.

        Raises:
            ApiError: 503 while draining, 429 if other requests leave too little of the limit, 400 if it can never fit.
        """
        self.check(num_samples)
        self.num_samples += num_samples
        try:
            yield
        finally:
            self.num_samples -= num_samples

    def check(self, num_samples: int) -> None:
        """Raise the error of `enter` if a request would get one now."""
        if self.draining:
            raise draining_error()
        if num_samples > self.limit:
            raise ApiError(400, f"the request has {num_samples} samples, but the server takes at most {self.limit}")
        if self.num_samples + num_samples > self.limit:
            message = f"the server is busy with {self.num_samples} of at most {self.limit} samples; try again later"
            raise ApiError(429, message, code="queue_full", retry_after=_RETRY_AFTER_S)

    @contextmanager
    def waiting_for_body(self, request: asyncio.Future) -> Iterator[None]:
        """Let `cancel_waiting` cancel the request within a `with` block."""
        self._waiting.add(request)
        try:
            yield
        finally:
            self._waiting.discard(request)

    def cancel_waiting(self) -> None:
        """Cancel the requests whose bodies have not come whole, because a client may never send the rest."""
        for request in self._waiting:
            request.cancel()


def draining_error() -> ApiError:
    """Return what a request gets while the server is about to stop."""
    return ApiError(503, "the server is about to stop", code="draining", retry_after=_RETRY_AFTER_S)
