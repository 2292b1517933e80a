"""Sampling parameters of all slots, on the device."""

from typing import Any

import numpy as np
import torch

from nanovllm.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_IDS

# Bits of a slot's `flags`.
HAS_PENALTIES = 1  # the slot's row of `counts` is valid
HAS_MASK = 2  # only tokens in the slot's row of `masks` may be sampled
HAS_BIAS = 4  # the slot's row of `bias` has `num_bias` entries
PROCESSED_LOGPROBS = 8  # logprobs are of the processed logits (see logprobs.py); the sampler ignores this

# The memory layout of one slot's parameters: the host sends a new request's in one copy. fields.py has the offsets for
# kernels.
PARAMS_DTYPE = np.dtype(
    [
        ("seed", np.int64),
        ("temperature", np.float32),  # 0 is greedy
        ("top_k", np.int32),  # 0 keeps all
        ("top_p", np.float32),  # 1 keeps all
        ("min_p", np.float32),  # 0 keeps all
        ("min_length", np.int32),  # stop ids cannot be sampled while the context is shorter
        ("flags", np.int32),
        ("repetition", np.float32),  # penalties
        ("presence", np.float32),
        ("frequency", np.float32),
        ("num_bias", np.int32),
        ("stop_ids", np.int32, MAX_STOP_IDS),  # padded with -1
    ]
)
PARAMS_STRIDE = PARAMS_DTYPE.itemsize // 4
MAX_COUNT = 16382  # a token's count stops here
TILE = 2048  # logits that a program processes at once when it samples; samples depend on it


class SamplingState:
    """Sampling parameters by slot. Each scalar field of PARAMS_DTYPE is an attribute: a view [S + 1] of the table.

    Args:
        params: [S + 1] of PARAMS_DTYPE, for S slots and a scratch slot.
        vocab_size: V.

    Attributes:
        table: [S + 1, PARAMS_STRIDE] int32.
        counts: [S + 1, V] int16: twice the number of times the token is in the output, plus 1 if the prompt has it.
        masks: [S + 1, ceil(V / 32)] int32, one bit for each token that may be sampled.
        bias: [S + 1, MAX_LOGIT_BIAS, 2] int32: a token id, and the float32 value that is added to its logit.
    """

    def __init__(self, params: np.ndarray, vocab_size: int, device: torch.device):
        num_slots = len(params)
        table = params.view(np.int32).reshape(num_slots, PARAMS_STRIDE)
        self.table = torch.from_numpy(table).to(device, copy=True)
        self.counts = torch.zeros((num_slots, vocab_size), dtype=torch.int16, device=device)
        self.masks = torch.zeros((num_slots, (vocab_size + 31) // 32), dtype=torch.int32, device=device)
        self.bias = torch.zeros((num_slots, MAX_LOGIT_BIAS, 2), dtype=torch.int32, device=device)

    def __getattr__(self, name: str) -> torch.Tensor:
        fields: Any = PARAMS_DTYPE.fields
        if name not in fields:
            raise AttributeError(name)
        dtype, offset = fields[name][:2]
        if dtype.subdtype:
            return self.table[:, offset // 4 :]
        return self.table.view(getattr(torch, dtype.name))[:, offset // dtype.itemsize]


def default_params(count: int) -> np.ndarray:
    """Return `count` entries of PARAMS_DTYPE for greedy sampling."""
    params = np.zeros(count, PARAMS_DTYPE)
    params["top_p"] = 1
    params["repetition"] = 1
    params["stop_ids"] = -1
    return params
