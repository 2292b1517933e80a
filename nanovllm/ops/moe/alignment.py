"""Alignment: sort the pairs (token, chosen expert) by expert and cut each expert's pairs into tiles, on the device.

The host knows only upper bounds, so nothing synchronizes and a CUDA graph can hold it. A counting sort: programs count
the pairs of each expert in their block; then each program finds where its block's pairs go from everybody's counts. Few
pairs are sorted by one program, which takes places from a counter for each expert.

The order of an expert's pairs may differ between runs, but results do not: a row of a GEMM depends on no other row.
"""

from typing import NamedTuple

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.moe.dispatch import MAX_FEW_PAIRS
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs

ONE_HOT = 8192  # elements of the one-hot matrix [pairs, experts] that a program holds
MAX_BLOCKS = 256


class ExpertTiles(NamedTuple):
    """Pairs sorted by expert, in tiles of one expert each.

    Attributes:
        order: [P] int32: the index of each sorted pair in the [T, top_k] expert ids.
        tiles: [3, max_tiles] int32: expert, first sorted pair, and end of the expert's pairs, of each tile.
        num_tiles: [1] int32.
        block_m: most pairs of a tile.
    """

    order: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor
    block_m: int


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Return the most tiles that `num_pairs` can need: every expert that has pairs has one more."""
    used = min(num_pairs, num_experts)
    return used + (num_pairs - used) // block_m


@triton.jit
def _one_hot(ids_ptr, first, end, ROWS: tl.constexpr, E_PAD: tl.constexpr):
    """Return [ROWS, E_PAD] int32: 1 where the pair has chosen the expert."""
    pairs = first + tl.arange(0, ROWS)
    ids = tl.load(ids_ptr + pairs, mask=pairs < end, other=E_PAD)
    return (ids[:, None] == tl.arange(0, E_PAD)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs", "block"])
def _count_pairs_kernel(
    ids_ptr, counts_ptr, num_pairs, block, ROWS: tl.constexpr, E_PAD: tl.constexpr, PDL: tl.constexpr
):
    wait_for_inputs(PDL)
    start = tl.program_id(0) * block
    end = tl.minimum(start + block, num_pairs)
    counts = tl.zeros([E_PAD], tl.int32)
    for first in range(start, end, ROWS):
        counts += tl.sum(_one_hot(ids_ptr, first, end, ROWS, E_PAD), 0)
    tl.store(counts_ptr + tl.program_id(0) * E_PAD + tl.arange(0, E_PAD), counts)


@triton.jit(do_not_specialize=["num_pairs", "block", "max_tiles"])
def _sort_pairs_kernel(
    ids_ptr,
    counts_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_pairs,
    block,
    max_tiles,
    ROWS: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    blocks = tl.num_programs(0)
    experts = tl.arange(0, E_PAD)
    start = program * block
    end = tl.minimum(start + block, num_pairs)
    total = tl.zeros([E_PAD], tl.int32)
    earlier = tl.zeros([E_PAD], tl.int32)
    for first in range(0, blocks, ROWS):
        others = first + tl.arange(0, ROWS)
        pointers = counts_ptr + others[:, None] * E_PAD + experts[None, :]
        counts = tl.load(pointers, mask=(others < blocks)[:, None], other=0)
        total += tl.sum(counts, 0)
        earlier += tl.sum(tl.where((others < program)[:, None], counts, 0), 0)
    starts = tl.cumsum(total, 0) - total

    # The programs share the work of writing the tiles: each writes every `blocks`-th tile of all experts.
    tiles = (total + BLOCK_M - 1) // BLOCK_M
    first_tiles = tl.cumsum(tiles, 0) - tiles
    if program == 0:
        tl.store(num_tiles_ptr, tl.sum(tiles, 0))
    for i in range(program, tl.max(tiles, 0), blocks):
        pointers = tiles_ptr + first_tiles + i
        tl.store(pointers, experts, mask=i < tiles)
        tl.store(pointers + max_tiles, starts + i * BLOCK_M, mask=i < tiles)
        tl.store(pointers + 2 * max_tiles, starts + total, mask=i < tiles)

    following = starts + earlier
    for first in range(start, end, ROWS):
        one_hot = _one_hot(ids_ptr, first, end, ROWS, E_PAD)
        places = tl.sum(one_hot * (tl.cumsum(one_hot, 0) - 1 + following[None, :]), 1)
        pairs = first + tl.arange(0, ROWS)
        tl.store(order_ptr + places, pairs, mask=pairs < end)
        following += tl.sum(one_hot, 0)


@triton.jit(do_not_specialize=["num_pairs", "max_tiles"])
def _sort_few_pairs_kernel(
    ids_ptr,
    next_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_pairs,
    max_tiles,
    ROWS: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    experts = tl.arange(0, E_PAD)
    total = tl.zeros([E_PAD], tl.int32)
    for first in range(0, num_pairs, ROWS):
        pairs = first + tl.arange(0, ROWS)
        ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=0)
        total += tl.histogram(ids, E_PAD, mask=pairs < num_pairs)
    starts = tl.cumsum(total, 0) - total
    tl.atomic_xchg(next_ptr + experts, starts)

    tiles = (total + BLOCK_M - 1) // BLOCK_M
    first_tiles = tl.cumsum(tiles, 0) - tiles
    tl.store(num_tiles_ptr, tl.sum(tiles, 0))
    for i in range(tl.max(tiles, 0)):
        pointers = tiles_ptr + first_tiles + i
        tl.store(pointers, experts, mask=i < tiles)
        tl.store(pointers + max_tiles, starts + i * BLOCK_M, mask=i < tiles)
        tl.store(pointers + 2 * max_tiles, starts + total, mask=i < tiles)

    tl.debug_barrier()  # all counters are set
    for first in range(0, num_pairs, ROWS):
        pairs = first + tl.arange(0, ROWS)
        ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=0)
        places = tl.atomic_add(next_ptr + ids, 1, mask=pairs < num_pairs)
        tl.store(order_ptr + places, pairs, mask=pairs < num_pairs)


def align_triton(ids: torch.Tensor, num_experts: int, block_m: int) -> ExpertTiles:
    """Sort the pairs of `ids` [T, top_k] int32 by expert and cut them into tiles of up to `block_m` pairs."""
    num_pairs = ids.numel()
    device = ids.device
    experts_pad = max(16, triton.next_power_of_2(num_experts))
    most = max_tiles(num_pairs, num_experts, block_m)
    order = torch.empty(num_pairs, dtype=torch.int32, device=device)
    tiles = torch.empty((3, most), dtype=torch.int32, device=device)
    num_tiles = torch.empty(1, dtype=torch.int32, device=device)
    options = {"E_PAD": experts_pad, **launch_options(device)}
    if num_pairs <= MAX_FEW_PAIRS:
        following = torch.empty(experts_pad, dtype=torch.int32, device=device)
        _sort_few_pairs_kernel[(1,)](
            ids,
            following,
            order,
            tiles,
            num_tiles,
            num_pairs,
            most,
            ROWS=1024,
            BLOCK_M=block_m,
            num_warps=8,
            **options,
        )
        return ExpertTiles(order, tiles, num_tiles, block_m)
    rows = min(128, max(1, ONE_HOT // experts_pad))
    block = rows * ceil_div(num_pairs, rows * MAX_BLOCKS)
    num_blocks = ceil_div(num_pairs, block)
    counts = torch.empty((num_blocks, experts_pad), dtype=torch.int32, device=device)
    _count_pairs_kernel[(num_blocks,)](ids, counts, num_pairs, block, ROWS=rows, **options)
    _sort_pairs_kernel[(num_blocks,)](
        ids,
        counts,
        order,
        tiles,
        num_tiles,
        num_pairs,
        block,
        most,
        ROWS=rows,
        BLOCK_M=block_m,
        num_warps=4,
        **options,
    )
    return ExpertTiles(order, tiles, num_tiles, block_m)
