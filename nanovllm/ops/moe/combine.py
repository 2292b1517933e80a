"""Sum over the chosen experts of each token, with the shared expert and the residual."""

import torch

from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs


@triton.jit
def add_shared_expert(total, shared_ptr, gate_ptr, gate_stride, offsets, token, mask, GATE: tl.constexpr):
    """Add the shared expert's output, scaled by the sigmoid of its gate if there is one, to `total`."""
    shared = tl.load(shared_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        shared *= tl.sigmoid(tl.load(gate_ptr + token * gate_stride).to(tl.float32))
    return total + shared


@triton.jit
def _combine_kernel(
    pairs_ptr,
    residual_ptr,
    shared_ptr,
    gate_ptr,
    out_ptr,
    gate_stride,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    SHARED: tl.constexpr,
    GATE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    offsets = token * H + columns
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(TOP_K):
        pair = token * TOP_K + rank
        total += tl.load(pairs_ptr + pair * H + columns, mask=mask, other=0.0).to(tl.float32)
    if SHARED:
        total = add_shared_expert(total, shared_ptr, gate_ptr, gate_stride, offsets, token, mask, GATE)
    if ADD:
        total += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine_triton(
    pairs: torch.Tensor,
    residual: torch.Tensor | None = None,
    shared: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Return the sum of `pairs` [T, top_k, H] over the experts: [T, H], in float32, rounded once.

    Args:
        residual, shared: as in `experts`.
    """
    num_tokens, top_k, size = pairs.shape
    out = torch.empty((num_tokens, size), dtype=pairs.dtype, device=pairs.device) if residual is None else residual
    output, gate = shared or (None, None)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(size))
        _combine_kernel[(num_tokens, triton.cdiv(size, block))](
            pairs,
            out,
            pairs if output is None else output,
            pairs if gate is None else gate,
            out,
            1 if gate is None else gate.stride(0),
            H=size,
            TOP_K=top_k,
            BLOCK=block,
            ADD=residual is not None,
            SHARED=output is not None,
            GATE=gate is not None,
            num_warps=4,
            **launch_options(pairs.device),
        )
    return out
