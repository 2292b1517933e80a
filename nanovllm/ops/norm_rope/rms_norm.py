"""Root mean square norm."""

import torch

from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs


@triton.jit
def normalize(x, eps, N: tl.constexpr, DTYPE: tl.constexpr):
    """x [BLOCK] float32, N numbers and zeros, over its root mean square; rounded where transformers rounds."""
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
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * N + columns, mask=mask, other=0.0).to(tl.float32)
        x = x.to(dtype)
        tl.store(x_ptr + row * x_stride + columns, x, mask=mask)
        x = x.to(tl.float32)
    normed = normalize(x, eps, N, dtype)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + columns, (normed * weight).to(dtype), mask=mask)


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`rms_norm` as a Triton kernel, one program a row."""
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(size)
        options = {"num_warps": min(8, max(1, block // 512)), **launch_options(x.device)}
        add = residual is not None
        inputs = x, residual if add else x, weight
        _rms_norm_kernel[(rows,)](*inputs, out, x.stride(0), eps, N=size, BLOCK=block, ADD=add, **options)
    return out


def rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`rms_norm` in plain torch, over the last dimension."""
    if residual is not None:
        x.add_(residual)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in float32 but for the last product (arXiv:1910.07467).

    Args:
        x: [T, N], rows contiguous.
        weight: [N].
        residual: [T, N], contiguous, or None; it is added to x first, in x's place.

    Returns:
        [T, N], a new tensor.
    """
    return (rms_norm_triton if x.is_cuda else rms_norm_torch)(x, weight, eps, residual)
