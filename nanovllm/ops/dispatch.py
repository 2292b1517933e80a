"""The choices that depend on a step's number of tokens, as one table.

They are the GEMM kernel of linear layers, the operation that adds its output to the residual stream, the sizes of the
CUDA graphs of mixed steps, and for how many tokens kernels are compiled. Other choices are next to their kernels: the
all-reduce depends on bytes (`ops/comm`), and sharing prefixes depends on their lengths
(`ops/attention/shared_prefix.py`).

This module imports no kernel, so that kernels, layers, graphs and warm-up can read it.
"""

from bisect import bisect_left
from enum import Enum, auto
from sys import maxsize
from typing import NamedTuple


class Kernel(Enum):
    """A way to compute the GEMM of a linear layer.

    `is_gemv` and `is_gemm` check what else the Triton kernels need (Hopper, TMA, dtype, contiguity). Where they return
    False, and on a CPU, the library is used.
    """

    GEMV = auto()  # Triton; fuses the RMSNorm before it, the bias, SwiGLU and the residual add
    GEMM = auto()  # Triton, after rms_norm; fuses the bias, SwiGLU and the residual add
    LIBRARY = auto()  # cuBLAS or oneDNN, after rms_norm and before silu_mul; Triton with SwiGLU where `is_swiglu`


class Fp8Kernel(Enum):
    """A way to compute the GEMM of a linear layer with FP8 weights on a GPU."""

    GEMV = auto()  # Triton; reads activations as they are; fuses the RMSNorm, the bias, SwiGLU and the residual add
    GEMM = auto()  # Triton; the kernel before it quantizes activations; fuses the bias, SwiGLU and the residual add
    # torch._scaled_mm, with activations quantized in the same way; GEMM where `uses_scaled_mm` returns False
    LIBRARY = auto()


class Adder(Enum):
    """The operation that adds the output of o_proj or down_proj to the residual stream.

    `choose_adder` in ops/linear/linear.py takes another one where the operands do not fit.
    """

    LINEAR = auto()  # the linear layer's own kernel; of several ranks only rank 0 adds, and the next norm all-reduces
    NEXT_NORM = auto()  # the RMSNorm that follows; with several ranks, it also all-reduces
    ALL_REDUCE_GEMV = auto()  # the GEMV, which also all-reduces through memory that the ranks share
    SLICED_GEMM = auto()  # the library's GEMM, slice by slice: each is sent while the next one is computed


class Regime(NamedTuple):
    """A row of the table: the kernels that run in a step of up to `max_tokens` tokens.

    Attributes:
        max_tokens: upper bound, included. A step of decode rows has a token for each row.
        kernel: computes linear layers.
        fp8_kernel: computes those that have FP8 weights.
        adder, ranks_adder: add the output of o_proj and down_proj to the residual stream, on one rank and on several.
        one_kernel_attention: one kernel does QK-norm, RoPE, KV store and attention, if the step has decode rows only.
        captured: numbers of tokens of the CUDA graphs for mixed steps.
        compiled: numbers of tokens for which kernels are compiled at the start, besides the largest step.
    """

    max_tokens: int
    kernel: Kernel
    fp8_kernel: Fp8Kernel
    adder: Adder
    ranks_adder: Adder
    one_kernel_attention: bool = False
    captured: tuple[int, ...] = ()
    compiled: tuple[int, ...] = ()


# fmt: off
TABLE = (
    #      max_tokens kernel      fp8_kernel         adder            ranks_adder
    # GEMV is compiled for each number of tokens, and GEMM for each power of two.
    Regime(1,     Kernel.GEMV,    Fp8Kernel.GEMV,    Adder.LINEAR,    Adder.ALL_REDUCE_GEMV,
           one_kernel_attention=True, compiled=(1,)),
    # Large weights use GEMM from two tokens on; see GEMV_MAX_PRODUCTS.
    Regime(4,     Kernel.GEMV,    Fp8Kernel.GEMM,    Adder.LINEAR,    Adder.ALL_REDUCE_GEMV,
           one_kernel_attention=True, compiled=(2, 3, 4)),
    # The other kernels of a step take so long from here on that fusing QK-norm, RoPE and attention gains nothing.
    Regime(64,    Kernel.GEMM,    Fp8Kernel.GEMM,    Adder.LINEAR,    Adder.NEXT_NORM,
           captured=(16, 32, 64), compiled=(16, 32, 64)),
    # The output of cuBLAS is still in the L2 cache when the next norm adds it.
    Regime(512,   Kernel.LIBRARY, Fp8Kernel.LIBRARY, Adder.NEXT_NORM, Adder.NEXT_NORM,
           captured=(96, 128, 192, 256, 384, 512), compiled=(128, 256)),
    Regime(2048,  Kernel.LIBRARY, Fp8Kernel.LIBRARY, Adder.LINEAR,    Adder.LINEAR,
           captured=(768, 1024, 1536, 2048), compiled=(2048,)),
    # Such a step takes the GPU longer than the host, so that a graph gains nothing.
    Regime(maxsize, Kernel.LIBRARY, Fp8Kernel.LIBRARY, Adder.LINEAR,  Adder.SLICED_GEMM),
)
# fmt: on
_BOUNDS = [regime.max_tokens for regime in TABLE]

# Ranks allocate memory for ALL_REDUCE_GEMV with up to this many tokens.
MAX_GEMV_TOKENS = max(regime.max_tokens for regime in TABLE if regime.ranks_adder is Adder.ALL_REDUCE_GEMV)
MAX_CAPTURED_TOKENS = max(size for regime in TABLE for size in regime.captured)
# For several tokens, GEMV multiplies at most this many values, tokens times weights. Its arithmetic for more takes
# longer than reading the weights, and GEMM is faster. docs/benchmarks.md has the figures.
GEMV_MAX_PRODUCTS = 1 << 24
# Layers with more outputs than this use the library instead of GEMM. The head of a large vocabulary is one.
GEMM_MAX_OUTPUTS = 1 << 16
# For weights with more columns than this, a bias may make the GEMM faster, because torch then calls cuBLASLt.
ZERO_BIAS_COLUMNS = 4096


def regime_of(num_tokens: int) -> Regime:
    """Return the row of the table for this many tokens."""
    return TABLE[bisect_left(_BOUNDS, num_tokens)]


def kernel_of(num_tokens: int, num_weights: int) -> Kernel:
    """Return the kernel that multiplies this many tokens by a layer's weights."""
    kernel = regime_of(num_tokens).kernel
    if kernel is Kernel.GEMV and num_tokens > 1 and num_tokens * num_weights > GEMV_MAX_PRODUCTS:
        return Kernel.GEMM
    return kernel


def mixed_capture_sizes(max_tokens: int) -> list[int]:
    """Return the numbers of tokens, up to `max_tokens`, of the CUDA graphs for mixed steps."""
    return [size for regime in TABLE for size in regime.captured if size <= max_tokens]


def compile_sizes(max_tokens: int) -> list[int]:
    """Return the numbers of tokens, up to `max_tokens`, for which kernels are compiled at the start."""
    return sorted({min(size, max_tokens) for regime in TABLE for size in regime.compiled})
