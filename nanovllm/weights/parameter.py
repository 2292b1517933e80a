"""Parameters that load themselves, and the checkpoint tensors that they load.

A parameter has the attribute `weight_loader(param, loaded, shard_id=None)`, which copies this rank's shard of a whole
checkpoint tensor. `shard_id` names the shard of a merged parameter. `block_of` and `row_block_of` say which part of a
weight the elements of packed weights, scales and zero points cover, and `storage_of` how their weight is held.

Checkpoints differ in which tensors they merge. Layers declare the separate tensors, and in which merged tensor some
checkpoints have them.
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from nanovllm.arithmetic import ceil_div

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # loading converts between these

WeightLoader: TypeAlias = Callable[..., None]  # see above
ShardId = str | int  # names a shard of a merged parameter, as in nano-vLLM: "q", "k", "v", 0 or 1
BAD_SCALE = "has values that are NaN, infinite or negative"
Index: TypeAlias = slice | tuple[int | slice, ...]  # selects a part of a tensor
# A block with this many rows or columns covers all rows or columns of its weight: no weight has more.
WHOLE = 1 << 30


class Storage(Enum):
    """How the checkpoint and the parameters hold a weight.

    A weight that loading quantizes counts as quantized in the checkpoint.
    """

    PLAIN = auto()  # in higher precision in both
    DEQUANTIZED = auto()  # quantized in the checkpoint, in higher precision in its only parameter
    QUANTIZED = auto()  # quantized in both: its parameters are those of a format that has kernels


class _Contents(NamedTuple):
    """The contents of a parameter; see `make_parameter` and `Storage`."""

    block: tuple[int, int] = (1, 1)
    row_block: int = 1
    is_scale: bool = False
    storage: Storage = Storage.PLAIN


class MergedTensor(NamedTuple):
    """A tensor that some checkpoints have in place of several separate ones.

    Attributes:
        name, shape: name and shape of the merged tensor.
        source_index: index of the separate tensor in the merged one.
    """

    name: str
    shape: tuple[int, ...]
    source_index: Index

    def part(self, loaded: torch.Tensor) -> torch.Tensor:
        """Return the separate tensor, a view. Raise ValueError if the shape of `loaded` is wrong."""
        check_shape(loaded, self.shape)
        return loaded[self.source_index]


class CheckpointTensor(NamedTuple):
    """A tensor that a checkpoint must have, and its target.

    Attributes:
        param: the parameter that loads it.
        shape: shape of the whole tensor.
        shard_id: the shard of `param` that it fills; None if `param` is not merged.
        target_index: index of the part of `param` that it fills; None if `param` is not merged.
        merged: the tensor that has this one as a part in some checkpoints.
        dummy: the value of all its elements with load_format="dummy"; None if they are small random numbers.
    """

    param: nn.Parameter
    shape: tuple[int, ...]
    shard_id: ShardId | tuple[int, int] | None = None
    target_index: Index | None = None
    merged: MergedTensor | None = None
    dummy: float | None = None

    @property
    def destination(self) -> torch.Tensor:
        """Return the part of the parameter that the tensor fills."""
        return self.param if self.target_index is None else self.param[self.target_index]

    def load(self, loaded: torch.Tensor) -> None:
        """Copy this rank's shard of the whole tensor. Raise ValueError if its dtype or shape is wrong."""
        check_dtype(loaded, self.param.dtype)
        self.param.weight_loader(self.param, loaded, self.shard_id)  # pyright: ignore[reportAttributeAccessIssue]


def checkpoint_tensors(module: nn.Module, prefix: str) -> dict[str, CheckpointTensor]:
    """Return the targets of the checkpoint tensors that `module` loads, by their names.

    A layer whose tensors have other names or shapes than its parameters declares them in a method of this name.
    """
    declare = getattr(module, "checkpoint_tensors", None)
    if declare is not None:
        return declare(prefix)
    tensors = {}
    for name, param in module.named_parameters(recurse=False):
        tensors[f"{prefix}.{name}"] = CheckpointTensor(param, tuple(param.shape))
    for name, child in module.named_children():
        tensors |= checkpoint_tensors(child, f"{prefix}.{name}")
    return tensors


def check_shape(loaded: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `loaded` has the `shape` of the whole tensor."""
    if tuple(loaded.shape) != tuple(shape):
        raise ValueError(f"has shape {list(loaded.shape)}, but the model needs {list(shape)}")


def check_dtype(loaded: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless a parameter of this dtype can load the tensor: only floats are converted."""
    allowed = FLOATS if dtype in FLOATS else (dtype,)
    if loaded.dtype not in allowed:
        raise ValueError(f"has dtype {loaded.dtype}, but the model needs {' or '.join(map(str, allowed))}")


def splits_block(part: slice, size: int, block: int) -> bool:
    """Return whether rows or columns of a weight cover a block in part, unless they all lie in one block.

    Args:
        part: the rows or columns.
        size: number of rows or columns that the weight has. Its last block may be smaller than the others.
        block: number of rows or columns in a block.
    """
    is_inside = part.start // block == (part.stop - 1) // block
    return not is_inside and (part.start % block > 0 or (part.stop % block > 0 and part.stop < size))


def blocks_covering(part: slice, size: int, block: int) -> slice:
    """Return the slice of a tensor's blocks that covers rows or columns of a weight.

    Args:
        part, size, block: as in `splits_block`.

    Raises:
        ValueError: `part` splits a block.
    """
    if splits_block(part, size, block):
        raise ValueError(
            f"the shard {part.start}:{part.stop} of a weight's {size} rows or columns must start and stop at multiples "
            f"of {block}, the block size of its format; another tensor_parallel_size may do that"
        )
    return slice(part.start // block, ceil_div(part.stop, block))


def _contents(param: nn.Parameter) -> _Contents:
    return getattr(param, "contents", _Contents())


def block_of(param: nn.Parameter) -> tuple[int, int]:
    """Return how many rows and columns of a weight one element of the parameter's checkpoint tensor covers."""
    return _contents(param).block


def row_block_of(param: nn.Parameter) -> int:
    """Return how many rows of a weight one element of the parameter covers."""
    return _contents(param).row_block


def column_shard(param: nn.Parameter, columns: slice, total: int) -> tuple[tuple[int, int], slice]:
    """Return the shape of the whole tensor that `param` [..., N, K] loads, and the columns of it that this rank loads.

    Both are in elements of that tensor: if an element covers a block, a shape counts blocks.

    Args:
        columns: this rank's columns of the weight.
        total: number of columns that the whole weight has.

    Raises:
        ValueError: `columns` split a block.
    """
    block = block_of(param)[1]
    return (param.shape[-2], ceil_div(total, block)), blocks_covering(columns, total, block)


def is_scale(param: nn.Parameter) -> bool:
    """Return whether the parameter has scales of a weight, which are not negative."""
    return _contents(param).is_scale


def storage_of(param: nn.Parameter) -> Storage:
    """Return how the parameter's weight is held. The parameter is the weight, its packed values, scales or zeros."""
    return _contents(param).storage


def set_storage(param: nn.Parameter, storage: Storage) -> None:
    """Set how the parameter's weight is held; see `storage_of`."""
    param.contents = _contents(param)._replace(storage=storage)  # pyright: ignore[reportAttributeAccessIssue]


def is_valid(values: torch.Tensor, is_scale: bool) -> torch.Tensor:
    """Return whether values are finite, and not negative if they are scales: a bool on their device."""
    # `aminmax` reads the values once, but lacks dtypes such as float8. These are converted in chunks, because a GPU may
    # lack memory for another copy of them.
    chunks = [values] if values.dtype in FLOATS else (chunk.bfloat16() for chunk in values.split(4096))
    # Both are NaN if the chunk has a NaN.
    extremes = torch.stack([extreme for chunk in chunks for extreme in torch.aminmax(chunk)])
    is_finite = extremes.isfinite().all()
    return is_finite & (extremes >= 0).all() if is_scale else is_finite


def load_whole(param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
    """Load a parameter that every rank holds in full."""
    check_shape(loaded, param.shape)
    param.copy_(loaded)


def select(loaded: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
    """Return a copy of the rows of `loaded` at these indices, in their order."""
    return loaded.index_select(0, torch.as_tensor(indices, device=loaded.device))


def make_parameter(
    *shape: int,
    dtype: torch.dtype | None = None,
    weight_loader: WeightLoader = load_whole,
    block: tuple[int, int] = (1, 1),
    row_block: int | None = None,
    is_scale: bool = False,
) -> nn.Parameter:
    """Make an uninitialized parameter without gradient on the current default device.

    Args:
        block: how many rows and columns of a weight one element of the checkpoint tensor covers: more than (1, 1) for
            scales, zero points, and weights that have several values in an element. WHOLE stands for all of them.
        row_block: how many rows one element of the parameter covers; block[0] if None. 1 if shards split blocks.
        is_scale: whether the elements are scales. Loading refuses negative ones.
    """
    param = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    contents = _Contents(block, block[0] if row_block is None else row_block, is_scale)
    param.weight_loader = weight_loader  # pyright: ignore[reportAttributeAccessIssue]
    param.contents = contents  # pyright: ignore[reportAttributeAccessIssue]
    return param


def rows_of(
    indices: np.ndarray, *, shape: tuple[int, ...], whole: tuple[int, ...], dtype: torch.dtype | None
) -> CheckpointTensor:
    """Make a parameter that holds some rows of a checkpoint's tensor. Return it as the target of that tensor.

    Args:
        indices: the rows, in the parameter's order.
        shape: shape of the parameter. It has as many values as the rows.
        whole: shape of the whole tensor.
    """

    def load(param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
        check_shape(loaded, whole)
        param.copy_(select(loaded, indices).view(shape))

    return CheckpointTensor(make_parameter(*shape, dtype=dtype, weight_loader=load), whole)
