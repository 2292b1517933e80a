"""RMSNorm (arXiv:1910.07467), optionally after a residual add."""

import torch

from nanovllm.ops.norm_rope.reference import rms_norm_torch
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs


@triton.jit
def normalize(x, eps, N: tl.constexpr, DTYPE: tl.constexpr):
    """Divide x [BLOCK] float32, N values and zero padding, by its root mean square; round it to DTYPE."""
    scale = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    return (x * scale).to(DTYPE).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + token * N + columns, mask=mask, other=0.0).to(tl.float32)
        x = x.to(dtype)
        tl.store(x_ptr + token * x_stride + columns, x, mask=mask)
        x = x.to(tl.float32)
    normed = normalize(x, eps, N, weight_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + columns, (normed * weight).to(dtype), mask=mask)


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute `rms_norm` with a Triton kernel, one program per token."""
    num_tokens, size = x.shape
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    if num_tokens:
        block = triton.next_power_of_2(size)
        _rms_norm_kernel[(num_tokens,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            x.stride(0),
            eps,
            N=size,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=min(8, max(1, block // 512)),
            **launch_options(x.device),
        )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight.

    As in transformers, the normed x is rounded to the dtype of the weight before the weight multiplies it.

    Args:
        x: [T, N], the values of a token contiguous.
        weight: [N], in the dtype of x or in float32.
        residual: [T, N], contiguous; if given, it is added to x in place first.

    Returns:
        [T, N], a new tensor.
    """
    return (rms_norm_triton if x.is_cuda else rms_norm_torch)(x, weight, eps, residual)
