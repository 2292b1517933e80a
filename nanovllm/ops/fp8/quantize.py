"""Quantization of activations to FP8 (e4m3): one scale for each token, or for each 128 values of a token.

The kernel also computes the RMSNorm or the SwiGLU activation before it, so that only the FP8 values are written.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.float8 import FP8
from nanovllm.ops.linear.scales import scales_for
from nanovllm.ops.linear.silu_mul import silu_mul
from nanovllm.ops.norm_rope.rms_norm import normalize
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs

GROUP = 128  # values per scale


class QuantizedRows(NamedTuple):
    """Rows in FP8, such as the tokens that a linear layer reads.

    Attributes:
        values: [T, K] float8_e4m3fn, contiguous.
        scales: [T, ceil(K / 128)] or [T, 1] float32, whose tokens are contiguous; value * scale is the activation.
        dtype: of the activations before.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True, eq=False)
class LazySwiglu:
    """silu(gate) * up [T, I], not computed yet: the kernel that quantizes it can compute it.

    Attributes:
        gate_up: [T, 2 I], gate first.
    """

    gate_up: torch.Tensor

    def __len__(self) -> int:
        return len(self.gate_up)

    def __getitem__(self, tokens: slice) -> "LazySwiglu":
        return LazySwiglu(self.gate_up[tokens])

    def computed(self) -> torch.Tensor:
        """Return silu(gate) * up."""
        return silu_mul(self.gate_up)


@triton.jit(do_not_specialize=["scale_stride"])
def _quantize_kernel(
    x_ptr,
    norm_ptr,
    out_ptr,
    scale_ptr,
    x_stride,
    scale_stride,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if NORM:  # round where rms_norm rounds
        weight = tl.load(norm_ptr + columns, mask=mask, other=0.0)
        x = (normalize(x, eps, N, weight.dtype) * weight.to(tl.float32)).to(dtype).to(tl.float32)
    if GATED:  # round where silu_mul rounds
        up = tl.load(x_ptr + token * x_stride + N + columns, mask=mask, other=0.0).to(tl.float32)
        x = ((x / (1 + tl.exp(-x))).to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
    x = tl.reshape(x, [BLOCK // GROUP, GROUP])
    scale = scales_for(tl.max(tl.abs(x), 1))
    values = (x / scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * N + columns, tl.reshape(values, [BLOCK]), mask=mask)
    groups = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(scale_ptr + groups * scale_stride + token, scale, mask=groups * GROUP < N)


def quantize_triton(
    x: torch.Tensor | LazySwiglu,
    norm: tuple[torch.Tensor, float] | None = None,
    by_token: bool = False,
    multiple: int = 1,
) -> QuantizedRows:
    """Quantize x [T, K], after an RMSNorm or SwiGLU.

    Args:
        x: the values of a token are contiguous.
        norm: weight [K] and epsilon of an RMSNorm to apply first.
        by_token: use one scale for all values of a token.
        multiple: append rows of undefined values, to a multiple of so many.
    """
    gated = isinstance(x, LazySwiglu)
    if isinstance(x, LazySwiglu):
        x = x.gate_up
    num_tokens = x.shape[0]
    size = x.shape[1] // (2 if gated else 1)
    num_rows = ceil_div(num_tokens, multiple) * multiple
    whole = max(GROUP, triton.next_power_of_2(size))
    group = whole if by_token else GROUP
    values = torch.empty((num_rows, size), dtype=FP8, device=x.device)
    scales = torch.empty((ceil_div(size, group), num_rows), dtype=torch.float32, device=x.device)
    if num_tokens:
        block = whole if by_token or norm is not None else min(2048, whole)
        norm_weight, eps = (x, 0.0) if norm is None else norm
        _quantize_kernel[(num_tokens, triton.cdiv(size, block))](
            x,
            norm_weight,
            values,
            scales,
            x.stride(0),
            scales.stride(0),
            eps,
            N=size,
            BLOCK=block,
            NORM=norm is not None,
            GATED=gated,
            GROUP=group,
            num_warps=min(8, max(1, block // 512)),
            **launch_options(x.device),
        )
    return QuantizedRows(values, scales.t(), x.dtype)
