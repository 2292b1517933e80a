"""Attention by this project's own Triton kernels."""

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, Context, PagedKV
from nanovllm.ops.attention.decode_attention import decode_attention_triton
from nanovllm.ops.attention.decode_plan import default_split_policy, plan_decode_triton
from nanovllm.ops.attention.prefill_attention import prefill_attention_triton
from nanovllm.ops.attention.rope_decode import rope_decode_triton
from nanovllm.ops.attention.shared_prefix import shared_attention_triton
from nanovllm.ops.dispatch import regime_of
from nanovllm.ops.triton_utils import HAVE_TRITON, sm_count


class TritonBackend(AttentionBackend):
    """The kernels read lengths and block tables on the device, and plan their work there, so graphs may hold them.

    Raises:
        ImportError: Triton is not installed.
        ValueError: no CUDA device, or a block size that is no power of two.
    """

    name = "triton"
    capturable = capturable_prefill = shares_prefixes = True

    def __init__(self, device: torch.device, block_size: int):
        if not HAVE_TRITON:
            raise ImportError("attention_backend='triton' needs the triton package, which is not installed")
        if device.type != "cuda":
            raise ValueError(f"attention_backend='triton' needs a CUDA device, not device={str(device)!r}; use 'torch'")
        if block_size < 1 or block_size & (block_size - 1):
            raise ValueError(f"block_size={block_size} must be a power of two for attention_backend='triton'")

    def prepare(self, ctx: Context) -> None:
        """Plan decode attention: of decode rows; also of all rows if the last layer attends for last tokens only."""
        if ctx.meta is not None or (ctx.cu_seqlens_q is None and self._fuses(ctx, ctx.num_decode)):
            return  # planned already, before the chain of kernels that reads it began; or not needed
        plans = ctx.meta = {}  # by the numbers of rows and KV heads
        counts = {ctx.num_decode, 0 if ctx.last_indices is None else len(ctx.slots)}
        for rows in counts - {0}:
            for kv_heads in ctx.kv_heads:
                policy = default_split_policy(rows, kv_heads, sm_count(ctx.slots.device))
                plans[rows, kv_heads] = plan_decode_triton(ctx.context_lens[:rows], kv_heads, policy)

    @staticmethod
    def _fuses(ctx: Context, num_tokens: int) -> bool:
        """Whether one kernel does all: in a step of few decode rows alone."""
        only_decode = ctx.num_decode == num_tokens and ctx.shared is None
        return only_decode and regime_of(num_tokens).one_kernel_attention

    def store_and_attend(self, qkv, transform, positions, kv, scale, ctx, last=None) -> Tensor:
        if not self._fuses(ctx, len(qkv)):
            return super().store_and_attend(qkv, transform, positions, kv, scale, ctx, last)
        where = (kv.k_cache, kv.v_cache, ctx.block_tables, ctx.slots, ctx.context_lens)
        return rope_decode_triton(qkv, transform, *where, scale, counters=ctx.counters)

    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        rows = slice(ctx.num_decode)
        where = (q, kv.k_cache, kv.v_cache, ctx.block_tables, ctx.slots[rows])
        plan, prefix = ctx.meta[ctx.num_decode, kv.k_cache.shape[2]], None
        if ctx.shared is not None:
            prefix = shared_attention_triton(*where, scale, ctx.shared, plan.num_splits)
        lens = ctx.context_lens[rows]
        decode_attention_triton(*where, lens, scale, out=out, counters=ctx.counters, plan=plan, prefix=prefix)

    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        rows = slice(ctx.num_decode, None)
        assert ctx.cu_seqlens_q is not None  # as there are prefill rows
        where = (ctx.block_tables, ctx.slots[rows], ctx.cu_seqlens_q, ctx.context_lens[rows])
        prefill_attention_triton(q, kv.k_cache, kv.v_cache, *where, scale, out=out)
