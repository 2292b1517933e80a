"""Decode attention over what the rows of a batch have in common, once for many rows.

Rows whose block tables begin with the same blocks form a group (Hydragen, arXiv:2402.05099; cascade inference in
FlashInfer). All queries of a group and KV head are one tile, as in prefill, so the shared keys and values are read once
for the group, and arithmetic is done by whole matrix tiles. The partial results are merged with those over each row's
own tokens by `decode_attention_triton`.
"""

from typing import NamedTuple

import numpy as np
import torch

from nanovllm.ops.attention.decode_attention import (
    LOG2E,
    attention_constants,
    empty_softmax,
    new_partials,
)
from nanovllm.ops.attention.prefill_attention import attend_tiles, default_prefill_config
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs

MIN_SEQUENCES = 4  # rows of a group
MIN_TOKENS = 256  # shared tokens of a group
MIN_SAVED = 16384  # tokens that a step must not read again; below, the launch costs more than it gains
STEP = 128  # shared tokens are a multiple of this, which every kernel's tile divides
MAX_SHARED_PARTS = 16  # most programs that share the work of a group and KV head
TILE_QUERIES = 64  # queries (rows x heads of a KV head) that a group has at most


class SharedPrefixPlan(NamedTuple):
    """Which rows share what, int32 arrays or tensors.

    Args:
        rows: [B, 2], each row's shared tokens and the number of their partial results; zeros where there are none.
        groups: [B // MIN_SEQUENCES, 4]: first row, rows, shared tokens, partial results; zeros past the last group.
    """

    rows: torch.Tensor
    groups: torch.Tensor

    @staticmethod
    def size(batch: int) -> int:
        """Numbers in both."""
        return 2 * batch + batch // MIN_SEQUENCES * 4

    @classmethod
    def split(cls, packed, batch: int) -> "SharedPrefixPlan":
        """Views of the two in one array or tensor that holds them one after the other."""
        return cls(packed[: 2 * batch].reshape(-1, 2), packed[2 * batch :].reshape(-1, 4))


class SharedPrefixPartials(NamedTuple):
    """Partial results that `decode_attention_triton` merges with its own, and room for these.

    Args:
        rows: of the SharedPrefixPlan.
        partial, lse: [B, H, P, Dh] and [B, H, P] float32; each row's shared parts come first.
    """

    rows: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor


def plan_shared_prefixes(
    tables: np.ndarray, no_block: int, block_size: int, group: int, kv_heads: int, sm_count: int, size: int
) -> np.ndarray | None:
    """The SharedPrefixPlan of a batch of `size` rows in one array, or None if it would not gain.

    Args:
        tables: [B, W] block ids of the first B rows. Rows that share neighbour each other, as they do when they came
            together.
        no_block: the id that stands for none.
        group: query heads of a KV head.
    """
    equal = (tables[1:] == tables[:-1]) & (tables[1:] != no_block)
    common = np.where(equal.all(1), equal.shape[1], equal.argmin(1)) * block_size // STEP * STEP  # of rows i and i + 1
    if common.sum() < MIN_SAVED:
        return None
    most, row, groups = max(1, TILE_QUERIES // group), 0, []
    while row < len(common):
        tokens, last = common[row], row  # rows up to `last` have `tokens` in common
        while tokens >= MIN_TOKENS and last < len(common) and last + 1 - row < most and common[last] >= tokens:
            last += 1
        if last + 1 - row >= MIN_SEQUENCES:
            groups.append((row, last + 1 - row, tokens))
        row = last + 1
    if sum((rows - 1) * tokens for _, rows, tokens in groups) < MIN_SAVED:
        return None
    packed = np.zeros(SharedPrefixPlan.size(size), dtype=np.int32)
    plan = SharedPrefixPlan.split(packed, size)
    wanted = min(MAX_SHARED_PARTS, -(-4 * sm_count // (len(groups) * kv_heads)))
    for i, (row, rows, tokens) in enumerate(groups):
        steps = -(-tokens // STEP // wanted)
        parts = -(-tokens // (steps * STEP))
        plan.groups[i] = row, rows, tokens, parts
        plan.rows[row : row + rows] = tokens, parts
    return packed


@triton.jit(do_not_specialize=["slots_ptr", "groups_ptr", "part_stride"])
def _shared_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    slots_ptr,
    groups_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2e,
    q_row_stride,
    q_head_stride,
    table_stride,
    part_stride,
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
    part = tl.program_id(2)
    num_parts = tl.load(groups_ptr + 3)
    if part >= num_parts:
        return
    first_row = tl.load(groups_ptr)
    num_rows = tl.load(groups_ptr + 1)
    shared_len = tl.load(groups_ptr + 2)

    m = tl.arange(0, BLOCK_M)
    rows = (first_row + m // GROUP).to(tl.int64)
    heads = kv_head * GROUP + m % GROUP
    dims = tl.arange(0, HEAD_PAD)
    row_mask = m // GROUP < num_rows
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = rows * q_row_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=mask, other=0.0)

    table_ptr = tables_ptr + tl.load(slots_ptr + first_row).to(tl.int64) * table_stride
    part_tiles = tl.cdiv(shared_len // STEP, num_parts) * (STEP // BLOCK_N)
    first_tile = part * part_tiles
    last_tile = tl.minimum(first_tile + part_tiles, shared_len // BLOCK_N)
    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    q_tile, cache = (q, m, scale_log2e), (k_ptr, v_ptr, table_ptr, shared_len, kv_head)
    softmax = empty_softmax(BLOCK_M, HEAD_PAD)
    running_max, running_sum, acc = attend_tiles(
        softmax, q_tile, cache, first_tile, last_tile, False, HEAD_DIM, TOKEN_STRIDE, BLOCK_SIZE, BLOCK_N, False
    )
    places = (rows * (KV_HEADS * GROUP) + heads) * part_stride + part
    tl.store(partial_ptr + places[:, None] * HEAD_DIM + dims[None, :], acc / running_sum[:, None], mask=mask)
    tl.store(lse_ptr + places, running_max + tl.log2(running_sum), mask=row_mask)


def shared_attention_triton(
    q, k_cache, v_cache, block_tables, slots, scale: float, plan: SharedPrefixPlan, num_own: int
) -> SharedPrefixPartials:
    """Attention of decode rows over the tokens that they share, for `decode_attention_triton` to go on from.

    Args:
        q, k_cache, v_cache, block_tables, slots, scale: as in `decode_attention_torch`.
        plan: from `plan_shared_prefixes`, on the device.
        num_own: most parts of what a row does not share: the DecodePlan's `num_splits`.
    """
    _, heads, head_dim = q.shape
    kv_heads, config = k_cache.shape[2], default_prefill_config(head_dim, q.element_size())
    partial, lse = new_partials(q, MAX_SHARED_PARTS + num_own)
    tensors = q, k_cache, v_cache, block_tables, slots, plan.groups, partial, lse
    strides = q.stride(0), q.stride(1), block_tables.stride(0)
    _shared_kernel[(kv_heads, len(plan.groups), MAX_SHARED_PARTS)](
        *tensors,
        scale * LOG2E,
        *strides,
        lse.shape[2],
        BLOCK_M=max(TILE_QUERIES, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_N=config.block_n,
        STEP=STEP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **attention_constants(q, k_cache),
        **launch_options(q.device),
    )
    return SharedPrefixPartials(plan.rows, partial, lse)
