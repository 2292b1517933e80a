"""Attention in plain torch: the reference, and what runs on a CPU."""

from typing import NamedTuple

import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.kernels.decode_attention import GatherPlan, attend_gathered, plan_gather
from nanovllm.kernels.prefill_attention import RowPlan, attend_row, plan_rows
from nanovllm.utils.context import Context


class _Plans(NamedTuple):
    decode: GatherPlan | None
    prefill: list[RowPlan]


class TorchBackend(AttentionBackend):
    """Gathers each row's pages, then calls scaled_dot_product_attention: once for all decode rows, once a prefill row.

    Where the pages lie is worked out once a step. The gathered K and V of a layer go to buffers that are kept: on a CPU,
    fresh ones of some MB cost more in page faults than the attention itself.

    Args:
        block_size: tokens in a block.
    """

    name = "torch"
    capturable = False

    def __init__(self, block_size: int):
        self.block_size = block_size
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def prepare(self, ctx: Context) -> None:
        # The number of KV heads is only known from a layer's cache: indices are completed by the first layer.
        ctx.meta = None
