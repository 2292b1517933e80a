"""Log-probabilities of tokens, for the rows whose requests ask for them. Plain torch: few rows, and no graph's part."""

import torch

from nanovllm.ops.sampling.sampling import (
    PROCESSED_LOGPROBS,
    SamplingState,
    adjust_logits,
    filter_logits,
    mask_stop_ids,
)


def process_logits(
    x: torch.Tensor, slots: torch.Tensor, context_lens: torch.Tensor, state: SamplingState
) -> torch.Tensor:
    """Logits as the sampler draws from them, for the rows that ask for these; the model's own for the others.

    Args:
        x: [R, V], any float dtype; the result is float32.
        slots: [R] int64.
        context_lens: [R] int32, tokens before the one that is drawn.
    """
    x = x.float()
    wanted = (state.flags[slots] & PROCESSED_LOGPROBS) != 0
    temperature = state.temperature[slots]
    drawn = temperature > 0
    y = mask_stop_ids(adjust_logits(x, slots, state), slots, context_lens, state)
    y = y * torch.where(drawn, temperature, 1.0)[:, None].reciprocal()  # which rounds as the sampler does
    filtered = filter_logits(y, state.top_k[slots], state.top_p[slots], state.min_p[slots])
    return torch.where(wanted[:, None], torch.where(drawn[:, None], filtered, y), x)


def top_logprobs(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Float32 log-softmax of the k most likely tokens, V at most, and of the given one.

    Args:
        logits: [R, V], any float dtype; the sum is made in float32.
        tokens: [R] int64.

    Returns:
        Token ids [R, k + 1] int64, the given one last; their log-probabilities, float32; the given ones' ranks [R]
        int64, 1 being the most likely.
    """
    total = logits.float().logsumexp(-1, keepdim=True)
    own, top = logits.gather(1, tokens[:, None]), logits.topk(min(k, logits.shape[1]), dim=-1)
    ranks = (logits > own).sum(-1) + 1
    return torch.cat((top.indices, tokens[:, None]), 1), torch.cat((top.values, own), 1).float() - total, ranks
