"""The container of a GGUF file: metadata and tensor positions, every length checked first.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
The gguf package's own reader trusts the counts in the header and loops or allocates by them, so a
damaged file can take all memory; here no count is believed that the file is too short for. Block
types and their sizes come from the gguf package.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from headstart.engine.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ENTRIES = 1 << 16
"""More metadata keys or tensors than any model has."""
MAX_STRINGS = 1 << 22
"""Longest array of strings: several times the largest vocabulary in use."""
MAX_DIMENSIONS = 4

_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file. ``shape`` is in torch's order, rows first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """A GGUF file, mapped: ``metadata`` by key, ``tensors`` by name.

    Strings are str, scalars int, float or bool, arrays of strings list[str], other arrays numpy.
    Raises ModelError of one line for anything that is not a whole, well-formed file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ModelError(f"{path}: is empty") from error
        cursor = _Cursor(path, self._data)
        if bytes(cursor.take(4)) != MAGIC:
            raise ModelError(f"{path}: not a GGUF file")
        version = cursor.unsigned(4)
        if version not in VERSIONS:
            raise ModelError(f"{path}: GGUF version {version} is not supported, only 2 and 3")
        num_tensors, num_keys = cursor.unsigned(8), cursor.unsigned(8)
        if max(num_tensors, num_keys) > MAX_ENTRIES:
            cursor.fail(f"{num_tensors} tensors and {num_keys} metadata keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string()
            if key in self.metadata:
                cursor.fail(f"metadata key {key} is there twice")
            self.metadata[key] = cursor.value(cursor.unsigned(4), key)
        infos = [_tensor_info(cursor) for _ in range(num_tensors)]
        self.tensors = self._place(cursor, infos)

    def _place(
        self, cursor: _Cursor, infos: list[tuple[str, tuple[int, ...], int, int]]
    ) -> dict[str, TensorInfo]:
        """Turn offsets relative to the data section into checked positions in the file."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            cursor.fail(f"general.alignment is {alignment!r}")
        start = -(-cursor.offset // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_id, offset in infos:
            try:
                tensor_type = GGMLQuantizationType(type_id)
            except ValueError as error:
                raise ModelError(
                    f"{self.path}: tensor {name} has the unknown type {type_id}"
                ) from error
            block, block_bytes = GGML_QUANT_SIZES[tensor_type]
            if shape[-1] % block:
                cursor.fail(f"rows of tensor {name} are not whole blocks of {block}")
            elements = 1
            for size in shape:
                elements *= size
            num_bytes = elements // block * block_bytes
            if start + offset + num_bytes > len(self._data):
                raise ModelError(f"{self.path}: truncated: tensor {name} lies beyond its end")
            if name in tensors:
                cursor.fail(f"tensor {name} is there twice")
            tensors[name] = TensorInfo(name, shape, tensor_type, start + offset, num_bytes)
        return tensors

    def rows(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as stored, [rows, bytes per row]; a view of the mapped file."""
        raw = np.frombuffer(self._data, np.uint8, info.num_bytes, info.offset)
        block, block_bytes = GGML_QUANT_SIZES[info.type]
        return raw.reshape(-1, info.shape[-1] // block * block_bytes)


class _Cursor:
    """Reads the header front to back; never past the end of the file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.offset = 0

    def fail(self, what: str) -> None:
        raise ModelError(f"{self.path}: damaged GGUF header at byte {self.offset}: {what}")

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self.data) - self.offset:
            raise ModelError(f"{self.path}: truncated: the header runs beyond the end of the file")
        part = self.data[self.offset : self.offset + num_bytes]
        self.offset += num_bytes
        return part

    def unsigned(self, num_bytes: int) -> int:
        return int.from_bytes(self.take(num_bytes), "little")

    def string(self) -> str:
        length = self.unsigned(8)
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(
                f"{self.path}: damaged GGUF header at byte {self.offset}: text is not UTF-8"
            ) from error

    def value(self, type_id: int, key: str) -> Any:
        if type_id == GGUFValueType.STRING:
            return self.string()
        if type_id == GGUFValueType.ARRAY:
            return self._array(key)
        if type_id not in _SCALARS:
            self.fail(f"{key!r} has the unknown type {type_id}")
        kind = np.dtype(_SCALARS[type_id])
        return np.frombuffer(self.take(kind.itemsize), kind)[0].item()

    def _array(self, key: str) -> list[str] | npt.NDArray[Any]:
        type_id, count = self.unsigned(4), self.unsigned(8)
        if type_id == GGUFValueType.STRING:
            if count > MAX_STRINGS:
                self.fail(f"{key!r} has {count} strings")
            return self._strings(count)
        if type_id not in _SCALARS:
            self.fail(f"{key!r} is an array of the unsupported type {type_id}")
        kind = np.dtype(_SCALARS[type_id])
        return np.frombuffer(self.take(count * kind.itemsize), kind)

    def _strings(self, count: int) -> list[str]:
        """As ``string`` count times, without its overhead: vocabularies have 10^5 entries."""
        data, offset, end = self.data, self.offset, len(self.data)
        read_length = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            if end - offset < 8 or read_length(data, offset)[0] > end - offset - 8:
                self.take(end)  # says that the file is truncated
            start = offset + 8
            offset = start + read_length(data, offset)[0]
            try:
                strings.append(str(data[start:offset], "utf-8"))
            except UnicodeDecodeError:
                self.offset = start
                self.fail("text is not UTF-8")
        self.offset = offset
        return strings


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """name, shape (rows first), type, offset in the data section."""
    name = cursor.string()
    num_dimensions = cursor.unsigned(4)
    if not 0 < num_dimensions <= MAX_DIMENSIONS:
        cursor.fail(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(cursor.unsigned(8) for _ in range(num_dimensions))[::-1]
    if not all(shape):
        cursor.fail(f"tensor {name!r} is empty")
    return name, shape, cursor.unsigned(4), cursor.unsigned(8)
