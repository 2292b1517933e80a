"""The residual stream, which every layer reads through a norm and adds to."""

from dataclasses import dataclass

import torch

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.ops.norm_rope.rms_norm import rms_norm


@dataclass(eq=False)
class Residual:
    """Tokens' residual stream: x + the sum over the ranks of delta.

    A product may leave its result as `delta`, for the next norm to add on the way: that makes the sum over ranks
    anyway, and cuBLAS has faster kernels for products that have nothing to add.

    Attributes:
        x: [T, hidden_size], the same on every rank; None if `delta` is all there is.
        delta: [T, hidden_size], this rank's summand; None if `x` is all there is.
        tp: the ranks.
    """

    x: torch.Tensor | None
    delta: torch.Tensor | None
    tp: TensorParallel

    @classmethod
    def of(cls, summand: torch.Tensor, tp: TensorParallel) -> "Residual":
        """The sum over the ranks of their `summand` [T, hidden_size]."""
        return cls(summand, None, tp) if tp.size == 1 else cls(None, summand, tp)

    def __getitem__(self, rows: torch.Tensor) -> "Residual":
        """Some of the rows [R] int64, copied."""
        return Residual(*(None if part is None else part[rows] for part in (self.x, self.delta)), self.tp)

    def sum(self, norm: tuple[torch.Tensor, float] | None = None) -> torch.Tensor:
        """Add up what there is, which is `x` from then on, and return it; or its RMSNorm of this weight and epsilon."""
        if self.delta is None:
            return self.x if norm is None else rms_norm(self.x, *norm)
        result = self.tp.all_reduce(self.delta, norm, self.x)
        self.x, self.delta = self.delta, None
        return result
