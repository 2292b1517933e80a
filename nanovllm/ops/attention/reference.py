"""Attention in plain torch: the references of the kernels in this folder, and what a CPU runs.

The backend for CPUs uses the pieces: it plans a gather once per step and attends with it in every layer.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.attention.decode_plan import DecodePlan, SplitPolicy
from nanovllm.ops.attention.fp8_cache import dequantize_kv
from nanovllm.ops.attention.paged_cache import PagedKV, PagedRows
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.ops.norm_rope.reference import qk_norm_rope_store_torch


def cache_indices(
    kv: PagedKV, block_tables: torch.Tensor, slots: torch.Tensor | int, positions: torch.Tensor
) -> torch.Tensor:
    """Return where `gather` finds positions [..., L] of slots [..., 1]: [..., K, L] int64."""
    tokens = slot_mapping(kv, block_tables, slots, positions)
    return tokens[..., None, :] * kv.kv_heads + torch.arange(kv.kv_heads, device=positions.device)[:, None]


def slot_mapping(
    kv: PagedKV, block_tables: torch.Tensor, slots: torch.Tensor | int, positions: torch.Tensor
) -> torch.Tensor:
    """Return the indices of tokens in the caches seen as [num_blocks * block_size, K, Dh]: int64."""
    blocks = block_tables[slots, positions // kv.block_size].to(torch.int64)
    return blocks * kv.block_size + positions % kv.block_size


def gather(cache: torch.Tensor, indices: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return [*indices.shape, Dh], the vectors at `indices` of the cache seen as [tokens * K, Dh].

    `out` is memory for the result.
    """
    flat = cache.view(-1, cache.shape[-1])
    if out is None:
        return flat.index_select(0, indices.view(-1)).view(*indices.shape, -1)
    return torch.index_select(flat, 0, indices.view(-1), out=out).view(*indices.shape, -1)


def gather_kv(kv: PagedKV, indices: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [*indices.shape, Dh] at `cache_indices`; those in FP8 are dequantized to `dtype`."""
    if kv.scales is None:
        return gather(kv.k_cache, indices), gather(kv.v_cache, indices)
    tokens = indices // kv.kv_heads
    heads = indices % kv.kv_heads
    scales = kv.scales[tokens // kv.block_size, heads, tokens % kv.block_size]
    # torch gathers bytes, but not FP8.
    k, v = (gather(cache.view(torch.uint8), indices).view(cache.dtype) for cache in (kv.k_cache, kv.v_cache))
    return dequantize_kv(k, scales[..., 0]).to(dtype), dequantize_kv(v, scales[..., 1]).to(dtype)


# -- decode ------------------------------------------------------------------------------------------------------------


class DecodeGatherPlan(NamedTuple):
    """Locations of the KV of decode sequences: the part of `attend_gathered` that all layers share.

    Attributes:
        indices: [B * K, 1, L], the `cache_indices` of the tokens that the sequences see.
        mask: [B * K, 1, 1, L], 0 where there is such a token, else -inf; None if all sequences see L tokens.
    """

    indices: torch.Tensor
    mask: torch.Tensor | None


def plan_decode_gather(rows: PagedRows, kv: PagedKV, dtype: torch.dtype) -> DecodeGatherPlan:
    """Return the plan for `rows` and caches of the sizes and window of `kv`. Synchronizes with the device.

    Args:
        dtype: of the queries, and so of the mask.
    """
    slots = rows.slots.to(torch.int64)[:, None]  # [B, 1]
    contexts = rows.context_lens.to(torch.int64)[:, None]  # [B, 1]
    lens = contexts.clamp(max=kv.window) if kv.window else contexts
    offsets = torch.arange(int(lens.max()), device=slots.device)[None]  # [1, L]
    seen = offsets < lens
    # Repeat the last token past the context: the cache may hold NaN there, which a weight of 0 does not hide.
    positions = contexts - lens + torch.minimum(offsets, lens - 1)  # [B, L]
    indices = cache_indices(kv, rows.block_tables, slots, positions).flatten(0, 1)[:, None]
    if bool(seen.all()):
        return DecodeGatherPlan(indices, None)
    mask = torch.zeros(seen.shape, dtype=dtype, device=slots.device).masked_fill_(~seen, float("-inf"))
    return DecodeGatherPlan(indices, mask.repeat_interleave(kv.kv_heads, 0)[:, None, None, :])


# Sequences are gathered in groups. Another group takes the time of about this many gathered tokens.
_GROUP_TOKENS = 512
# A group of several sequences gathers at most this much of K, and as much of V.
_GATHERED_BYTES = 4 << 20


def group_by_length(rows: PagedRows, kv: PagedKV) -> list[torch.Tensor]:
    """Return which of `rows` to gather together: rows of similar lengths, because a group is padded to its longest.

    So one long sequence does not make all others long, and the memory does not grow with the number of sequences.
    """
    lens = rows.context_lens.clamp(max=kv.window) if kv.window else rows.context_lens
    lens, order = lens.sort(descending=True)
    max_tokens = _GATHERED_BYTES // (kv.kv_heads * kv.head_dim * kv.k_cache.itemsize)
    # the groups so far, and the most tokens of a sequence in the last one
    sizes = []
    longest = 0
    for i, length in enumerate(lens.tolist()):
        # All sequences from here on are at most as long.
        saved = (longest - length) * (len(lens) - i)
        if not sizes or (4 * length < 3 * longest and saved > _GROUP_TOKENS) or (sizes[-1] + 1) * longest > max_tokens:
            sizes.append(0)
            longest = length
        sizes[-1] += 1
    return list(order.split(sizes))


class DecodeRun(NamedTuple):
    """The tokens that one sequence sees, side by side in the cache."""

    start: int
    num_tokens: int


def find_run(rows: PagedRows, kv: PagedKV) -> DecodeRun | None:
    """Return the tokens that attention need not gather; None unless there is one sequence in blocks side by side."""
    if len(rows) > 1 or kv.is_fp8:
        return None
    context_len = int(rows.context_lens)
    first = max(0, context_len - kv.window) if kv.window else 0
    blocks = rows.block_tables[int(rows.slots), first // kv.block_size : ceil_div(context_len, kv.block_size)]
    if (blocks.diff() != 1).any():
        return None
    return DecodeRun(int(blocks[0]) * kv.block_size + first % kv.block_size, context_len - first)


def attend_gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return attention of q [B, H, Dh] over gathered k and v [B * K, 1, L, Dh], as [B, H, Dh].

    The query heads of a KV head take the role of query positions, so that K and V need not be repeated. KV heads take
    the role of sequences, so that the output is contiguous.
    """
    grouped = q.reshape(len(k), 1, -1, q.shape[2])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


def decode_attention_torch(q: torch.Tensor, kv: PagedKV, rows: PagedRows, scale: float) -> torch.Tensor:
    """Return attention of one query per sequence over its paged KV, which includes the query's own K and V.

    Gathers the KV of each sequence. Synchronizes with the device.

    Args:
        q: [B, H, Dh], heads contiguous; H is a multiple of K.
        kv: the layer's caches. With a window, only the newest tokens of a sequence are seen.
        rows: the B sequences.
        scale: factor of the scores, positive.

    Returns:
        [B, H, Dh] in q's dtype.
    """
    kv.check_queries(q)
    if len(q) == 0:
        return torch.empty_like(q)
    plan = plan_decode_gather(rows, kv, q.dtype)
    return attend_gathered(q, *gather_kv(kv, plan.indices, q.dtype), plan.mask, scale)


def plan_decode_torch(context_lens: torch.Tensor, kv_heads: int, policy: SplitPolicy) -> DecodePlan:
    """Split long sequences into equal splits of about a share, the longest first. Synchronizes with the device.

    A sequence of n shares has at most n + 1/2 splits, so the plan has at most `policy.programs` / `kv_heads` more items
    than sequences.

    Args:
        context_lens: [B] int32, at least 1.
    """
    lens = context_lens.to(torch.int64)
    total = int(lens.sum()) * kv_heads
    share = max(policy.min_tokens, (total + policy.programs - 1) // policy.programs)
    is_long = lens * 2 * policy.programs > policy.whole * total
    splits = torch.where(is_long, (lens + share // 2) // share, 1).clamp(1, policy.num_splits)
    tokens = (lens + splits - 1) // splits
    order = tokens.argsort(descending=True, stable=True)
    splits = splits[order]
    first = (splits.cumsum(0) - splits).repeat_interleave(splits)
    sequences = order.repeat_interleave(splits)
    index = torch.arange(len(sequences), device=lens.device) - first
    num_items = len(lens) + policy.programs // kv_heads
    items = torch.full((num_items, 3), -1, dtype=torch.int32, device=lens.device)
    items[: len(sequences)] = torch.stack([sequences, index, splits.repeat_interleave(splits)], 1)
    return DecodePlan(items, policy.num_splits)


def shared_attention_torch(
    q: torch.Tensor, kv: PagedKV, rows: PagedRows, prefix_lens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention of q [B, H, Dh] over the first `prefix_lens` [B] tokens, and its log-sum-exp (base 2).

    Both are float32, [B, H, Dh] and [B, H]. A sequence without a prefix gets 0 and -inf. Synchronizes with the device.
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), device=q.device)
    for i in prefix_lens.nonzero()[:, 0].tolist():
        positions = torch.arange(int(prefix_lens[i]), device=q.device)
        indices = cache_indices(kv, rows.block_tables, rows.slots[i].to(torch.int64), positions)
        k, v = (x.float() for x in gather_kv(kv, indices, torch.float32))  # [K, L, Dh]
        scores = q[i].float().view(len(k), -1, q.shape[2]) @ k.mT * scale  # [K, H / K, L]
        out[i] = (scores.softmax(-1) @ v).view(q.shape[1:])
        lse[i] = scores.logsumexp(-1).view(-1) / torch.log(torch.tensor(2.0))
    return out, lse


# -- prefill -----------------------------------------------------------------------------------------------------------

_MASKED_QUERIES = 1024  # that attend at once, which bounds the memory of their mask


class PrefillGatherPlan(NamedTuple):
    """Locations of the KV that queries of one prefill sequence see: the part of `attend_sequence` that layers share.

    Attributes:
        start, end: the queries in the packed queries.
        indices: [K, L], the `cache_indices` of the tokens that the queries see.
        mask: [end - start, L], 0 where a query sees a position, else -inf; None if plain causal attention applies,
            because nothing is cached before the queries and no window hides any of them.
    """

    start: int
    end: int
    indices: torch.Tensor
    mask: torch.Tensor | None


def plan_prefill_gather(
    rows: PagedRows, cu_seqlens_q: torch.Tensor, kv: PagedKV, dtype: torch.dtype
) -> list[PrefillGatherPlan]:
    """Return the plans of those `rows` that have queries, for caches like `kv`. Synchronizes.

    At most _MASKED_QUERIES queries share a plan with a mask.

    Args:
        cu_seqlens_q: as in `prefill_attention_torch`.
        dtype: of the queries, and so of the masks.
    """
    bounds = (cu_seqlens_q - cu_seqlens_q[0]).tolist()
    slots = rows.slots.tolist()
    lens = rows.context_lens.tolist()
    device = rows.slots.device
    plain = []
    masked = []
    for slot, length, (start, end) in zip(slots, lens, pairwise(bounds), strict=True):
        is_plain = length == end - start and not 0 < kv.window < length
        step = max(length, 1) if is_plain else _MASKED_QUERIES
        for first, last in pairwise([*range(start, end, step), end]):
            context = length - (end - last)
            begin = max(0, context - (last - first) + 1 - kv.window) if kv.window else 0
            indices = cache_indices(kv, rows.block_tables, slot, torch.arange(begin, context, device=device))
            (plain if is_plain else masked).append(PrefillGatherPlan(first, last, indices, None))
    # The tokens of the longest plan with so many queries.
    num_tokens: dict[int, int] = {}
    for plan in masked:
        num_queries = plan.end - plan.start
        num_tokens[num_queries] = max(num_tokens.get(num_queries, 0), plan.indices.shape[1])
    masks = {queries: _causal_mask(queries, tokens, kv.window, dtype, device) for queries, tokens in num_tokens.items()}
    for i, plan in enumerate(masked):
        mask = masks[plan.end - plan.start][:, -plan.indices.shape[1] :]
        # On a GPU, attention may need aligned rows, which a slice does not have.
        masked[i] = plan._replace(mask=mask if device.type == "cpu" else mask.contiguous())
    return plain + masked


def _causal_mask(
    num_queries: int, num_tokens: int, window: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return the mask [num_queries, num_tokens] of the last tokens as queries.

    Its last L columns are the mask for L tokens, so that plans with as many queries share one.
    """
    positions = torch.arange(num_tokens, device=device)
    queries = torch.arange(num_tokens - num_queries, num_tokens, device=device)[:, None]
    hidden = positions > queries
    if window:
        hidden |= positions <= queries - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def attend_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return causal attention of one sequence's q [N, H, Dh] over gathered k and v [K, L, Dh], as [N, H, Dh]."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[0],
    )
    return out[0].transpose(0, 1)


def prefill_attention_torch(
    q: torch.Tensor, kv: PagedKV, rows: PagedRows, cu_seqlens_q: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return causal attention of each sequence's newest tokens over its paged KV, which includes theirs.

    Works sequence by sequence and synchronizes with the device. Query i of n is at position context_len - n + i and
    sees all positions up to its own, or as many as the window of `kv` shows.

    Args:
        q: [T, H, Dh], the sequences' tokens packed one after the other, heads contiguous.
        kv, scale: as in `decode_attention_torch`.
        rows: the P sequences; their context includes their queries.
        cu_seqlens_q: [P + 1] int32, where each sequence starts and the last one ends; q[0] is at the first entry.
            Sequences may have no query.

    Returns:
        [T, H, Dh] in q's dtype.
    """
    kv.check_queries(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for plan in plan_prefill_gather(rows, cu_seqlens_q, kv, q.dtype):
        k, v = gather_kv(kv, plan.indices, q.dtype)
        out[plan.start : plan.end] = attend_sequence(q[plan.start : plan.end], k, v, plan.mask, scale)
    return out


# -- RoPE and decode ---------------------------------------------------------------------------------------------------


def rope_decode_torch(
    qkv: torch.Tensor, transform: QKTransform, kv: PagedKV, rows: PagedRows, scale: float
) -> torch.Tensor:
    """Apply `qk_norm_rope_store`, then decode attention, to sequences whose new token is the last of their context.

    Args:
        qkv: [B, (H + 2 K) Dh], the values of a token contiguous.
        kv: the layer's caches; the new keys and values are written.
        rows, scale: as in `decode_attention_torch`; the context includes the new token.

    Returns:
        [B, H, Dh] in qkv's dtype.
    """
    positions = rows.context_lens.to(torch.int64) - 1
    written = slot_mapping(kv, rows.block_tables, rows.slots.to(torch.int64), positions)
    q = qk_norm_rope_store_torch(qkv, transform, positions, written, kv)
    return decode_attention_torch(q, kv, rows, scale)
