"""Log-probabilities of tokens, for the sequences whose requests ask for them.

Plain torch: these are few sequences, and no captured graph contains them.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.sampling.reference import adjust_logits, filter_logits, mask_stop_ids
from nanovllm.ops.sampling.state import PROCESSED_LOGPROBS, SamplingState


class LogprobTensors(NamedTuple):
    """Log-probabilities at N positions of a text.

    Attributes:
        token_ids: [N, k + 1] int64, the k most likely tokens (at most V) and the scored one, which is the last.
        logprobs: [N, k + 1] float32, their log-probabilities.
        ranks: [N] int64, the rank of the scored token; 1 is the most likely.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor


def process_logits(
    x: torch.Tensor, slots: torch.Tensor, context_lens: torch.Tensor, state: SamplingState
) -> torch.Tensor:
    """Return the logits that the sampler uses, for the sequences that ask for these; the others' are unchanged.

    Args:
        x: [B, V], any float dtype; the result is float32.
        slots: [B] int64.
        context_lens: [B] int32, tokens before the sampled one.
    """
    x = x.float()
    wanted = (state.flags[slots] & PROCESSED_LOGPROBS) != 0
    temperature = state.temperature[slots]
    sampled = temperature > 0
    y = mask_stop_ids(adjust_logits(x, slots, state), slots, context_lens, state)
    y = y * torch.where(sampled, temperature, 1.0)[:, None].reciprocal()  # rounds as the sampler does
    filtered = filter_logits(y, state.top_k[slots], state.top_p[slots], state.min_p[slots])
    return torch.where(wanted[:, None], torch.where(sampled[:, None], filtered, y), x)


def top_logprobs(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> LogprobTensors:
    """Return the log-softmax of the k most likely tokens and of the given ones, which are the scored tokens.

    Args:
        logits: [N, V], any float dtype; sums are in float32.
        tokens: [N] int64.
    """
    total = logits.float().logsumexp(-1, keepdim=True)
    given = logits.gather(1, tokens[:, None])
    top = logits.topk(min(k, logits.shape[1]), dim=-1)
    return LogprobTensors(
        token_ids=torch.cat((top.indices, tokens[:, None]), 1),
        logprobs=torch.cat((top.values, given), 1).float() - total,
        ranks=(logits > given).sum(-1) + 1,
    )
