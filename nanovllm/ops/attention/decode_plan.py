"""Plan how decode attention splits its sequences: once per step for all layers, on the device. Choose its tiles.

Because the plan is made on the device, a captured graph is valid for any context lengths. A sequence is split if it
would keep an SM busy after the others have finished. The longest splits start first, so that short ones fill the gaps
at the end.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.attention.paged_cache import MIN_DOT
from nanovllm.ops.triton_utils import HOPPER_SHARED_MEMORY, tl, triton

MAX_SPLITS = 128
MANY_PROGRAMS_PER_SM = 6  # from here on, more programs run on an SM at a time, each of them slower
MIN_SPLIT_TOKENS = 256  # shorter splits lose more to a program's start and the merge than they gain


class SplitPolicy(NamedTuple):
    """How decode attention divides its work. A *share* is the total number of tokens to read, over `programs`.

    Args:
        programs: number of shares.
        whole: sequences of up to `whole` / 2 shares are not split.
        num_splits: most splits of a sequence; determines the memory for partial results.
        min_tokens: least number of tokens in a share.
    """

    programs: int
    whole: int
    num_splits: int
    min_tokens: int = MIN_SPLIT_TOKENS


def default_split_policy(batch: int, kv_heads: int, sm_count: int, is_fp8: bool = False) -> SplitPolicy:
    """Return the split policy for a batch.

    The numbers come from sweeps on an H100 over batches of equal lengths, of the offline workload's lengths, and of a
    few long sequences among short ones. The cases depend on the number of (sequence, KV head) pairs:

    - Fewer pairs than SMs: every SM gets a split.
    - More: only sequences longer than 1.5 times the work of an SM are split, into splits of half that work.
    - At least MANY_PROGRAMS_PER_SM pairs per SM: the same from 0.75 times. No sweep of long sequences had so many.

    So few sequences are split, and hardly any reaches the limit of 8 splits, or of 4 in the last case.

    For a cache in FP8, there are four times as many programs: with WORDS_CONFIG they have two warps and few loads each.
    """
    if is_fp8:
        sm_count *= 4
    pairs = batch * kv_heads
    if pairs < sm_count:
        most = max(8, 4 * sm_count // pairs)  # four times the splits of sequences of equal length
        return SplitPolicy(sm_count, whole=3, num_splits=min(MAX_SPLITS, 1 + sm_count // kv_heads, most))
    most = 1 + 2 * sm_count // kv_heads
    if pairs >= MANY_PROGRAMS_PER_SM * sm_count:
        return SplitPolicy(2 * sm_count, whole=3, num_splits=min(4, most))
    return SplitPolicy(2 * sm_count, whole=6, num_splits=min(8, most))


class DecodeConfig(NamedTuple):
    """Compile-time settings of the decode kernel.

    Attributes:
        tile: tokens per loop iteration.
        num_warps, num_stages: warps and pipeline stages.
    """

    tile: int
    num_warps: int
    num_stages: int


def default_decode_config(
    batch: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    sm_count: int,
    prefix: bool = False,
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> DecodeConfig:
    """Return the settings that sweeps chose on an H100 and an H200; with `prefix`, the prefix workload of bench.py.

    A program needs (stages - 1) * tile * head_dim * itemsize bytes of shared memory for K and the same for V. So wide
    heads and devices with less shared memory get a smaller tile. With many programs, two or three share an SM. With
    few, each has an SM to itself and needs more loads in flight.

    Tiles in FP8 (itemsize 1) pass through registers in float16, and through as much shared memory as another stage. The
    kernel has such tiles only if `reads_words` returns False.
    """
    programs = batch * kv_heads
    tile = 128
    num_warps = 4
    num_stages = 3
    if 2 * programs >= 5 * sm_count and itemsize > 1:
        tile = 64
        num_stages = 3 if programs >= MANY_PROGRAMS_PER_SM * sm_count else 4
    if prefix:
        tile = 32
        num_warps = 2
        num_stages = 3
    padded_dim = triton.next_power_of_2(head_dim)
    head_bytes = padded_dim * itemsize
    tile = min(tile, tile * 256 // (padded_dim * max(itemsize, 2)))
    max_tokens = (shared_memory - (16 << 10)) // (2 * head_bytes)  # 16 KiB are left for everything else
    spare = 0 if itemsize == 1 else 1  # stages that need no memory
    if (num_stages - spare) * tile > max_tokens:
        num_stages = 3
    while (num_stages - spare) * tile > max_tokens:
        tile //= 2
    return DecodeConfig(max(MIN_DOT, tile), num_warps, num_stages)


# For the loop of fp8_decode.py, which has no stages: the fastest of eight settings on an H200.
WORDS_CONFIG = DecodeConfig(tile=32, num_warps=2, num_stages=1)


class DecodePlan(NamedTuple):
    """How `decode_attention_triton` divides its work.

    Args:
        items: [I, 3] int32: sequence, index of the split, number of splits of the sequence; sequence -1 if unused.
            Every KV head has these work items, which start in this order.
        num_splits: most splits of a sequence.
        config: the kernel's settings; `default_decode_config` if None.
    """

    items: torch.Tensor
    num_splits: int
    config: DecodeConfig | None = None


@triton.jit
def _split(lens, total, programs, whole, num_splits, min_tokens):
    """Return the number of splits of sequences of `lens` tokens, and the tokens of each split."""
    share = tl.maximum(tl.cdiv(total, programs), min_tokens)
    splits = tl.where(lens * 2 * programs > whole * total, (lens + share // 2) // share, 1)
    splits = tl.maximum(tl.minimum(splits, num_splits), 1).to(tl.int32)
    return splits, tl.cdiv(lens, splits)


@triton.jit(do_not_specialize=["lens_ptr", "batch", "num_items", "programs", "whole", "num_splits", "min_tokens"])
def _plan_kernel(
    lens_ptr,
    plan_ptr,
    batch,
    num_items,
    programs,
    whole,
    num_splits,
    min_tokens,
    KV_HEADS: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # No `wait_for_inputs`: this runs before the chain, whose kernels read the plan before they wait.
    all_seqs = tl.arange(0, BATCH_PAD)
    all_lens = tl.load(lens_ptr + all_seqs, mask=all_seqs < batch, other=0).to(tl.int64)
    seq = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lens = tl.load(lens_ptr + seq, mask=seq < batch, other=0).to(tl.int64)
    total = tl.sum(all_lens, 0) * KV_HEADS
    all_splits, all_sizes = _split(all_lens, total, programs, whole, num_splits, min_tokens)
    splits, size = _split(lens, total, programs, whole, num_splits, min_tokens)
    all_splits = tl.where(all_seqs < batch, all_splits, 0)
    # A sequence's first item comes after those of all sequences with longer splits.
    equal = (all_sizes[None, :] == size[:, None]) & (all_seqs[None, :] < seq[:, None])
    before = (all_sizes[None, :] > size[:, None]) | equal
    first = tl.sum(tl.where(before, all_splits[None, :], 0), 1)
    for split in range(0, tl.max(splits, 0)):
        mask = (split < splits) & (seq < batch)
        item_ptr = plan_ptr + 3 * (first + split)
        tl.store(item_ptr, seq, mask=mask)
        tl.store(item_ptr + 1, tl.full([BLOCK], split, tl.int32), mask=mask)
        tl.store(item_ptr + 2, splits, mask=mask)
    if tl.program_id(0) == 0:
        for start in range(tl.sum(all_splits, 0), num_items, BATCH_PAD):
            unused = start + all_seqs
            tl.store(plan_ptr + 3 * unused, tl.full([BATCH_PAD], -1, tl.int32), mask=unused < num_items)


def plan_decode_triton(context_lens: torch.Tensor, kv_heads: int, policy: SplitPolicy) -> DecodePlan:
    """Compute `plan_decode_torch` with a Triton kernel that does not synchronize with the device.

    Raises:
        ValueError: `policy.num_splits` is out of range.
        ImportError: Triton is not installed.
    """
    batch = len(context_lens)
    if not 1 <= policy.num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits={policy.num_splits} must be between 1 and {MAX_SPLITS}")
    items = torch.empty((batch + policy.programs // kv_heads, 3), dtype=torch.int32, device=context_lens.device)
    width = max(512, triton.next_power_of_2(batch))
    block = max(1, 4096 // width)
    _plan_kernel[(triton.cdiv(batch, block),)](
        context_lens,
        items,
        batch,
        len(items),
        policy.programs,
        policy.whole,
        policy.num_splits,
        policy.min_tokens,
        KV_HEADS=kv_heads,
        BATCH_PAD=width,
        BLOCK=block,
        num_warps=min(32, max(4, width // 1024)),
    )
    return DecodePlan(items, policy.num_splits)
