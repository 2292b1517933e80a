"""Online softmax of attention kernels, and the merge of partial results.

The state is (largest score, sum of weights, weighted sum of values) for each query head; scores have base 2. Where
several programs split one sequence's context, each stores its output and log-sum-exp, and the last one to finish merges
them (flash-decoding; Dao et al., 2023).
"""

import torch

from nanovllm.ops.attention.fp8_cache import key_scales, value_scales, widen
from nanovllm.ops.triton_utils import tl, triton


@triton.jit
def init_softmax(ROWS: tl.constexpr, HEAD_PAD: tl.constexpr, LOWEST: tl.constexpr = float("-inf")):
    """Return the state before the first token: largest score (base 2), sum of weights, weighted sum of values.

    A finite LOWEST, below all scores, allows queries that see no token of the first tiles.
    """
    largest = tl.full([ROWS], LOWEST, tl.float32)
    return largest, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, HEAD_PAD], tl.float32)


@triton.jit
def attend_tile(softmax, q, tile, seen, scale_log2e):
    """Add the tokens of a tile that are `seen` to the state. After the first tile, at least one token must be seen.

    Args:
        tile: K, V [TILE, dims] and their scales [TILE], as from `load_tile`. The scales of FP8 multiply scores and
            weights, because there are fewer of these than numbers in K and V.
    """
    running_max, running_sum, acc = softmax
    k, v, scales = tile
    IS_FP8: tl.constexpr = v.dtype == tl.float8e4nv
    # "ieee" keeps float32 from being rounded to TF32; products of 16-bit types are exact anyway.
    scores = tl.dot(q, tl.trans(widen(k, q.dtype)), input_precision="ieee")
    factor = scale_log2e
    if IS_FP8:
        factor = (key_scales(scales).to(tl.float32) * scale_log2e)[None, :]
    scores = tl.where(seen[None, :], scores * factor, float("-inf"))
    largest = tl.max(scores, 1)
    if IS_FP8:
        largest -= 8  # weights of up to 256 use the range of float16, also after the smallest and largest scale
    new_max = tl.maximum(running_max, largest)
    decay = tl.exp2(running_max - new_max)
    p = tl.exp2(scores - new_max[:, None])
    running_sum = running_sum * decay + tl.sum(p, 1)
    if IS_FP8:
        p = p * value_scales(scales).to(tl.float32)[None, :]
        v = widen(v, q.dtype)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_max, running_sum, acc


@triton.jit
def _merge_splits(
    out_ptr, partial_ptr, lse_ptr, first_head, num_splits, split_stride, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Merge the partial results of GROUP heads from `first_head` on, counted over all sequences, into `out`.

    Each partial result is weighted by exp(lse - max lse).
    """
    GROUP_POW2: tl.constexpr = triton.next_power_of_2(GROUP)
    CHUNK: tl.constexpr = 32 // GROUP_POW2 if GROUP_POW2 < 32 else 1  # splits per iteration; they must fit in registers
    heads = tl.arange(0, GROUP_POW2)
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    is_head = heads < GROUP
    first_split = (first_head + heads).to(tl.int64) * split_stride
    running_max = tl.full([GROUP_POW2], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_POW2], tl.float32)
    acc = tl.zeros([GROUP_POW2, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for start in tl.range(0, num_splits, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        mask = is_head[:, None] & (splits < num_splits)[None, :]
        index = first_split[:, None] + splits[None, :]
        lse = tl.load(lse_ptr + index, mask=mask, other=float("-inf"))
        mask = mask[:, :, None] & (dims < HEAD_DIM)[None, None, :]
        partial = tl.load(partial_ptr + index[:, :, None] * HEAD_DIM + dims[None, None, :], mask=mask, other=0.0)
        # Finite, because each chunk has a split and no split is empty.
        new_max = tl.where(is_head, tl.maximum(running_max, tl.max(lse, 1)), 0.0)
        decay = tl.exp2(running_max - new_max)
        weights = tl.exp2(lse - new_max[:, None])
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.sum(partial * weights[:, :, None], 1)
        running_max = new_max
    out = (acc / tl.maximum(total, 1e-30)[:, None]).to(out_ptr.dtype.element_ty)  # total is 0 in padding heads
    out_rows = (first_head + heads).to(tl.int64)[:, None] * HEAD_DIM
    tl.store(out_ptr + out_rows + dims[None, :], out, mask=is_head[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def store_or_merge(out_ptr, partials, softmax, group, split, num_programs, num_splits, GROUP, HEAD_DIM):
    """Store a program's result: the final output if this is the only split, else a partial result.

    Args:
        partials: pointers to partial outputs, log-sum-exps and counters, and the stride between heads' partials.
        group: sequence * KV_HEADS + kv_head.
        split: index of this partial result.
        num_programs: programs that call this for `group`; the last one to arrive merges all partial results.
        num_splits: partial results of `group`, those of a shared prefix included.
    """
    partial_ptr, lse_ptr, counter_ptr, split_stride = partials
    running_max, running_sum, acc = softmax
    heads = tl.arange(0, acc.shape[0])
    dims = tl.arange(0, acc.shape[1])
    first_head = group * GROUP
    out_rows = (first_head + heads).to(tl.int64)
    mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    acc = acc / running_sum[:, None]
    if num_splits == 1:
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :], out, mask=mask)
    else:
        indices = out_rows * split_stride + split
        tl.store(partial_ptr + indices[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(lse_ptr + indices, running_max + tl.log2(running_sum), mask=heads < GROUP)
        tl.debug_barrier()  # this program's stores must come before its count
        counter_ptr += group
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1:
            tl.store(counter_ptr, 0)  # ready for the next launch
            _merge_splits(out_ptr, partial_ptr, lse_ptr, first_head, num_splits, split_stride, GROUP, HEAD_DIM)


def empty_partials(q: torch.Tensor, max_splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate partial results of q [B, H, Dh]: outputs [B, H, P, Dh] and log-sum-exps (base 2) [B, H, P], float32."""
    batch, heads, head_dim = q.shape
    partial = torch.empty((batch, heads, max_splits, head_dim), dtype=torch.float32, device=q.device)
    return partial, torch.empty((batch, heads, max_splits), dtype=torch.float32, device=q.device)
