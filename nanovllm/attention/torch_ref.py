"""Attention in plain torch: the reference, and what runs on a CPU."""

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend
from nanovllm.ops.attention.reference import (
    DecodeGatherPlan,
    PrefillGatherPlan,
    attend_gathered,
    attend_sequence,
    gather,
    plan_decode_gather,
    plan_prefill_gather,
)
from nanovllm.utils.context import Context


class TorchBackend(AttentionBackend):
    """Gathers each row's KV, then calls scaled_dot_product_attention: once for all decode rows, once a prefill row.

    Where the KV lies is worked out once a step, by its first layer, whose cache tells the number of KV heads. The
    gathered K and V of a layer go to buffers that are kept: on a CPU, fresh ones of some MB cost more in page faults
    than the attention itself.
    """

    name = "torch"
    capturable = False

    def __init__(self):
        self._buffers: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def prepare(self, ctx: Context) -> None:
        ctx.meta = None  # the context's it is made from, if any, is of other rows

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, ctx: Context, out: Tensor) -> None:
        plan, _ = self._plans(q, k_cache, ctx)
        k, v = self._gather(k_cache, v_cache, plan.indices)
        out.copy_(attend_gathered(q, k, v, plan.mask, scale))

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, ctx: Context, out: Tensor) -> None:
        for row in self._plans(q, k_cache, ctx)[1]:
            k, v = self._gather(k_cache, v_cache, row.indices)
            tokens = slice(row.start, row.end)
            out[tokens] = attend_sequence(q[tokens], k, v, row.mask, scale)

    def _plans(
        self, q: Tensor, k_cache: Tensor, ctx: Context
    ) -> tuple[DecodeGatherPlan | None, list[PrefillGatherPlan]]:
        """Of the decode rows and of each prefill row."""
        if ctx.meta is None:
            d, layout = ctx.num_decode, (*k_cache.shape[1:3], q.dtype)
            tables, slots, lens, cu_seqlens = ctx.block_tables, ctx.slots, ctx.context_lens, ctx.cu_seqlens_q
            decode = plan_decode_gather(tables, slots[:d], lens[:d], *layout) if d else None
            prefill = (
                [] if cu_seqlens is None else plan_prefill_gather(tables, slots[d:], cu_seqlens, lens[d:], *layout)
            )
            ctx.meta = decode, prefill
        return ctx.meta

    def _gather(self, k_cache: Tensor, v_cache: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """`gather` of both caches. Valid until the next call."""
        head_dim = k_cache.shape[-1]
        size = indices.numel() * head_dim
        first = self._buffers[0]
        if first.numel() < size or first.dtype != k_cache.dtype or first.device != k_cache.device:
            options = {"dtype": k_cache.dtype, "device": k_cache.device}
            with torch.inference_mode(False):  # usable in and out of inference mode
                self._buffers.clear()  # the old ones go before the new ones come
                self._buffers = [torch.empty(size + size // 4, **options) for _ in range(2)]
        k, v = (buffer[:size].view(-1, head_dim) for buffer in self._buffers)
        return gather(k_cache, indices, out=k), gather(v_cache, indices, out=v)
