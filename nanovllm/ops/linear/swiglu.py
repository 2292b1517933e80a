"""SwiGLU for many tokens: gate and up projection and the activation in one kernel.

After a cuBLAS GEMM, SiLU and product would read back everything that was just written. Here a program holds the gate
and up sums of its tile in registers, and writes half as much, once.

Persistent programs take output tiles round-robin, a few token tiles wide, so that programs running at the same time
share tokens and weights in the L2 cache. Operands are loaded by the tensor memory accelerator (TMA) of Hopper and
later.
"""

from typing import NamedTuple

import torch

from nanovllm.ops.triton_utils import (
    HAVE_TRITON,
    TensorDescriptor,
    fits_large_tma_tiles,
    launch_options,
    sm_count,
    tl,
    triton,
    wait_for_inputs,
)

GROUP_TILES = 8  # token tiles that programs go through together


class SwigluConfig(NamedTuple):
    """Compile-time settings of the kernel.

    Attributes:
        block_m, block_n, block_k: tokens, outputs and inputs of a tile.
        num_warps, num_stages: warps and pipeline stages.
        programs: programs per SM.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 1


# The fastest settings of a sweep on an H100 with `python -m benchmarks.tune swiglu`. Two warpgroups share the weight
# tiles; one program fills an SM's shared memory.
DEFAULT_CONFIG = SwigluConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)


@triton.jit(do_not_specialize=["num_tokens"])
def _swiglu_kernel(
    x_desc,
    weight_desc,
    out_desc,
    num_tokens,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    wait_for_inputs(PDL)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first = tile // (GROUP * tiles_n) * GROUP
        height = min(GROUP, tiles_m - first)
        within = tile % (GROUP * tiles_n)
        m = (first + within % height) * BLOCK_M
        n = within // height * BLOCK_N
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([m, k])
            gate = tl.dot(x, weight_desc.load([n, k]).T, gate)
            up = tl.dot(x, weight_desc.load([N + n, k]).T, up)
        y = gate / (1 + tl.exp(-gate)) * up
        out_desc.store([m, n], y.to(out_desc.dtype))


def is_swiglu(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether `swiglu_triton` is the fastest way to multiply x [T, K] with `weight` [2 N, K] of the same dtype.

    It is if its tiles keep all SMs busy most of the time. TMA needs rows of whole 16 bytes.
    """
    if not HAVE_TRITON or not x.is_cuda or x.itemsize != 2 or x.shape[1] % 8 or len(weight) % 16:
        return False
    busy = 2 * _num_tiles(len(x), len(weight) // 2, DEFAULT_CONFIG) >= 5 * sm_count(x.device)
    plain = x.ndim == 2 and x.is_contiguous() and weight.is_contiguous()
    return busy and plain and fits_large_tma_tiles(x.device)


def _num_tiles(num_tokens: int, n: int, config: SwigluConfig) -> int:
    return triton.cdiv(num_tokens, config.block_m) * triton.cdiv(n, config.block_n)


def swiglu_triton(x: torch.Tensor, weight: torch.Tensor, config: SwigluConfig = DEFAULT_CONFIG) -> torch.Tensor:
    """Return silu(x G^T) * x U^T, with sums in float32, rounded once.

    Args:
        x: [T, K], accepted by `is_swiglu`.
        weight: [2 N, K], G and U, plain and contiguous.

    Returns:
        [T, N].
    """
    (num_tokens, k), n = x.shape, len(weight) // 2
    out = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)
    num_tiles = _num_tiles(num_tokens, n, config)
    _swiglu_kernel[(min(num_tiles, config.programs * sm_count(x.device)),)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        TensorDescriptor.from_tensor(out, [config.block_m, config.block_n]),
        num_tokens,
        n,
        k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=GROUP_TILES,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )
    return out
