"""Check the tensors that a caller gives as weights."""

from collections.abc import Iterable, Iterator

import torch

from nanovllm.checks import plain, shown


def checked_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over `weights`. Raise TypeError or ValueError at one that is not a name and a tensor with data."""
    for pair in weights:
        name, tensor = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"weights must be pairs (name, tensor), got {shown(pair)}")
        with torch._C.DisableTorchFunctionSubclass():  # read the memory, whatever methods a subclass has
            if fault := _fault(tensor):
                raise ValueError(f"the tensor {name:.200} {fault}; it must be a dense tensor of real numbers with data")
            tensor = tensor.detach().as_subclass(torch.Tensor).resolve_neg()
        yield plain(name), tensor


def _fault(tensor: torch.Tensor) -> str | None:
    """Return why the bytes of a tensor's numbers cannot be read; None if they can."""
    kind = type(tensor)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # pyright: ignore[reportAttributeAccessIssue]
        advice = " (give its .full_tensor())" if hasattr(tensor, "full_tensor") else ""
        return f"is a {kind.__name__:.100}, which has no plain data{advice}"
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_nested:
        return f"is a {'nested tensor' if tensor.is_nested else kind.__name__} without a shape"
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        return f"is on {tensor.device} with layout {tensor.layout} and dtype {tensor.dtype}"
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.storage_offset() + last + 1
    if tensor.numel() and tensor.untyped_storage().nbytes() < end * tensor.itemsize:
        return "has lost its memory: its storage was freed or made smaller"
    return None
