"""The paged KV cache as attention kernels read it: a layer's caches, a step's rows, and addresses of tiles.

`PagedKV` belongs to a layer for as long as the engine runs. `PagedRows` belongs to a step and serves all its layers.

A *tile* is the group of consecutive tokens that one loop iteration of a kernel processes. A cache *block* holds whole
tiles, or a tile spans whole blocks.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from nanovllm.arithmetic import is_power_of_2
from nanovllm.ops.float8 import FP8
from nanovllm.ops.triton_utils import tl, triton

LOG2E = 1.4426950408889634
MIN_DOT = 16  # smallest side of a tensor-core tile


class KVKind(NamedTuple):
    """The properties of a cache that a step's plans depend on. Layers whose caches are of one kind share plans.

    Attributes:
        kv_heads: number of KV heads.
        window: as in `PagedKV`.
        is_fp8: whether the cache is in FP8.
    """

    kv_heads: int
    window: int = 0
    is_fp8: bool = False


class PagedKV:
    """A layer's keys and values in blocks.

    Args:
        k_cache, v_cache: [num_blocks, block_size, K, Dh], contiguous and of one shape.
        window: how many tokens a query sees, itself and those right before it; 0 if it sees its whole context.
        scales: [num_blocks, K, block_size, 2] float16, contiguous, the scales of key and value of each token in caches
            in FP8 (see fp8_cache.py); None for caches of another dtype. Kernels load both scales as one 32-bit word.

    Attributes:
        block_size, kv_heads, head_dim: sizes of the caches; block_size is a power of two.
        kind: what plans depend on.

    Raises:
        ValueError: the caches differ in shape or are not contiguous, block_size is not a power of two, or the scales do
            not fit the caches.
    """

    def __init__(
        self,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        window: int = 0,
        scales: torch.Tensor | None = None,
    ):
        if k_cache.shape != v_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
            raise ValueError(
                f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must be contiguous and of one shape"
            )
        self.k_cache, self.v_cache, self.window = k_cache, v_cache, window
        _, self.block_size, self.kv_heads, self.head_dim = k_cache.shape
        self.kind = KVKind(self.kv_heads, window, self.is_fp8)
        check_power_of_2("block_size", self.block_size, 1)
        self.scales = scales
        self._check_scales()

    @property
    def is_fp8(self) -> bool:
        return self.k_cache.dtype == FP8

    # Cached: on a CPU, a view takes as long as the arithmetic of a token.

    @cached_property
    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [num_blocks * block_size, K, Dh]."""
        shape = -1, self.kv_heads, self.head_dim
        return self.k_cache.view(shape), self.v_cache.view(shape)

    @cached_property
    def heads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [K, 1, num_blocks * block_size, Dh]."""
        k, v = self.tokens
        return k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]

    def _check_scales(self) -> None:
        scales = self.scales
        shape = (len(self.k_cache), self.kv_heads, self.block_size, 2)
        if scales is None:
            if self.is_fp8:
                raise ValueError("caches in FP8 need scales")
        elif not self.is_fp8 or scales.shape != shape or scales.dtype != torch.float16 or not scales.is_contiguous():
            raise ValueError(
                f"scales {tuple(scales.shape)} of {scales.dtype} do not fit caches of {self.k_cache.dtype}: only FP8 "
                f"has scales, contiguous, in float16 and of shape {shape}"
            )

    def check_queries(self, q: torch.Tensor) -> None:
        """Raise ValueError unless queries [N, H, Dh] fit the caches."""
        _, heads, head_dim = q.shape
        if heads % self.kv_heads or head_dim != self.head_dim or q.stride(2) != 1:
            raise ValueError(
                f"q of shape {tuple(q.shape)} and strides {q.stride()} does not fit a cache of {self.kv_heads} KV "
                f"heads of size {self.head_dim}: the KV heads must divide the heads and each head be contiguous"
            )


@dataclass(frozen=True, eq=False)
class PagedRows:
    """Sequences that attend in a step, and where their keys and values are. A slice or int64 indices select sequences.

    Attributes:
        block_tables: [S + 1, W] int32, the block ids of each slot's tokens, in order.
        slots: [B] int32, the slot of each sequence.
        context_lens: [B] int32, tokens that each sequence sees, this step's included; at least 1.
    """

    block_tables: torch.Tensor
    slots: torch.Tensor
    context_lens: torch.Tensor

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, rows: slice | torch.Tensor) -> "PagedRows":
        return PagedRows(self.block_tables, self.slots[rows], self.context_lens[rows])


@triton.jit
def tile_blocks(table_ptr, tile, last_block, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Load the physical block ids of a tile: one id if a block holds whole tiles, else one id per token.

    Tokens past the context use `last_block`, because the table may hold no valid id for them.
    """
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table_ptr + tl.minimum(tile // (BLOCK_SIZE // TILE), last_block))
    else:
        tokens = tile * TILE + tl.arange(0, TILE)
        return tl.load(table_ptr + tl.minimum(tokens // BLOCK_SIZE, last_block))


@triton.jit
def offsets_in_block(in_token, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TOKEN_STRIDE: tl.constexpr):
    """Return the part of a tile's offsets [TILE, dims] that does not depend on block ids; computed once per program."""
    tokens = tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        return tokens[:, None] * TOKEN_STRIDE + in_token[None, :]
    else:
        return (tokens % BLOCK_SIZE)[:, None] * TOKEN_STRIDE + in_token[None, :]


@triton.jit
def tile_pointers(
    cache_ptr, blocks, tile, in_block, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TOKEN_STRIDE: tl.constexpr
):
    """Return pointers [TILE, dims] to a tile whose block ids are `blocks`."""
    starts = blocks.to(tl.int64) * (BLOCK_SIZE * TOKEN_STRIDE)  # exceeds int32 in large caches
    if BLOCK_SIZE % TILE == 0:
        return cache_ptr + (starts + (tile % (BLOCK_SIZE // TILE)) * (TILE * TOKEN_STRIDE)) + in_block
    else:
        return cache_ptr + starts[:, None] + in_block


@triton.jit
def load_tile(
    cache,
    blocks,
    tile,
    kv_head,
    in_block,
    seen,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Load K, V [TILE, dims] and `load_scales` of a tile, for the tokens that are `seen` [TILE]; zero for others.

    Args:
        cache: pointers to K, V and their scales, which are None unless the cache is in FP8.
        blocks: the block ids of the tile.
    """
    k_ptr, v_ptr, scales_ptr = cache
    TOKEN_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    mask = seen[:, None] & (tl.arange(0, in_block.shape[1]) < HEAD_DIM)[None, :]
    k = tl.load(tile_pointers(k_ptr, blocks, tile, in_block, BLOCK_SIZE, TILE, TOKEN_STRIDE), mask=mask, other=0.0)
    v = tl.load(tile_pointers(v_ptr, blocks, tile, in_block, BLOCK_SIZE, TILE, TOKEN_STRIDE), mask=mask, other=0.0)
    return k, v, load_scales(scales_ptr, blocks, tile, 0, kv_head, seen, KV_HEADS, BLOCK_SIZE, TILE)


@triton.jit
def load_scales(
    scales_ptr,
    blocks,
    tile,
    shift,
    kv_head,
    mask,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Load the scales [TILE] of a tile moved back by `shift` tokens: words of `pack_scales`, zero outside the mask.

    If the pointer is None, they are zero and unused.
    """
    words = tl.zeros([TILE], tl.int32)
    if scales_ptr is not None:
        tokens = tl.arange(0, TILE)
        if BLOCK_SIZE % TILE == 0:
            tokens += (tile % (BLOCK_SIZE // TILE)) * TILE - shift
        else:
            tokens %= BLOCK_SIZE
        offsets = (blocks.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + tokens
        words = tl.load(scales_ptr.to(tl.pointer_type(tl.int32)) + offsets, mask=mask, other=0)
    return words


def attention_constants(num_heads: int, kv: PagedKV) -> dict[str, Any]:
    """Return the compile-time sizes of an attention kernel for `num_heads` query heads."""
    return {
        "GROUP": num_heads // kv.kv_heads,
        "HEAD_DIM": kv.head_dim,
        "HEAD_PAD": max(MIN_DOT, triton.next_power_of_2(kv.head_dim)),
        "KV_HEADS": kv.kv_heads,
        "BLOCK_SIZE": kv.block_size,
    }


def check_power_of_2(name: str, value: int, minimum: int) -> None:
    """Raise ValueError unless `value` is a power of two and at least `minimum`."""
    if value < minimum or not is_power_of_2(value):
        raise ValueError(f"{name}={value} must be a power of two of at least {minimum}")
