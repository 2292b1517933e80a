"""Attention in plain torch: the reference, and what runs on a CPU."""

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, Context, PagedKV
from nanovllm.ops.attention.reference import (
    DecodeGatherPlan,
    PrefillGatherPlan,
    attend_gathered,
    attend_sequence,
    gather,
    plan_decode_gather,
    plan_prefill_gather,
)


class TorchBackend(AttentionBackend):
    """Gathers each row's KV, then calls scaled_dot_product_attention: once for all decode rows, once a prefill row.

    The first layer of each number of KV heads plans where the KV lies, for the whole step. The gathered K and V of a
    layer go to buffers that are kept: on a CPU, fresh ones of some MB cost more in page faults than attention itself.
    """

    name = "torch"
    capturable = False

    def __init__(self):
        self._buffers: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def prepare(self, ctx: Context) -> None:
        ctx.meta = {}  # by the number of KV heads; plans of the context that this one is made from are for other rows

    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        plan, _ = self._plans(q, kv, ctx)
        k, v = self._gather(kv, plan.indices)
        out.copy_(attend_gathered(q, k, v, plan.mask, scale))

    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        for row in self._plans(q, kv, ctx)[1]:
            k, v = self._gather(kv, row.indices)
            tokens = slice(row.start, row.end)
            out[tokens] = attend_sequence(q[tokens], k, v, row.mask, scale)

    def _plans(self, q: Tensor, kv: PagedKV, ctx: Context) -> tuple[DecodeGatherPlan, list[PrefillGatherPlan]]:
        """Return the plan of the decode rows and those of the prefill rows."""
        block_size, kv_heads = kv.k_cache.shape[1:3]
        if kv_heads not in ctx.meta:
            d, layout = ctx.num_decode, (block_size, kv_heads, q.dtype)
            tables, slots, lens, prefill = ctx.block_tables, ctx.slots, ctx.context_lens, []
            decode = plan_decode_gather(tables, slots[:d], lens[:d], *layout) if d else None
            if ctx.cu_seqlens_q is not None:
                prefill = plan_prefill_gather(tables, slots[d:], ctx.cu_seqlens_q, lens[d:], *layout)
            ctx.meta[kv_heads] = decode, prefill
        return ctx.meta[kv_heads]

    def _gather(self, kv: PagedKV, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Gather from both caches. The result is valid until the next call."""
        cache = kv.k_cache
        head_dim = cache.shape[-1]
        size = indices.numel() * head_dim
        first = self._buffers[0]
        if first.numel() < size or first.dtype != cache.dtype or first.device != cache.device:
            with torch.inference_mode(False):  # usable in and out of inference mode
                self._buffers.clear()  # free the old ones before the new ones are allocated
                for _ in range(2):
                    self._buffers.append(torch.empty(size + size // 4, dtype=cache.dtype, device=cache.device))
        k, v = (buffer[:size].view(-1, head_dim) for buffer in self._buffers)
        return gather(cache, indices, out=k), gather(kv.v_cache, indices, out=v)
