"""Writes an ONNX file and the file of its weights, field by field, without a library.

A graph is added to node by node. Weights go to the data file as they come, a piece at a time, so memory does not grow
with the model; the graph itself is written last.
Source: onnx.proto3 (field numbers); onnx, *External data*.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

FLOAT, UINT8, INT32, INT64, FLOAT16 = 1, 2, 6, 7, 10
"""Element types."""
MICROSOFT = "com.microsoft"
IR_VERSION = 10
OPSET = 22
_ALIGNMENT = 4096
"""Of a tensor in the data file: the library maps pages."""
_TYPES = {"float32": FLOAT, "uint8": UINT8, "int32": INT32, "int64": INT64, "float16": FLOAT16}
_ATTRIBUTE_FLOAT, _ATTRIBUTE_INT = 1, 2

Size = int | str
"""Of a dimension; text names one that is not fixed."""
Array = npt.NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Bytes in the data file."""

    offset: int
    length: int


class OnnxFile:
    """A model that is being written."""

    def __init__(self, data: BinaryIO, data_name: str) -> None:
        """
        Args:
            data: open for writing, empty.
            data_name: its name, in the folder of the `.onnx` file.
        """
        self._data = data
        self._data_name = data_name
        self._nodes: list[bytes] = []
        self._tensors: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        *more_outputs: str,
        domain: str = "",
        **attributes: float,
    ) -> str:
        """Adds a node whose first output has its name.

        Args:
            more_outputs: their names; empty for one that nobody reads.

        Returns:
            The first output.
        """
        self._nodes.append(
            b"".join(_bytes(1, each) for each in inputs)
            + b"".join(_bytes(2, each) for each in (name, *more_outputs))
            + _bytes(3, name)
            + _bytes(4, kind)
            + b"".join(_bytes(5, _attribute(*each)) for each in attributes.items())
            + (_bytes(7, domain) if domain else b"")
        )
        return name

    def constant(self, name: str, value: Array) -> str:
        """Adds a small tensor, which stands in the `.onnx` file itself."""
        tensor = _tensor(name, _TYPES[value.dtype.name], value.shape)
        self._tensors.append(tensor + _bytes(9, value.tobytes()))
        return name

    def store(self, pieces: Iterable[Array]) -> Stored:
        """Writes the parts of one tensor to the data file."""
        self._data.write(bytes(-self._data.tell() % _ALIGNMENT))
        offset = self._data.tell()
        for piece in pieces:
            self._data.write(np.ascontiguousarray(piece).data)
        return Stored(offset=offset, length=self._data.tell() - offset)

    def tensor(self, name: str, element_type: int, shape: Sequence[int], stored: Stored) -> str:
        """Names bytes of the data file; several tensors may have the same bytes."""
        size = {FLOAT: 4, UINT8: 1, FLOAT16: 2}[element_type] * math.prod(shape)
        if stored.length != size:
            raise ValueError(f"{name} has {stored.length} bytes, {size} were expected")
        places = {"location": self._data_name, "offset": stored.offset, "length": stored.length}
        entries = (_bytes(1, key) + _bytes(2, str(value)) for key, value in places.items())
        tensor = _tensor(name, element_type, shape)
        self._tensors.append(tensor + b"".join(_bytes(13, entry) for entry in entries) + _number(14, 1))
        return name

    def input(self, name: str, element_type: int, shape: Sequence[Size]) -> str:
        self._inputs.append(_value_info(name, element_type, shape))
        return name

    def output(self, name: str, element_type: int, shape: Sequence[Size]) -> None:
        self._outputs.append(_value_info(name, element_type, shape))

    def write(self, file: Path, producer: str) -> None:
        """Writes the graph."""
        graph = (
            b"".join(_bytes(1, node) for node in self._nodes)
            + _bytes(2, "main_graph")
            + b"".join(_bytes(5, tensor) for tensor in self._tensors)
            + b"".join(_bytes(11, each) for each in self._inputs)
            + b"".join(_bytes(12, each) for each in self._outputs)
        )
        opsets = (("", OPSET), (MICROSOFT, 1))
        file.write_bytes(
            _number(1, IR_VERSION)
            + _bytes(2, producer)
            + _bytes(7, graph)
            + b"".join(_bytes(8, _bytes(1, domain) + _number(2, version)) for domain, version in opsets)
        )


def _tensor(name: str, element_type: int, shape: Sequence[int]) -> bytes:
    return b"".join(_number(1, size) for size in shape) + _number(2, element_type) + _bytes(8, name)


def _attribute(name: str, value: float) -> bytes:
    if isinstance(value, int):
        return _bytes(1, name) + _number(3, value) + _number(20, _ATTRIBUTE_INT)
    return _bytes(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, _ATTRIBUTE_FLOAT)


def _value_info(name: str, element_type: int, shape: Sequence[Size]) -> bytes:
    dims = (_number(1, size) if isinstance(size, int) else _bytes(2, size) for size in shape)
    tensor = _number(1, element_type) + _bytes(2, b"".join(_bytes(1, dim) for dim in dims))
    return _bytes(1, name) + _bytes(2, _bytes(1, tensor))


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes | str) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return _varint(field << 3 | 2) + _varint(len(data)) + data
