"""The residual stream and its norm as lazy values, so that whichever kernel is fastest can add, all-reduce and norm."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.ops.norm_rope.rms_norm import rms_norm

Norm = tuple[torch.Tensor, float]  # weight and epsilon of an RMSNorm


class Normed(NamedTuple):
    """The RMSNorm of a residual stream: the linear layer that reads it may fuse the norm.

    Attributes:
        x: [T, hidden_size].
        norm: still to be applied to x; None if x is normed already.
    """

    x: torch.Tensor
    norm: Norm | None


@dataclass(eq=False)
class Residual:
    """The residual stream of T tokens: x, or base + all_reduce(x) while it is partial. The next norm completes it.

    Attributes:
        x: [T, hidden_size].
        tp: the ranks.
        base: [T, hidden_size], the same on every rank; or None.
        is_partial: whether x is only this rank's summand.
    """

    x: torch.Tensor
    tp: TensorParallel
    base: torch.Tensor | None = None
    is_partial: bool = False

    @classmethod
    def of(cls, summand: torch.Tensor, tp: TensorParallel) -> "Residual":
        """Start a residual stream with the all-reduce of `summand` [T, hidden_size]."""
        return cls(summand, tp, is_partial=tp.size > 1)

    def __getitem__(self, tokens: torch.Tensor) -> "Residual":
        """Return a copy of the tokens at these indices [L] int64."""
        base = None if self.base is None else self.base[tokens]
        return Residual(self.x[tokens], self.tp, base, self.is_partial)

    def sum(self, norm: Norm | None = None) -> torch.Tensor:
        """Complete x, and return it or its RMSNorm."""
        if not self.is_partial:
            return self.x if norm is None else rms_norm(self.x, *norm)
        result = self.tp.all_reduce(self.x, norm, self.base)
        self.base, self.is_partial = None, False
        return result

    def normed(self, norm: Norm) -> Normed:
        """Return the RMSNorm of the stream: computed here if an all-reduce is due anyway, else left to the reader."""
        return Normed(self.sum(norm), None) if self.is_partial else Normed(self.x, norm)
