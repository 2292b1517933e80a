"""Collectives in plain torch, over a list with each rank's tensor: the references of the kernels in this folder."""

import torch

from nanovllm.ops.norm_rope.reference import rms_norm_torch


def all_reduce_torch(
    parts: list[torch.Tensor],
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum all ranks' x [T, N] and the residual in float32. Return the rounded sum, and its RMSNorm (or the sum again).

    This is the reference of `all_reduce_triton` and of `OverlappedAllReduce`.
    """
    total = torch.stack([part.float() for part in parts]).sum(0)
    if residual is not None:
        total = total + residual.float()
    total = total.to(parts[0].dtype)
    return total, total if norm is None else rms_norm_torch(total, *norm)


def all_to_all_torch(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return what each rank gets from `all_to_all_triton`: all columns of its rows.

    Args:
        parts: each rank's columns [B, N] of all rows.
    """
    rows_per_rank = (len(parts[0]) + len(parts) - 1) // len(parts)
    whole = torch.cat(parts, 1)
    return [whole[rank * rows_per_rank : (rank + 1) * rows_per_rank] for rank in range(len(parts))]
