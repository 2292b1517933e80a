"""What the programs of decode attention do in a step: planned once for all layers, on the device.

A captured graph is then valid for any lengths. Rows are split that would keep a multiprocessor busy after the others
end. The longest parts come first, so that short ones fill what those leave at the end.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.triton_utils import tl, triton

MAX_SPLITS = 128
MANY_PROGRAMS_PER_SM = 6  # programs for each multiprocessor: of so many, more run at a time, each of them slower
MIN_SPLIT_TOKENS = 256  # tokens; of fewer, a program's start and the merge of its part take longer than they save


class SplitPolicy(NamedTuple):
    """How the work of decode attention is shared by multiprocessors.

    Args:
        programs: how many shares there are.
        whole: rows of up to so many halves of a share are not split.
        num_splits: most parts of a row, which decides how much room their results need.
        min_part: tokens of a share, at least.
    """

    programs: int
    whole: int
    num_splits: int
    min_part: int = MIN_SPLIT_TOKENS


def default_split_policy(batch: int, kv_heads: int, sm_count: int) -> SplitPolicy:
    """From sweeps on an H100: of rows of one length, of the offline workload's, of a few long ones among short ones.

    Of fewer rows and heads than multiprocessors, each of these gets a part. Of more, a row is split if it is longer
    than 1.5 times what a multiprocessor has to do, into parts of half of that; 0.75 times if its programs are many,
    which no sweep of long rows had. Few are so long, and hardly one 8 or 4 parts.
    """
    programs = batch * kv_heads
    if programs < sm_count:
        most = max(8, 4 * sm_count // programs)  # four times the parts that rows of one length have
        return SplitPolicy(sm_count, 3, min(MAX_SPLITS, 1 + sm_count // kv_heads, most))
    whole, num_splits = (3, 4) if programs >= MANY_PROGRAMS_PER_SM * sm_count else (6, 8)
    return SplitPolicy(2 * sm_count, whole, min(num_splits, 1 + 2 * sm_count // kv_heads))


class DecodePlan(NamedTuple):
    """What the programs of `decode_attention_triton` do, for each KV head, in the order in which they begin.

    Args:
        items: [I, 3] int32: row, number of the part, parts of that row; row -1 where there is none.
        num_splits: most parts of a row.
    """

    items: torch.Tensor
    num_splits: int


@triton.jit
def _split(lens, total, programs, whole, num_splits, min_part):
    """In how many parts rows of `lens` tokens are split, and the tokens of each."""
    share = tl.maximum(tl.cdiv(total, programs), min_part)
    parts = tl.where(lens * 2 * programs > whole * total, (lens + share // 2) // share, 1)
    parts = tl.maximum(tl.minimum(parts, num_splits), 1).to(tl.int32)
    return parts, tl.cdiv(lens, parts)


@triton.jit(do_not_specialize=["lens_ptr", "rows", "num_items", "programs", "whole", "num_splits", "min_part"])
def _plan_kernel(
    lens_ptr,
    plan_ptr,
    rows,
    num_items,
    programs,
    whole,
    num_splits,
    min_part,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # No `wait_for_inputs`: this comes before the chain, whose kernels read what is written here before they wait.
    other = tl.arange(0, ROWS)
    their_len = tl.load(lens_ptr + other, mask=other < rows, other=0).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own_len = tl.load(lens_ptr + row, mask=row < rows, other=0).to(tl.int64)
    total = tl.sum(their_len, 0) * KV_HEADS
    their_parts, their_size = _split(their_len, total, programs, whole, num_splits, min_part)
    parts, size = _split(own_len, total, programs, whole, num_splits, min_part)
    their_parts = tl.where(other < rows, their_parts, 0)
    # A row's first part comes after those of rows with longer ones.
    equal = (their_size[None, :] == size[:, None]) & (other[None, :] < row[:, None])
    before = (their_size[None, :] > size[:, None]) | equal
    first = tl.sum(tl.where(before, their_parts[None, :], 0), 1)
    for part in range(0, tl.max(parts, 0)):
        mask = (part < parts) & (row < rows)
        place = plan_ptr + 3 * (first + part)
        tl.store(place, row, mask=mask)
        tl.store(place + 1, tl.full([BLOCK], part, tl.int32), mask=mask)
        tl.store(place + 2, parts, mask=mask)
    if tl.program_id(0) == 0:
        for start in range(tl.sum(their_parts, 0), num_items, ROWS):
            tl.store(plan_ptr + 3 * (start + other), tl.full([ROWS], -1, tl.int32), mask=start + other < num_items)


def plan_decode_triton(context_lens: torch.Tensor, kv_heads: int, shares: SplitPolicy) -> DecodePlan:
    """`plan_decode_torch` as a Triton kernel, which does not wait for the device.

    Raises:
        ValueError: `num_splits` is out of range.
        ImportError: Triton is not installed.
    """
    rows = len(context_lens)
    if not 1 <= shares.num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits={shares.num_splits} must be between 1 and {MAX_SPLITS}")
    items = torch.empty((rows + shares.programs // kv_heads, 3), dtype=torch.int32, device=context_lens.device)
    width = max(512, triton.next_power_of_2(rows))
    block = max(1, 4096 // width)
    _plan_kernel[(triton.cdiv(rows, block),)](
        context_lens,
        items,
        rows,
        len(items),
        *shares,
        KV_HEADS=kv_heads,
        ROWS=width,
        BLOCK=block,
        num_warps=min(32, max(4, width // 1024)),
    )
    return DecodePlan(items, shares.num_splits)


def plan_decode_torch(context_lens: torch.Tensor, kv_heads: int, shares: SplitPolicy) -> DecodePlan:
    """Split long rows into equal parts of about a share; the longest parts come first. Synchronises with the device.

    A row of n shares has at most n + 1/2 parts, so there are at most `shares.programs` / `kv_heads` more than rows.

    Args:
        context_lens: [B] int32, at least 1.
    """
    lens = context_lens.to(torch.int64)
    programs, whole, num_splits, min_part = shares
    total = int(lens.sum()) * kv_heads
    share = max(min_part, -(-total // programs))
    parts = torch.where(lens * 2 * programs > whole * total, (lens + share // 2) // share, 1).clamp(1, num_splits)
    order = (-(-lens // parts)).argsort(descending=True, stable=True)
    parts = parts[order]
    first = (parts.cumsum(0) - parts).repeat_interleave(parts)
    rows = order.repeat_interleave(parts)
    number = torch.arange(len(rows), device=rows.device) - first
    items = torch.full((len(lens) + programs // kv_heads, 3), -1, dtype=torch.int32, device=lens.device)
    items[: len(rows)] = torch.stack([rows, number, parts.repeat_interleave(parts)], 1)
    return DecodePlan(items, num_splits)
