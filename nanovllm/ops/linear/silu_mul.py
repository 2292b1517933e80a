"""The gated unit of SwiGLU."""

import torch
import torch.nn.functional as F

from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + N + columns, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)  # rounded where torch rounds
    tl.store(out_ptr + row * N + columns, (silu * up).to(dtype), mask=mask)


def silu_mul_triton(x: torch.Tensor) -> torch.Tensor:
    """`silu_mul` as a Triton kernel."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        block = min(1024, triton.next_power_of_2(size))
        options = {"num_warps": 4, **launch_options(x.device)}
        _silu_mul_kernel[(rows, triton.cdiv(size, block))](x, out, x.stride(0), N=size, BLOCK=block, **options)
    return out


def silu_mul_torch(x: torch.Tensor) -> torch.Tensor:
    """`silu_mul` in plain torch."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2 I] -> silu(x[:, :I]) * x[:, I:], [T, I] in x's dtype."""
    return (silu_mul_triton if x.is_cuda else silu_mul_torch)(x)
