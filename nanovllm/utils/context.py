"""The global forward context: what a step's layers need to know besides their activations.

The runner sets it for exactly one forward; layers read it with `get_context()`. That keeps layer signatures the same
for every model and every attention backend.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nanovllm.attention.base import AttentionBackend
    from nanovllm.ops.attention.shared_prefix import SharedPrefixPlan


@dataclass
class Context:
    """Metadata of one step. Rows are sequences: decode rows (one token each) come first, then prefill rows.

    D decode rows, P prefill rows, R = D + P; T tokens = D + the prefill rows' tokens; S slots plus one scratch slot.
    """

    backend: "AttentionBackend | None" = None
    num_kv_heads: int = 0  # this rank's
    num_decode: int = 0  # D, padding rows of a captured graph included
    slots: torch.Tensor | None = None  # [R] int32, the slot of each row
    context_lens: torch.Tensor | None = None  # [R] int32, tokens a row sees, this step's included
    block_tables: torch.Tensor | None = None  # [S + 1, W] int32, indexed by slot
    slot_mapping: torch.Tensor | None = None  # [T] int64, place of each token in the flattened cache
    cu_seqlens_q: torch.Tensor | None = None  # [P + 1] int32, where prefill rows begin among the T tokens; the end
    max_seqlen_q: int = 0  # longest prefill row of this step
    max_context_len: int = 0  # longest prefill row's context
    shared: "SharedPrefixPlan | None" = None  # what decode rows have in common (see kernels/shared_prefix.py)
    last_indices: torch.Tensor | None = None  # [L] int64, tokens whose hidden states are wanted; None: all of them
    counters: torch.Tensor | None = None  # int32, of finished parts of one kernel's work; zeros between kernels
    meta: Any = None  # the backend's own, filled by `prepare`

    def of_last_tokens(self) -> "Context":
        """For the attention of each row's last token alone: all are decode rows. `prepare` finds `meta` as it is."""
        return replace(self, num_decode=len(self.slots), cu_seqlens_q=None, shared=None)


_EMPTY = Context()
_context: ContextVar[Context] = ContextVar("nanovllm_context", default=_EMPTY)


def get_context() -> Context:
    """The context of the forward that is running, or an empty one outside of a forward."""
    return _context.get()


@contextmanager
def set_context(context: Context) -> Iterator[Context]:
    """Make `context` current for one forward; the previous one returns even when the forward raises."""
    token = _context.set(context)
    try:
        yield context
    finally:
        _context.reset(token)
