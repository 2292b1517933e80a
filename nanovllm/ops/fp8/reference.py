"""FP8 weights in plain torch: the format's formulas, and the references of the kernels in this folder.

A weight [N, K] of 8-bit floats (e4m3) has scales in float32. One scale covers a block of rows and columns, and the
weight is `weight * scale`. The shape of the scales says which block it is: [ceil(N / 128), ceil(K / 128)],
[N, ceil(K / 128)] or [N, 1]. Experts have one more dimension in front.
"""

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.float8 import FP8, FP8_MAX
from nanovllm.ops.linear.reference import linear_torch
from nanovllm.ops.moe.reference import experts_torch
from nanovllm.ops.norm_rope.reference import rms_norm_torch

BLOCK = 128  # rows and columns of a weight's block, and columns of a token's group
Block = tuple[int, int]


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Return the shape of the scales of a weight [..., N, K]. A block may be larger than the weight."""
    *batch, rows, columns = shape
    return (*batch, ceil_div(rows, block[0]), ceil_div(columns, block[1]))


def block_of_scale(weight: torch.Tensor, scale: torch.Tensor) -> Block:
    """Return how many rows and columns of the weight [..., N, K] one of its scales covers, from the shapes."""
    for block in ((BLOCK, BLOCK), (1, BLOCK), (1, weight.shape[-1])):
        if tuple(scale.shape) == scale_shape(tuple(weight.shape), block):
            return block
    raise ValueError(f"scales of shape {list(scale.shape)} do not fit a weight of shape {list(weight.shape)}")


def expand_scale(scale: torch.Tensor, shape: tuple[int, ...], block: Block) -> torch.Tensor:
    """Return the scale of each element of a weight of this `shape` [..., N, K]."""
    *_, rows, columns = shape
    by_row = scale.repeat_interleave(min(block[0], rows), -2)[..., :rows, :]
    return by_row.repeat_interleave(min(block[1], columns), -1)[..., :columns]


def quantize_weight(weight: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float weight [..., N, K] in e4m3, and its scales: a block's largest magnitude / 448, 1 for zeros."""
    shape = tuple(weight.shape)
    *_, rows, columns = shape
    height = min(block[0], rows)
    width = min(block[1], columns)
    values = weight.float()
    padded = torch.nn.functional.pad(values, (0, -columns % width, 0, -rows % height))
    amax = padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, height)).abs().amax((-3, -1))
    # A tensor divides exactly. By a number, a GPU multiplies with the reciprocal, and scales would differ from a CPU's.
    scale = torch.where(amax > 0, amax / torch.full_like(amax, FP8_MAX), 1.0)
    return _to_fp8(values / expand_scale(scale, shape, block)), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """Return weight * scale in `dtype`, computed in float32, for a weight [..., N, K] in e4m3."""
    return (weight.float() * expand_scale(scale.float(), tuple(weight.shape), block)).to(dtype)


def quantize_rows_torch(x: torch.Tensor, group: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Return activations [T, K] in e4m3, and a scale for each group of a token's columns: [T, ceil(K / group)]."""
    return quantize_weight(x, (1, group))


def linear_fp8_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T + b in float32 and x's dtype, with activations that are not quantized.

    Args:
        weight, scale: [N, K] in e4m3, or gate and up [2 N, K] if `gated`, and its scales.
        bias, norm, gated, residual: as in `linear_torch`.
    """
    plain = dequantize(weight, scale, block_of_scale(weight, scale), torch.float32)
    return linear_torch(x, plain, bias, norm=norm, gated=gated, residual=residual)


def experts_fp8_torch(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
    shared: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Return what `experts` returns for the dequantized weights, with activations that are not quantized.

    Args:
        gate_up, down: [E, 2 I, H] and [E, H, I] in e4m3.
        gate_up_scale, down_scale: their scales.
    """
    if norm is not None:
        x = rms_norm_torch(x, *norm)
    plain_gate_up = dequantize(gate_up, gate_up_scale, block_of_scale(gate_up, gate_up_scale), x.dtype)
    plain_down = dequantize(down, down_scale, block_of_scale(down, down_scale), x.dtype)
    return experts_torch(x, plain_gate_up, plain_down, ids, weights, residual, shared)


def _to_fp8(values: torch.Tensor) -> torch.Tensor:
    """Round to e4m3. Larger numbers become the largest one, because torch makes them NaN."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(FP8)
