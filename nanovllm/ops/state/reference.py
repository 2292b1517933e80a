"""Copies of slots in plain torch: the reference of the kernel in this folder, and what a CPU runs."""

import torch


def copy_slots_torch(pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Compute `copy_slots`."""
    pool.index_copy_(1, targets.long(), pool.index_select(1, sources))
