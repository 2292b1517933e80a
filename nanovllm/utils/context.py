"""The forward context (`attention/base.py:Context`): what a step's layers need to know besides their activations.

The runner sets it for exactly one forward; layers read it with `get_context()`. So layers have the same signatures for
every model and every attention backend.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from nanovllm.attention.base import Context

__all__ = ["Context", "get_context", "get_counters", "set_context"]

_context: ContextVar[Context | None] = ContextVar("nanovllm_context", default=None)


def get_context() -> Context:
    """Return the context of the forward that is running."""
    context = _context.get()
    if context is None:
        raise RuntimeError("no forward is running: run layers that read the step's context in `with set_context(...)`")
    return context


def get_counters() -> torch.Tensor | None:
    """Return the context's counters for kernels that split their work; None for a layer that is used by itself."""
    context = _context.get()
    return None if context is None else context.counters


@contextmanager
def set_context(context: Context) -> Iterator[Context]:
    """Make `context` current for one forward; the previous one returns even when the forward raises."""
    token = _context.set(context)
    try:
        yield context
    finally:
        _context.reset(token)
