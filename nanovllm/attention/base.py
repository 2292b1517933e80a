"""The seam between models and attention kernels: prepare a step's metadata, write K and V, attend."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.ops.attention.shared_prefix import SharedPrefixPlan
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.ops.norm_rope.rope_store import qk_norm_rope_store


class PagedKV(NamedTuple):
    """A layer's keys and values, in blocks that the block tables refer to.

    Attributes:
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
    """

    k_cache: Tensor
    v_cache: Tensor


@dataclass(kw_only=True)
class Context:
    """Metadata of one step. Rows are sequences: decode rows (one token each) come first, then prefill rows.

    D decode rows, P prefill rows, R = D + P; T tokens = D + the prefill rows' tokens; S slots plus one scratch slot.
    """

    backend: "AttentionBackend"
    kv_heads: tuple[int, ...]  # the different numbers of KV heads that layers have on this rank
    num_decode: int  # D, padding rows of a captured graph included
    slots: Tensor  # [R] int32, the slot of each row
    context_lens: Tensor  # [R] int32, tokens that a row sees, this step's included
    block_tables: Tensor  # [S + 1, W] int32, indexed by slot
    slot_mapping: Tensor  # [T] int64, index of each token in the flattened cache
    counters: Tensor  # int32, of finished parts of one kernel's work; zeros between kernels
    cu_seqlens_q: Tensor | None = None  # [P + 1] int32, where prefill rows start among the T tokens; None without any
    max_seqlen_q: int = 0  # longest prefill row of this step
    max_context_len: int = 0  # longest prefill row's context
    shared: SharedPrefixPlan | None = None  # which prefixes decode rows share, if they are attended once for all
    last_indices: Tensor | None = None  # [L] int64, tokens whose hidden states are wanted; None: all of them
    meta: Any = None  # the backend's own, filled by `prepare`

    def of_last_tokens(self) -> "Context":
        """Return the context for attention of each row's last token only: all rows are decode rows, `meta` is kept."""
        return replace(self, num_decode=len(self.slots), cu_seqlens_q=None, shared=None)


class AttentionBackend(ABC):
    """Attends a step's rows over the paged KV cache.

    The runner calls `prepare` once a step, then each layer calls `store_and_attend`. All metadata is in the context.
    If the last layer attends for some tokens only, it calls `prepare` again with the context of these tokens, whose
    `meta` is still that of the step.

    Attributes:
        name: what users call it.
        capturable: whether a CUDA graph may hold steps of decode rows: `decode` neither waits for the device nor keeps
            host metadata of the step.
        capturable_prefill: the same for `prefill`, whose work must then follow from the context's tensors alone.
        shares_prefixes: whether `decode` uses the context's `shared`.
    """

    name: str
    capturable: bool = False
    capturable_prefill: bool = False
    shares_prefixes: bool = False

    def prepare(self, ctx: Context) -> None:  # noqa: B027  optional: most backends need nothing
        """Derive from the context's tensors, once for all layers, what kernels need. Keep it in `ctx.meta`."""

    @abstractmethod
    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        """Attend for the decode rows' q [D, H, Dh] into `out`, of the same shape; the cache holds the step's K, V."""

    @abstractmethod
    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        """Attend causally for the prefill rows' packed q [Tp, H, Dh] into `out`, of the same shape."""

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
        """Transform queries and keys, store keys and values, attend. A backend may have one kernel for all of it.

        Args:
            qkv: [T, (H + 2 K) Dh], decode rows' tokens first.
            positions: [T] int64.
            kv: the layer's cache, which is written.
            scale: factor of the scores.
            last: [R] int64, each row's last token, if only these attend. A step of decode rows alone has none.

        Returns:
            [T, H, Dh], or [R, H, Dh] with `last`.
        """
        q = qk_norm_rope_store(qkv, transform, positions, ctx.slot_mapping, kv.k_cache, kv.v_cache)
        if last is not None:
            q, ctx = q[last], ctx.of_last_tokens()
            self.prepare(ctx)
        return self.attend(q, kv, scale, ctx)

    def attend(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context) -> Tensor:
        """Attend for all of a step's tokens [T, H, Dh], decode rows first; the cache holds their K and V already."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if ctx.num_decode:
            self.decode(q[: ctx.num_decode], kv, scale, ctx, out[: ctx.num_decode])
        if ctx.num_decode < len(q):
            self.prefill(q[ctx.num_decode :], kv, scale, ctx, out[ctx.num_decode :])
        return out
