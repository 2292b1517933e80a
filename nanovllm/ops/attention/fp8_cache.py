"""Keys and values in FP8: e4m3 numbers, with a float16 scale for each token and KV head.

The scale is the largest magnitude of the head over the largest number of e4m3. So nothing saturates, and nothing needs
calibration. The numbers of a token do not depend on other tokens.

Kernels compute with float16 tiles of keys and values: e4m3 converts to float16 exactly and in a fifth of the
instructions that bfloat16 takes, and its scale multiplies two numbers per instruction. float32 runs use float32.
"""

import torch

from nanovllm.ops.float8 import FP8, FP8_MAX
from nanovllm.ops.triton_utils import INTERPRETED, tl, triton

# The smallest float16 with full precision, and the largest scale whose products are finite in float16.
MIN_SCALE = 2.0**-14
MAX_SCALE = 146.0


def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the e4m3 numbers of keys or values [..., Dh], and their scales [...] in float16."""
    x = x.float()
    amax = x.abs().amax(-1)
    # A tensor divides exactly, as the kernels do. By a number, a GPU multiplies with the reciprocal.
    scales = (amax / torch.full_like(amax, FP8_MAX)).clamp(MIN_SCALE, MAX_SCALE).half()
    # Numbers above the bound become NaN in torch.
    return (x * scales.float().reciprocal()[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales


def dequantize_kv(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the float32 keys or values of e4m3 numbers [..., Dh] and scales [...]."""
    return x.float() * scales.float()[..., None]


# -- in kernels. All that store use the same functions, so that the numbers of a token never differ --------------------


@triton.jit
def fp8_scale(magnitude, MAX: tl.constexpr = FP8_MAX, LOW: tl.constexpr = MIN_SCALE, HIGH: tl.constexpr = MAX_SCALE):
    """Return the scales of heads, whose largest magnitudes are given."""
    return tl.minimum(tl.maximum(tl.div_rn(magnitude, MAX), LOW), HIGH).to(tl.float16)


@triton.jit
def to_fp8(x, scale):
    """Return the e4m3 numbers of x [R, dims] with the scales [R, 1]. Larger numbers saturate."""
    return (x.to(tl.float32) * tl.div_rn(1.0, scale.to(tl.float32))).to(tl.float8e4nv)


@triton.jit
def quantize_heads(x):
    """Return the e4m3 numbers of heads [R, dims], and their scales [R]."""
    scale = fp8_scale(tl.max(tl.abs(x.to(tl.float32)), 1))
    return to_fp8(x, scale[:, None]), scale


@triton.jit
def pack_scales(k_scale, v_scale):
    """Return words with the scales of keys in the low half and those of values in the high half."""
    low = k_scale.to(tl.uint16, bitcast=True).to(tl.int32)
    return low | (v_scale.to(tl.uint16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def key_scales(words):
    """Return the scales of keys in words of `pack_scales`, float16."""
    return words.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def value_scales(words):
    """Return the scales of values in words of `pack_scales`, float16."""
    return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """Return the e4m3 numbers of a tile in DTYPE, float16 or float32. A tile in another dtype stays as it is."""
    if x.dtype == tl.float8e4nv:
        x = x.to(DTYPE)
        if x.dtype == tl.float16 and not INTERPRETED:
            # Without an instruction that it must not move, the compiler would transpose V before the conversion, and so
            # load it from shared memory byte by byte.
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2)
    return x


@triton.jit
def query_operand(q, scales_ptr):
    """Return queries in the dtype in which dot products with the cache are computed (see above)."""
    if scales_ptr is not None and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    return q
