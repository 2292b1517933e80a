"""The seam between models and attention kernels."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.ops.norm_rope.rope_store import qk_norm_rope_store
from nanovllm.utils.context import Context


class AttentionBackend(ABC):
    """Attends a step's rows over the paged KV cache.

    The runner calls `prepare` once a step, then each layer calls `store_and_attend`. All metadata is in the context.
    Where the last layer attends for some tokens only, `prepare` is called again, with a context of theirs, whose `meta`
    is still what it made before.

    Attributes:
        name: how users ask for it.
        capturable: whether steps of decode rows may be captured in a CUDA graph: `decode` neither waits for the device
            nor keeps host metadata of the step.
        capturable_prefill: the same for `prefill`, whose work must then follow from the context's tensors alone.
        shares_prefixes: whether `decode` makes use of the context's `shared`.
    """

    name: str
    capturable: bool = False
    capturable_prefill: bool = False
    shares_prefixes: bool = False

    def prepare(self, ctx: Context) -> None:  # noqa: B027  optional: most backends need nothing
        """Work out, once for all layers, what the context's tensors imply; kept in `ctx.meta`."""

    @abstractmethod
    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, ctx: Context, out: Tensor) -> None:
        """Attention of the decode rows' q [D, H, Dh] into `out`, of the same shape; the cache holds the step's K, V."""

    @abstractmethod
    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, ctx: Context, out: Tensor) -> None:
        """Causal attention of the prefill rows' packed q [Tp, H, Dh] into `out`, of the same shape."""

    def store_and_attend(
        self,
        qkv: Tensor,
        transform: QKTransform,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scale: float,
        ctx: Context,
        last: Tensor | None = None,
    ) -> Tensor:
        """Transform queries and keys, store keys and values, attend. A backend may have one kernel for all of it.

        Args:
            qkv: [T, (H + 2 K) Dh], decode rows' tokens first.
            positions: [T] int64.
            k_cache, v_cache, scale: as in `attend`; the caches are written.
            last: [R] int64, each row's last token, if only these attend. A step of decode rows alone has none.

        Returns:
            [T, H, Dh], or [R, H, Dh] with `last`.
        """
        q = qk_norm_rope_store(qkv, transform, positions, ctx.slot_mapping, k_cache, v_cache)
        if last is not None:
            q, ctx = q[last], ctx.of_last_tokens()
            self.prepare(ctx)
        return self.attend(q, k_cache, v_cache, scale, ctx)

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, ctx: Context) -> Tensor:
        """Attention of all of a step's tokens, whose K and V the cache holds already.

        Args:
            q: [T, H, Dh], decode rows' tokens first.
            k_cache, v_cache: [num_blocks, block_size, K, Dh].
            scale: factor of the logits.

        Returns:
            [T, H, Dh].
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if ctx.num_decode:
            self.decode(q[: ctx.num_decode], k_cache, v_cache, scale, ctx, out[: ctx.num_decode])
        if ctx.num_decode < len(q):
            self.prefill(q[ctx.num_decode :], k_cache, v_cache, scale, ctx, out[ctx.num_decode :])
        return out
