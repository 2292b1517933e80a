"""Weight formats: the memory layout of a linear layer's weight [N, K] or of experts, and the GEMMs that read it.

A format owns its parameters, their conversion after loading, and its GEMMs. The layer owns the bias, the sharding and
the names in the checkpoint, of which a format gives the last part. A scheme (quantization.py) makes the formats of
quantized weights. docs/architecture.md says how to add a format.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from nanovllm.ops.comm.peer_memory import PeerMemory
from nanovllm.ops.dispatch import Adder
from nanovllm.ops.fp8.quantize import LazySwiglu
from nanovllm.ops.inputs.embedding import embedding
from nanovllm.ops.linear import linear as ops_linear
from nanovllm.ops.linear.silu_mul import silu_mul
from nanovllm.ops.moe.dispatch import expert_compile_sizes
from nanovllm.ops.moe.experts import Shared, check_expert_sizes, experts, is_expert_gemv
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.weights.parameter import WeightLoader, make_parameter


class WeightFormat(ABC):
    """A linear layer's weight. This base class has no fused kernels.

    Attributes:
        parameters: the parameters, by the last part of their names in checkpoints.
    """

    parameters: dict[str, nn.Parameter]

    @abstractmethod
    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x W^T + b for x [T, K] with any number of tokens."""

    def gate_up(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        norm: tuple[torch.Tensor, float] | None = None,
        counters: torch.Tensor | None = None,
    ) -> torch.Tensor | LazySwiglu:
        """Return SwiGLU of x W^T + b [T, N / 2], or a LazySwiglu that the next layer's `prepare` computes or keeps."""
        return self.linear(x, bias, norm=norm, gated=True, counters=counters)

    def prepare(self, x: torch.Tensor | LazySwiglu) -> Any:
        """Return x as the other methods of this format read it.

        Layers do not look into the result, but take slices of its tokens: `result[start:stop]`.
        """
        return x.computed() if isinstance(x, LazySwiglu) else x

    def matmul_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Write x W^T to `out` [T, N]."""
        out.copy_(self.matmul(x))

    def start_loading(self) -> "WeightFormat":
        """Return a format whose `parameters` can be written. They are the same objects."""
        return self

    def finish_loading(self) -> "WeightFormat":
        """Return the fastest format for the loaded weight. Its `parameters` are the same objects."""
        return self

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        norm: tuple[torch.Tensor, float] | None = None,
        gated: bool = False,
        counters: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return x W^T + b. See `linear` in ops/linear for the arguments."""
        if norm is not None:
            norm_weight, eps = norm
            x = rms_norm(x, norm_weight, eps)
        y = self.matmul(x, bias)
        return silu_mul(y) if gated else y

    def linear_add(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        counters: torch.Tensor | None = None,
        peers: PeerMemory | None = None,
    ) -> torch.Tensor:
        """Compute residual [T, N] += x W^T + b in place.

        Args:
            peers: given for ALL_REDUCE_GEMV only, which all-reduces x W^T through their memory.
        """
        return residual.add_(self.matmul(x, bias))

    def choose_adder(self, x: torch.Tensor, residual: torch.Tensor, ranks: int, peers: PeerMemory | None) -> Adder:
        """Choose the operation that adds x W^T to the residual stream [T, N]."""
        return ops_linear.choose_adder(x, None, residual, ranks=ranks, peers=peers)

    def wants_zero_bias(self, x: torch.Tensor) -> bool:
        """Return whether a bias of zeros may make `matmul` faster than no bias."""
        return False


class AllocateWeight(Protocol):
    """Makes a format, with uninitialized parameters on the current default device.

    Args:
        rows, columns: sizes of the weight on this rank.
        dtype: dtype of the activations; torch's default if None.
        weight_loader: loads all parameters.
        row_alignment: every shard starts at a multiple of this many rows, or at row 0 if it is 0; see
            `layers/linear.py:Shard.row_alignment`. A block whose height divides it lies in one shard. If shards could
            split blocks, a parameter of scales needs a row for each row of the weight (`row_block=1`).
    """

    def __call__(
        self, rows: int, columns: int, *, dtype: torch.dtype | None, weight_loader: WeightLoader, row_alignment: int
    ) -> WeightFormat: ...


class Plain(WeightFormat):
    """The weight as it is in a checkpoint. Fused kernels read this format.

    Args:
        weight: the parameter.
        is_shared: whether an embedding, or the head, also reads it.
    """

    def __init__(self, weight: nn.Parameter, is_shared: bool = False):
        self.weight = weight
        self.parameters = {"weight": weight}
        self.is_shared = is_shared

    @classmethod
    def allocate(
        cls, rows: int, columns: int, *, dtype: torch.dtype | None, weight_loader: WeightLoader, row_alignment: int = 0
    ) -> "Plain":
        """Make the parameter [rows, columns]; see AllocateWeight."""
        return cls(make_parameter(rows, columns, dtype=dtype, weight_loader=weight_loader))

    def finish_loading(self) -> WeightFormat:
        return Packed(self) if Packed.supports(self.weight) else self

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops_linear.linear(x, self.weight, bias)

    def matmul_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        torch.mm(x, self.weight.t(), out=out)

    def linear(self, x, bias=None, norm=None, gated=False, counters=None) -> torch.Tensor:
        return ops_linear.linear(x, self.weight, bias, norm=norm, gated=gated, counters=counters)

    def linear_add(self, x, bias, residual, counters=None, peers=None) -> torch.Tensor:
        if peers is not None:
            return ops_linear.linear_all_reduce(x, self.weight, bias, residual=residual, peers=peers)
        return ops_linear.linear_add(x, self.weight, bias, residual=residual, counters=counters)

    def choose_adder(self, x: torch.Tensor, residual: torch.Tensor, ranks: int, peers: PeerMemory | None) -> Adder:
        return ops_linear.choose_adder(x, self.weight, residual, ranks=ranks, peers=peers)

    def wants_zero_bias(self, x: torch.Tensor) -> bool:
        return ops_linear.wants_zero_bias(x, self.weight)


class Table(Plain):
    """An embedding's weight, of which rows are read.

    Args:
        is_shared: whether the head also reads it.
    """

    def finish_loading(self) -> WeightFormat:
        return self

    def rows(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Return the rows of token ids [T]; the first row is that of the token `start`. See `embedding`."""
        return embedding(ids, self.weight, start)


class Packed(WeightFormat):
    """A copy of the weight in oneDNN's blocked layout, on CPUs.

    oneDNN would convert a plain weight to that layout in every GEMM, which takes as long as a GEMM of about 30 tokens.
    The plain weight is freed unless an embedding reads it.
    """

    def __init__(self, plain: Plain):
        self.plain = plain
        self.weight = plain.weight
        self.parameters = plain.parameters
        self.packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight)
        if not plain.is_shared:
            self.weight.data = self.weight.data.new_empty(0)

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Return whether this machine has oneDNN, and oneDNN computes in the weight's dtype."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if weight.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32

    def start_loading(self) -> WeightFormat:
        if not self.plain.is_shared:
            self.weight.data = self.packed.to_dense()
        return self.plain

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


class ExpertFormat(ABC):
    """The weights of experts, gate and up [E, 2 I, H] and down [E, H, I]. This base class has no fused kernels.

    Attributes:
        parameters: the parameters of gate and up, and those of down, by the ends of their names in checkpoints.
    """

    parameters: dict[str, tuple[nn.Parameter, nn.Parameter]]

    def fuses_norm(self, x: torch.Tensor, top_k: int) -> bool:
        """Return whether `run` computes x [T, H] with kernels that normalize x themselves."""
        return False

    def compile_sizes(self, top_k: int, max_tokens: int) -> list[int]:
        """Return the numbers of tokens, up to `max_tokens`, at which `run` starts to use other kernels or tiles."""
        return []

    @abstractmethod
    def run(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        norm: tuple[torch.Tensor, float] | None = None,
        residual: torch.Tensor | None = None,
        shared: Shared | None = None,
    ) -> torch.Tensor:
        """Return the sum over each token's experts; see `experts` in ops/moe."""


class ExpertSizes(NamedTuple):
    """The sizes of the experts' weights on this rank.

    Attributes:
        num_experts, hidden, inner: E, H and I.
        row_alignment: that of gate and up; see AllocateWeight.
    """

    num_experts: int
    hidden: int
    inner: int
    row_alignment: int

    @property
    def gate_up_shape(self) -> tuple[int, int, int]:
        """Shape of the weight of all gates and ups."""
        return self.num_experts, 2 * self.inner, self.hidden

    @property
    def down_shape(self) -> tuple[int, int, int]:
        """Shape of the weight of all down projections."""
        return self.num_experts, self.hidden, self.inner


class AllocateExperts(Protocol):
    """Makes a format of these sizes, as AllocateWeight does.

    Args:
        load_gate_up, load_down: load the parameters of gate and up, and those of down.
    """

    def __call__(
        self, sizes: ExpertSizes, *, dtype: torch.dtype | None, load_gate_up: WeightLoader, load_down: WeightLoader
    ) -> ExpertFormat: ...


class PlainExperts(ExpertFormat):
    """The weights as they are in a checkpoint."""

    def __init__(self, gate_up: nn.Parameter, down: nn.Parameter):
        self.gate_up, self.down = gate_up, down
        self.parameters = {"": (gate_up, down)}

    @classmethod
    def allocate(
        cls, sizes: ExpertSizes, *, dtype: torch.dtype | None, load_gate_up: WeightLoader, load_down: WeightLoader
    ) -> "PlainExperts":
        """Make the parameters; see AllocateExperts."""
        check_expert_sizes(sizes.hidden, sizes.inner, dtype)
        return cls(
            make_parameter(*sizes.gate_up_shape, dtype=dtype, weight_loader=load_gate_up),
            make_parameter(*sizes.down_shape, dtype=dtype, weight_loader=load_down),
        )

    def fuses_norm(self, x: torch.Tensor, top_k: int) -> bool:
        return is_expert_gemv(x, self.down, top_k)

    def compile_sizes(self, top_k: int, max_tokens: int) -> list[int]:
        return expert_compile_sizes(len(self.down), top_k, max_tokens)

    def run(self, x, ids, weights, norm=None, residual=None, shared=None) -> torch.Tensor:
        return experts(x, self.gate_up, self.down, ids, weights, norm=norm, residual=residual, shared=shared)
