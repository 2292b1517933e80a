"""The scales of FP8 weights, as the kernels read them."""

import torch

from nanovllm.ops.float8 import FP8_MAX
from nanovllm.ops.triton_utils import tl, triton


def scale_layout(weight: torch.Tensor, scale: torch.Tensor | None) -> str:
    """Return what a scale of an FP8 weight [..., N, K] covers.

    It is "block" (128 x 128), "row_block" (128 columns of a row), "row", or "none" if there are no scales.
    """
    if scale is None:
        return "none"
    if scale.shape[-2] < weight.shape[-2]:
        return "block"
    return "row" if scale.shape[-1] == 1 else "row_block"


@triton.jit
def scales_for(largest, MAX: tl.constexpr = FP8_MAX):
    """Return the scales of groups whose largest magnitudes are given: 1 for zeros."""
    return tl.where(largest > 0, largest / MAX, 1.0)


@triton.jit
def load_scales(scale_ptr, first, end, K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr, SCALES: tl.constexpr):
    """Return the scale of each column [1, K_PAD] of the rows from `first` on, or of each row and column [ROWS, K_PAD].

    Args:
        end: end of the weight's rows.
    """
    PADDED: tl.constexpr = K_PAD // 128
    blocks = tl.arange(0, PADDED)
    if SCALES == "block":
        HEIGHT: tl.constexpr = 1
        rows = tl.arange(0, 1) + first // 128
    else:
        HEIGHT: tl.constexpr = ROWS
        rows = tl.minimum(first + tl.arange(0, ROWS), end - 1)
    pointers = scale_ptr + rows[:, None] * tl.cdiv(K, 128) + blocks[None, :]
    scales = tl.load(pointers, mask=(blocks * 128 < K)[None, :], other=0.0)
    return tl.reshape(tl.broadcast_to(scales[:, :, None], [HEIGHT, PADDED, 128]), [HEIGHT, K_PAD])


@triton.jit
def block_scale_ptrs(scale_ptr, first, end, K, ROWS: tl.constexpr, SCALES: tl.constexpr):
    """Return pointers to the scales of the first 128 columns of the rows from `first` on: one, or [ROWS].

    Args:
        end: end of the weight's rows.
    """
    if SCALES == "row_block":
        rows = tl.minimum(first + tl.arange(0, ROWS), end - 1)
        return scale_ptr + rows * tl.cdiv(K, 128)
    else:
        return scale_ptr + first // 128 * tl.cdiv(K, 128)


@triton.jit
def scales_of_expert(scale_ptr, expert, N, K, SCALES: tl.constexpr):
    """Return a pointer to the first scale of this expert's weight [N, K]."""
    if SCALES == "block":
        return scale_ptr + expert * tl.cdiv(N, 128) * tl.cdiv(K, 128)
    elif SCALES == "row_block":
        return scale_ptr + expert * N * tl.cdiv(K, 128)
    else:
        return scale_ptr + expert * N
