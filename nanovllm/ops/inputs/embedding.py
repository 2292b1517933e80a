"""Token embedding, as a kernel of its own so that a step's chain of dependent launches can start with it."""

import torch

from nanovllm.ops.inputs.reference import embedding_torch
from nanovllm.ops.triton_utils import launch_options, start_chain, tl, triton


@triton.jit(do_not_specialize=["start"])
def _embedding_kernel(
    ids_ptr, weight_ptr, out_ptr, start, num_embeddings, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    start_chain(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token) - start + tl.zeros([BLOCK], tl.int64)
    mask = columns < N
    x = tl.load(weight_ptr + row * N + columns, mask=mask & (row >= 0) & (row < num_embeddings), other=0.0)
    tl.store(out_ptr + token * N + columns, x, mask=mask)


def embedding_triton(ids: torch.Tensor, weight: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Compute `embedding` with a Triton kernel, one program per token."""
    num_embeddings, size = weight.shape
    out = torch.empty((len(ids), size), dtype=weight.dtype, device=weight.device)
    if len(ids):
        block = triton.next_power_of_2(size)
        _embedding_kernel[(len(ids),)](
            ids,
            weight,
            out,
            start,
            num_embeddings,
            N=size,
            BLOCK=block,
            num_warps=min(8, max(1, block // 256)),
            **launch_options(weight.device),
        )
    return out


def embedding(ids: torch.Tensor, weight: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Look up tokens in a slice of an embedding table; tokens outside the slice get zeros.

    Args:
        ids: [T] int64, token ids.
        weight: [N, K] contiguous, the embeddings of tokens `start` to start + N - 1.

    Returns:
        [T, K], a new tensor.
    """
    return (embedding_triton if weight.is_cuda else embedding_torch)(ids, weight, start)
