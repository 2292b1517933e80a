"""RMSNorm over each head, times silu of a gate."""

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.gdn.elementwise import gated_norm_tile
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs

_VALUES_PER_PROGRAM = 4096


@triton.jit(do_not_specialize=["num_vectors"])
def _gated_rms_norm_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    num_vectors,
    z_stride,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    VECTORS: tl.constexpr,
    PDL: tl.constexpr,
):
    vectors = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    dims = tl.arange(0, SIZE)[None, :]
    mask = (vectors < num_vectors)[:, None] & (dims < SIZE)
    weight = tl.load(weight_ptr + dims).to(tl.float32)
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + vectors[:, None] * SIZE + dims, mask=mask, other=0.0)
    z_offsets = (vectors // HEADS) * z_stride + (vectors % HEADS) * SIZE
    z = tl.load(z_ptr + z_offsets[:, None] + dims, mask=mask, other=0.0)
    out = gated_norm_tile(x, z, weight, eps, SIZE, out_ptr.dtype.element_ty)
    tl.store(out_ptr + vectors[:, None] * SIZE + dims, out, mask=mask)


def gated_rms_norm_triton(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return RMSNorm(x) * weight * silu(z), where the norm is over each head.

    Args:
        x: [T, HV * DV], contiguous.
        z: [T, HV * DV], the values of a token contiguous.
        weight: [DV].
        out: [T, HV * DV], which may be x; None makes a new tensor.
    """
    size = len(weight)
    out = torch.empty_like(x) if out is None else out
    num_vectors = x.numel() // size
    if num_vectors:
        vectors = max(1, _VALUES_PER_PROGRAM // size)
        _gated_rms_norm_kernel[(ceil_div(num_vectors, vectors),)](
            x,
            z,
            weight,
            out,
            num_vectors,
            z.stride(0),
            eps,
            HEADS=x.shape[1] // size,
            SIZE=size,
            VECTORS=vectors,
            num_warps=4,
            **launch_options(x.device),
        )
    return out
