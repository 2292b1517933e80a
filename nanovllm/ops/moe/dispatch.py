"""Dispatch of mixtures of experts: which kernels run for how many tokens, and the tiles of the grouped GEMM.

The number of tokens chooses the kernel, as in the table of `ops/dispatch.py`. The number of pairs (token, chosen
expert) per expert chooses the tiles.

This module imports no kernel.
"""

from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum, auto
from math import inf
from typing import NamedTuple


class ExpertKernel(Enum):
    """A way to compute the experts of a layer on a GPU."""

    GEMV = auto()  # one GEMV per pair (token, expert); fuses the RMSNorm, SwiGLU, weights, sum and residual add
    GEMM = auto()  # after rms_norm, grouped GEMM over the pairs sorted by expert, with SwiGLU and weights; then the sum


class ExpertRegime(NamedTuple):
    """A row of the table: the kernel that runs for up to `max_tokens` tokens."""

    max_tokens: float
    kernel: ExpertKernel


class GroupedGemmConfig(NamedTuple):
    """Settings of a grouped GEMM.

    Attributes:
        block_n, block_k: outputs (of gate and up each) and inputs of a tile. `ExpertTiles` has the tokens.
        num_warps, num_stages: warps and pipeline stages.
        programs: most programs per SM. With 1, they loop over tiles. 64 is more than an SM can run: no bound.
        halve: compute a tile with at most block_m / 2 tokens as half a tile. Needs a block_m of 128 or more.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int
    halve: bool = False


class Tiling(NamedTuple):
    """The tiles of both grouped GEMMs for an average of up to `max_pairs` pairs per expert.

    Attributes:
        block_m: tokens of a tile.
    """

    max_pairs: float
    block_m: int
    gate_up: GroupedGemmConfig
    down: GroupedGemmConfig


# More tokens share experts, and a GEMV would read those from the L2 cache once per token.
REGIMES = (
    ExpertRegime(4, ExpertKernel.GEMV),
    ExpertRegime(inf, ExpertKernel.GEMM),
)

# Measured on an H200 with the shapes of Qwen3-30B-A3B and Qwen3.5-35B-A3B. Up to 32 pairs per expert, reading the
# weights is the limit, so tiles are small; with more, it is arithmetic.
# fmt: off
TILINGS = (
    #      max_pairs block_m  gate_up and down: block_n, block_k, num_warps, num_stages, programs, halve
    Tiling(8,        16,      GroupedGemmConfig(64,  128, 4, 3, 64), GroupedGemmConfig(128, 128, 4, 3, 64)),
    Tiling(24,       32,      GroupedGemmConfig(128, 64,  8, 3, 64), GroupedGemmConfig(64,  128, 4, 3, 64)),
    Tiling(48,       64,      GroupedGemmConfig(128, 64,  8, 5, 1),  GroupedGemmConfig(128, 64,  4, 3, 64)),
    Tiling(384,      128,     GroupedGemmConfig(128, 64,  8, 4, 64, True), GroupedGemmConfig(256, 64, 8, 4, 64, True)),
    Tiling(768,      128,     GroupedGemmConfig(128, 64,  8, 4, 64, True), GroupedGemmConfig(256, 64, 8, 4, 1, True)),
    Tiling(inf,      128,     GroupedGemmConfig(128, 64,  8, 3, 1),  GroupedGemmConfig(128, 64, 8, 3, 64, True)),
)
# For FP8 weights, measured on an H200 with the shapes of Qwen3-30B-A3B. Tiles have 128 inputs, and those of gate_up 128
# outputs: a group of the quantized result.
FP8_TILINGS = (
    #      max_pairs block_m  gate_up and down: block_n, block_k, num_warps, num_stages, programs, halve
    Tiling(8,        16,      GroupedGemmConfig(128, 128, 4, 3, 64), GroupedGemmConfig(64,  128, 4, 4, 64)),
    Tiling(24,       32,      GroupedGemmConfig(128, 128, 4, 3, 64), GroupedGemmConfig(64,  128, 4, 4, 64)),
    Tiling(inf,      64,      GroupedGemmConfig(128, 128, 8, 3, 64), GroupedGemmConfig(128, 128, 4, 4, 64)),
)
# fmt: on

MAX_FEW_PAIRS = 4096  # one program sorts up to this many pairs faster than two kernels

# For a GPU with less shared memory than Hopper.
SMALL_TILING = Tiling(inf, 64, GroupedGemmConfig(64, 32, 4, 3, 64), GroupedGemmConfig(64, 32, 4, 3, 64))


def expert_regime_of(num_tokens: int) -> ExpertRegime:
    """Return the row of the table for this many tokens."""
    return REGIMES[bisect_left([regime.max_tokens for regime in REGIMES], num_tokens)]


def tiling_of(num_pairs: int, num_experts: int, tilings: Sequence[Tiling] = TILINGS) -> Tiling:
    """Return the tiles for this many pairs."""
    return tilings[bisect_left([tiling.max_pairs for tiling in tilings], num_pairs / num_experts)]


def expert_compile_sizes(
    num_experts: int, top_k: int, max_tokens: int, tilings: Sequence[Tiling] = TILINGS
) -> list[int]:
    """Return the numbers of tokens, up to `max_tokens`, at which other kernels or tiles start."""
    last_pairs = [MAX_FEW_PAIRS] + [tiling.max_pairs * num_experts for tiling in tilings[:-1]]
    last_tokens = [regime.max_tokens for regime in REGIMES[:-1]] + [pairs // top_k for pairs in last_pairs]
    return sorted({int(tokens) + 1 for tokens in last_tokens if tokens < max_tokens})
