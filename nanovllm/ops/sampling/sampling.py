"""Sampling: logits -> bias, penalties, mask -> temperature -> top-k -> top-p -> min-p -> Gumbel-max.

The argmax of logit + Gumbel noise is a sample of the softmax (Gumbel, 1954): it needs no cumulative sum and no wait for
the host. The largest such value in a tile of the vocabulary is itself distributed as the tile's log-sum-exp + Gumbel
noise. So the kernels sample a tile first, then a token of it (Maddison et al., "A* Sampling", arXiv:1411.0030): one
pass over the vocabulary without noise, and a second read of one tile. The noise is a hash of (seed, context length,
token id or -1 - tile), so a sample does not depend on the batch or on the sequence's index in it.

All filters together are one threshold per sequence. Bisection over an order-preserving integer map of float32 finds it:
at most 32 passes for an exact k-th value, and as many for top-p. Sequences without filters skip this.

Bias, penalties and masks are applied where logits are read. Nothing is written, and sequences without them pay nothing.
"""

import torch

from nanovllm.ops.sampling.fields import (
    BANS_STOP_IDS,
    FLAGS,
    FREQUENCY,
    HAS_BIAS,
    HAS_MASK,
    HAS_PENALTIES,
    MAX_STOP_IDS,
    MIN_LENGTH,
    MIN_P,
    NUM_BIAS,
    PRESENCE,
    REPETITION,
    SEED,
    STOP_IDS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from nanovllm.ops.sampling.reference import advance_slots_torch, sample_torch
from nanovllm.ops.sampling.state import TILE, SamplingState
from nanovllm.ops.triton_utils import launch_options, ordered_int, tl, triton, wait_for_inputs

__all__ = ["advance_slots", "advance_slots_triton", "sample", "sample_triton"]


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _float(ptr):
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit
def _gumbel(counters, params_ptr, context_len):
    seed_ptr = params_ptr + SEED
    low = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    high = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    key = _mix(_mix(_mix(high + 0x9E3779B9) ^ low) ^ context_len.to(tl.uint32))
    bits = _mix(_mix(counters.to(tl.uint32, bitcast=True) + key) ^ _mix(key + 0x9E3779B9))
    u = ((bits >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2**-31
    u = tl.minimum(u, 0.99999994)
    # A series of -log(1 - u) for small u, where 1 - u would lose the deciding bits.
    exponential = tl.where(u < 0.001, u + u * u * 0.5 + u * u * u * 0.33333334, -tl.log(1 - u))
    return -tl.log(exponential)


@triton.jit
def _sequence(batch, slots_ptr, context_lens_ptr, threshold_ptr, tables):
    """Return whether the program's sequence is greedy, and its `logits`, a tuple that the functions below unpack.

    Args:
        batch: the pointer to the logits of all sequences, their stride, and the size of the vocabulary.
        slots_ptr, context_lens_ptr, threshold_ptr: one number for each sequence.
        tables: pointer and stride of each table of `SamplingState`: the parameters, `counts`, `masks` and `bias`.

    Returns:
        logits: the pointer to the sequence's logits, their number, their factor, the pointer to its threshold, and:
        slot: the pointers to the slot's row of each table, and the adjustments that it needs: HAS_PENALTIES, HAS_MASK,
            HAS_BIAS and BANS_STOP_IDS.
    """
    logits_ptr, stride, vocab_size = batch
    params, counts, masks, bias = tables
    seq = tl.program_id(0)
    slot = tl.load(slots_ptr + seq).to(tl.int64)
    params_ptr = params[0] + slot * params[1]
    temperature = _float(params_ptr + TEMPERATURE)
    greedy = temperature == 0
    scale = tl.div_rn(1.0, tl.where(greedy, 1.0, temperature))
    is_banned = tl.load(context_lens_ptr + seq) < tl.load(params_ptr + MIN_LENGTH)
    flags = tl.load(params_ptr + FLAGS) & (HAS_PENALTIES | HAS_MASK | HAS_BIAS)
    adjustments = flags | tl.where(is_banned, BANS_STOP_IDS, 0)
    slot = params_ptr, counts[0] + slot * counts[1], masks[0] + slot * masks[1], bias[0] + slot * bias[1], adjustments
    return greedy, (logits_ptr + seq.to(tl.int64) * stride, vocab_size, scale, threshold_ptr + seq, slot)


@triton.jit
def _adjusted(x, columns, vocab_size, slot):
    """Apply the slot's bias, penalties, mask and banned stop ids to the logits x of `columns`."""
    params_ptr, counts_ptr, masks_ptr, bias_ptr, adjustments = slot
    if adjustments & HAS_BIAS:
        for i in range(tl.load(params_ptr + NUM_BIAS)):
            x += tl.where(columns == tl.load(bias_ptr + 2 * i), _float(bias_ptr + 2 * i + 1), 0.0)
    if adjustments & HAS_PENALTIES:
        seen = tl.load(counts_ptr + columns, mask=columns < vocab_size, other=0)
        times = (seen >> 1).to(tl.float32)
        penalty = _float(params_ptr + REPETITION)
        x = tl.where(seen != 0, tl.where(x > 0, x / penalty, x * penalty), x)
        x -= tl.where(times > 0, _float(params_ptr + PRESENCE), 0.0) + times * _float(params_ptr + FREQUENCY)
    if adjustments & HAS_MASK:
        words = tl.load(masks_ptr + columns // 32, mask=columns < vocab_size, other=0)
        x = tl.where((words >> (columns % 32)) & 1 != 0, x, float("-inf"))
    if adjustments & BANS_STOP_IDS:
        for i in range(MAX_STOP_IDS):
            x = tl.where(columns == tl.load(params_ptr + STOP_IDS + i), float("-inf"), x)
    return x


@triton.jit
def _scaled(logits, columns):
    """Load the logits of `columns`, adjusted and divided by the temperature; -inf past the vocabulary."""
    logits_ptr, vocab_size, scale, _, slot = logits
    _, _, _, _, adjustments = slot
    x = tl.load(logits_ptr + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
    if adjustments != 0:
        x = _adjusted(x, columns, vocab_size, slot)
    return x * scale


@triton.jit
def _kept(logits, columns):
    """Return `_scaled` logits with those below the sequence's threshold, and NaN, set to -inf."""
    _, _, _, threshold_ptr, _ = logits
    x = _scaled(logits, columns)
    return tl.where(x >= tl.load(threshold_ptr), x, float("-inf"))


@triton.jit
def _total(logits, lowest, best, WEIGH: tl.constexpr, TILE: tl.constexpr):
    """Count the tokens at or above the logit of ordered int `lowest`; with WEIGH, sum their exp(x - best)."""
    total = tl.zeros([TILE], tl.float32 if WEIGH else tl.int32)
    _, vocab_size, _, _, _ = logits
    threshold = ordered_int(lowest.to(tl.int32)).to(tl.float32, bitcast=True)
    for start in range(0, vocab_size, TILE):
        x = _scaled(logits, start + tl.arange(0, TILE))
        total += tl.where(x >= threshold, tl.exp(x - best), 0.0) if WEIGH else (x >= threshold).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _highest(logits, low, high, wanted, best, WEIGH: tl.constexpr, TILE: tl.constexpr):
    """Return the highest threshold from `low` to `high` whose `_total` reaches `wanted`; that of `low` must."""
    while low < high:
        middle = (low + high + 1) >> 1
        if _total(logits, middle, best, WEIGH, TILE) >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _threshold_kernel(batch, slots_ptr, context_lens_ptr, threshold_ptr, tables, TILE: tl.constexpr, PDL: tl.constexpr):
    greedy, logits = _sequence(batch, slots_ptr, context_lens_ptr, threshold_ptr, tables)
    _, vocab_size, _, threshold_ptr, slot = logits
    params_ptr, _, _, _, _ = slot
    top_k = tl.load(params_ptr + TOP_K)
    top_p = _float(params_ptr + TOP_P)
    min_p = _float(params_ptr + MIN_P)
    wait_for_inputs(PDL)
    if greedy | ((top_k == 0) & (top_p >= 1) & (min_p == 0)):
        tl.store(threshold_ptr, float("-inf"))
        return
    top = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocab_size, TILE):
        top = tl.maximum(top, _scaled(logits, start + tl.arange(0, TILE)))
    best = tl.max(top, 0)
    low = tl.full([], -0x7F800001, tl.int64)  # the ordered int of -inf
    high = ordered_int(best.to(tl.int32, bitcast=True)).to(tl.int64)
    if (top_k > 0) & (top_k < vocab_size):
        low = _highest(logits, low, high, top_k, best, False, TILE)
    if top_p < 1:
        wanted = top_p * _total(logits, low, best, True, TILE)
        low = _highest(logits, low, high, wanted, best, True, TILE)
    threshold = ordered_int(low.to(tl.int32)).to(tl.float32, bitcast=True)
    tl.store(threshold_ptr, tl.maximum(threshold, best + tl.log(min_p)))


@triton.jit
def _weigh_kernel(
    batch, slots_ptr, context_lens_ptr, threshold_ptr, tables, weight_ptr, TILE: tl.constexpr, PDL: tl.constexpr
):
    """Store the largest logit of each tile of a greedy sequence, and the log-sum-exp of each tile of the others."""
    greedy, logits = _sequence(batch, slots_ptr, context_lens_ptr, threshold_ptr, tables)
    seq = tl.program_id(0)
    tile = tl.program_id(1)
    wait_for_inputs(PDL)
    x = _kept(logits, tile * TILE + tl.arange(0, TILE))
    weight = tl.max(x, 0)
    if not greedy:
        shift = tl.where(tl.abs(weight) < float("inf"), weight, 0.0)
        weight = shift + tl.log(tl.sum(tl.exp(x - shift), 0))
    tl.store(weight_ptr + seq * tl.num_programs(1) + tile, weight)


@triton.jit
def _sample_kernel(
    batch,
    slots_ptr,
    context_lens_ptr,
    threshold_ptr,
    tables,
    weight_ptr,
    out_ptr,
    last_token_ptr,
    length_ptr,
    scratch_slot,
    ADVANCE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    # Sample a tile by its weight, then a token of the tile; see the top of this module.
    greedy, logits = _sequence(batch, slots_ptr, context_lens_ptr, threshold_ptr, tables)
    _, vocab_size, _, _, parameter_ptrs = logits
    params_ptr, _, _, _, _ = parameter_ptrs
    seq = tl.program_id(0)
    slot = tl.load(slots_ptr + seq)
    context_len = tl.load(context_lens_ptr + seq)
    wait_for_inputs(PDL)
    tiles = tl.arange(0, TILES)
    num_tiles = tl.cdiv(vocab_size, TILE)
    weights = tl.load(weight_ptr + seq * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    if not greedy:
        weights += _gumbel(-1 - tiles, params_ptr, context_len)
    first = tl.argmax(weights, 0) * TILE
    columns = first + tl.arange(0, TILE)
    x = _kept(logits, columns)
    if not greedy:
        x += _gumbel(columns, params_ptr, context_len)
    token = (first + tl.argmax(x, 0)).to(tl.int64)
    tl.store(out_ptr + seq, token)
    if ADVANCE:
        tl.store(last_token_ptr + slot, token, mask=slot != scratch_slot)
        tl.store(length_ptr + slot, context_len, mask=slot != scratch_slot)


def sample_triton(
    logits: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    state: SamplingState,
    progress: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """Compute `sample` with Triton kernels."""
    batch, vocab_size = logits.shape
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch == 0:
        return tokens
    num_tiles = triton.cdiv(vocab_size, TILE)
    threshold = torch.empty(batch, dtype=torch.float32, device=logits.device)
    weight = torch.empty((batch, num_tiles), dtype=torch.float32, device=logits.device)
    tables = tuple((table, table.stride(0)) for table in (state.table, state.counts, state.masks, state.bias))
    inputs = (logits, logits.stride(0), vocab_size), slots, context_lens, threshold, tables
    options = launch_options(logits.device)
    _threshold_kernel[(batch,)](*inputs, TILE=4096, num_warps=16, **options)
    # The fastest of 13 settings on an H100: limiting the registers makes it 1.7 times as fast.
    _weigh_kernel[(batch, num_tiles)](*inputs, weight, TILE=TILE, num_warps=4, maxnreg=64, **options)
    # Without `progress`, the kernel does not use these arguments, but launching it takes some tensors.
    last_token, length, scratch_slot = (tokens, slots, 0) if progress is None else progress
    _sample_kernel[(batch,)](
        *inputs,
        weight,
        tokens,
        last_token,
        length,
        scratch_slot,
        TILE=TILE,
        TILES=triton.next_power_of_2(num_tiles),
        ADVANCE=progress is not None,
        num_warps=4,
        **options,
    )
    return tokens


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    state: SamplingState,
    progress: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """Sample one token per sequence.

    Args:
        logits: [B, V], any float dtype; processed in float32.
        slots: [B] int32, the slots whose parameters apply.
        context_lens: [B] int32, tokens before the sampled one: the counter of the noise.
        state: the parameters of all slots.
        progress: `last_token`, `length` and `scratch_slot` of `advance_slots`, to advance the slots in the same launch.

    Returns:
        [B] int64. top_p keeps the smallest set whose mass reaches it; ties at a threshold are all kept.
    """
    return (sample_triton if logits.is_cuda else sample_torch)(logits, slots, context_lens, state, progress)


@triton.jit
def _advance_kernel(
    tokens_ptr, slots_ptr, context_lens_ptr, last_token_ptr, length_ptr, batch, scratch_slot, BLOCK: tl.constexpr
):
    seq = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + seq, mask=seq < batch, other=scratch_slot)
    mask = (seq < batch) & (slots != scratch_slot)
    tl.store(last_token_ptr + slots, tl.load(tokens_ptr + seq, mask=mask, other=0), mask=mask)
    tl.store(length_ptr + slots, tl.load(context_lens_ptr + seq, mask=mask, other=0), mask=mask)


def advance_slots_triton(
    tokens: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    last_token: torch.Tensor,
    length: torch.Tensor,
    scratch_slot: int,
) -> None:
    """Compute `advance_slots` with a Triton kernel."""
    batch = len(tokens)
    if batch:
        _advance_kernel[(triton.cdiv(batch, 128),)](
            tokens, slots, context_lens, last_token, length, batch, scratch_slot, BLOCK=128, num_warps=4
        )


def advance_slots(
    tokens: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    last_token: torch.Tensor,
    length: torch.Tensor,
    scratch_slot: int,
) -> None:
    """Store sampled tokens [B] in the slots' state: last_token[slot] = token, length[slot] = context_len.

    Sequences in `scratch_slot` are padding and change nothing.
    """
    run = advance_slots_triton if tokens.is_cuda else advance_slots_torch
    run(tokens, slots, context_lens, last_token, length, scratch_slot)
