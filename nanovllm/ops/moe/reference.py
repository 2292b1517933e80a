"""Mixture of experts in plain torch: the references of the kernels in this folder, and the path of a CPU."""

import torch
import torch.nn.functional as F

from nanovllm.ops.linear.reference import silu_mul_torch


def route_torch(
    logits: torch.Tensor, top_k: int, renormalize: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `route`."""
    logits = logits.float()
    # A stable sort puts the lower id first where logits are equal.
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = logits.softmax(dim=-1).gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.int(), weights.to(dtype or logits.dtype)


def sort_pairs_torch(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """Sort the pairs (token, expert) by expert.

    Args:
        ids: [T, top_k].

    Returns:
        The index of each sorted pair in `ids.flatten()`, and the number of pairs of each expert.
    """
    flat = ids.flatten().long()
    return flat.argsort(stable=True), flat.bincount(minlength=num_experts).tolist()


def experts_torch(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    residual: torch.Tensor | None = None,
    shared: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Compute `experts` with one GEMM per expert and projection.

    It rounds where the kernels round, and 16-bit gate and up besides: a library's GEMM stores them.
    """
    order, counts = sort_pairs_torch(ids, len(gate_up))
    flat_weights = weights.flatten().float()
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, pairs in enumerate(order.split(counts)):
        if len(pairs):
            tokens = pairs // ids.shape[1]
            hidden = silu_mul_torch(F.linear(x[tokens], gate_up[expert]))
            weighted = F.linear(hidden, down[expert]).float() * flat_weights[pairs, None]
            total.index_add_(0, tokens, weighted.to(x.dtype).float())
    return _finish(total, x.dtype, residual, shared)


def combine_torch(
    pairs: torch.Tensor,
    residual: torch.Tensor | None = None,
    shared: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Compute `combine_triton`."""
    return _finish(pairs.float().sum(dim=1), pairs.dtype, residual, shared)


def _finish(
    total: torch.Tensor,
    dtype: torch.dtype,
    residual: torch.Tensor | None,
    shared: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> torch.Tensor:
    """Add the shared expert and the residual to a sum in float32, and round once."""
    if shared is not None:
        output, gate = shared
        total = total + (output.float() if gate is None else output.float() * gate.float().sigmoid().view(-1, 1))
    if residual is None:
        return total.to(dtype)
    return residual.copy_(total + residual.float())
