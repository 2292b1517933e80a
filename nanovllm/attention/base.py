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

    A captured mixed step has no decode rows here: attention treats rows of one token as prefill rows.

    Sizes: D decode rows, P prefill rows, R = D + P rows; T tokens, D of decode rows and the rest of prefill rows; S
    slots and one scratch slot; W entries in a block table. A rank has H query heads and K KV heads of size Dh.
    """

    backend: "AttentionBackend"
    kv_kinds: tuple[KVKind, ...]  # the distinct kinds of the layers' caches on this rank
    num_decode: int  # D, padding rows of a captured graph included
    rows: PagedRows  # all R rows; their block tables are [S + 1, W]
    slot_mapping: Tensor  # [T] int64, index of each token in the flattened cache
    counters: Tensor  # int32, counts the finished splits of one kernel; zeros between kernels
    cu_seqlens_q: Tensor | None = None  # [P + 1] int32, offsets of the prefill rows in the T tokens; None if P is 0
    max_seqlen_q: int = 0  # upper bound of the tokens of a prefill row
    max_context_len: int = 0  # upper bound of the context of a prefill row
    shared: SharedPrefixPlan | None = None  # prefixes of decode rows, if one kernel attends to them for all rows
    # [R] int64, the last token of each row: the last layer returns the hidden states of these only. None: all tokens,
    # because each row is one token, or because the step keeps all hidden states (for prompt logprobs).
    last_indices: Tensor | None = None
    # All R rows for layers with recurrent state, with a plan of each class of these layers.
    state_rows: Mapping[type, StateRows] = field(default_factory=dict)
    plan: Any = None  # what the backend's `plan` returns for this context
    # The context for the last layer if only `last_indices` attend there; None otherwise.
    last_tokens_context: "Context | None" = None

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
        return replace(self, num_decode=len(self.rows), cu_seqlens_q=None, shared=None, plan=None)

    def select(self, q: Tensor, last_indices: Tensor | None) -> tuple[Tensor, "Context"]:
        """Return the queries that attend in a layer, and their context: all queries, or those of `last_indices`."""
        if last_indices is None:
            return q, self
        assert self.last_tokens_context is not None  # `prepare` has made it
        return q[last_indices], self.last_tokens_context


class AttentionBackend(ABC):
    """A backend computes the attention of a step's rows over the paged KV cache.

    The runner calls `prepare` once in each step, then each layer calls `store_and_attend`. All metadata is in the
    context. A layer in which only last tokens attend uses the step's other context, `last_tokens_context`.

    Attributes:
        name: the name that users give.
        capturable: whether a CUDA graph can capture a step of decode rows: `decode` does not wait for the device, and
            needs nothing from the host that changes between steps.
        capturable_prefill: whether the same holds for `prefill`.
        shares_prefixes: whether `decode` uses the context's `shared`.
        compiles_while_loading: whether its kernels are Triton's. The runner then compiles all kernels while the weights
            load, in steps that launch nothing.
    """

    name: str
    capturable: bool = False
    capturable_prefill: bool = False
    shares_prefixes: bool = False
    compiles_while_loading: bool = False

    def prepare(self, ctx: Context) -> None:
        """Plan a step before its first layer: its context, and the one for last tokens if a layer will use it."""
        ctx.plan = self.plan(ctx)
        if ctx.last_indices is not None:
            ctx.last_tokens_context = ctx.for_last_tokens()
            ctx.last_tokens_context.plan = self.plan(ctx.last_tokens_context)

    def free_buffers(self) -> None:  # noqa: B027  (most backends keep none)
        """Free memory that is kept between steps."""

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
        last_indices: Tensor | None = None,
    ) -> Tensor:
        """Transform queries and keys, store keys and values, attend. A backend may fuse all of this in one kernel.

        Args:
            qkv: [T, (H + 2 K) Dh], the decode rows' tokens first. A backend may overwrite it.
            positions: [T] int64.
            kv: the layer's cache, which is written. It knows the layer's window.
            scale: factor of the scores.
            last_indices: [R] int64, those of the context if only these tokens attend; None if every token attends.

        Returns:
            [T, H, Dh], or [R, H, Dh] with `last_indices`.
        """
        q = qk_norm_rope_store(qkv, transform, positions, ctx.slot_mapping, kv)
        q, ctx = ctx.select(q, last_indices)
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
