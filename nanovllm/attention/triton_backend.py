"""Attention with this project's Triton kernels."""

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, Context, PagedKV
from nanovllm.ops.attention.decode_attention import decode_attention_triton
from nanovllm.ops.attention.decode_plan import DecodePlan, default_split_policy, plan_decode_triton
from nanovllm.ops.attention.paged_cache import KVKind
from nanovllm.ops.attention.prefill_attention import prefill_attention_triton
from nanovllm.ops.attention.rope_decode import rope_decode_triton
from nanovllm.ops.attention.shared_prefix import shared_attention_triton
from nanovllm.ops.dispatch import regime_of
from nanovllm.ops.triton_utils import HAVE_TRITON, sm_count


class TritonBackend(AttentionBackend):
    """Attention with Triton kernels. They read lengths and block tables on the device, so graphs can capture them.

    Raises:
        ImportError: Triton is not installed.
        ValueError: the device is not a CUDA device.
    """

    name = "triton"
    capturable = capturable_prefill = shares_prefixes = compiles_while_loading = True

    def __init__(self, device: torch.device):
        if not HAVE_TRITON:
            raise ImportError("attention_backend='triton' needs the triton package, which is not installed")
        if device.type != "cuda":
            raise ValueError(f"attention_backend='triton' needs a CUDA device, not device={str(device)!r}; use 'torch'")

    def prepare(self, ctx: Context) -> None:
        """Plan both contexts of a step, unless one kernel attends without a plan.

        The last layer's plan is also made now: a kernel between the layers would break their overlap.
        """
        if not self._fuses(ctx):
            super().prepare(ctx)

    def plan(self, ctx: Context) -> dict[KVKind, DecodePlan]:
        """Plan decode attention, for each kind of cache."""
        if not ctx.num_decode:
            return {}
        rows = ctx.decode_rows
        plans = {}
        for kind in ctx.kv_kinds:
            policy = default_split_policy(len(rows), kind.kv_heads, sm_count(rows.slots.device), kind.is_fp8)
            lens = rows.context_lens.clamp(max=kind.window) if kind.window else rows.context_lens
            plans[kind] = plan_decode_triton(lens, kind.kv_heads, policy)
        return plans

    @staticmethod
    def _fuses(ctx: Context) -> bool:
        """Return whether one kernel without a plan does everything: in a step of a few decode rows only."""
        num_tokens = len(ctx.slot_mapping)
        only_decode = ctx.num_decode == num_tokens and ctx.shared is None
        return only_decode and regime_of(num_tokens).one_kernel_attention

    def store_and_attend(self, qkv, transform, positions, kv, scale, ctx, last_indices=None) -> Tensor:
        if not self._fuses(ctx):
            return super().store_and_attend(qkv, transform, positions, kv, scale, ctx, last_indices)
        return rope_decode_triton(qkv, transform, kv, ctx.rows, scale, counters=ctx.counters)

    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        rows = ctx.decode_rows
        plan = ctx.plan[kv.kind]
        prefix = None
        if ctx.shared is not None and not kv.window:
            prefix = shared_attention_triton(q, kv, rows, scale, ctx.shared, plan.num_splits)
        decode_attention_triton(q, kv, rows, scale, plan=plan, out=out, counters=ctx.counters, prefix=prefix)

    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        assert ctx.cu_seqlens_q is not None  # `attend` calls this only if there are prefill rows
        prefill_attention_triton(q, kv, ctx.prefill_rows, ctx.cu_seqlens_q, scale, out=out)
