"""Weights of quantized checkpoints that stay small on a CPU: 4 bits, or 8 bits.

In `Int4`, groups of 32 weights of a row share a scale and a zero, as in the types Q4_0, Q4_1, Q4_K and Q8_0 of GGUF
files. An 8-bit weight is stored as two 4-bit weights, its high and its low bits, side by side. Torch's GEMM for such
weights reads bfloat16: the tokens, scales, zeros and the output are rounded to it. Sums are float32.

In `Int8`, which is for the head, each row and each column has a factor. oneDNN's GEMM multiplies integers. For one
token, it takes half the time of 8-bit weights in `Int4`.

Weights arrive in float32, as in every checkpoint. Those that have at most 16 equally spaced values in each group get 4
bits, which loses nothing. All others get 8 bits, which loses nothing of Q8_0 in `Int4`; of others, such as trained
weights, it loses at most 1/254 of the largest absolute value in a group.
"""

import math
from typing import NamedTuple

import torch

from nanovllm.ops.linear.silu_mul import silu_mul
from nanovllm.ops.norm_rope.reference import rms_factor
from nanovllm.weights.formats import Plain, Table, WeightFormat

# A call through `torch.ops` takes 1 us longer.
_int4_gemm = torch._weight_int4pack_mm_for_cpu  # pyright: ignore[reportPrivateImportUsage]

GROUP = 32
# The 4-bit GEMM packs this many rows together.
_PACKED_ROWS = 16
# The largest magnitude of the integers that `Int8` makes of activations. On CPUs without VNNI, the GEMM adds two
# products of such an integer and a weight in 16 bits.
_MAX_ACTIVATION = 63
# In place of the factor of a row or column of zeros.
_TINY = 1e-30
# Rows that are quantized at once, which bounds the memory for it.
_CHUNK_ROWS = 1024
# How far a value of a 4-bit type may be from the grid, relative to the largest absolute value of its group. The
# checkpoint's reader rounds to float32.
_TOLERANCE = 2.0**-21


class Groups(NamedTuple):
    """Quantized weights: scale * q + low in each group.

    Attributes:
        q: [N, K] uint8.
        scale, low: [N, K / 32] float32.
    """

    q: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """Return the weights [N, K] in float32."""
        groups = self.q.unflatten(1, (-1, GROUP)) * self.scale[:, :, None] + self.low[:, :, None]
        return groups.flatten(1)


def is_supported() -> bool:
    """Return whether this machine has oneDNN, and torch's GEMM for 4-bit weights is vectorized on it."""
    is_vectorized = torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512"))
    return is_vectorized and torch.backends.mkldnn.is_available()


def quantize_4_bits(weight: torch.Tensor) -> Groups | None:
    """Return float32 weights [N, K] in 4 bits; None if some group has more than 16 equally spaced values."""
    parts = []
    for rows in weight.split(_CHUNK_ROWS):
        part = _fit_grids(rows.unflatten(1, (-1, GROUP)))
        if part is None:
            return None
        parts.append(part)
    return Groups(
        q=torch.cat([part.q for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        low=torch.cat([part.low for part in parts]),
    )


def _fit_grids(groups: torch.Tensor) -> Groups | None:
    """Fit an equally spaced grid to each group [N, K / 32, 32]; return None if a group has no such grid.

    A grid goes from the group's smallest to its largest value in 15 steps. If a value is off the grid, the group tries
    fewer steps.
    """
    flat = groups.reshape(-1, GROUP)
    low, high = flat.aminmax(dim=1)
    span = high - low
    tolerance = torch.maximum(low.abs(), high.abs()) * _TOLERANCE
    q = torch.zeros(flat.shape, dtype=torch.uint8, device=flat.device)
    scale = torch.zeros_like(low)
    remaining = torch.arange(len(flat), device=flat.device)  # the groups without a grid yet
    for steps in range(15, 0, -1):
        values = flat if len(remaining) == len(flat) else flat[remaining]
        step = span[remaining] / steps
        nearest = (values - low[remaining, None]).mul_(torch.where(step > 0, 1 / step, 0.0)[:, None]).round_()
        error = torch.addcmul(low[remaining, None], nearest, step[:, None]).sub_(values).abs_().amax(1)
        fits = error <= tolerance[remaining]
        fitted = remaining[fits]
        q[fitted] = nearest[fits].to(torch.uint8)
        scale[fitted] = step[fits]
        remaining = remaining[~fits]
        if not len(remaining):
            shape = groups.shape[:2]
            return Groups(q.view(len(groups), -1), scale.view(shape), low.view(shape))
    return None


def quantize_8_bits(weight: torch.Tensor) -> Groups:
    """Return the nearest 8-bit weights to float32 weights [N, K]."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)[:, :, None]
    q = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    for start in range(0, len(groups), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        q[part] = (groups[part] * inverse[part]).round_().add_(128)
    return Groups(q.flatten(1), scale, -128 * scale)


def _split_into_nibbles(groups: Groups) -> Groups:
    """Return 8-bit weights as 4-bit ones [N, 2 K]: the high bits, whose values are centered, and then the low bits."""
    high = groups.scale * 16
    low = groups.scale
    return Groups(
        torch.cat([groups.q >> 4, groups.q & 15], 1),
        torch.cat([high, low], 1),
        torch.cat([-8 * high, torch.zeros_like(low)], 1),
    )


class WeightToCompress(Plain):
    """A weight that becomes `Int4` once it is loaded, where the GEMM can read its shape."""

    def finish_loading(self) -> WeightFormat:
        rows, columns = self.weight.shape
        if rows % _PACKED_ROWS or columns % GROUP:
            return super().finish_loading()
        groups = quantize_4_bits(self.weight)
        return self._with_8_bits() if groups is None else Int4(self, groups)

    def _with_8_bits(self) -> WeightFormat:
        return Int4(self, _split_into_nibbles(quantize_8_bits(self.weight)), is_doubled=True)


class HeadToCompress(WeightToCompress):
    """The head's weight, which becomes `Int8` if it needs 8 bits. No later layer adds to its rounding errors."""

    def _with_8_bits(self) -> WeightFormat:
        return Int8(self)


class Compressed(WeightFormat):
    """A packed weight. The plain weight is freed. An embedding that shares it has an `Int8Table`."""

    def __init__(self, plain: Plain):
        self.plain = plain
        self.weight = plain.weight
        self.parameters = plain.parameters
        self.shape = self.weight.shape
        self.weight.data = self.weight.data.new_empty(0)

    def start_loading(self) -> WeightFormat:
        self.weight.data = self.weight.data.new_empty(self.shape)
        return self.plain


class Int4(Compressed):
    """4-bit weights with a scale and a zero for each group.

    Args:
        is_doubled: the groups are the high and the low bits of an 8-bit weight, side by side.
    """

    def __init__(self, plain: Plain, groups: Groups, is_doubled: bool = False):
        super().__init__(plain)
        self.is_doubled = is_doubled
        # The GEMM computes scale * (q - 8) + zero.
        zero = groups.low + 8 * groups.scale
        self.scales = torch.stack([groups.scale, zero], 2).transpose(0, 1).contiguous().bfloat16()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(groups.q.to(torch.int32), 1)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear(x, bias)

    def linear(self, x, bias=None, norm=None, gated=False, counters=None) -> torch.Tensor:
        if norm is None:
            y = self._matmul(x).float()
        else:
            weight, eps = norm
            # A factor of a token is a factor of its outputs, which must become float32 anyway.
            y = self._matmul(x * weight) * rms_factor(x, eps)
        if bias is not None:
            y.add_(bias)
        return silu_mul(y) if gated else y

    def linear_add(self, x, bias, residual, counters=None, peers=None) -> torch.Tensor:
        if bias is not None:
            residual.add_(bias)
        return residual.add_(self._matmul(x))

    def _matmul(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T in bfloat16."""
        tokens = x.bfloat16()
        if self.is_doubled:
            tokens = torch.cat((tokens, tokens), 1)
        return _int4_gemm(tokens, self.packed, GROUP, self.scales)


class Int8(Compressed):
    """8-bit weights with a factor for each row and each column: row * q * column.

    Without the factors of columns, a column of large weights would cost the others their precision. Each token becomes
    two rows of 7-bit integers: its rounded values, and the rounding errors, scaled up.
    """

    def __init__(self, plain: Plain):
        weight = plain.weight
        self.columns = torch.linalg.vector_norm(weight, math.inf, dim=0).clamp_(min=_TINY).sqrt_()
        self.rows = weight.new_empty(len(weight))
        q = torch.empty_like(weight, dtype=torch.int8)
        for start in range(0, len(weight), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            scaled = weight[part] / self.columns
            self.rows[part] = scaled.abs().amax(1).clamp_(min=_TINY) / 127
            q[part] = scaled.div_(self.rows[part, None]).round_()
        self.packed = torch.ops.onednn.qlinear_prepack(q, None)
        self.zeros = weight.new_zeros(len(weight), dtype=torch.int32)
        super().__init__(plain)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x = x * self.columns
        scale = torch.linalg.vector_norm(x, math.inf, dim=1, keepdim=True).clamp_(min=_TINY).div_(_MAX_ACTIVATION)
        x.div_(scale)
        high = x.round()
        low = x.sub_(high).mul_(2 * _MAX_ACTIVATION)
        # The GEMM reads unsigned integers. Adding 0.5 makes the conversion round.
        q = torch.cat((high, low)).add_(_MAX_ACTIVATION + 0.5).to(torch.uint8)
        sums = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, _MAX_ACTIVATION, self.packed, self.rows, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        high, low = sums.chunk(2)
        y = high.add_(low, alpha=0.5 / _MAX_ACTIVATION).mul_(scale)
        return y if bias is None else y.add_(bias)


class TableToCompress(Table):
    """An embedding's weight that becomes an `Int8Table` once it is loaded."""

    def finish_loading(self) -> WeightFormat:
        return Int8Table(self) if self.weight.shape[1] % GROUP == 0 else self


class Int8Table(Table):
    """An embedding's weight in 8 bits, dequantized where it is read.

    The plain weight is freed unless the head also reads it.
    """

    def __init__(self, plain: Table):
        super().__init__(plain.weight, plain.is_shared)
        self.plain = plain
        self.shape = self.weight.shape
        self.groups = quantize_8_bits(self.weight)
        if not plain.is_shared:
            self.weight.data = self.weight.data.new_empty(0)

    def start_loading(self) -> WeightFormat:
        self.weight.data = self.weight.data.new_empty(self.shape)
        return self.plain

    def finish_loading(self) -> WeightFormat:
        return self

    def rows(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        local = ids - start
        outside = (local < 0) | (local >= self.shape[0])
        index = local.masked_fill(outside, 0)
        found = Groups(*(tensor.index_select(0, index) for tensor in self.groups))
        return found.dequantized().masked_fill_(outside[:, None], 0)


def with_compression(weight_format: WeightFormat, is_head: bool = False) -> WeightFormat:
    """Return a format that compresses its weight once it is loaded, if `weight_format` is plain and float32."""
    if not isinstance(weight_format, Plain) or weight_format.weight.dtype != torch.float32:
        return weight_format
    if type(weight_format) is Table:
        return TableToCompress(weight_format.weight, weight_format.is_shared)
    if type(weight_format) is Plain:
        make = HeadToCompress if is_head else WeightToCompress
        return make(weight_format.weight, weight_format.is_shared)
    return weight_format
