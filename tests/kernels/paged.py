"""A paged KV cache for attention tests, with NaN wherever there is no token."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nanovllm.ops.attention.fp8_cache import dequantize_kv, quantize_kv
from nanovllm.ops.attention.paged_cache import PagedKV, PagedRows
from nanovllm.ops.float8 import FP8
from nanovllm.ops.triton_utils import triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes with numpy, which has no bfloat16 arithmetic.
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]
# Dtypes of queries over FP8 caches. 16-bit ones are computed in float16.
FP8_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


@dataclass
class Paged:
    """Sequences of given context lengths in scattered blocks and slots.

    Attributes:
        keys, values: the content of each sequence's pages, [context, K, Dh]; dequantized if they are in FP8.
    """

    kv: PagedKV
    rows: PagedRows
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All inputs of a kernel."""
        rows, scales = self.rows, [] if self.kv.scales is None else [self.kv.scales]
        return [self.kv.k_cache, self.kv.v_cache, *scales, rows.block_tables, rows.slots, rows.context_lens]

    def copy_kv(self) -> PagedKV:
        kv = self.kv
        scales = None if kv.scales is None else kv.scales.clone()
        return PagedKV(kv.k_cache.clone(), kv.v_cache.clone(), kv.window, scales)


def make_paged(
    contexts: list[int],
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = DEVICE,
    num_padding: int = 0,
    window: int = 0,
    queries: list[int] | None = None,
    fp8: bool = False,
) -> Paged:
    """Make pages for `contexts`.

    Args:
        num_padding: how many sequences, the last ones, are padding: context 1, all in one slot and block.
        window: hides tokens from the queries; pages of tiles that it hides completely have NaN.
        queries: the number of queries of each sequence; 1 each if None.
        fp8: keys and values are in FP8. The tokens' magnitudes differ by factors of up to a million.
    """
    batch = len(contexts)
    generator = torch.Generator().manual_seed(batch)
    width = max(triton.cdiv(context, block_size) for context in contexts)
    num_blocks = sum(triton.cdiv(context, block_size) for context in contexts) + 2
    shape = (num_blocks, block_size, kv_heads, head_dim)
    k_cache, v_cache = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    free = torch.randperm(num_blocks, generator=generator).tolist()
    slots = torch.randperm(batch + 3, generator=generator)[:batch].tolist()
    scratch_block, nan_block = free.pop(), free.pop()
    tables = torch.full((batch + 4, width), nan_block)
    keys, values = [], []
    for i, context in enumerate(contexts):
        k, v = torch.randn(2, context, kv_heads, head_dim, generator=generator)
        if fp8:
            v *= 10 ** (6 * torch.rand(context, kv_heads, 1, generator=generator) - 5)
            k *= 10 ** (6 * torch.rand(context, kv_heads, 1, generator=generator) - 5.5)
            k, v = (dequantize_kv(*quantize_kv(x)) for x in (k, v))
        padding = i >= batch - num_padding
        if padding:
            slots[i] = batch + 3
        for index, start in enumerate(range(0, context, block_size)):
            block = scratch_block if padding else free.pop()
            tables[slots[i], index] = block
            length = min(block_size, context - start)
            first = hidden_tokens(context, queries[i] if queries else 1, window) - start
            seen = slice(min(max(first, 0), length), length)
            k_cache[block, seen] = k[start : start + length][seen]
            v_cache[block, seen] = v[start : start + length][seen]
        keys.append(k.to(device, dtype))
        values.append(v.to(device, dtype))
    if fp8:
        (k_cache, k_scales), (v_cache, v_scales) = (quantize_kv(cache.to(device)) for cache in (k_cache, v_cache))
        kv = PagedKV(k_cache, v_cache, window, torch.stack([k_scales, v_scales], -1).transpose(1, 2).contiguous())
    else:
        kv = PagedKV(k_cache.to(device, dtype), v_cache.to(device, dtype), window)
    rows = PagedRows(
        tables.to(device, torch.int32),
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
    )
    return Paged(kv, rows, keys, values)


def hidden_tokens(context: int, queries: int, window: int) -> int:
    """Return how many tokens are in tiles, of 64 tokens at most, that the window hides from all queries."""
    return max(0, context - queries + 1 - window) // 64 * 64 if window else 0


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int = 0) -> torch.Tensor:
    """Compute the formula in float32: queries [N, H, Dh] at the last N of the L positions of k and v [L, K, Dh]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("nhd,lhd->hnl", q.float(), k) * scale
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    if window:
        hidden |= torch.ones_like(hidden).tril(len(k) - len(q) - window)
    return torch.einsum("hnl,lhd->nhd", logits.masked_fill(hidden, float("-inf")).softmax(-1), v)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-5 if actual.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def assert_same(tensors: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    """Assert that tensors are equal bit for bit, NaN included."""
    for actual, other in zip(tensors, expected, strict=True):
        if actual.dtype == FP8:
            actual, other = actual.view(torch.uint8), other.view(torch.uint8)
        torch.testing.assert_close(actual, other, atol=0, rtol=0, equal_nan=True)
