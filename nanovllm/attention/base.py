"""The seam between models and attention kernels."""

from abc import ABC, abstractmethod

import torch

from nanovllm.utils.context import Context


class AttentionBackend(ABC):
    """Attends a step's rows over the paged KV cache, which holds this step's K and V already.

    The runner calls `prepare` once a step, then each layer calls `attend`. All metadata is in the context.

    Attributes:
        name: how users ask for it.
        capturable: whether `decode` may be captured in a CUDA graph: it neither waits for the device nor keeps host
            metadata of the step.
    """

    name: str
    capturable: bool = False

    def prepare(self, ctx: Context) -> None:  # noqa: B027  optional: most backends need nothing
        """Work out, once for all layers, what the context's tensors imply; kept in `ctx.meta`."""

    @abstractmethod
    def decode(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float, ctx: Context
    ) -> torch.Tensor:
        """Attention of the decode rows' q [D, H, Dh] -> [D, H, Dh]."""

    @abstractmethod
    def prefill(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float, ctx: Context
    ) -> torch.Tensor:
        """Causal attention of the prefill rows' packed q [Tp, H, Dh] -> [Tp, H, Dh]."""

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float, ctx: Context
    ) -> torch.Tensor:
        """Attention of all of a step's tokens.

        Args:
            q: [T, H, Dh], decode rows' tokens first.
            k_cache, v_cache: [num_blocks, block_size, K, Dh].
            scale: factor of the logits.

        Returns:
            [T, H, Dh].
        """
        num_decode = ctx.num_decode
        if num_decode == len(q):
            return self.decode(q, k_cache, v_cache, scale, ctx)
        if num_decode == 0:
            return self.prefill(q, k_cache, v_cache, scale, ctx)
        decoded = self.decode(q[:num_decode], k_cache, v_cache, scale, ctx)
        return torch.cat([decoded, self.prefill(q[num_decode:], k_cache, v_cache, scale, ctx)])
