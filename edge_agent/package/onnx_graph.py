"""Reads from an ONNX file how its model was built, without the library that runs it.

It reads the graph's structure from the protobuf, never the weights: the file is mapped, not loaded. The file is
untrusted input: anything unknown is an error, not a guess.
Source: onnx.proto3 (field numbers); com.microsoft.MatMulNBits and GatherBlockQuantized of onnxruntime; ONNX's
DequantizeLinear before a MatMul, which onnxruntime makes into MatMulNBits when it loads the graph.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edge_agent.errors import ContentError
from edge_agent.package.protobuf import Value, fields, varints

_MAX_NODES = 1_000_000
_UINT8 = 2
_FLOATS = {1: "float32", 10: "float16", 16: "bfloat16"}
_MAX_CONSTANT = 16
"""Elements: a smaller tensor is a number of the computation."""
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
_LOOK_UPS = ("Gather", "GatherBlockQuantized")
"""They read a few rows of a table."""
_ALL = range(1 << 10)
_NONE = range(0)
_WEIGHT_INPUTS: Mapping[str, range] = {
    **dict.fromkeys((*_PRODUCTS, "Add", "Transpose", "Cast"), _ALL),
    **dict.fromkeys(("LayerNormalization", "SkipLayerNormalization"), _ALL),
    **dict.fromkeys(("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"), _ALL),
    **dict.fromkeys(_LOOK_UPS, range(1)),
    "MatMulNBits": range(5, 6),  # its bias; the matrix counts by its two sizes
    "DequantizeLinear": range(1),
    **dict.fromkeys(("GroupQueryAttention", "RotaryEmbedding"), _NONE),  # tables of sines
}
"""Where the model builder's operators have weights."""
_MINIMA = ".minima"
"""Ends the name of a tensor that is a part of quantized weights, as their scales are (publishing/gguf)."""
_INTEGER_BITS = {2: 8, 3: 8, 21: 4, 22: 4}
"""Element type → bits, of a quantized tensor."""
_QDQ_ACCURACY_LEVEL = 4
"""onnxruntime's own choice for DequantizeLinear and MatMul (session.qdq_matmulnbits_accuracy_level)."""
_ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 10: 2, 11: 8, 16: 2}


@dataclass(frozen=True, kw_only=True)
class QuantizedMatMul:
    """One matrix, quantized in blocks.

    Attributes:
        accuracy_level: 4 computes in int8, 1 in float32; with 0 the library chooses.
        weights: number of elements.
    """

    name: str
    bits: int
    block_size: int
    accuracy_level: int
    weights: int = 0


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """How a decoder was built.

    Attributes:
        float_matmuls: number of matrices that are not quantized.
        embedding_bytes: size of the table of token embeddings.
        embedding_shared: the table is also the last matrix.
        embedding_quantized: None if there is no such table.
        embedding_bits: of one of its elements; 0 where that is unknown.
        embedding_block_size: weights that share a scale; 0 where none do.
        prunes_head: the last matrix is applied to the last token only.
        weights: number of weights in the graph; a table of embeddings that is there twice counts twice. 0 where an
            operator holds some that this module does not know.
        float_type: of the matrices that are not quantized, such as `float16`; empty if there are none, or several.
    """

    matmuls: tuple[QuantizedMatMul, ...]
    float_matmuls: int
    embedding_bytes: int
    embedding_quantized: bool | None
    prunes_head: bool
    weights: int = 0
    float_type: str = ""
    embedding_shared: bool = False
    embedding_bits: int = 0
    embedding_block_size: int = 0


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
    nodes: list[_Node] = []
    tensors: dict[str, _Tensor] = {}
    pruned = False
    for count, (number, value) in enumerate(fields(graph)):
        if count > _MAX_NODES:
            raise ValueError("too many nodes")
        if number == 5:
            tensor = _tensor(_bytes(value))
            tensors[tensor.name] = tensor
        elif number == 12 and not pruned:
            pruned = _one_token_logits(_bytes(value))
        elif number == 1:
            nodes.append(_Node(_bytes(value)))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_MINIMA)}
    matmuls = [node.quantized() for node in nodes if node.kind == "MatMulNBits"]
    matmuls += _dequantized_matmuls(nodes, tensors)
    floats = [
        [tensors[name] for name in node.inputs if name in tensors] for node in nodes if node.kind in _PRODUCTS
    ]
    float_types = {_FLOATS.get(tensor.type, "") for matrix in floats for tensor in matrix[:1]}
    embedding, table, shared = 0, None, False
    others = {name for node in nodes if node.kind not in _LOOK_UPS for name in node.inputs}
    for node in nodes:
        if node.kind in _LOOK_UPS:
            weights = [name for name in node.inputs if name in tensors]
            size = sum(tensors[name].size_bytes for name in weights)
            if size > embedding:
                embedding, table = size, node
                shared = not others.isdisjoint(weights)
    return OnnxGraph(
        matmuls=tuple(matmuls),
        float_matmuls=sum(map(bool, floats)),
        embedding_bytes=embedding,
        embedding_quantized=None if table is None else table.kind == "GatherBlockQuantized",
        prunes_head=pruned,
        weights=_weights(nodes, tensors),
        float_type=float_types.pop() if len(float_types) == 1 else "",
        embedding_shared=shared,
        **_embedding(table, tensors),
    )


def _dequantized_matmuls(nodes: Sequence[_Node], tensors: Mapping[str, _Tensor]) -> Iterator[QuantizedMatMul]:
    """Matrices that are stored quantized, and given to a MatMul by DequantizeLinear, turned or not."""
    stored: dict[str, tuple[_Tensor, int]] = {}
    for node in nodes:
        source = node.inputs[0] if node.inputs else ""
        if node.kind == "DequantizeLinear":
            tensor = tensors.get(source)
            if tensor and tensor.type in _INTEGER_BITS:
                stored |= dict.fromkeys(node.outputs, (tensor, node.integers.get("block_size", 0)))
        elif node.kind == "Transpose" and source in stored:
            stored |= dict.fromkeys(node.outputs, stored[source])
        elif node.kind in _PRODUCTS:
            for tensor, block_size in (stored[name] for name in node.inputs if name in stored):
                yield QuantizedMatMul(
                    name=node.name,
                    bits=_INTEGER_BITS[tensor.type],
                    block_size=block_size,
                    accuracy_level=_QDQ_ACCURACY_LEVEL,
                    weights=tensor.elements,
                )


def _embedding(table: _Node | None, tensors: Mapping[str, _Tensor]) -> dict[str, int]:
    """How the elements of the table of embeddings are stored."""
    if table is None:
        return {}
    if table.kind == "GatherBlockQuantized":
        sizes = table.integers
        return {"embedding_bits": sizes.get("bits", 4), "embedding_block_size": sizes.get("block_size", 128)}
    tensor = tensors.get(table.inputs[0])
    return {"embedding_bits": 8 * _ELEMENT_BYTES[tensor.type]} if tensor and tensor.type in _FLOATS else {}


def _weights(nodes: Iterable[_Node], tensors: Mapping[str, _Tensor]) -> int:
    """How many there are; 0 if an operator has some that are not known here."""
    total, counted = 0, set[str]()
    for node in nodes:
        matrix = node.inputs[1] if node.kind == "MatMulNBits" and len(node.inputs) > 1 else ""
        if matrix and matrix not in counted:
            counted.add(matrix)
            total += node.quantized().weights
        for place, name in enumerate(node.inputs):
            tensor = tensors.get(name)
            if tensor is None or name in counted or place not in _WEIGHT_INPUTS.get(node.kind, _ALL):
                continue
            if node.kind == "GatherBlockQuantized":
                packed = 8 // max(1, node.integers.get("bits", 4)) if tensor.type == _UINT8 else 1
                total += tensor.elements * packed
            elif node.kind == "DequantizeLinear" and tensor.type in _INTEGER_BITS:
                total += tensor.elements
            elif tensor.type not in _FLOATS or tensor.elements <= _MAX_CONSTANT:
                continue
            elif node.kind not in _WEIGHT_INPUTS:
                return 0
            else:
                total += tensor.elements
            counted.add(name)
    return total


class _Node:
    """A NodeProto."""

    def __init__(self, data: memoryview) -> None:
        self.kind, self.name = "", ""
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self._attributes: list[memoryview] = []
        for number, value in fields(data):
            if number == 1:
                self.inputs.append(_text(value))
            elif number == 2:
                self.outputs.append(_text(value))
            elif number == 3:
                self.name = _text(value)
            elif number == 4:
                self.kind = _text(value)
            elif number == 5:
                self._attributes.append(_bytes(value))

    @cached_property
    def integers(self) -> dict[str, int]:
        """The attributes that are numbers."""
        found: dict[str, int] = {}
        for attribute in self._attributes:
            name, integer = "", 0
            for number, value in fields(attribute):
                if number == 1:
                    name = _text(value)
                elif number == 3 and isinstance(value, int):
                    integer = value
            found[name] = integer
        return found

    def quantized(self) -> QuantizedMatMul:
        return QuantizedMatMul(
            name=self.name,
            bits=self.integers.get("bits", 4),
            block_size=self.integers.get("block_size", 0),
            accuracy_level=self.integers.get("accuracy_level", 0),
            weights=self.integers.get("K", 0) * self.integers.get("N", 0),
        )


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """What a TensorProto says of itself; `type` is an element type of onnx.proto3."""

    name: str
    type: int
    elements: int

    @property
    def size_bytes(self) -> int:
        return self.elements * _ELEMENT_BYTES.get(self.type, 0)


def _tensor(tensor: memoryview) -> _Tensor:
    name, elements, kind = "", 1, 0
    for number, value in fields(tensor):
        if number == 1:
            for size in [value] if isinstance(value, int) else varints(value):
                elements *= size
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value)
    return _Tensor(name=name, type=kind, elements=elements)


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
