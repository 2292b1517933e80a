"""GPU memory that several processes of one host map and write, through the CUDA driver.

Every CUDA program has loaded `libcuda`. torch can share tensors too, but it keeps a shared tensor until the other
process releases it, so a killed process would leak it forever.
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
    """Call a driver function; raise RuntimeError if it fails."""
    status = getattr(_driver(), function)(*arguments)
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{function}: {(name.value or b'unknown error').decode()}")


def copy(target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
    """Queue a copy by a copy engine in `stream`. Either address may belong to a `Mapping`."""
    addresses = ctypes.c_uint64(target), ctypes.c_uint64(source)
    _call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(num_bytes), ctypes.c_void_p(stream.cuda_stream))


def write(address: int, value: int, stream: torch.cuda.Stream) -> None:
    """Queue a 32-bit write in `stream`. All earlier work of the stream is complete and visible everywhere by then."""
    target = ctypes.c_uint64(address)
    bits = ctypes.c_uint32(value & 0xFFFFFFFF)
    _call("cuStreamWriteValue32_v2", ctypes.c_void_p(stream.cuda_stream), target, bits, ctypes.c_uint(0))


def share(tensor: torch.Tensor) -> list:
    """Return what another process needs for a `Mapping` of the tensor, as plain data.

    It is the handle of the tensor's allocation, in hexadecimal, and the tensor's offset in it in bytes.

    Raises:
        RuntimeError: the tensor's allocator does not support sharing.
    """
    address = ctypes.c_uint64(tensor.data_ptr())
    base = ctypes.c_uint64()
    handle = _HandleByValue()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), None, address)
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return [bytes(handle).hex(), address.value - base.value]


class Mapping:
    """Another process's GPU memory, mapped for the current GPU until `close`.

    Args:
        shared: the result of `share` in that process.

    Raises:
        RuntimeError: this GPU cannot reach the memory.
    """

    def __init__(self, shared: list):
        handle = _HandleByValue.from_buffer_copy(bytes.fromhex(shared[0]))
        self.offset = shared[1]
        self.base = ctypes.c_uint64()
        self.context = ctypes.c_void_p()
        _call("cuCtxGetCurrent", ctypes.byref(self.context))
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(self.base), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))

    def data_ptr(self) -> int:
        """Return the address of the shared tensor's first element."""
        return self.base.value + self.offset

    def close(self) -> None:
        """Unmap the memory, in any thread. No kernel may use it any more; its owner may have exited."""
        _call("cuCtxPushCurrent_v2", self.context)
        try:
            _call("cuIpcCloseMemHandle", self.base)
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
