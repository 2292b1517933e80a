"""Decode attention over prefixes that sequences share: once for many sequences.

Sequences whose block tables start with the same blocks form a group (Hydragen, arXiv:2402.05099; cascade inference in
FlashInfer). All queries of a group and KV head are one tile, as in prefill, so the shared K and V are read once per
group and full matrix tiles do the arithmetic. `decode_attention_triton` merges the partial results with those over each
sequence's own tokens. Layers with a window do not use shared prefixes: the window hides them from most queries.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from nanovllm.ops.attention.decode_attention import PrefixPartials
from nanovllm.ops.attention.fp8_cache import query_operand
from nanovllm.ops.attention.online_softmax import empty_partials, init_softmax
from nanovllm.ops.attention.paged_cache import LOG2E, PagedKV, PagedRows, attention_constants
from nanovllm.ops.attention.prefill_attention import attend_tiles, default_prefill_config
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs

MIN_SEQUENCES = 4  # in a group
MIN_TOKENS = 256  # shared tokens of a group
MIN_SAVED = 16384  # tokens that a step need not read again; with fewer, the launch costs more than it gains
_TABLE_PART = 64  # columns of the block tables that are compared first; each further part is twice as wide
STEP = 128  # shared tokens are a multiple of this, which is a multiple of every kernel's tile
MAX_PREFIX_SPLITS = 16  # most programs that split the work of a group and KV head
TILE_QUERIES = 64  # most queries (sequences x heads of a KV head) of a group


class SharedPrefixPlan(NamedTuple):
    """Sequences that share a prefix, as int32 arrays or tensors.

    Args:
        sequences: [B, 2], each sequence's shared tokens and the number of their partial results; zeros without any.
        groups: [B // MIN_SEQUENCES, 4]: first sequence, number of sequences, shared tokens, partial results; unused
            entries are zeros.
    """

    sequences: Any
    groups: Any

    @staticmethod
    def size(batch: int) -> int:
        """Return the number of values in both arrays."""
        return 2 * batch + batch // MIN_SEQUENCES * 4

    @classmethod
    def split(cls, packed: Any, batch: int) -> "SharedPrefixPlan":
        """Return views of the two arrays in one array or tensor that holds them one after the other."""
        return cls(packed[: 2 * batch].reshape(-1, 2), packed[2 * batch :].reshape(-1, 4))


def plan_shared_prefixes(
    tables: np.ndarray,
    slots: list[int],
    no_block: int,
    block_size: int,
    group: int,
    kv_heads: int,
    sm_count: int,
    size: int,
) -> np.ndarray | None:
    """Return the SharedPrefixPlan of a batch in one array, or None if it would not pay off.

    Args:
        tables: [S, W] block ids of each slot.
        slots: slots of the B sequences. Sequences that share a prefix must be neighbors; they are if they arrived
            together.
        no_block: the id that marks an empty entry.
        group: query heads per KV head.
        size: sequences that the plan has room for, at least B.
    """
    shared_tokens = _num_shared_blocks(tables, slots, no_block) * block_size // STEP * STEP
    groups = _find_groups(shared_tokens, max_sequences=max(1, TILE_QUERIES // group))
    if sum((count - 1) * tokens for _, count, tokens in groups) < MIN_SAVED:
        return None
    packed = np.zeros(SharedPrefixPlan.size(size), dtype=np.int32)
    plan = SharedPrefixPlan.split(packed, size)
    wanted = min(MAX_PREFIX_SPLITS, triton.cdiv(4 * sm_count, len(groups) * kv_heads))
    for i, (first, count, tokens) in enumerate(groups):
        steps = triton.cdiv(tokens // STEP, wanted)
        splits = triton.cdiv(tokens, steps * STEP)
        plan.groups[i] = first, count, tokens, splits
        plan.sequences[first : first + count] = tokens, splits
    return packed


def _num_shared_blocks(tables: np.ndarray, slots: list[int], no_block: int) -> np.ndarray:
    """Return [B - 1], how many of its first blocks each sequence shares with the next one.

    The tables are read in parts, because wide ones are mostly empty.
    """
    rows = np.array(slots, dtype=np.int64)
    shared = np.zeros(len(rows) - 1, dtype=np.int64)
    pairs = np.arange(len(shared))  # those that share all blocks so far
    start = 0
    size = _TABLE_PART
    while len(pairs) and start < tables.shape[1]:
        part = tables[:, start : start + size]
        if len(pairs) == len(shared):  # then each sequence is read once, although it is in two pairs
            blocks = part[rows]
            first, second = blocks[:-1], blocks[1:]
        else:
            first, second = part[rows[pairs]], part[rows[pairs + 1]]
        equal = (first == second) & (second != no_block)
        is_whole = equal.all(1)
        # `argmin` is the first block that differs.
        shared[pairs] += np.where(is_whole, equal.shape[1], equal.argmin(1))
        pairs = pairs[is_whole]
        start += size
        size *= 2
    return shared


def _find_groups(shared_tokens: np.ndarray, max_sequences: int) -> list[tuple[int, int, int]]:
    """Return (first sequence, number of sequences, shared tokens) of each group of neighbors.

    Args:
        shared_tokens: [B - 1], tokens that sequences i and i + 1 share.
    """
    if shared_tokens.sum() < MIN_SAVED:
        return []
    groups = []
    first = 0
    while first < len(shared_tokens):
        # The sequences from `first` to `last` share their first `tokens` tokens.
        tokens = int(shared_tokens[first])
        last = first
        if tokens >= MIN_TOKENS:
            while last < len(shared_tokens) and last + 1 - first < max_sequences and shared_tokens[last] >= tokens:
                last += 1
        if last + 1 - first >= MIN_SEQUENCES:
            groups.append((first, last + 1 - first, tokens))
        first = last + 1
    return groups


@triton.jit(do_not_specialize=["slots_ptr", "groups_ptr", "split_stride"])
def _shared_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scales_ptr,
    tables_ptr,
    slots_ptr,
    groups_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2e,
    q_seq_stride,
    q_head_stride,
    table_stride,
    split_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    kv_head = tl.program_id(0)
    groups_ptr += 4 * tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.load(groups_ptr + 3)
    if split >= num_splits:
        return
    first_seq = tl.load(groups_ptr)
    num_seqs = tl.load(groups_ptr + 1)
    prefix_len = tl.load(groups_ptr + 2)

    m = tl.arange(0, BLOCK_M)
    seqs = (first_seq + m // GROUP).to(tl.int64)
    heads = kv_head * GROUP + m % GROUP
    dims = tl.arange(0, HEAD_PAD)
    row_mask = m // GROUP < num_seqs
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = seqs * q_seq_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    q = query_operand(q, scales_ptr)

    table_ptr = tables_ptr + tl.load(slots_ptr + first_seq).to(tl.int64) * table_stride
    split_tiles = tl.cdiv(prefix_len // STEP, num_splits) * (STEP // BLOCK_N)
    first_tile = split * split_tiles
    last_tile = tl.minimum(first_tile + split_tiles, prefix_len // BLOCK_N)
    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    q_tile = (q, m, scale_log2e)
    cache = (k_ptr, v_ptr, scales_ptr, table_ptr, prefix_len, kv_head)
    softmax = init_softmax(BLOCK_M, HEAD_PAD)
    running_max, running_sum, acc = attend_tiles(
        softmax, q_tile, cache, first_tile, last_tile, False, 0, HEAD_DIM, TOKEN_STRIDE, BLOCK_SIZE, BLOCK_N, False
    )
    indices = (seqs * (KV_HEADS * GROUP) + heads) * split_stride + split
    tl.store(partial_ptr + indices[:, None] * HEAD_DIM + dims[None, :], acc / running_sum[:, None], mask=mask)
    tl.store(lse_ptr + indices, running_max + tl.log2(running_sum), mask=row_mask)


def shared_attention_triton(
    q: torch.Tensor, kv: PagedKV, rows: PagedRows, scale: float, plan: SharedPrefixPlan, num_splits: int
) -> PrefixPartials:
    """Attend to shared prefixes (`shared_attention_torch`); `decode_attention_triton` continues from the result.

    Args:
        q, kv, rows, scale: as in `decode_attention_torch`; `kv` has no window.
        plan: from `plan_shared_prefixes`, on the device.
        num_splits: the most splits of a sequence's own tokens: `num_splits` of the DecodePlan.
    """
    heads = q.shape[1]
    config = default_prefill_config(kv.head_dim, q.element_size())
    partial, lse = empty_partials(q, MAX_PREFIX_SPLITS + num_splits)
    _shared_kernel[(kv.kv_heads, len(plan.groups), MAX_PREFIX_SPLITS)](
        q,
        kv.k_cache,
        kv.v_cache,
        kv.scales,
        rows.block_tables,
        rows.slots,
        plan.groups,
        partial,
        lse,
        scale * LOG2E,
        q.stride(0),
        q.stride(1),
        rows.block_tables.stride(0),
        lse.shape[2],
        BLOCK_M=max(TILE_QUERIES, triton.next_power_of_2(heads // kv.kv_heads)),
        BLOCK_N=config.block_n,
        STEP=STEP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **attention_constants(heads, kv),
        **launch_options(q.device),
    )
    return PrefixPartials(plan.sequences, partial, lse)
