"""Parameters that load themselves: each carries `weight_loader(param, loaded, shard_id=None)`.

`loaded` is the checkpoint's whole tensor; the loader takes this rank's slice of it. `shard_id` names the part of a
merged parameter that it belongs to.
"""

from collections.abc import Callable

import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.ops.linear.linear import can_pack, pack


class PackedLayer(nn.Module):
    """A layer whose `weight` [N, K] multiplies, and which may keep it in a faster layout instead of the plain one."""

    packed: torch.Tensor | None = None

    def pack(self, keep_plain: bool) -> None:
        """Change to the faster layout where there is one; `keep_plain` if another layer reads the plain weight."""
        if can_pack(self.weight):
            self.packed = pack(self.weight)
            if not keep_plain:
                self.weight.data = self.weight.data.new_empty(0)

    def unpack(self) -> None:
        """Change back, so that the weight can be written."""
        if self.packed is not None and not self.weight.numel():
            self.weight.data = self.packed.to_dense()
        self.packed = None

    @property
    def operand(self) -> torch.Tensor:
        """The weight as products want it."""
        return self.weight if self.packed is None else self.packed


def check_shape(loaded: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `loaded` has the `shape` of the whole tensor."""
    if tuple(loaded.shape) != tuple(shape):
        raise ValueError(f"has shape {list(loaded.shape)}, but the model needs {list(shape)}")


def load_whole(param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
    """The weight loader of a parameter that every rank holds in full."""
    check_shape(loaded, param.shape)
    param.copy_(loaded)


def make_parameter(
    *shape: int, dtype: torch.dtype | None = None, weight_loader: Callable[..., None] = load_whole
) -> nn.Parameter:
    """An uninitialised parameter without gradient on the current default device."""
    param = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    param.weight_loader = weight_loader
    return param


def divide(name: str, value: int, tp: TensorParallel) -> int:
    """A rank's share of `value`; ValueError if the ranks cannot share it evenly."""
    if value % tp.size:
        raise ValueError(f"tensor_parallel_size={tp.size} does not divide the model's {name}={value}")
    return value // tp.size
