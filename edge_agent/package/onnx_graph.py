"""Reads from an ONNX file how its model was built, without the library that runs it.

It reads the graph's structure from the protobuf, never the weights: the file is mapped, not loaded. The file is
untrusted input: anything unknown is an error, not a guess.
Source: onnx.proto3 (field numbers); com.microsoft.MatMulNBits and GatherBlockQuantized of onnxruntime.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_agent.errors import ContentError
from edge_agent.package.protobuf import Value, fields, varints

_MAX_NODES = 1_000_000
_ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 10: 2, 11: 8, 16: 2}


@dataclass(frozen=True, kw_only=True)
class QuantizedMatMul:
    """One matrix, quantized in blocks.

    Attributes:
        accuracy_level: 4 computes in int8, 1 in float32; with 0 the library chooses.
    """

    name: str
    bits: int
    block_size: int
    accuracy_level: int


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """How a decoder was built.

    Attributes:
        float_matmuls: number of matrices that are not quantized.
        embedding_bytes: size of the table of token embeddings.
        embedding_quantized: None if there is no such table.
        prunes_head: the last matrix is applied to the last token only.
    """

    matmuls: tuple[QuantizedMatMul, ...]
    float_matmuls: int
    embedding_bytes: int
    embedding_quantized: bool | None
    prunes_head: bool


def read(file: Path) -> OnnxGraph:
    """Reads one `.onnx` file.

    Raises:
        ContentError: it is not an ONNX file.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                return _graph(view)
            finally:
                view.release()
    except (OSError, ValueError, IndexError, UnicodeDecodeError, BufferError) as error:
        raise ContentError(f"{file} is not an ONNX file ({type(error).__name__})") from error


def _graph(model: memoryview) -> OnnxGraph:
    graph = next((_bytes(value) for number, value in fields(model) if number == 7), None)
    if graph is None:
        raise ValueError("no graph")
    matmuls: list[QuantizedMatMul] = []
    float_inputs: list[list[str]] = []
    weights: dict[str, int] = {}
    gathers: list[tuple[bool, list[str]]] = []
    pruned = False
    for count, (number, value) in enumerate(fields(graph)):
        if count > _MAX_NODES:
            raise ValueError("too many nodes")
        if number == 5:
            name, size = _weight(_bytes(value))
            weights[name] = size
        elif number == 12 and not pruned:
            pruned = _one_token_logits(_bytes(value))
        elif number == 1:
            node = _Node(_bytes(value))
            if node.kind == "MatMulNBits":
                matmuls.append(node.quantized())
            elif node.kind in ("Gather", "GatherBlockQuantized"):
                gathers.append((node.kind == "GatherBlockQuantized", node.inputs))
            elif node.kind in ("MatMul", "Gemm"):
                float_inputs.append(node.inputs)
    embedding, quantized = 0, None
    for is_quantized, inputs in gathers:
        size = sum(weights.get(name, 0) for name in inputs)
        if size > embedding:
            embedding, quantized = size, is_quantized
    return OnnxGraph(
        matmuls=tuple(matmuls),
        float_matmuls=sum(any(name in weights for name in inputs) for inputs in float_inputs),
        embedding_bytes=embedding,
        embedding_quantized=quantized,
        prunes_head=pruned,
    )


class _Node:
    """A NodeProto."""

    def __init__(self, data: memoryview) -> None:
        self.kind, self.name = "", ""
        self.inputs: list[str] = []
        self._attributes: list[memoryview] = []
        for number, value in fields(data):
            if number == 1:
                self.inputs.append(_text(value))
            elif number == 3:
                self.name = _text(value)
            elif number == 4:
                self.kind = _text(value)
            elif number == 5:
                self._attributes.append(_bytes(value))

    def quantized(self) -> QuantizedMatMul:
        integers: dict[str, int] = {}
        for attribute in self._attributes:
            name, integer = "", 0
            for number, value in fields(attribute):
                if number == 1:
                    name = _text(value)
                elif number == 3 and isinstance(value, int):
                    integer = value
            integers[name] = integer
        return QuantizedMatMul(
            name=self.name,
            bits=integers.get("bits", 4),
            block_size=integers.get("block_size", 0),
            accuracy_level=integers.get("accuracy_level", 0),
        )


def _weight(tensor: memoryview) -> tuple[str, int]:
    """(name, bytes) of a TensorProto."""
    name, elements, element_bytes = "", 1, 0
    for number, value in fields(tensor):
        if number == 1:
            for size in [value] if isinstance(value, int) else varints(value):
                elements *= size
        elif number == 2 and isinstance(value, int):
            element_bytes = _ELEMENT_BYTES.get(value, 0)
        elif number == 8:
            name = _text(value)
    return name, elements * element_bytes


def _one_token_logits(output: memoryview) -> bool:
    """Whether a ValueInfoProto is `logits` of [batch, 1, vocabulary]."""
    name, sizes = "", list[int | None]()
    for number, value in fields(output):
        if number == 1:
            name = _text(value)
        elif number == 2:  # type → tensor_type → shape → dim → dim_value
            for tensor in _inner(_bytes(value), 1):
                for shape in _inner(tensor, 2):
                    sizes = [
                        next((size for key, size in fields(dim) if key == 1 and isinstance(size, int)), None)
                        for dim in _inner(shape, 1)
                    ]
    return name == "logits" and len(sizes) == 3 and sizes[1] == 1


def _inner(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (_bytes(value) for number, value in fields(data) if number == wanted)


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _text(value: Value) -> str:
    return bytes(_bytes(value)).decode("utf-8")
