"""The interface between models and attention kernels: prepare a step's metadata, write K and V, attend."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nanovllm.ops.attention.paged_cache import KVKind, PagedKV, PagedRows
from nanovllm.ops.attention.shared_prefix import SharedPrefixPlan
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.ops.norm_rope.rope_store import qk_norm_rope_store
from nanovllm.ops.state.rows import StateRows


@dataclass(kw_only=True)
class Context:
    """Metadata of one step. Rows are sequences: decode rows (one token each) come first, then prefill rows.

    A captured step with prompt tokens has no decode rows here: attention treats rows of one token as prompts.

    There are D decode rows, P prefill rows and R = D + P rows; T tokens: D and those of the prefill rows; S slots and
    one scratch slot.
    """

    backend: "AttentionBackend"
    kv_kinds: tuple[KVKind, ...]  # the distinct kinds of the layers' caches on this rank
    num_decode: int  # D, padding rows of a captured graph included
    rows: PagedRows  # all R rows; their block tables are [S + 1, W]
    slot_mapping: Tensor  # [T] int64, index of each token in the flattened cache
    counters: Tensor  # int32, counts the finished splits of one kernel; zeros between kernels
    cu_seqlens_q: Tensor | None = None  # [P + 1] int32, offsets of the prefill rows in the T tokens; None if P is 0
    max_seqlen_q: int = 0  # longest prefill row of this step
    max_context_len: int = 0  # longest context of a prefill row
    shared: SharedPrefixPlan | None = None  # prefixes of decode rows, if one kernel attends to them for all rows
    # [L] int64, tokens whose hidden states the last layer returns. None: all tokens, because each row is one token, or
    # because the step keeps all hidden states (for prompt logprobs).
    last_indices: Tensor | None = None
    # All R rows for layers with recurrent state, with a plan of each class of these layers.
    state_rows: Mapping[type, StateRows] = field(default_factory=dict)
    meta: Any = None  # what the backend's `plan` returns for this context
    last: "Context | None" = None  # the context of a layer in which only last tokens attend; None if no layer is one

    # Cached: all layers read these, and slicing takes the host time.

    @cached_property
    def decode_rows(self) -> PagedRows:
        """The first D rows."""
        return self.rows[: self.num_decode]

    @cached_property
    def prefill_rows(self) -> PagedRows:
        """The other P rows."""
        return self.rows[self.num_decode :]

    def for_last_tokens(self) -> "Context":
        """Return a context in which only each row's last token attends, as decode rows do. It has no plan yet."""
        return replace(self, num_decode=len(self.rows), cu_seqlens_q=None, shared=None, meta=None)


class AttentionBackend(ABC):
    """A backend computes the attention of a step's rows over the paged KV cache.

    The runner calls `prepare` once in each step, then each layer calls `store_and_attend`. All metadata is in the
    context. A layer in which only last tokens attend uses the step's other context, `last`.

    Attributes:
        name: the name that users give.
        capturable: whether a CUDA graph can capture a step of decode rows: `decode` does not wait for the device, and
            needs nothing from the host that changes between steps.
        capturable_prefill: whether the same holds for `prefill`.
        shares_prefixes: whether `decode` uses the context's `shared`.
        compiles_ahead: whether its kernels are Triton's, so that the runner can compile them, and those of the layers,
            while weights load: in a step that launches none of them.
    """

    name: str
    capturable: bool = False
    capturable_prefill: bool = False
    shares_prefixes: bool = False
    compiles_ahead: bool = False

    def prepare(self, ctx: Context) -> None:
        """Plan a step before its first layer: its context, and the one for last tokens if a layer will use it."""
        ctx.meta = self.plan(ctx)
        if ctx.last_indices is not None:
            ctx.last = ctx.for_last_tokens()
            ctx.last.meta = self.plan(ctx.last)

    @abstractmethod
    def plan(self, ctx: Context) -> Any:
        """Return metadata for the kernels of all layers that use this context, derived from its tensors."""

    @abstractmethod
    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        """Attend for the decode rows' q [D, H, Dh]; write to `out` [D, H, Dh]. The cache has the step's K and V."""

    @abstractmethod
    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        """Attend causally for the prefill rows' packed q [T - D, H, Dh]; write to `out` [T - D, H, Dh]."""

    def store_and_attend(
        self,
        qkv: Tensor,
        transform: QKTransform,
        positions: Tensor,
        kv: PagedKV,
        scale: float,
        ctx: Context,
        last: Tensor | None = None,
    ) -> Tensor:
        """Transform queries and keys, store keys and values, attend. A backend may fuse all of this in one kernel.

        Args:
            qkv: [T, (H + 2 K) Dh], the decode rows' tokens first.
            positions: [T] int64.
            kv: the layer's cache, which is written. It knows the layer's window.
            scale: factor of the scores.
            last: [R] int64, the context's `last_indices` if only these tokens attend; None if every token attends.

        Returns:
            [T, H, Dh], or [R, H, Dh] with `last`.
        """
        q = qk_norm_rope_store(qkv, transform, positions, ctx.slot_mapping, kv)
        if last is not None:
            assert ctx.last is not None  # `prepare` has made it
            q, ctx = q[last], ctx.last
        return self.attend(q, kv, scale, ctx)

    def attend(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context) -> Tensor:
        """Attend for all of a step's tokens [T, H, Dh], decode rows first. The cache has their K and V already."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        num_decode = ctx.num_decode
        if num_decode:
            self.decode(q[:num_decode], kv, scale, ctx, out=out[:num_decode])
        if num_decode < len(q):
            self.prefill(q[num_decode:], kv, scale, ctx, out=out[num_decode:])
        return out
