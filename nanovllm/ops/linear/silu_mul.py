"""The activation of SwiGLU, for gate and up projections that are already computed."""

import torch

from nanovllm.ops.linear.reference import silu_mul_torch
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    gate = tl.load(x_ptr + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * x_stride + N + columns, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)  # round where torch rounds
    tl.store(out_ptr + token * N + columns, (silu * up).to(dtype), mask=mask)


def silu_mul_triton(x: torch.Tensor) -> torch.Tensor:
    """Compute `silu_mul` with a Triton kernel."""
    num_tokens = x.shape[0]
    size = x.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(size))
        _silu_mul_kernel[(num_tokens, triton.cdiv(size, block))](
            x, out, x.stride(0), N=size, BLOCK=block, num_warps=4, **launch_options(x.device)
        )
    return out


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """Return silu(x[:, :I]) * x[:, I:] of x [T, 2 I]: [T, I] in x's dtype."""
    return (silu_mul_triton if x.is_cuda else silu_mul_torch)(x)
