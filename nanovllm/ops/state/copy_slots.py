"""Copy the state of sequences between slots."""

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.state.reference import copy_slots_torch
from nanovllm.ops.triton_utils import tl, triton

_VALUES_PER_PROGRAM = 4096


@triton.jit(do_not_specialize=["sources_ptr", "targets_ptr", "num_slots"])
def _copy_slots_kernel(pool_ptr, sources_ptr, targets_ptr, num_slots, NUM_VALUES: tl.constexpr, BLOCK: tl.constexpr):
    values = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    layer_ptr = pool_ptr + tl.program_id(2).to(tl.int64) * num_slots * NUM_VALUES
    source = tl.load(sources_ptr + tl.program_id(1)).to(tl.int64)
    target = tl.load(targets_ptr + tl.program_id(1)).to(tl.int64)
    x = tl.load(layer_ptr + source * NUM_VALUES + values, mask=values < NUM_VALUES)
    tl.store(layer_ptr + target * NUM_VALUES + values, x, mask=values < NUM_VALUES)


def copy_slots_triton(pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Compute `copy_slots` with a Triton kernel, which needs no memory for the values."""
    num_layers, num_slots = pool.shape[:2]
    num_values = pool[0, 0].numel()
    if len(sources):
        _copy_slots_kernel[(ceil_div(num_values, _VALUES_PER_PROGRAM), len(sources), num_layers)](
            pool,
            sources,
            targets,
            num_slots,
            NUM_VALUES=num_values,
            BLOCK=_VALUES_PER_PROGRAM,
            num_warps=4,
        )


def copy_slots(pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy slots in all layers: pool[:, targets] = pool[:, sources].

    Args:
        pool: [L, S, ...], contiguous; written in place.
        sources, targets: [N] int32 or int64 on the pool's device. No slot is both a source and a target.
    """
    (copy_slots_triton if pool.is_cuda else copy_slots_torch)(pool, sources, targets)
