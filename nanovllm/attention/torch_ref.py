"""Attention in plain torch: the reference, and the backend for CPUs."""

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, Context, PagedKV
from nanovllm.ops.attention.reference import (
    DecodeGatherPlan,
    PrefillGatherPlan,
    attend_gathered,
    attend_sequence,
    gather,
    gather_kv,
    plan_decode_gather,
    plan_prefill_gather,
)


class TorchBackend(AttentionBackend):
    """Gather each row's KV, then call scaled_dot_product_attention: once for all decode rows, once per prefill row.

    In each step, the first layer of each kind plans the indices to gather. The buffers for gathered K and V are reused:
    on a CPU, page faults of new buffers of some MB would take longer than attention.
    """

    name = "torch"
    capturable = False

    def __init__(self):
        self._buffers: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def prepare(self, ctx: Context) -> None:
        ctx.meta = {}  # plans by the kind of the cache; a context for last tokens must not use the step's plans

    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        plan, _ = self._plans(q, kv, ctx)
        k, v = self._gather(kv, plan.indices, q.dtype)
        out.copy_(attend_gathered(q, k, v, plan.mask, scale))

    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        for row in self._plans(q, kv, ctx)[1]:
            k, v = self._gather(kv, row.indices, q.dtype)
            tokens = slice(row.start, row.end)
            out[tokens] = attend_sequence(q[tokens], k, v, row.mask, scale)

    def _plans(self, q: Tensor, kv: PagedKV, ctx: Context) -> tuple[DecodeGatherPlan, list[PrefillGatherPlan]]:
        """Return the plan of the decode rows and the plans of the prefill rows."""
        if kv.kind not in ctx.meta:
            decode, prefill = None, []
            if ctx.num_decode:
                decode = plan_decode_gather(ctx.decode_rows, kv, q.dtype)
            if ctx.cu_seqlens_q is not None:
                prefill = plan_prefill_gather(ctx.prefill_rows, ctx.cu_seqlens_q, kv, q.dtype)
            ctx.meta[kv.kind] = decode, prefill
        return ctx.meta[kv.kind]

    def _gather(self, kv: PagedKV, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gather from both caches; convert FP8 to `dtype`. The result is valid until the next call."""
        if kv.is_fp8:  # on a GPU, to test the other backend
            return gather_kv(kv, indices, dtype)
        cache = kv.k_cache
        head_dim = cache.shape[-1]
        size = indices.numel() * head_dim
        first = self._buffers[0]
        if first.numel() < size or first.dtype != cache.dtype or first.device != cache.device:
            with torch.inference_mode(False):  # the buffers must be usable inside and outside inference mode
                self._buffers.clear()  # free the old ones before allocating new ones
                for _ in range(2):
                    self._buffers.append(torch.empty(size + size // 4, dtype=cache.dtype, device=cache.device))
        k, v = (buffer[:size].view(-1, head_dim) for buffer in self._buffers)
        return gather(cache, indices, out=k), gather(kv.v_cache, indices, out=v)
