# pyright: reportPossiblyUnboundVariable=false
# Names in the kernels are bound under the same compile-time conditions under which they are read.
"""Grouped GEMM: one GEMM per expert for the tokens that chose it, in one kernel.

gate_up reads the tokens through the sorted pairs and applies SwiGLU to its sums; its output is in sorted order. down
reads that order, multiplies with the routing weights and writes to where the pairs were before sorting.

Programs take output tiles round-robin, a few token tiles wide, so that programs running at the same time share tokens
and weights in the L2 cache. Only the device knows the number of tiles; programs without a tile exit. TMA loads
the weights.

Up to 32 tokens, a tile is [outputs, tokens], so that the weight provides the 64 rows that Hopper's tensor cores need.
"""

import torch

from nanovllm.ops.moe.alignment import ExpertTiles
from nanovllm.ops.moe.dispatch import GroupedGemmConfig
from nanovllm.ops.triton_utils import TensorDescriptor, launch_options, sm_count, tl, triton, wait_for_inputs

GROUP_TILES = 8  # token tiles that programs go through together


@triton.jit
def _tile_position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return the token tile and the output tile of the tile with this number."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(GROUP, tiles_m - first)
    within = tile % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def _dot(x, weight, total, SWAP: tl.constexpr):
    """Add x [BLOCK_M, BLOCK_K] times weight [BLOCK_N, BLOCK_K] transposed, or the transpose of that if SWAP."""
    if SWAP:
        return tl.dot(weight, x.T, total, input_precision="ieee")
    else:
        return tl.dot(x, weight.T, total, input_precision="ieee")


@triton.jit
def _gate_up_tile(
    x_ptr,
    weight_desc,
    out_ptr,
    order_ptr,
    x_stride,
    INNER,
    H,
    expert,
    first,
    end,
    n,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    SWAP: tl.constexpr = BLOCK_M < 64
    rows = first + tl.arange(0, BLOCK_M)
    pairs = tl.load(order_ptr + rows, mask=rows < end, other=0)  # rows past the end read token 0
    columns = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (pairs // TOP_K).to(tl.int64)[:, None] * x_stride + columns[None, :]
    gate_row = expert * 2 * INNER + n
    shape: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
    gate = tl.zeros(shape, tl.float32)
    up = tl.zeros(shape, tl.float32)
    for k in range(0, H, BLOCK_K):
        x = tl.load(x_ptrs + k) if EVEN_K else tl.load(x_ptrs + k, mask=(columns < H - k)[None, :], other=0.0)
        gate = _dot(x, weight_desc.load([gate_row, k]), gate, SWAP)
        up = _dot(x, weight_desc.load([gate_row + INNER, k]), up, SWAP)
    y = gate / (1 + tl.exp(-gate)) * up
    y = y.to(out_ptr.dtype.element_ty)
    if SWAP:
        y = tl.trans(y)
    columns = n + tl.arange(0, BLOCK_N)
    mask = (rows < end)[:, None] & (columns < INNER)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * INNER + columns[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["max_tiles"])
def _gate_up_kernel(
    x_ptr,
    weight_desc,
    out_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    x_stride,
    INNER,
    H,
    max_tiles,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVE: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_n = tl.cdiv(INNER, BLOCK_N)
    wait_for_inputs(PDL)
    tiles_m = tl.load(num_tiles_ptr)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _tile_position(tile, tiles_m, tiles_n, GROUP)
        expert = tl.load(tiles_ptr + m)
        first = tl.load(tiles_ptr + max_tiles + m)
        end = tl.load(tiles_ptr + 2 * max_tiles + m)
        half: tl.constexpr = BLOCK_M // 2 if HALVE else BLOCK_M
        if HALVE and end - first <= half:
            _gate_up_tile(
                x_ptr, weight_desc, out_ptr, order_ptr, x_stride, INNER, H, expert, first, end, n * BLOCK_N,
                TOP_K, half, BLOCK_N, BLOCK_K, EVEN_K,
            )  # fmt: skip
        else:
            _gate_up_tile(
                x_ptr, weight_desc, out_ptr, order_ptr, x_stride, INNER, H, expert, first, end, n * BLOCK_N,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
            )  # fmt: skip


@triton.jit
def _down_tile(
    hidden_desc,
    weight_desc,
    out_ptr,
    order_ptr,
    routing_ptr,
    H,
    INNER,
    expert,
    first,
    end,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SWAP: tl.constexpr = BLOCK_M < 64
    rows = first + tl.arange(0, BLOCK_M)
    pairs = tl.load(order_ptr + rows, mask=rows < end, other=0)
    routing = tl.load(routing_ptr + pairs).to(tl.float32)
    shape: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
    y = tl.zeros(shape, tl.float32)
    for k in range(0, INNER, BLOCK_K):
        # Rows past the end belong to the next expert; they are not stored.
        y = _dot(hidden_desc.load([first, k]), weight_desc.load([expert * H + n, k]), y, SWAP)
    y *= routing[None, :] if SWAP else routing[:, None]
    y = y.to(out_ptr.dtype.element_ty)
    if SWAP:
        y = tl.trans(y)
    columns = n + tl.arange(0, BLOCK_N)
    mask = (rows < end)[:, None] & (columns < H)[None, :]
    tl.store(out_ptr + pairs.to(tl.int64)[:, None] * H + columns[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["max_tiles"])
def _down_kernel(
    hidden_desc,
    half_desc,
    weight_desc,
    out_ptr,
    order_ptr,
    routing_ptr,
    tiles_ptr,
    num_tiles_ptr,
    H,
    INNER,
    max_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVE: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_n = tl.cdiv(H, BLOCK_N)
    wait_for_inputs(PDL)
    tiles_m = tl.load(num_tiles_ptr)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _tile_position(tile, tiles_m, tiles_n, GROUP)
        expert = tl.load(tiles_ptr + m)
        first = tl.load(tiles_ptr + max_tiles + m)
        end = tl.load(tiles_ptr + 2 * max_tiles + m)
        half: tl.constexpr = BLOCK_M // 2 if HALVE else BLOCK_M
        if HALVE and end - first <= half:
            _down_tile(
                half_desc, weight_desc, out_ptr, order_ptr, routing_ptr, H, INNER, expert, first, end, n * BLOCK_N,
                half, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _down_tile(
                hidden_desc, weight_desc, out_ptr, order_ptr, routing_ptr, H, INNER, expert, first, end, n * BLOCK_N,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


def _num_programs(tiles: ExpertTiles, n: int, config: GroupedGemmConfig) -> int:
    bound = tiles.tiles.shape[1] * triton.cdiv(n, config.block_n)
    return min(bound, config.programs * sm_count(tiles.order.device))


def grouped_gate_up_triton(
    x: torch.Tensor, gate_up: torch.Tensor, tiles: ExpertTiles, top_k: int, config: GroupedGemmConfig
) -> torch.Tensor:
    """Return silu(gate x) * up x [T top_k, I] of the sorted pairs, with sums in float32, rounded once.

    Args:
        x, gate_up: as in `experts`.
        top_k: experts per token.
    """
    (num_experts, rows, h), i = gate_up.shape, gate_up.shape[1] // 2
    hidden = torch.empty((len(tiles.order), i), dtype=x.dtype, device=x.device)
    weight = gate_up.view(num_experts * rows, h)
    _gate_up_kernel[(_num_programs(tiles, i, config),)](
        x,
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        hidden,
        tiles.order,
        tiles.tiles,
        tiles.num_tiles,
        x.stride(0),
        i,
        h,
        tiles.tiles.shape[1],
        TOP_K=top_k,
        BLOCK_M=tiles.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_K=h % config.block_k == 0,
        GROUP=GROUP_TILES,
        HALVE=config.halve,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )
    return hidden


def grouped_down_triton(
    hidden: torch.Tensor, down: torch.Tensor, tiles: ExpertTiles, weights: torch.Tensor, config: GroupedGemmConfig
) -> torch.Tensor:
    """Return weight * down(hidden) of each pair [T, top_k, H], with sums in float32, rounded once.

    Args:
        hidden: [T top_k, I] of the sorted pairs, contiguous.
        down, weights: as in `experts`.
    """
    num_experts, h, i = down.shape
    out = torch.empty((*weights.shape, h), dtype=hidden.dtype, device=hidden.device)
    weight = down.view(num_experts * h, i)
    block = [tiles.block_m, config.block_k]
    half_block = [tiles.block_m // 2, config.block_k] if config.halve else block
    _down_kernel[(_num_programs(tiles, h, config),)](
        TensorDescriptor.from_tensor(hidden, block),
        TensorDescriptor.from_tensor(hidden, half_block),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        out,
        tiles.order,
        weights,
        tiles.tiles,
        tiles.num_tiles,
        h,
        i,
        tiles.tiles.shape[1],
        BLOCK_M=tiles.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=GROUP_TILES,
        HALVE=config.halve,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(hidden.device),
    )
    return out
