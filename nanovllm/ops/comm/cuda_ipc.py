"""GPU memory that processes of one host map and write, by the CUDA driver (every CUDA program has loaded `libcuda`).

torch shares tensors too, but keeps one until the other process has said that it is done with it: after that one was
killed, for ever.
"""

import ctypes
from functools import lru_cache

import torch

_Handle = ctypes.c_ubyte * 64
_LAZY_PEER_ACCESS = 1


class _HandleByValue(ctypes.Structure):
    _fields_ = (("bytes", _Handle),)


@lru_cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(str(error)) from error


def _call(function: str, *arguments: object) -> None:
    """Call the driver; RuntimeError if that fails."""
    status = getattr(_driver(), function)(*arguments)
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{function}: {(name.value or b'unknown error').decode()}")


def copy(target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
    """Let a copy engine copy between addresses, of which either may be of a `Mapping`, in the order of `stream`."""
    sizes = ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(num_bytes)
    _call("cuMemcpyDtoDAsync_v2", *sizes, ctypes.c_void_p(stream.cuda_stream))


def write(address: int, value: int, stream: torch.cuda.Stream) -> None:
    """Write 32 bits once all before in `stream` is done and can be seen from everywhere."""
    bits = ctypes.c_uint64(address), ctypes.c_uint32(value & 0xFFFFFFFF)
    _call("cuStreamWriteValue32_v2", ctypes.c_void_p(stream.cuda_stream), *bits, ctypes.c_uint(0))


def share(tensor: torch.Tensor) -> list:
    """What a `Mapping` of the tensor's memory needs: a string and an integer.

    Raises:
        RuntimeError: the tensor is of an allocator whose memory cannot be shared.
    """
    address, base, handle = ctypes.c_uint64(tensor.data_ptr()), ctypes.c_uint64(), _HandleByValue()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), None, address)
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return [bytes(handle).hex(), address.value - base.value]


class Mapping:
    """Memory of another process, as the current GPU sees it, until `close`.

    Args:
        shared: from that process's `share`.

    Raises:
        RuntimeError: this GPU cannot reach it.
    """

    def __init__(self, shared: list):
        handle, self.offset = _HandleByValue.from_buffer_copy(bytes.fromhex(shared[0])), shared[1]
        self.base, self.context = ctypes.c_uint64(), ctypes.c_void_p()
        _call("cuCtxGetCurrent", ctypes.byref(self.context))
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(self.base), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))

    def data_ptr(self) -> int:
        """The address of what the tensor's first element is there."""
        return self.base.value + self.offset

    def close(self) -> None:
        """Unmap it, in any thread. No kernel may use it any more; the process that it belongs to may be gone."""
        _call("cuCtxPushCurrent_v2", self.context)
        try:
            _call("cuIpcCloseMemHandle", self.base)
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
