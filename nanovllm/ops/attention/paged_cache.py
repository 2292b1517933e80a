"""The paged KV cache as attention kernels read it: addresses of tiles, constants, and checks of arguments.

A *tile* is the group of consecutive tokens that one loop iteration of a kernel processes. A cache *block* holds whole
tiles, or a tile spans whole blocks.
"""

from typing import Any

import torch

from nanovllm.ops.triton_utils import tl, triton

LOG2E = 1.4426950408889634
MIN_DOT = 16  # smallest side of a tensor-core tile


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
    k_ptr, v_ptr, blocks, tile, in_block, mask, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TOKEN_STRIDE: tl.constexpr
):
    """Load K and V [TILE, dims] of a tile whose block ids are `blocks`; zero outside the mask."""
    k_ptrs = tile_pointers(k_ptr, blocks, tile, in_block, BLOCK_SIZE, TILE, TOKEN_STRIDE)
    v_ptrs = tile_pointers(v_ptr, blocks, tile, in_block, BLOCK_SIZE, TILE, TOKEN_STRIDE)
    return tl.load(k_ptrs, mask=mask, other=0.0), tl.load(v_ptrs, mask=mask, other=0.0)


def attention_constants(q: torch.Tensor, k_cache: torch.Tensor) -> dict[str, Any]:
    """Return the compile-time sizes of an attention kernel for q [N, H, Dh] and a cache [blocks, block_size, K, Dh]."""
    _, block_size, kv_heads, head_dim = k_cache.shape
    return {
        "GROUP": q.shape[1] // kv_heads,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": max(MIN_DOT, triton.next_power_of_2(head_dim)),
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
    }


def check_power_of_2(name: str, value: int, minimum: int) -> None:
    """Raise ValueError unless `value` is a power of two and at least `minimum`."""
    if value < minimum or value & (value - 1):
        raise ValueError(f"{name}={value} must be a power of two of at least {minimum}")


def check_attention_inputs(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise ValueError unless queries [N, H, Dh] fit two equal, contiguous caches [blocks, block_size, K, Dh]."""
    if k_cache.shape != v_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must be contiguous and of one shape"
        )
    if q.shape[1] % k_cache.shape[2] or q.shape[2] != k_cache.shape[3] or q.stride(2) != 1:
        raise ValueError(
            f"q of shape {tuple(q.shape)} and strides {q.stride()} does not fit a cache of {k_cache.shape[2]} KV heads "
            f"of size {k_cache.shape[3]}: the KV heads must divide the heads and each head be contiguous"
        )
