"""The transformation of queries and keys before attention, as a value."""

from typing import NamedTuple

import torch


class QKTransform(NamedTuple):
    """RMSNorm of each query and key head, if the model has one, then RoPE with paired halves, then a query factor.

    Args:
        num_heads: H, query heads.
        cos_sin: [max_position, Dh] float32, cosines in the first half, sines in the second.
        q_weight, k_weight: [Dh] weights of the norms, in the dtype of queries and keys or in float32; or both None.
        eps: epsilon of the norms.
        query_scale: [max_position] float32, the factor of queries at each position; None for models without one.
    """

    num_heads: int
    cos_sin: torch.Tensor
    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    eps: float = 0.0
    query_scale: torch.Tensor | None = None
