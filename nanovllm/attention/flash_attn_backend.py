"""Attention by the flash-attn package (Dao-AILab), where it is installed."""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend
from nanovllm.utils.context import Context

PAGE_MULTIPLE = 256  # flash-attn 2 pages its cache in multiples of this


class _Metadata(NamedTuple):
    decode_tables: Tensor  # [D, W] int32
    prefill_tables: Tensor  # [P, W] int32
    cu_seqlens_q: Tensor | None  # [P + 1] int32, from 0
    cu_seqlens_k: Tensor | None  # [P + 1] int32


class FlashAttnBackend(AttentionBackend):
    """flash-attn over pages: `flash_attn_with_kvcache` for decode rows, `flash_attn_varlen_func` for prefill rows.

    Raises:
        ImportError: flash-attn is not installed.
        ValueError: no CUDA device, or a block size or dtype that flash-attn does not take.
    """

    name = "flash_attn"
    capturable = True

    def __init__(self, device: torch.device, block_size: int, dtype: torch.dtype):
        if device.type != "cuda":
            raise ValueError(
                f"attention_backend='flash_attn' needs a CUDA device, not device={str(device)!r}; use 'torch'"
            )
        if block_size % PAGE_MULTIPLE:
            raise ValueError(
                f"block_size={block_size} must be a multiple of {PAGE_MULTIPLE} for attention_backend='flash_attn'"
            )
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype={dtype} must be float16 or bfloat16 for attention_backend='flash_attn'")
        try:
            from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
        except ImportError as error:
            raise ImportError(
                "attention_backend='flash_attn' needs the flash-attn package, which cannot be imported"
            ) from error
        self._varlen, self._with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache

    def prepare(self, ctx: Context) -> None:
        # flash-attn indexes block tables by row, not by slot. A device-side gather: a graph replays it.
        tables = ctx.block_tables.index_select(0, ctx.slots)
        cu_seqlens_q = cu_seqlens_k = None
        if ctx.cu_seqlens_q is not None:
            cu_seqlens_q = ctx.cu_seqlens_q - ctx.num_decode
            cu_seqlens_k = torch.nn.functional.pad(ctx.context_lens[ctx.num_decode :].cumsum(0), (1, 0)).int()
        ctx.meta = _Metadata(tables[: ctx.num_decode], tables[ctx.num_decode :], cu_seqlens_q, cu_seqlens_k)

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, ctx: Context, out: Tensor) -> None:
        attended = self._with_kvcache(
            q[:, None],
            k_cache,
            v_cache,
            cache_seqlens=ctx.context_lens[: ctx.num_decode],
            block_table=ctx.meta.decode_tables,
            softmax_scale=scale,
            causal=True,
        )
        out.copy_(attended[:, 0])

    def prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, ctx: Context, out: Tensor) -> None:
        attended = self._varlen(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=ctx.meta.cu_seqlens_q,
            cu_seqlens_k=ctx.meta.cu_seqlens_k,
            max_seqlen_q=ctx.max_seqlen_q,
            max_seqlen_k=ctx.max_context_len,
            softmax_scale=scale,
            causal=True,
            block_table=ctx.meta.prefill_tables,
        )
        out.copy_(attended)
