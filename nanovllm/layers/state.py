"""State that layers keep between steps. A spec declares it, so that runner/state_pool.py can size and allocate it.

A layer's state is by block (`PagedKVSpec`) or by slot (`SlotStateSpec`). State that is neither needs a spec class here,
and a StatePool that counts it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.layers.layer import Layer
from nanovllm.ops.attention.paged_cache import KVKind, PagedKV
from nanovllm.ops.float8 import FP8


@dataclass(frozen=True)
class PagedKVSpec:
    """A layer's keys and values in blocks. Sizes are those on this rank.

    The cache holds all tokens, also those that the layer's `window` hides; see `PagedKV`. In FP8 it has scales as well.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int = 0

    @property
    def kind(self) -> KVKind:
        return KVKind(self.num_kv_heads, self.window, self.dtype == FP8)

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of one block of `block_size` tokens."""
        scale_bytes = torch.float16.itemsize if self.dtype == FP8 else 0
        return 2 * block_size * self.num_kv_heads * (self.head_dim * self.dtype.itemsize + scale_bytes)

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> PagedKV:
        """Allocate caches of zeros: FlashAttention-3 needs finite values after the end of a sequence."""
        shape = (num_blocks, block_size, self.num_kv_heads, self.head_dim)
        k_cache = torch.zeros(shape, dtype=self.dtype, device=device)
        v_cache = torch.zeros(shape, dtype=self.dtype, device=device)
        if self.dtype != FP8:
            return PagedKV(k_cache, v_cache, self.window)
        scales = torch.zeros((num_blocks, self.num_kv_heads, block_size, 2), dtype=torch.float16, device=device)
        return PagedKV(k_cache, v_cache, self.window, scales)


@dataclass(frozen=True)
class SlotStateSpec:
    """A layer's state of a fixed size for each slot, in one or more tensors. Sizes are those on this rank.

    Args:
        shapes, dtypes: the shape and dtype of each tensor, for one slot.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    def allocate(self, num_layers: int, num_slots: int, device: torch.device) -> list[torch.Tensor]:
        """Allocate each tensor as [num_layers, num_slots, *shape], so that one operation copies a slot of all layers.

        The memory is uninitialized, because a sequence's first token ignores the content of its slot.
        """
        return [
            torch.empty((num_layers, num_slots, *shape), dtype=dtype, device=device)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]


class StatefulLayer(Layer, ABC):
    """A layer that keeps state between steps.

    If its state is by slot, it reads the step's rows in `get_context().state_rows`, by its class.
    """

    @abstractmethod
    def state_spec(self) -> PagedKVSpec | SlotStateSpec:
        """Return the spec of the layer's state."""

    @abstractmethod
    def bind(self, state: Any) -> None:
        """Use this state from now on.

        Args:
            state: a `PagedKV`, or the tensors [num_slots, *shape] of a `SlotStateSpec`. None removes the state, whose
                memory is freed while the cache sleeps, or to be measured.
        """

    @staticmethod
    def plan_prompts(cu_seqlens: torch.Tensor, num_tokens: int, max_prompts: int) -> Any:
        """Return what the kernels of this class need to know about a step's prompt rows; None if nothing.

        Prompt rows are here, and in `ops/gdn`, the rows of two or more tokens.

        Only layers with state by slot have such a plan. It runs once a step for all layers of the class, before the
        model's first kernel, and a CUDA graph may capture it: it must not wait for the device.

        Args:
            cu_seqlens: [R + 1] int32, as in `StateRows`.
            num_tokens: number of tokens, padding included.
            max_prompts: at least the number of prompt rows.
        """
        return None
