"""Rows of a table: a kernel of its own, so that the step's chain of dependent launches begins with it."""

import torch

from nanovllm.ops.triton_utils import launch_options, start_chain, tl, triton


@triton.jit(do_not_specialize=["start"])
def _embedding_kernel(
    ids_ptr, weight_ptr, out_ptr, start, num_rows, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    start_chain(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token) - start + tl.zeros([BLOCK], tl.int64)
    mask = columns < N
    x = tl.load(weight_ptr + row * N + columns, mask=mask & (row >= 0) & (row < num_rows), other=0.0)
    tl.store(out_ptr + token * N + columns, x, mask=mask)


def embedding_triton(ids: torch.Tensor, weight: torch.Tensor, start: int = 0) -> torch.Tensor:
    """`embedding` as a Triton kernel, one program a token."""
    num_rows, size = weight.shape
    out = torch.empty((len(ids), size), dtype=weight.dtype, device=weight.device)
    if len(ids):
        block = triton.next_power_of_2(size)
        options = {"num_warps": min(8, max(1, block // 256)), **launch_options(weight.device)}
        _embedding_kernel[(len(ids),)](ids, weight, out, start, num_rows, N=size, BLOCK=block, **options)
    return out


def embedding_torch(ids: torch.Tensor, weight: torch.Tensor, start: int = 0) -> torch.Tensor:
    """`embedding` in plain torch."""
    local = ids - start
    outside = (local < 0) | (local >= len(weight))
    return weight[local.masked_fill(outside, 0)].masked_fill_(outside[:, None], 0)


def embedding(ids: torch.Tensor, weight: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Rows of a slice of a table; zeros for those that the slice has not.

    Args:
        ids: [T] int64, rows of the whole table.
        weight: [N, K] contiguous, rows `start` to start + N of it.

    Returns:
        [T, K], a new tensor.
    """
    return (embedding_triton if weight.is_cuda else embedding_torch)(ids, weight, start)
