"""Dispatch by number of tokens: which GEMM runs for how many tokens of a step, who adds, what is captured and compiled.

Limits in bytes of all-reduces are in `ops/comm`, and when prefixes are shared in `ops/attention/shared_prefix.py`.

This module imports no kernel, so that kernels, layers, graphs and warm-up can read it.
"""

from bisect import bisect_left
from enum import Enum
from sys import maxsize
from typing import NamedTuple


class Kernel(Enum):
    """A way to compute the GEMM of a linear layer.

    The Triton kernels check what else they need in `is_gemv` and `is_gemm` (Hopper, TMA, dtype, contiguity). The
    library replaces a kernel that does not fit, and is all that a CPU has.
    """

    GEMV = "Triton; fuses the RMSNorm before it, the bias, SwiGLU and the residual add"
    GEMM = "Triton, after rms_norm; fuses the bias, SwiGLU and the residual add"
    LIBRARY = "cuBLAS or oneDNN, after rms_norm; silu_mul follows. `is_swiglu` says where one Triton kernel does both"


class Adder(Enum):
    """A way to add the output of o_proj or down_proj to the residual stream. `choose_adder` knows the exceptions."""

    GEMM = "the GEMV or GEMM; with several ranks only rank 0 adds the residual, and the next norm all-reduces"
    NEXT_NORM = "the RMSNorm that follows, in whose kernel several ranks also all-reduce"
    ALL_REDUCE_GEMV = "the GEMV, which also all-reduces, through memory that the ranks share"
    SLICED_GEMM = "the GEMM, in slices: each is sent to the other rank while the next is computed"


class Regime(NamedTuple):
    """A row of the table: the kernels that run for up to `max_tokens` tokens.

    Attributes:
        max_tokens: upper bound, included.
        kernel: computes qkv_proj, gate_up_proj, o_proj, down_proj and lm_head.
        adder, ranks_adder: adds o_proj and down_proj to the residual stream, on one rank and on several.
        one_kernel_attention: one kernel does QK-norm, RoPE, KV store and attention in a step of decode tokens only.
        captured: numbers of tokens of the CUDA graphs for steps with prompt tokens.
        compiled: numbers of tokens for which kernels are compiled at the start, besides the largest step.
    """

    max_tokens: int
    kernel: Kernel
    adder: Adder
    ranks_adder: Adder
    one_kernel_attention: bool = False
    captured: tuple[int, ...] = ()
    compiled: tuple[int, ...] = ()


# GEMV is compiled for each number of tokens, GEMM for each power of two.
# Above 4 sequences, all else takes so long that fusing QK-norm, RoPE and attention does not matter.
# Up to 512 tokens, the output of cuBLAS is still in the L2 cache when the next norm adds it.
# Above 2048 tokens, a step takes the GPU longer than the host, so that a graph gains nothing.
TABLE = (
    Regime(4, Kernel.GEMV, Adder.GEMM, Adder.ALL_REDUCE_GEMV, one_kernel_attention=True, compiled=(1, 2, 4)),
    Regime(64, Kernel.GEMM, Adder.GEMM, Adder.NEXT_NORM, captured=(16, 32, 64), compiled=(16, 32, 64)),
    Regime(
        512, Kernel.LIBRARY, Adder.NEXT_NORM, Adder.NEXT_NORM, captured=(96, 128, 192, 256, 384, 512), compiled=(256,)
    ),
    Regime(2048, Kernel.LIBRARY, Adder.GEMM, Adder.GEMM, captured=(768, 1024, 1536, 2048), compiled=(2048,)),
    Regime(maxsize, Kernel.LIBRARY, Adder.GEMM, Adder.SLICED_GEMM),
)
_BOUNDS = [regime.max_tokens for regime in TABLE]

MAX_GEMV_TOKENS = TABLE[0].max_tokens  # ranks have memory for an all-reduce of so many tokens in a GEMV
MAX_CAPTURED_TOKENS = max(size for regime in TABLE for size in regime.captured)
GEMM_MAX_OUTPUTS = 1 << 16  # GEMM leaves more outputs to the library: the logits of a large vocabulary
ZERO_BIAS_COLUMNS = 4096  # of a wider weight, cuBLASLt may have a faster kernel for NEXT_NORM if there is a bias


def regime_of(num_tokens: int) -> Regime:
    """Return the row of the table for this many tokens."""
    return TABLE[bisect_left(_BOUNDS, num_tokens)]


def capture_sizes(max_tokens: int) -> list[int]:
    """Return the numbers of tokens, up to `max_tokens`, of the CUDA graphs for steps with prompt tokens."""
    return [size for regime in TABLE for size in regime.captured if size <= max_tokens]


def compile_sizes(max_tokens: int) -> list[int]:
    """Return the numbers of tokens, up to `max_tokens`, for which kernels are compiled at the start."""
    return sorted({min(size, max_tokens) for regime in TABLE for size in regime.compiled})
