"""State that layers keep between steps. A spec declares it, so that runner/state_pool.py can size and allocate it.

To add another kind of state, such as recurrent state for each slot, add a spec class here with its size in bytes and
`allocate`. StatePool must then take these bytes out of its budget before it counts blocks. Today all state is paged KV.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.ops.attention.paged_cache import KVKind, PagedKV


@dataclass(frozen=True)
class PagedKVSpec:
    """A layer's keys and values in blocks. Sizes are those on this rank.

    The cache holds all tokens, also those that the layer's `window` hides; see `PagedKV`.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int = 0

    @property
    def kind(self) -> KVKind:
        return KVKind(self.num_kv_heads, self.window)

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of one block of `block_size` tokens."""
        return 2 * block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> PagedKV:
        """Allocate caches of zeros: FlashAttention-3 needs finite values behind the end of a sequence."""
        shape = (num_blocks, block_size, self.num_kv_heads, self.head_dim)
        k_cache = torch.zeros(shape, dtype=self.dtype, device=device)
        v_cache = torch.zeros(shape, dtype=self.dtype, device=device)
        return PagedKV(k_cache, v_cache, self.window)


class StatefulLayer(nn.Module):
    """A layer that keeps state between steps."""

    @abstractmethod
    def state_spec(self) -> PagedKVSpec:
        """Return the spec of the layer's state."""

    @abstractmethod
    def bind(self, state: PagedKV | None) -> None:
        """Use this state from now on. None removes the state."""
