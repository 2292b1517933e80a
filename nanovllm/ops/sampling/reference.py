"""Sampling in plain torch: the references of the kernels in this folder, and what a CPU runs."""

import torch

from nanovllm.ops.sampling.state import HAS_BIAS, HAS_MASK, HAS_PENALTIES, TILE, SamplingState
from nanovllm.sampling_params import MAX_LOGIT_BIAS

_GOLDEN = 0x9E3779B9
# "lowbias32" of Wellons' hash prospector
_MIX1 = 0x7FEB352D
_MIX2 = 0x846CA68B


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def _mix_torch(x: torch.Tensor) -> torch.Tensor:
    """Hash int32 in place as `_mix` of sampling.py does; int32 products wrap like unsigned ones."""
    x ^= (x >> 16) & 0xFFFF
    x *= _MIX1
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(_MIX2)
    x ^= (x >> 16) & 0xFFFF
    return x


def _gumbel_torch(counters: torch.Tensor, seed: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
    """Return noise [B, N] float32 for counters [B or 1, N] int32, seed [B] int64 and context_lens [B] int32."""
    low = seed.to(torch.int32)
    high = (seed >> 32).to(torch.int32)
    key = _mix_torch(_mix_torch(_mix_torch(high + _signed(_GOLDEN)) ^ low) ^ context_lens)[:, None]
    bits = _mix_torch(_mix_torch(counters + key) ^ _mix_torch(key + _signed(_GOLDEN)))
    u = ((bits >> 1) & 0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2**-31).clamp_(max=0.99999994)
    return torch.log1p(-u).neg_().log_().neg_()


def _sample_softmax(y: torch.Tensor, seed: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
    """Sample tokens [B] int64 of the softmax of y [B, V]: first a tile, then a token of the tile."""
    width = min(TILE, y.shape[1])
    tiles = torch.nn.functional.pad(y, (0, -y.shape[1] % width), value=float("-inf")).unflatten(1, (-1, width))
    ids = torch.arange(max(tiles.shape[1:]), dtype=torch.int32, device=y.device)
    weight = tiles.logsumexp(-1) + _gumbel_torch(-1 - ids[None, : tiles.shape[1]], seed, context_lens)
    tile = weight.argmax(-1)
    columns = tile.to(torch.int32)[:, None] * width + ids[:width]
    x = tiles[torch.arange(len(y), device=y.device), tile] + _gumbel_torch(columns, seed, context_lens)
    return tile * width + x.argmax(-1)


def filter_logits(x: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Set the logits x [B, V] that top-k, top-p and min-p drop to -inf."""
    vocab_size = x.shape[1]
    ordered = x.sort(dim=-1, descending=True).values
    last = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size).to(torch.int64) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last[:, None]), float("-inf"))
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # probability mass of the more likely tokens
    count = (before < top_p[:, None]).sum(-1).clamp(min=1)
    count = torch.where(top_p < 1, count, (ordered > float("-inf")).sum(-1).clamp(min=1))
    threshold = ordered.gather(1, count[:, None] - 1)
    threshold = torch.maximum(threshold, ordered[:, :1] + min_p[:, None].log())
    return x.masked_fill(x < threshold, float("-inf"))


def adjust_logits(x: torch.Tensor, slots: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Apply the bias, penalties and mask of slots [B] int64 to x [B, V] float32, each if the slot has it."""
    flags = state.flags[slots]
    ids, values = state.bias[slots].mT.contiguous().unbind(1)
    num_bias = torch.where(flags & HAS_BIAS != 0, state.num_bias[slots], 0)
    unused = torch.arange(MAX_LOGIT_BIAS, device=x.device) >= num_bias[:, None]
    x = x.scatter_add(1, ids.to(torch.int64), values.view(torch.float32).masked_fill(unused, 0))
    seen = torch.where((flags & HAS_PENALTIES != 0)[:, None], state.counts[slots], 0)
    times = seen >> 1
    penalty = state.repetition[slots, None]
    x = torch.where(seen != 0, torch.where(x > 0, x / penalty, x * penalty), x)
    x = x - ((times > 0) * state.presence[slots, None] + times * state.frequency[slots, None])
    bits = state.masks[slots][:, :, None] >> torch.arange(32, dtype=torch.int32, device=x.device) & 1
    allowed = bits.flatten(1)[:, : x.shape[1]] != 0
    return x.masked_fill(~allowed & (flags & HAS_MASK != 0)[:, None], float("-inf"))


def mask_stop_ids(
    x: torch.Tensor, slots: torch.Tensor, context_lens: torch.Tensor, state: SamplingState
) -> torch.Tensor:
    """Set the stop ids of slots [B] int64 to -inf in x [B, V] where the sequence is shorter than its minimum length."""
    stop_ids = state.stop_ids[slots].to(torch.int64)
    banned = context_lens < state.min_length[slots]
    drop = torch.zeros((len(x), x.shape[1] + 1), dtype=torch.bool, device=x.device)
    drop.scatter_(1, stop_ids.masked_fill((stop_ids < 0) | ~banned[:, None], x.shape[1]), True)
    return x.masked_fill(drop[:, :-1], float("-inf"))


def sample_torch(
    logits: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    state: SamplingState,
    progress: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """Compute `sample`. Synchronizes with the device to skip what no sequence asks for."""
    slots = slots.to(torch.int64)
    x = logits.float()
    adjusted = (state.flags[slots] & (HAS_PENALTIES | HAS_MASK | HAS_BIAS)).nonzero()[:, 0]
    if len(adjusted):
        x = x.index_copy(0, adjusted, adjust_logits(x[adjusted], slots[adjusted], state))
    if (context_lens < state.min_length[slots]).any():
        x = mask_stop_ids(x, slots, context_lens, state)
    tokens = x.argmax(-1)
    sampled = state.temperature[slots].nonzero()[:, 0]
    if len(sampled):
        sampled_slots = slots[sampled]
        y = x[sampled] * state.temperature[sampled_slots, None].reciprocal()
        top_k = state.top_k[sampled_slots]
        top_p = state.top_p[sampled_slots]
        min_p = state.min_p[sampled_slots]
        filtered = ((top_k > 0) | (top_p < 1) | (min_p > 0)).nonzero()[:, 0]
        if len(filtered):
            y[filtered] = filter_logits(y[filtered], top_k[filtered], top_p[filtered], min_p[filtered])
        tokens[sampled] = _sample_softmax(y, state.seed[sampled_slots], context_lens[sampled])
    if progress is not None:
        advance_slots_torch(tokens, slots, context_lens, *progress)
    return tokens


def advance_slots_torch(
    tokens: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    last_token: torch.Tensor,
    length: torch.Tensor,
    scratch_slot: int,
) -> None:
    """Compute `advance_slots`."""
    real = slots != scratch_slot
    slots = slots[real].to(torch.int64)
    last_token[slots] = tokens[real]
    length[slots] = context_lens[real]
