"""The gate of attention's output."""

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.linear.reference import sigmoid_mul_torch
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs


@triton.jit
def _sigmoid_mul_kernel(x_ptr, gate_ptr, out_ptr, gate_stride, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    x = tl.load(x_ptr + token * N + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + token * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    sigmoid = tl.sigmoid(gate).to(dtype).to(tl.float32)  # round where torch rounds
    tl.store(out_ptr + token * N + columns, (x * sigmoid).to(dtype), mask=mask)


def sigmoid_mul_triton(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute `sigmoid_mul` with a Triton kernel."""
    num_tokens, size = x.shape
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(size))
        _sigmoid_mul_kernel[(num_tokens, ceil_div(size, block))](
            x, gate, out, gate.stride(0), N=size, BLOCK=block, num_warps=4, **launch_options(x.device)
        )
    return out


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return x * sigmoid(gate), a new tensor.

    Args:
        x: [T, N], contiguous.
        gate: [T, N], the values of a token contiguous.
    """
    return (sigmoid_mul_triton if x.is_cuda else sigmoid_mul_torch)(x, gate)
