"""The format of GGUF files: metadata and tensors, memory-mapped."""

import math
import struct
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from nanovllm.arithmetic import ceil_div, is_power_of_2
from nanovllm.checkpoints.files import regular_file
from nanovllm.checks import shown
from nanovllm.library_errors import refusing
from nanovllm.models.model_config import unsupported

# The numpy dtype of each scalar type of metadata, by its number in the format.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING = 8
_ARRAY = 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's header.

    Attributes:
        shape: as in transformers: the reverse of the file's.
        start, end: offsets of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    start: int
    end: int


class GgufFile:
    """A memory-mapped GGUF file.

    `get`, `number`, `integer`, `flag` and `texts` read its metadata; "{arch}" in a key stands for the architecture.

    Raises:
        ValueError: the file breaks the format, or a count or an offset points outside the file.
    """

    def __init__(self, path: Path):
        self.path = regular_file(path)
        self.arch = ""
        with refusing(f"{path} is not a GGUF file that can be read", OSError, ValueError, struct.error, RecursionError):
            self.data = np.memmap(path, mode="r").data
            self.offset = 0
            self.fields: dict[str, memoryview] = {}  # the bytes of each key with its value
            self.metadata, self.tensors = self._parse()
        arch = self.get("general.architecture")
        if arch is None:
            raise ValueError(f"{path} lacks the metadata general.architecture")
        if not isinstance(arch, str):
            raise ValueError(f"{path}: general.architecture must be a text, got {shown(arch)}")
        self.arch = arch

    def _parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        magic, version = self._unpack("<4sI")
        if magic != b"GGUF":
            raise ValueError("it does not start with GGUF")
        if version & 0xFFFF == 0:
            raise unsupported("a big-endian GGUF file")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; it must be 2 or 3")
        num_tensors, num_fields = self._unpack("<QQ")
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):  # a wrong count ends at the end of the file: each field takes some bytes
            start = self.offset
            key = self._text()
            if key in metadata:
                raise ValueError(f"it has the metadata {shown(key)} twice")
            metadata[key] = self._value(self._integer("<I"))
            self.fields[key] = self.data[start : self.offset]
        infos = [self._tensor_info() for _ in range(num_tensors)]
        return metadata, self._locate(infos, metadata.get("general.alignment", 32))

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return values

    def _integer(self, layout: str) -> int:
        return self._unpack(layout)[0]

    def _bytes(self, size: int) -> memoryview:
        if size > len(self.data) - self.offset:
            raise ValueError(f"a value has {size} bytes at offset {self.offset}, but the file ends at {len(self.data)}")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def _text(self) -> str:
        return str(self._bytes(self._integer("<Q")), "utf-8", "replace")

    def _value(self, kind: int) -> Any:
        """Read a value of metadata. `kind` is the number of its type: scalar, text or array."""
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            entry_kind, count = self._unpack("<IQ")
            if entry_kind in _SCALARS:
                return self._scalars(entry_kind, count)
            return [self._value(entry_kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"it has a value of the unknown type {kind} at {self.offset}")
        return self._scalars(kind, 1)[0].item()

    def _scalars(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)

    def _tensor_info(self) -> GgufTensor:
        """Read a tensor's header. Its `start` and `end` still count from the first tensor."""
        name = self._text()
        num_dims = self._integer("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"the tensor {shown(name)} must have 1 to {_MAX_DIMS} dimensions, got {num_dims}")
        shape = self._unpack(f"<{num_dims}Q")[::-1]
        kind, start = self._unpack("<IQ")
        kind = gguf.GGMLQuantizationType(kind)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block_size:
            raise ValueError(f"the tensor {shown(name)} has rows of {shape[-1]}, in blocks of {block_size}")
        end = start + math.prod(shape) // block_size * block_bytes
        return GgufTensor(name=name, shape=shape, type=kind, start=start, end=end)

    def _locate(self, infos: list[GgufTensor], alignment: Any) -> dict[str, GgufTensor]:
        """Return the tensors by name, with offsets in the file. Raise ValueError if two of them overlap."""
        if type(alignment) is not int or not is_power_of_2(alignment):
            raise ValueError(f"its alignment must be a power of two, got {shown(alignment)}")
        first = ceil_div(self.offset, alignment) * alignment
        tensors = {info.name: replace(info, start=first + info.start, end=first + info.end) for info in infos}
        if len(tensors) < len(infos):
            raise ValueError("two of its tensors have the same name")
        in_order = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end))
        for tensor in in_order:
            if tensor.start % alignment or tensor.end > len(self.data):
                raise ValueError(
                    f"the tensor {shown(tensor.name)} is from {tensor.start} to {tensor.end}; it must start at a "
                    f"multiple of {alignment} and end within the file's {len(self.data)} bytes"
                )
        for first_tensor, second in pairwise(in_order):
            if first_tensor.end > second.start:
                raise ValueError(f"the tensors {shown(first_tensor.name)} and {shown(second.name)} overlap")
        return tensors

    def get(self, key: str, default: Any = None) -> Any:
        """Return the metadata, or `default` if it is missing."""
        value = self.metadata.get(key.format(arch=self.arch), default)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def number(self, key: str, default: float | None = None) -> Any:
        """Return the metadata. Raise ValueError if it is not a number, or is missing without a default."""
        value = self.get(key, default)
        if type(value) not in (int, float):
            key = key.format(arch=self.arch)
            raise ValueError(f"{self.path} must have a number as its metadata {key}, got {shown(value)}")
        return value

    def integer(self, key: str) -> int:
        """Return the metadata. Raise ValueError if it is not an integer."""
        value = self.get(key)
        if type(value) is not int:
            raise ValueError(f"{self.path} must have an integer as its metadata {key}, got {shown(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return the metadata, or `default` if it is missing. Raise ValueError if it is neither true nor false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path} must have true or false as its metadata {key}, got {shown(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return the metadata. Raise ValueError if it is not a text, or is missing without a default."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{self.path} must have text as its metadata {key}, got {shown(value)}")
        return value

    def texts(self, key: str) -> list[str]:
        """Return the metadata, [] if it is missing. Raise ValueError if it is not a list of texts."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{self.path} must have a list of texts as its metadata {key}, got {shown(value)}")
        return value

    @contextmanager
    def metadata_file(self, without: Collection[str]) -> Iterator[Path]:
        """Make a temporary GGUF file with this one's metadata but for some keys, and without tensors.

        It has no name in a folder, so that a killed process leaves no file.
        """
        fields = [field for key, field in self.fields.items() if key not in without]
        with tempfile.TemporaryFile() as file:
            file.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(fields)))
            file.writelines(fields)
            file.flush()
            yield Path(f"/dev/fd/{file.fileno()}")

    def floats(self, name: str, expert: int | None = None) -> np.ndarray:
        """Return the tensor, or its part of one expert, dequantized to float32."""
        tensor = self.tensors[name]
        data = np.frombuffer(self.data[tensor.start : tensor.end], np.uint8)
        data = data.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type))
        try:
            return gguf.dequantize(data if expert is None else data[expert], tensor.type)
        except NotImplementedError as error:
            raise unsupported(f"the quantization of the GGUF tensor {name:.200}, {tensor.type.name},") from error
