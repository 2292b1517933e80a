"""FP8 weights: how checkpoints store them, and the formats that compute with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from nanovllm.ops.comm.peer_memory import PeerMemory
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.float8 import FP8
from nanovllm.ops.fp8.experts import experts_fp8
from nanovllm.ops.fp8.linear import (
    choose_adder_fp8,
    gate_up_fp8,
    linear_add_fp8,
    linear_all_reduce_fp8,
    linear_fp8,
)
from nanovllm.ops.fp8.quantize import LazySwiglu
from nanovllm.ops.fp8.reference import BLOCK, Block, dequantize, quantize_weight, scale_shape
from nanovllm.ops.moe.dispatch import FP8_TILINGS, expert_compile_sizes
from nanovllm.ops.moe.experts import is_expert_gemv
from nanovllm.weights.formats import ExpertFormat, ExpertSizes, WeightFormat
from nanovllm.weights.parameter import WHOLE, WeightLoader, make_parameter
from nanovllm.weights.quantization import QuantizationScheme, StoredTensor


@dataclass(frozen=True, kw_only=True)
class Fp8Scheme(QuantizationScheme):
    """Weights in e4m3 with scales in float32.

    Args:
        block: rows and columns of a weight that one scale covers.
        suffix: the end of a scale's name, after the weight's name.
    """

    name: ClassVar[str] = "fp8"
    block: Block = (BLOCK, BLOCK)
    suffix: str = "_scale_inv"

    @property
    def layout(self) -> str:
        rows, columns = self.block
        blocks = "row" if columns == WHOLE else f"{rows} x {columns} values"
        return f"FP8 with a scale *{self.suffix} for each {blocks}"

    def scale_name(self, weight_name: str) -> str:
        """Return the name of a weight's scales."""
        return weight_name + self.suffix

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        scales = StoredTensor(scale_shape(shape, self.block), torch.float32, is_scale=True)
        return {name: StoredTensor(shape, FP8), self.scale_name(name): scales}

    def weight_name(self, name: str, dtype: torch.dtype) -> str | None:
        if name.endswith(self.suffix):
            return name.removesuffix(self.suffix)
        return name if dtype == FP8 else None

    def quantize(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        values, scale = quantize_weight(weight, self.block)
        return {name: values, self.scale_name(name): scale}

    def dequantize(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return dequantize(tensors[name], tensors[self.scale_name(name)], self.block, torch.float32)

    def has_kernels(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            return False
        is_known = dtype in (torch.bfloat16, torch.float16) and self.block in ((BLOCK, BLOCK), (1, WHOLE))
        return is_known and shape[-1] % 16 == 0  # rows of whole 16 bytes

    def make_weight(
        self, rows: int, columns: int, *, dtype: torch.dtype | None, weight_loader: WeightLoader, row_alignment: int
    ) -> WeightFormat:
        return Fp8(*self._make((rows, columns), weight_loader, row_alignment), scale_name=self.scale_name("weight"))

    def make_experts(
        self, sizes: ExpertSizes, *, dtype: torch.dtype | None, load_gate_up: WeightLoader, load_down: WeightLoader
    ) -> ExpertFormat:
        gate_up = self._make(sizes.gate_up_shape, load_gate_up, sizes.row_alignment)
        down = self._make(sizes.down_shape, load_down, row_alignment=0)
        return Fp8Experts(gate_up, down, self.suffix)

    def _make(
        self, shape: tuple[int, ...], weight_loader: WeightLoader, row_alignment: int
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Make the parameters of a weight [..., N, K] and of its scales."""
        row_block = 1 if row_alignment % self.block[0] else self.block[0]
        scales = make_parameter(
            *scale_shape(shape, (row_block, self.block[1])),
            dtype=torch.float32,
            weight_loader=weight_loader,
            block=self.block,
            row_block=row_block,
            is_scale=True,
        )
        return make_parameter(*shape, dtype=FP8, weight_loader=weight_loader), scales


class Fp8(WeightFormat):
    """A weight [N, K] in e4m3 with scales in float32, on a GPU; see ops/fp8 for their shapes.

    Args:
        scale_name: the last part of the scales' name in checkpoints.
    """

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, scale_name: str):
        self.weight, self.scale = weight, scale
        self.parameters = {"weight": weight, scale_name: scale}

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear_fp8(x, self.weight, self.scale, bias)

    def linear(self, x, bias=None, norm=None, gated=False, counters=None) -> torch.Tensor:
        return linear_fp8(x, self.weight, self.scale, bias, norm=norm, gated=gated, counters=counters)

    def gate_up(self, x, bias=None, norm=None, counters=None) -> torch.Tensor | LazySwiglu:
        return gate_up_fp8(x, self.weight, self.scale, bias, norm=norm, counters=counters)

    def prepare(self, x: torch.Tensor | LazySwiglu) -> torch.Tensor | LazySwiglu:
        return x

    def linear_add(self, x, bias, residual, counters=None, peers=None) -> torch.Tensor:
        if peers is not None:
            return linear_all_reduce_fp8(x, self.weight, self.scale, bias, residual=residual, peers=peers)
        return linear_add_fp8(x, self.weight, self.scale, bias, residual=residual, counters=counters)

    def choose_adder(self, x: torch.Tensor, residual: torch.Tensor, ranks: int, peers: PeerMemory | None) -> Adder:
        return choose_adder_fp8(x, self.weight, residual, ranks=ranks, peers=peers)


class Fp8Experts(ExpertFormat):
    """Experts in e4m3 with scales in float32, on a GPU.

    Args:
        gate_up, down: a weight and its scales each.
        suffix: the end of the scales' names in checkpoints.
    """

    def __init__(
        self, gate_up: tuple[nn.Parameter, nn.Parameter], down: tuple[nn.Parameter, nn.Parameter], suffix: str
    ):
        self.gate_up, self.gate_up_scale = gate_up
        self.down, self.down_scale = down
        self.parameters = {"": (self.gate_up, self.down), suffix: (self.gate_up_scale, self.down_scale)}

    def fuses_norm(self, x: torch.Tensor, top_k: int) -> bool:
        return is_expert_gemv(x, self.down, top_k)

    def compile_sizes(self, top_k: int, max_tokens: int) -> list[int]:
        return expert_compile_sizes(len(self.down), top_k, max_tokens, FP8_TILINGS)

    def run(self, x, ids, weights, norm=None, residual=None, shared=None) -> torch.Tensor:
        operands = self.gate_up, self.gate_up_scale, self.down, self.down_scale
        return experts_fp8(x, *operands, ids, weights, norm=norm, residual=residual, shared=shared)
