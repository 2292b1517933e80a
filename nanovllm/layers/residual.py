"""The residual stream and its norm as lazy values: the fastest kernel can then add, all-reduce and norm."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.ops.norm_rope.rms_norm import rms_norm

Norm = tuple[torch.Tensor, float]  # weight and epsilon of an RMSNorm


class LazyNorm(NamedTuple):
    """An RMSNorm that may not have run yet, so that the linear layer that reads it can fuse it.

    Attributes:
        x: [T, hidden_size].
        norm: the norm that x still needs; None if x is normed already.
    """

    x: torch.Tensor
    norm: Norm | None

    def computed(self) -> "LazyNorm":
        """Return this with the norm applied, for several layers that cannot fuse it."""
        return self if self.norm is None else LazyNorm(rms_norm(self.x, *self.norm), None)


class LazyValue(Protocol):
    """A value that is computed when it is added to the residual stream, so that one kernel can do both."""

    def add_to(self, residual: "Residual") -> "Residual":
        """Compute the value and add it. The memory of `residual` may be overwritten."""
        ...


@dataclass(eq=False)
class Residual:
    """The residual stream of T tokens.

    Its value is x, or base + all_reduce(x) while `is_pending`. `complete` computes this value in x, in place.

    Attributes:
        x: [T, hidden_size].
        tp: the tensor-parallel group.
        base: [T, hidden_size], the same on every rank: what is still to be added to the all-reduced x. None if nothing.
        is_pending: whether the all-reduce of x, the addition of `base`, or both are still to be done. On one rank only
            the addition is.
    """

    x: torch.Tensor
    tp: TensorParallel
    base: torch.Tensor | None = None
    is_pending: bool = False

    @classmethod
    def from_partial_sum(cls, partial_sum: torch.Tensor, tp: TensorParallel) -> "Residual":
        """Start a residual stream with the all-reduce of `partial_sum` [T, hidden_size]."""
        return cls(partial_sum, tp, is_pending=tp.size > 1)

    def add(self, x: "torch.Tensor | LazyValue") -> "Residual":
        """Return the stream plus x. This stream is used up: its memory may be overwritten.

        Args:
            x: a tensor that is the same on every rank, or a lazy value, which is computed now.
        """
        if isinstance(x, torch.Tensor):
            return Residual(self.complete().add_(x), self.tp)
        return x.add_to(self)

    def __getitem__(self, tokens: torch.Tensor) -> "Residual":
        """Return a copy of the tokens at these indices [L] int64."""
        base = None if self.base is None else self.base[tokens]
        return Residual(self.x[tokens], self.tp, base, self.is_pending)

    def complete(self) -> torch.Tensor:
        """Make x the whole stream, in place, and return it."""
        return self._all_reduce(norm=None) if self.is_pending else self.x

    def normed(self, norm: Norm) -> LazyNorm:
        """Return the RMSNorm of the stream. It is computed now only if the stream needs an all-reduce anyway."""
        if self.is_pending:
            return LazyNorm(self._all_reduce(norm), None)
        return LazyNorm(self.x, norm)

    def _all_reduce(self, norm: Norm | None) -> torch.Tensor:
        """Overwrite x with its sum over the ranks plus `base`. Return x, or its RMSNorm."""
        result = self.tp.all_reduce(self.x, norm, self.base)
        self.base, self.is_pending = None, False
        return result


def as_lazy_norm(x: torch.Tensor | LazyNorm | Residual) -> LazyNorm:
    """Return the input of a linear layer as a `LazyNorm`. A tensor or a residual stream is read without a norm."""
    if isinstance(x, LazyNorm):
        return x
    return LazyNorm(x.complete() if isinstance(x, Residual) else x, None)
