"""Router: softmax over the experts, the top k of them, and their weights, in one kernel."""

import torch

from nanovllm.ops.moe.reference import route_torch
from nanovllm.ops.triton_utils import launch_options, ordered_int, tl, triton, wait_for_inputs


@triton.jit
def _route_kernel(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    logits_stride,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, E_PAD)
    logits = tl.load(logits_ptr + token * logits_stride + experts, mask=experts < E, other=float("-inf")).to(tl.float32)
    # Keys are integers in the order of (logit, -id), so that ties go to the lower id and NaN never yields a bad id.
    bits = ordered_int(logits.to(tl.int32, bitcast=True))
    LOWEST: tl.constexpr = -(1 << 63)
    keys = (bits.to(tl.int64) << 32) | (E_PAD - 1 - experts)
    keys = tl.where(experts < E, keys, LOWEST)
    ranks = tl.arange(0, K_PAD)
    chosen = tl.full([K_PAD], LOWEST, tl.int64)
    for rank in tl.static_range(TOP_K):
        best = tl.max(keys, 0)
        keys = tl.where(keys == best, LOWEST, keys)
        chosen = tl.where(ranks == rank, best, chosen)
    bits = ordered_int((chosen >> 32).to(tl.int32))
    top = tl.where(ranks < TOP_K, bits.to(tl.float32, bitcast=True), float("-inf"))
    largest = tl.max(logits, 0)
    weights = tl.exp(top - largest)
    weights /= tl.sum(weights, 0) if RENORMALIZE else tl.sum(tl.exp(logits - largest), 0)
    ids = E_PAD - 1 - (chosen & 0xFFFFFFFF).to(tl.int32)
    outputs = token * TOP_K + ranks
    tl.store(ids_ptr + outputs, ids, mask=ranks < TOP_K)
    tl.store(weights_ptr + outputs, weights.to(weights_ptr.dtype.element_ty), mask=ranks < TOP_K)


def route_triton(
    logits: torch.Tensor, top_k: int, renormalize: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `route` with a Triton kernel, one warp per token."""
    num_tokens, num_experts = logits.shape
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((num_tokens, top_k), dtype=dtype or torch.float32, device=logits.device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits,
            ids,
            weights,
            logits.stride(0),
            E=num_experts,
            E_PAD=triton.next_power_of_2(num_experts),
            TOP_K=top_k,
            K_PAD=triton.next_power_of_2(top_k),
            RENORMALIZE=renormalize,
            num_warps=1,
            **launch_options(logits.device),
        )
    return ids, weights


def route(
    logits: torch.Tensor, top_k: int, renormalize: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token: softmax in float32, then the top k, the lower id first where logits are equal.

    Args:
        logits: [T, E], any floating-point type; columns are contiguous.
        top_k: at most E.
        renormalize: divide the weights of each token by their sum.
        dtype: of the weights, float32 if None.

    Returns:
        ids [T, top_k] int32, the largest weight first, and weights [T, top_k].
    """
    return (route_triton if logits.is_cuda else route_torch)(logits, top_k, renormalize, dtype)
