"""Drawing tokens: logits -> bias, penalties, allowed tokens -> temperature -> top-k -> top-p -> min-p -> Gumbel-max.

The largest of logit + Gumbel noise is a draw from the softmax (Gumbel, 1954): no cumulative sum, no wait for the host.
Over a tile of the vocabulary that largest is itself the tile's log-sum-exp + Gumbel noise, so a tile is drawn first,
then a token of it (Maddison et al., "A* Sampling", arXiv:1411.0030): one pass over the vocabulary, free of noise, and a
second read of one tile. The noise is a hash of (seed, context length, token id or -1 - tile), so a row's draw depends
on nothing else: not on its place in the batch, and not on other rows.

The filters come down to one threshold a row. It is found by bisection on the order-preserving integer image of a float:
at most 32 passes over the row for an exact k-th value, and as many for the top-p cut. Rows without filters skip that.

What changes logits is applied where they are read, so that nothing is written and rows that ask for none pay for none.
"""

import numpy as np
import torch

from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs
from nanovllm.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_IDS

_GOLDEN = 0x9E3779B9
_MIX1, _MIX2 = 0x7FEB352D, 0x846CA68B  # "lowbias32" of Wellons' hash prospector
TILE = 2048  # logits a program holds where it draws; draws depend on it


# What a slot asks for besides: bits of `flags`.
HAS_PENALTIES = 1  # penalties, by the slot's row of `counts`
HAS_MASK = 2  # only tokens of the slot's row of `masks`
HAS_BIAS = 4  # `num_bias` entries of the slot's row of `bias`
PROCESSED_LOGPROBS = 8  # logprobs of what is drawn from (see logprobs.py; nothing to the sampler)

# One slot's parameters as they lie in memory: a new request's go to the device in one copy. The kernels read the fields
# at these places: an int32 each, the seed two.
PARAMS_DTYPE = np.dtype(
    [
        ("seed", np.int64),  # 0, 1
        ("temperature", np.float32),  # 2; 0 is greedy
        ("top_k", np.int32),  # 3; 0 keeps all
        ("top_p", np.float32),  # 4; 1 keeps all
        ("min_p", np.float32),  # 5; 0 keeps all
        ("min_length", np.int32),  # 6; while a row's context is shorter its stop ids cannot be drawn
        ("flags", np.int32),  # 7
        ("repetition", np.float32),  # 8; penalties
        ("presence", np.float32),  # 9
        ("frequency", np.float32),  # 10
        ("num_bias", np.int32),  # 11
        ("stop_ids", np.int32, MAX_STOP_IDS),  # 12 to 43; padded with -1
    ]
)
PARAMS_STRIDE = PARAMS_DTYPE.itemsize // 4
MAX_COUNT = 16382  # times of a token that are counted


class SamplingState:
    """Parameters by slot, on the device.

    Args:
        rows: [S + 1] of dtype PARAMS_DTYPE, those of S slots and a scratch one.
        vocab_size: V.

    Attributes:
        table: [S + 1, PARAMS_STRIDE] int32; the fields are views of it.
        counts: [S + 1, V] int16: twice the times that the output has the token, plus 1 if the prompt has it.
        masks: [S + 1, ceil(V / 32)] int32, a bit for each token that may be drawn.
        bias: [S + 1, MAX_LOGIT_BIAS, 2] int32: a token id, and the float32 number that is added to its logit.
    """

    def __init__(self, rows: np.ndarray, vocab_size: int, device: torch.device):
        self.table = torch.from_numpy(rows.view(np.int32).reshape(len(rows), PARAMS_STRIDE)).to(device, copy=True)
        self.counts = torch.zeros((len(rows), vocab_size), dtype=torch.int16, device=device)
        self.masks = torch.zeros((len(rows), -(-vocab_size // 32)), dtype=torch.int32, device=device)
        self.bias = torch.zeros((len(rows), MAX_LOGIT_BIAS, 2), dtype=torch.int32, device=device)

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in PARAMS_DTYPE.fields:
            raise AttributeError(name)
        dtype, offset = PARAMS_DTYPE.fields[name][:2]
        if dtype.subdtype:
            return self.table[:, offset // 4 :]
        return self.table.view(getattr(torch, dtype.name))[:, offset // dtype.itemsize]


def default_params(count: int) -> np.ndarray:
    """`count` rows of dtype PARAMS_DTYPE that draw greedily."""
    rows = np.zeros(count, PARAMS_DTYPE)
    rows["top_p"] = rows["repetition"] = 1
    rows["stop_ids"] = -1
    return rows


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
def _gumbel(counters, seed_ptr, context_len):
    low = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    high = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    key = _mix(_mix(_mix(high + 0x9E3779B9) ^ low) ^ context_len.to(tl.uint32))
    bits = _mix(_mix(counters.to(tl.uint32, bitcast=True) + key) ^ _mix(key + 0x9E3779B9))
    u = ((bits >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2**-31
    u = tl.minimum(u, 0.99999994)
    # -log(1 - u) for small u, where 1 - u would lose the bits that decide
    exponential = tl.where(u < 0.001, u + u * u * 0.5 + u * u * u * 0.33333334, -tl.log(1 - u))
    return -tl.log(exponential)


@triton.jit
def _row(inputs):
    """Whether the program's row is greedy, and what `_kept` reads.

    That is where its logits are, how many there are, what they are multiplied by, where its threshold is, where its
    slot is in the tables, and what changes the logits: bits of flags; 8: stop ids.
    """
    logits_ptr, stride, vocab_size, slots_ptr, context_lens_ptr, threshold_ptr, tables = inputs
    params, counts, masks, bias = tables
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    params_ptr = params[0] + slot * params[1]
    temperature = _float(params_ptr + 2)
    greedy = temperature == 0
    scale = tl.div_rn(1.0, tl.where(greedy, 1.0, temperature))
    banned = (tl.load(context_lens_ptr + row) < tl.load(params_ptr + 6)).to(tl.int32)
    changes = (tl.load(params_ptr + 7) & 7) | (banned << 3)
    places = params_ptr, counts[0] + slot * counts[1], masks[0] + slot * masks[1], bias[0] + slot * bias[1], changes
    return greedy, (logits_ptr + row.to(tl.int64) * stride, vocab_size, scale, threshold_ptr + row, places)


@triton.jit
def _changed(x, columns, vocab_size, slot):
    """Logits x of `columns` with all that the slot asks for."""
    params_ptr, counts_ptr, masks_ptr, bias_ptr, changes = slot
    if changes & 4:
        for i in range(tl.load(params_ptr + 11)):
            x += tl.where(columns == tl.load(bias_ptr + 2 * i), _float(bias_ptr + 2 * i + 1), 0.0)
    if changes & 1:
        seen = tl.load(counts_ptr + columns, mask=columns < vocab_size, other=0)
        times = (seen >> 1).to(tl.float32)
        penalty = _float(params_ptr + 8)
        x = tl.where(seen != 0, tl.where(x > 0, x / penalty, x * penalty), x)
        x -= tl.where(times > 0, _float(params_ptr + 9), 0.0) + times * _float(params_ptr + 10)
    if changes & 2:
        words = tl.load(masks_ptr + columns // 32, mask=columns < vocab_size, other=0)
        x = tl.where((words >> (columns % 32)) & 1 != 0, x, float("-inf"))
    if changes & 8:
        for i in range(32):
            x = tl.where(columns == tl.load(params_ptr + 12 + i), float("-inf"), x)
    return x


@triton.jit
def _scaled(logits, columns):
    """Logits of `columns` as asked for, divided by the temperature; -inf past the vocabulary."""
    logits_ptr, vocab_size, scale, _, slot = logits
    x = tl.load(logits_ptr + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
    if slot[4] != 0:
        x = _changed(x, columns, vocab_size, slot)
    return x * scale


@triton.jit
def _kept(logits, columns):
    """`_scaled`; -inf below the row's threshold, and for NaN."""
    x = _scaled(logits, columns)
    return tl.where(x >= tl.load(logits[3]), x, float("-inf"))


@triton.jit
def _image(bits):
    """int32 that orders as the float32 of the int32 `bits` does; from that, the bits again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _total(logits, least, best, WEIGH: tl.constexpr, TILE: tl.constexpr):
    """Of the tokens of at least the float of image `least`: how many; if WEIGH, the sum of their exp(x - best)."""
    total = tl.zeros([TILE], tl.float32 if WEIGH else tl.int32)
    threshold = _image(least.to(tl.int32)).to(tl.float32, bitcast=True)
    for start in range(0, logits[1], TILE):
        x = _scaled(logits, start + tl.arange(0, TILE))
        total += tl.where(x >= threshold, tl.exp(x - best), 0.0) if WEIGH else (x >= threshold).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _highest(logits, low, high, wanted, best, WEIGH: tl.constexpr, TILE: tl.constexpr):
    """The highest threshold from `low` to `high` whose `_total` reaches `wanted`; that of `low` does."""
    while low < high:
        middle = (low + high + 1) >> 1
        if _total(logits, middle, best, WEIGH, TILE) >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _threshold_kernel(inputs, TILE: tl.constexpr, PDL: tl.constexpr):
    greedy, logits = _row(inputs)
    _, vocab_size, _, threshold_ptr, slot = logits
    top_k, top_p, min_p = tl.load(slot[0] + 3), _float(slot[0] + 4), _float(slot[0] + 5)
    wait_for_inputs(PDL)
    if greedy | ((top_k == 0) & (top_p >= 1) & (min_p == 0)):
        tl.store(threshold_ptr, float("-inf"))
        return
    top = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocab_size, TILE):
        top = tl.maximum(top, _scaled(logits, start + tl.arange(0, TILE)))
    best = tl.max(top, 0)
    low = tl.full([], -0x7F800001, tl.int64)  # the image of -inf
    high = _image(best.to(tl.int32, bitcast=True)).to(tl.int64)
    if (top_k > 0) & (top_k < vocab_size):
        low = _highest(logits, low, high, top_k, best, False, TILE)
    if top_p < 1:
        wanted = top_p * _total(logits, low, best, True, TILE)
        low = _highest(logits, low, high, wanted, best, True, TILE)
    threshold = _image(low.to(tl.int32)).to(tl.float32, bitcast=True)
    tl.store(threshold_ptr, tl.maximum(threshold, best + tl.log(min_p)))


@triton.jit
def _weigh_kernel(inputs, weight_ptr, TILE: tl.constexpr, PDL: tl.constexpr):
    """The largest logit of each tile of a greedy row, the log-sum-exp of each of the others'."""
    greedy, logits = _row(inputs)
    row, tile = tl.program_id(0), tl.program_id(1)
    wait_for_inputs(PDL)
    x = _kept(logits, tile * TILE + tl.arange(0, TILE))
    weight = tl.max(x, 0)
    if not greedy:
        shift = tl.where(tl.abs(weight) < float("inf"), weight, 0.0)
        weight = shift + tl.log(tl.sum(tl.exp(x - shift), 0))
    tl.store(weight_ptr + row * tl.num_programs(1) + tile, weight)


@triton.jit
def _draw_kernel(
    inputs,
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
    greedy, logits = _row(inputs)
    row = tl.program_id(0)
    slot, context_len = tl.load(inputs[3] + row), tl.load(inputs[4] + row)
    wait_for_inputs(PDL)
    tiles, num_tiles = tl.arange(0, TILES), tl.cdiv(logits[1], TILE)
    weights = tl.load(weight_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    if not greedy:
        weights += _gumbel(-1 - tiles, logits[4][0], context_len)
    first = tl.argmax(weights, 0) * TILE
    columns = first + tl.arange(0, TILE)
    x = _kept(logits, columns)
    if not greedy:
        x += _gumbel(columns, logits[4][0], context_len)
    token = (first + tl.argmax(x, 0)).to(tl.int64)
    tl.store(out_ptr + row, token)
    if ADVANCE:
        tl.store(last_token_ptr + slot, token, mask=slot != scratch_slot)
        tl.store(length_ptr + slot, context_len, mask=slot != scratch_slot)


def sample_triton(logits, slots, context_lens, state: SamplingState, last=None) -> torch.Tensor:
    """`sample` as Triton kernels."""
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    num_tiles = triton.cdiv(vocab_size, TILE)
    threshold = torch.empty(rows, dtype=torch.float32, device=logits.device)
    weight = torch.empty((rows, num_tiles), dtype=torch.float32, device=logits.device)
    tables = tuple((table, table.stride(0)) for table in (state.table, state.counts, state.masks, state.bias))
    inputs = logits, logits.stride(0), vocab_size, slots, context_lens, threshold, tables
    pdl = launch_options(logits.device)
    _threshold_kernel[(rows,)](inputs, TILE=4096, num_warps=16, **pdl)
    # Of 13 settings on an H100 the fastest, and 1.7 times as fast as with all the registers the compiler likes.
    _weigh_kernel[(rows, num_tiles)](inputs, weight, TILE=TILE, num_warps=4, maxnreg=64, **pdl)
    sizes = {"TILE": TILE, "TILES": triton.next_power_of_2(num_tiles), "ADVANCE": last is not None}
    _draw_kernel[(rows,)](inputs, weight, tokens, *(last or (tokens, slots, 0)), **sizes, num_warps=4, **pdl)
    return tokens


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def _mix_torch(x: torch.Tensor) -> torch.Tensor:
    """`_mix` on int32, in place; products wrap as unsigned ones do."""
    x ^= (x >> 16) & 0xFFFF
    x *= _MIX1
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(_MIX2)
    x ^= (x >> 16) & 0xFFFF
    return x


def _gumbel_torch(counters: torch.Tensor, seed: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
    """Noise [R, N] float32 for counters [R or 1, N] int32, seed [R] int64 and context_lens [R] int32."""
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    key = _mix_torch(_mix_torch(_mix_torch(high + _signed(_GOLDEN)) ^ low) ^ context_lens)[:, None]
    bits = _mix_torch(_mix_torch(counters + key) ^ _mix_torch(key + _signed(_GOLDEN)))
    u = ((bits >> 1) & 0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2**-31).clamp_(max=0.99999994)
    return torch.log1p(-u).neg_().log_().neg_()


def _draw_torch(y: torch.Tensor, seed: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
    """Tokens [R] int64 from the softmax of y [R, V]: a tile of it, then one of the tile's."""
    width = min(TILE, y.shape[1])
    tiles = torch.nn.functional.pad(y, (0, -y.shape[1] % width), value=float("-inf")).unflatten(1, (-1, width))
    ids = torch.arange(max(tiles.shape[1:]), dtype=torch.int32, device=y.device)
    weight = tiles.logsumexp(-1) + _gumbel_torch(-1 - ids[None, : tiles.shape[1]], seed, context_lens)
    tile = weight.argmax(-1)
    columns = tile.to(torch.int32)[:, None] * width + ids[:width]
    x = tiles[torch.arange(len(y), device=y.device), tile] + _gumbel_torch(columns, seed, context_lens)
    return tile * width + x.argmax(-1)


def filter_logits(x: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """x [R, V] with what the filters drop set to -inf."""
    vocab_size = x.shape[1]
    ordered = x.sort(dim=-1, descending=True).values
    last = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size).to(torch.int64) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last[:, None]), float("-inf"))
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # mass of the tokens above each
    count = (before < top_p[:, None]).sum(-1).clamp(min=1)
    count = torch.where(top_p < 1, count, (ordered > float("-inf")).sum(-1).clamp(min=1))
    threshold = ordered.gather(1, count[:, None] - 1)
    threshold = torch.maximum(threshold, ordered[:, :1] + min_p[:, None].log())
    return x.masked_fill(x < threshold, float("-inf"))


def adjust_logits(x: torch.Tensor, slots: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """x [R, V] float32 with the bias, penalties, mask of slots [R] int64, each where it is asked for."""
    flags = state.flags[slots]
    ids, values = state.bias[slots].mT.contiguous().unbind(1)
    num_bias = torch.where(flags & HAS_BIAS != 0, state.num_bias[slots], 0)
    unused = torch.arange(MAX_LOGIT_BIAS, device=x.device) >= num_bias[:, None]
    x = x.scatter_add(1, ids.to(torch.int64), values.view(torch.float32).masked_fill(unused, 0))
    seen = torch.where((flags & HAS_PENALTIES != 0)[:, None], state.counts[slots], 0)
    times, penalty = seen >> 1, state.repetition[slots, None]
    x = torch.where(seen != 0, torch.where(x > 0, x / penalty, x * penalty), x)
    x = x - ((times > 0) * state.presence[slots, None] + times * state.frequency[slots, None])
    bits = state.masks[slots][:, :, None] >> torch.arange(32, dtype=torch.int32, device=x.device) & 1
    allowed = bits.flatten(1)[:, : x.shape[1]] != 0
    return x.masked_fill(~allowed & (flags & HAS_MASK != 0)[:, None], float("-inf"))


def mask_stop_ids(
    x: torch.Tensor, slots: torch.Tensor, context_lens: torch.Tensor, state: SamplingState
) -> torch.Tensor:
    """x [R, V] with the stop ids of slots [R] int64 set to -inf where the row is too short to end."""
    stop_ids, banned = state.stop_ids[slots].to(torch.int64), context_lens < state.min_length[slots]
    drop = torch.zeros((len(x), x.shape[1] + 1), dtype=torch.bool, device=x.device)
    drop.scatter_(1, stop_ids.masked_fill((stop_ids < 0) | ~banned[:, None], x.shape[1]), True)
    return x.masked_fill(drop[:, :-1], float("-inf"))


def sample_torch(logits, slots, context_lens, state: SamplingState, last=None) -> torch.Tensor:
    """`sample` in plain torch. Synchronises with the device to skip what no row asks for."""
    slots = slots.to(torch.int64)
    x = logits.float()
    adjusted = (state.flags[slots] & (HAS_PENALTIES | HAS_MASK | HAS_BIAS)).nonzero()[:, 0]
    if len(adjusted):
        x = x.index_copy(0, adjusted, adjust_logits(x[adjusted], slots[adjusted], state))
    if (context_lens < state.min_length[slots]).any():
        x = mask_stop_ids(x, slots, context_lens, state)
    tokens = x.argmax(-1)
    drawn = state.temperature[slots].nonzero()[:, 0]
    if len(drawn):
        at = slots[drawn]
        y = x[drawn] * state.temperature[at, None].reciprocal()
        top_k, top_p, min_p = state.top_k[at], state.top_p[at], state.min_p[at]
        filtered = ((top_k > 0) | (top_p < 1) | (min_p > 0)).nonzero()[:, 0]
        if len(filtered):
            y[filtered] = filter_logits(y[filtered], top_k[filtered], top_p[filtered], min_p[filtered])
        tokens[drawn] = _draw_torch(y, state.seed[at], context_lens[drawn])
    if last is not None:
        advance_slots_torch(tokens, slots, context_lens, *last)
    return tokens


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    state: SamplingState,
    last: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """Draw a token for each row.

    Args:
        logits: [R, V], any float dtype; worked on in float32.
        slots: [R] int32, whose parameters apply.
        context_lens: [R] int32, tokens before the one that is drawn: the counter of the noise.
        state: the parameters of all slots.
        last: last_token, length and scratch_slot of `advance_slots`, if the tokens are to go there at once.

    Returns:
        [R] int64. top_p keeps the smallest set whose mass reaches it; ties at a threshold are all kept.
    """
    return (sample_triton if logits.is_cuda else sample_torch)(logits, slots, context_lens, state, last)


@triton.jit
def _advance_kernel(
    tokens_ptr, slots_ptr, context_lens_ptr, last_token_ptr, length_ptr, rows, scratch_slot, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + row, mask=row < rows, other=scratch_slot)
    mask = (row < rows) & (slots != scratch_slot)
    tl.store(last_token_ptr + slots, tl.load(tokens_ptr + row, mask=mask, other=0), mask=mask)
    tl.store(length_ptr + slots, tl.load(context_lens_ptr + row, mask=mask, other=0), mask=mask)


def advance_slots_triton(tokens, slots, context_lens, last_token, length, scratch_slot: int) -> None:
    """`advance_slots` as a Triton kernel."""
    rows = len(tokens)
    if rows:
        _advance_kernel[(triton.cdiv(rows, 128),)](
            tokens, slots, context_lens, last_token, length, rows, scratch_slot, BLOCK=128, num_warps=4
        )


def advance_slots_torch(tokens, slots, context_lens, last_token, length, scratch_slot: int) -> None:
    """`advance_slots` in plain torch."""
    real = slots != scratch_slot
    slots = slots[real].to(torch.int64)
    last_token[slots], length[slots] = tokens[real], context_lens[real]


def advance_slots(
    tokens: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    last_token: torch.Tensor,
    length: torch.Tensor,
    scratch_slot: int,
) -> None:
    """Take drawn tokens [R] into the slots' state, in place: last_token[slot] = token, length[slot] = context_len.

    Rows of `scratch_slot` are padding and change nothing.
    """
    (advance_slots_triton if tokens.is_cuda else advance_slots_torch)(
        tokens, slots, context_lens, last_token, length, scratch_slot
    )
