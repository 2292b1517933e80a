"""The experts of a layer: SwiGLU of the chosen experts, summed with their weights."""

import torch

from nanovllm.ops.moe.alignment import align_triton
from nanovllm.ops.moe.combine import combine_triton
from nanovllm.ops.moe.dispatch import (
    SMALL_TILING,
    ExpertKernel,
    GroupedGemmConfig,
    Tiling,
    expert_regime_of,
    tiling_of,
)
from nanovllm.ops.moe.expert_gemv import down_gemv_triton, fits_expert_gemv, gate_up_gemv_triton
from nanovllm.ops.moe.grouped_gemm import grouped_down_triton, grouped_gate_up_triton
from nanovllm.ops.moe.reference import experts_torch
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.ops.triton_utils import HAVE_TRITON, fits_large_tma_tiles

Shared = tuple[torch.Tensor, torch.Tensor | None]


def check_expert_sizes(h: int, i: int, dtype: torch.dtype | None) -> None:
    """Raise ValueError if the default device's kernels cannot read gate_up [E, 2 i, h] and down [E, h, i]."""
    itemsize = (dtype or torch.get_default_dtype()).itemsize
    if torch.get_default_device().type == "cuda" and (h * itemsize % 16 or i * itemsize % 16):
        raise ValueError(
            f"experts of hidden size {h} and inner size {i} on each rank are not supported on a GPU: "
            f"their rows must be whole multiples of 16 bytes, {16 // itemsize} values"
        )


def is_expert_gemv(x: torch.Tensor, down: torch.Tensor, top_k: int) -> bool:
    """Return whether `experts` computes x [T, H] with GEMVs, which normalize x themselves."""
    if not HAVE_TRITON or not x.is_cuda:
        return False
    _, h, i = down.shape
    return expert_regime_of(len(x)).kernel is ExpertKernel.GEMV and fits_expert_gemv(h, i, top_k)


def default_tiling(x: torch.Tensor, num_experts: int, top_k: int) -> Tiling:
    """Return the tiles of the grouped GEMMs of x [T, H] that fit the GPU's shared memory."""
    tiling = tiling_of(len(x) * top_k, num_experts)
    if x.is_cuda and not fits_large_tma_tiles(x.device):
        tiling = SMALL_TILING
    return tiling._replace(gate_up=_narrow(tiling.gate_up, x.itemsize), down=_narrow(tiling.down, x.itemsize))


def _narrow(config: GroupedGemmConfig, itemsize: int) -> GroupedGemmConfig:
    """Return `config`, made for 2-byte values, for values of `itemsize` bytes."""
    return config._replace(block_k=config.block_k * 2 // itemsize)


def experts_gemv_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
    shared: Shared | None = None,
) -> torch.Tensor:
    """Compute `experts` with the kernels for a few tokens."""
    hidden = gate_up_gemv_triton(x, gate_up, ids, norm)
    return down_gemv_triton(hidden, down, ids, weights, residual, shared)


def experts_gemm_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    residual: torch.Tensor | None = None,
    shared: Shared | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Compute `experts` without a norm with the kernels for many tokens.

    Args:
        tiling: `default_tiling` if None.
    """
    num_experts = len(down)
    top_k = ids.shape[1]
    tiling = tiling or default_tiling(x, num_experts, top_k)
    tiles = align_triton(ids, num_experts, tiling.block_m)
    hidden = grouped_gate_up_triton(x, gate_up, tiles, top_k, tiling.gate_up)
    pairs = grouped_down_triton(hidden, down, tiles, weights, tiling.down)
    return combine_triton(pairs, residual, shared)


def experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
    shared: Shared | None = None,
) -> torch.Tensor:
    """Return the sum over each token's experts of weight * down(silu(gate x) * up x): [T, H].

    On a GPU nothing synchronizes with the host, and the result is deterministic.

    Args:
        x: [T, H], contiguous columns.
        gate_up: [E, 2 I, H], gate first. down: [E, H, I]. Both contiguous, rows of whole 16 bytes.
        ids, weights: [T, top_k], from `route`. The ids of a token differ.
        norm: weight [H] and epsilon of an RMSNorm to apply to x first.
        residual: [T, H], contiguous; the result is added to it in place, and it is returned.
        shared: output [T, H] of a shared expert to add, and its gate [T, 1] before the sigmoid, or None for no gate.
            The gate may be a column of a larger tensor.
    """
    if not len(x):
        return torch.empty_like(x) if residual is None else residual
    if is_expert_gemv(x, down, ids.shape[1]):
        return experts_gemv_triton(x, gate_up, down, ids, weights, norm, residual, shared)
    if norm is not None:
        norm_weight, eps = norm
        x = rms_norm(x, norm_weight, eps)
    run = experts_gemm_triton if x.is_cuda else experts_torch
    return run(x, gate_up, down, ids, weights, residual, shared)
