"""The attention backend in plain torch, for CPUs. Its parts are in ops/attention/reference.py."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, Context, PagedKV
from nanovllm.ops.attention.paged_cache import KVKind, PagedRows
from nanovllm.ops.attention.reference import (
    DecodeGatherPlan,
    DecodeRun,
    PrefillGatherPlan,
    attend_gathered,
    attend_sequence,
    find_run,
    gather,
    gather_kv,
    group_by_length,
    plan_decode_gather,
    plan_prefill_gather,
)


class DecodeGroup(NamedTuple):
    """Decode rows that attend together.

    Attributes:
        rows: int64, their indices in the decode rows; None if they are all decode rows in order.
        plan: where their K and V are.
    """

    rows: Tensor | None
    plan: DecodeRun | DecodeGatherPlan


@dataclass
class TorchPlans:
    """Plans and tensors that the layers of a step share. The first layer that needs an entry makes it.

    Attributes:
        decode: by the kind of the cache, the decode rows in groups.
        prefill: by the kind of the cache, the plan of each prefill row.
        rotations: by the id of the table of RoPE, the factors of `_rotation`.
    """

    decode: dict[KVKind, list[DecodeGroup]] = field(default_factory=dict)
    prefill: dict[KVKind, list[PrefillGatherPlan]] = field(default_factory=dict)
    rotations: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class TorchBackend(AttentionBackend):
    """Gather KV, then call scaled_dot_product_attention: for decode rows of similar lengths, and for each prefill row.

    A row that is alone in its group and whose tokens are side by side in the cache is not gathered. The layers of a
    step share the factors of RoPE.

    In each step, the first layer of each kind plans the indices to gather. The buffers for gathered K and V are reused:
    on a CPU, page faults of new buffers of some MB would take longer than attention. They hold the longest sequence so
    far.
    """

    name = "torch"
    capturable = False

    def __init__(self):
        self._buffers: tuple[Tensor, Tensor] | None = None

    def free_buffers(self) -> None:
        self._buffers = None

    def plan(self, ctx: Context) -> TorchPlans:
        return TorchPlans()

    def store_and_attend(self, qkv, transform, positions, kv, scale, ctx, last_indices=None) -> Tensor:
        is_plain = transform.q_weight is None and transform.query_scale is None and kv.scales is None
        if qkv.dtype != torch.float32 or not is_plain:
            return super().store_and_attend(qkv, transform, positions, kv, scale, ctx, last_indices)
        heads = qkv.view(len(qkv), -1, kv.head_dim)
        q, k, v = heads.split([transform.num_heads, kv.kv_heads, kv.kv_heads], dim=1)
        halves = heads[:, : -kv.kv_heads].unflatten(2, (2, -1))  # q and k: [T, H + K, 2, Dh / 2]
        cos, sin = self._rotation(transform.cos_sin, positions, ctx)
        swapped = halves.flip(2)
        halves.mul_(cos).addcmul_(swapped, sin)
        k_tokens, v_tokens = kv.tokens
        k_tokens.index_copy_(0, ctx.slot_mapping, k)
        v_tokens.index_copy_(0, ctx.slot_mapping, v)
        q, ctx = ctx.select(q, last_indices)
        return self.attend(q, kv, scale, ctx) if ctx.num_decode < len(q) else self._attend_decode(q, kv, scale, ctx)

    def _attend_decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context) -> Tensor:
        plans = ctx.plan.decode
        if kv.kind not in plans:
            plans[kv.kind] = self._plan_decode(ctx.decode_rows, kv, q.dtype)
        groups = plans[kv.kind]
        if len(groups) == 1:
            return self._attend_group(q, kv, scale, groups[0].plan)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows, plan in groups:
            out[rows] = self._attend_group(q[rows], kv, scale, plan)
        return out

    def _plan_decode(self, rows: PagedRows, kv: PagedKV, dtype: torch.dtype) -> list[DecodeGroup]:
        if len(rows) > 1 and len(groups := group_by_length(rows, kv)) > 1:
            return [self._plan_group(group, rows[group], kv, dtype) for group in groups]
        return [self._plan_group(None, rows, kv, dtype)]

    @staticmethod
    def _plan_group(indices: Tensor | None, rows: PagedRows, kv: PagedKV, dtype: torch.dtype) -> DecodeGroup:
        return DecodeGroup(indices, find_run(rows, kv) or plan_decode_gather(rows, kv, dtype))

    def _attend_group(self, q: Tensor, kv: PagedKV, scale: float, plan: DecodeRun | DecodeGatherPlan) -> Tensor:
        if isinstance(plan, DecodeRun):
            k, v = kv.heads
            return attend_gathered(q, k.narrow(2, *plan), v.narrow(2, *plan), None, scale)
        return attend_gathered(q, *self._gather(kv, plan.indices, q.dtype), plan.mask, scale)

    @staticmethod
    def _rotation(cos_sin: Tensor, positions: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return RoPE's factors of the halves of each head and of the swapped halves, for all layers of a step.

        They are [T, 1, 1, Dh / 2] and [T, 1, 2, Dh / 2].
        """
        rotations = ctx.plan.rotations
        key = id(cos_sin)
        if key not in rotations:
            cos, sin = cos_sin[positions][:, None, None].chunk(2, dim=-1)
            rotations[key] = cos, torch.cat((-sin, sin), dim=2)
        return rotations[key]

    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        out.copy_(self._attend_decode(q, kv, scale, ctx))

    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        plans = ctx.plan.prefill
        if kv.kind not in plans:
            assert ctx.cu_seqlens_q is not None  # `attend` calls this only if there are prefill rows
            plans[kv.kind] = plan_prefill_gather(ctx.prefill_rows, ctx.cu_seqlens_q, kv, q.dtype)
        for row in plans[kv.kind]:
            k, v = self._gather(kv, row.indices, q.dtype)
            tokens = slice(row.start, row.end)
            out[tokens] = attend_sequence(q[tokens], k, v, row.mask, scale)

    def _gather(self, kv: PagedKV, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gather from both caches; convert FP8 to `dtype`. The result is valid until the next call."""
        if kv.is_fp8:  # on a GPU, to test the other backend
            return gather_kv(kv, indices, dtype)
        cache = kv.k_cache
        head_dim = cache.shape[-1]
        size = indices.numel() * head_dim
        if self._buffers is None or not _fits(self._buffers[0], cache, size):
            self._buffers = None  # frees the old ones before the new ones are allocated
            with torch.inference_mode(False):  # the buffers must be usable inside and outside inference mode
                k, v = (torch.empty(size + size // 4, dtype=cache.dtype, device=cache.device) for _ in range(2))
            self._buffers = k, v
        k, v = (buffer[:size].view(-1, head_dim) for buffer in self._buffers)
        return gather(cache, indices, out=k), gather(kv.v_cache, indices, out=v)


def _fits(buffer: Tensor, cache: Tensor, size: int) -> bool:
    """Return whether `buffer` can hold `size` values of `cache`."""
    return buffer.numel() >= size and buffer.dtype == cache.dtype and buffer.device == cache.device
