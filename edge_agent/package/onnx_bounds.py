"""Refuses an ONNX file whose graph says of itself that it allocates or loops without measure.

A look at the graph, not a proof: sizes and rounds that stand in the file are bounded, and what is computed while it
runs is left to the runner's limits of memory and time (docs/security.md). The file is mapped, and weights are not read.

    initialisers       together no larger than the package's files, where their bytes must come from
    ConstantOfShape …  of a shape that stands in the file: bounded together
    Loop               of a number of rounds that stands in the file: each round counts as so many steps
    functions          every call is expanded when the library loads the file: bounded in nodes, and never in a circle

It reads as the C++ reader does: a field of another type is unknown, and the last text counts. Bytes that are no
message are left to the library, which refuses them as well.
Source: onnx.proto3 (field numbers).
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from edge_agent.errors import PolicyError
from edge_agent.package.protobuf import fields, varints

MAX_MADE_BYTES = 256 << 20
"""Of tensors that a graph makes of nothing, together."""
MAX_STEPS = 1 << 24
"""Nodes that run, each round of a loop counted."""
MAX_NODES = 1_000_000
MAX_FUNCTIONS = 10_000
MAX_INITIALISERS = 200_000
MAX_DEPTH = 16
_MAX_SHAPE = 64
_MAX_SHARING = 2
"""Tensors may share the bytes of a file, as embeddings and the last matrix do."""
_ELEMENT_BYTES = {1: 4, 6: 4, 7: 8, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2, 4: 2, 5: 2, 8: 16}
_INT32, _INT64 = 6, 7
_SAME = frozenset({"Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape"})
"""They give the numbers of their first input."""

Constants = Mapping[str, Sequence[int]]
"""Tensors of whole numbers that stand in the file, by name."""


def check(file: Path, path: str, *, package_bytes: int) -> None:
    """Checks one `.onnx` file.

    Args:
        path: its place in the package, for messages.
        package_bytes: all files of the package together.

    Raises:
        PolicyError: it allocates or loops without measure; the message names the node's kind.
    """
    if not file.stat().st_size:
        return
    with file.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)  # closes with the last view of it
    try:
        _Model(package_bytes).check(memoryview(data))
    except PolicyError as error:
        raise PolicyError(f"{path!r} has {error.message}") from error
    except (ValueError, IndexError):
        return  # no message: the library refuses it


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """Of a graph with everything in it expanded.

    Attributes:
        made_bytes: of tensors that it makes of nothing.
    """

    nodes: int = 0
    steps: int = 0
    made_bytes: int = 0

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(
            nodes=self.nodes + other.nodes,
            steps=self.steps + other.steps,
            made_bytes=self.made_bytes + other.made_bytes,
        )


@dataclass(kw_only=True)
class _Node:
    """A NodeProto.

    Attributes:
        graphs: bodies of a Loop, If or Scan.
        numbers: of its attributes.
    """

    kind: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    graphs: list[memoryview] = field(default_factory=list)
    numbers: dict[str, Sequence[int]] = field(default_factory=dict)
    tensors: dict[str, memoryview] = field(default_factory=dict)
    sparse: list[memoryview] = field(default_factory=list)

    def input(self, number: int) -> str:
        return self.inputs[number] if number < len(self.inputs) else ""


class _Model:
    """One file while it is checked."""

    def __init__(self, package_bytes: int) -> None:
        self._package_bytes = package_bytes
        self._stored_bytes = 0
        self._functions: dict[tuple[str, str], list[memoryview]] = {}
        self._costs: dict[tuple[str, str], _Cost] = {}
        self._open: list[tuple[str, str]] = []

    def check(self, model: memoryview) -> None:
        for count, function in enumerate(_messages(model, 25), 1):
            if count > MAX_FUNCTIONS:
                _refuse(f"more than {MAX_FUNCTIONS} functions")
            key = (_text(function, 10), _text(function, 1))
            self._functions.setdefault(key, []).append(function)
        self._graph(_single(model, 7), {}, depth=0)

    def _graph(self, graph: memoryview, outer: Constants, *, depth: int) -> _Cost:
        if depth > MAX_DEPTH:
            _refuse("graphs nested too deeply")
        known = dict(outer)
        for count, tensor in enumerate(_messages(graph, 5), 1):
            if count > MAX_INITIALISERS:
                _refuse(f"more than {MAX_INITIALISERS} initialisers in one graph")
            name, numbers = self._initialiser(tensor)
            known[name] = numbers
        for sparse in _messages(graph, 15):
            self._sparse(sparse)
        return self._nodes(_messages(graph, 1), known, depth=depth)

    def _nodes(self, nodes: Iterator[memoryview], known: dict[str, Sequence[int]], *, depth: int) -> _Cost:
        total = _Cost()
        for data in nodes:
            node = _node(data)
            for sparse in node.sparse:
                self._sparse(sparse)
            inner = _Cost()
            for graph in node.graphs:
                inner += self._graph(graph, known, depth=depth + 1)
            key = (node.domain, node.kind)
            if key in self._functions:
                inner += self._function(key, depth)
            if node.kind == "Loop":
                inner = replace(inner, steps=self._rounds(node, known) * (inner.steps + 1))
            total += inner + _Cost(nodes=1, steps=1, made_bytes=_made_bytes(node, known))
            self._bound(total, node.kind)
            self._note(node, known)
        return total

    def _bound(self, cost: _Cost, kind: str) -> None:
        if cost.nodes > MAX_NODES:
            _refuse(f"more than {MAX_NODES} nodes with its functions")
        if cost.steps > MAX_STEPS:
            _refuse(f"a {kind[:40]!r} that makes it more than {MAX_STEPS} steps")
        if cost.made_bytes > MAX_MADE_BYTES:
            _refuse(f"a {kind[:40]!r} with which it makes tensors of more than {MAX_MADE_BYTES} bytes")

    def _function(self, key: tuple[str, str], depth: int) -> _Cost:
        if key in self._open:
            _refuse("a function that calls itself")
        if key not in self._costs:
            if len(self._open) > MAX_DEPTH * 4:
                _refuse("functions nested too deeply")
            self._open.append(key)
            found = [self._nodes(_messages(each, 7), {}, depth=depth + 1) for each in self._functions[key]]
            self._open.pop()
            self._costs[key] = max(found, key=lambda cost: (cost.nodes, cost.steps))
        return self._costs[key]

    def _rounds(self, node: _Node, known: Constants) -> int:
        wanted = known.get(node.input(0))
        if not wanted:
            _refuse("a Loop whose number of rounds does not stand in the file")
        return max(0, wanted[0])

    def _note(self, node: _Node, known: dict[str, Sequence[int]]) -> None:
        """Remembers the whole numbers that a node gives, where they stand in the file."""
        numbers: Sequence[int] = ()
        if node.kind == "Constant":
            tensor = node.tensors.get("value")
            numbers = self._initialiser(tensor)[1] if tensor is not None else ()
            numbers = numbers or node.numbers.get("value_ints") or node.numbers.get("value_int") or ()
        elif node.kind in _SAME:
            numbers = known.get(node.input(0), ())
        elif node.kind == "Concat":
            parts = [known.get(name, ()) for name in node.inputs]
            numbers = [number for part in parts for number in part] if all(parts) else ()
        elif node.kind in ("Mul", "Add") and (found := [known.get(name, ()) for name in node.inputs]):
            numbers = _elementwise(node.kind, found)
        if numbers and node.outputs and len(numbers) <= _MAX_SHAPE:
            known[node.outputs[0]] = numbers

    def _initialiser(self, tensor: memoryview) -> tuple[str, Sequence[int]]:
        """(name, its whole numbers if they are few) of a TensorProto."""
        size = self._elements(tensor, 1)
        kind = _number(tensor, 2)
        self._fits(size * _ELEMENT_BYTES.get(kind, 0) if kind in _ELEMENT_BYTES else size // 4)
        numbers: Sequence[int] = ()
        if kind in (_INT32, _INT64) and 0 <= size <= _MAX_SHAPE:
            width = 8 if kind == _INT64 else 4
            raw = bytes(_single(tensor, 9)[: width * size])
            numbers = _integers(tensor, 7 if kind == _INT64 else 5)[:size] or [
                int.from_bytes(raw[start : start + width], "little", signed=True)
                for start in range(0, len(raw) - len(raw) % width, width)
            ]
        return _text(tensor, 8), numbers

    def _sparse(self, tensor: memoryview) -> None:
        """A SparseTensorProto, which the library makes dense."""
        self._fits(self._elements(tensor, 3))

    def _elements(self, tensor: memoryview, wanted: int) -> int:
        shape = _integers(tensor, wanted)
        if len(shape) > _MAX_SHAPE:
            _refuse(f"a tensor of more than {_MAX_SHAPE} dimensions")
        return math.prod(shape)

    def _fits(self, size_bytes: int) -> None:
        self._stored_bytes += max(0, size_bytes)
        if self._stored_bytes > self._package_bytes * _MAX_SHARING:
            _refuse("tensors that are larger than the package")


def _made_bytes(node: _Node, known: Constants) -> int:
    """Size of a tensor that a node makes of nothing, as far as it stands in the file; else 0."""
    shape: Sequence[int] | None = None
    element_bytes = 4
    if node.kind == "ConstantOfShape":
        shape = known.get(node.input(0))
        value = node.tensors.get("value")
        element_bytes = _ELEMENT_BYTES.get(_number(value, 2), 1) if value is not None else 4
    elif node.kind in ("RandomNormal", "RandomUniform"):
        shape = node.numbers.get("shape")
    elif node.kind in ("Expand", "Tile"):
        shape, element_bytes = known.get(node.input(1)), 1
    elif node.kind == "Range":
        ends = [known.get(node.input(number)) for number in range(3)]
        if all(ends):
            first, last, step = (end[0] for end in ends if end)
            shape, element_bytes = [abs(last - first) // max(1, abs(step))], 8
    return math.prod(max(0, size) for size in shape) * element_bytes if shape else 0


def _elementwise(kind: str, parts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Product or sum of small tensors of one length, or of length 1."""
    length = max(map(len, parts), default=0)
    if not all(len(part) in (1, length) and part for part in parts):
        return ()
    columns = ([part[index % len(part)] for part in parts] for index in range(length))
    return [math.prod(column) if kind == "Mul" else sum(column) for column in columns]


def _node(data: memoryview) -> _Node:
    node = _Node()
    attributes: list[memoryview] = []
    for number, value in fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            node.inputs.append(_decoded(value))
        elif number == 2:
            node.outputs.append(_decoded(value))
        elif number == 4:
            node.kind = _decoded(value)
        elif number == 7:
            node.domain = _decoded(value)
        elif number == 5:
            attributes.append(value)
    for attribute in attributes:
        name = _text(attribute, 1)
        node.graphs += [part for part in (_single(attribute, 6), *_messages(attribute, 11)) if part]
        node.sparse += [part for part in (_single(attribute, 22), *_messages(attribute, 23)) if part]
        if tensor := _single(attribute, 5):
            node.tensors[name] = tensor
        if numbers := _integers(attribute, 8) or [_number(attribute, 3)]:
            node.numbers[name] = numbers
    return node


def _single(data: memoryview, wanted: int) -> memoryview:
    """A message or bytes that come once; empty if they do not. The C++ reader merges messages that come twice."""
    found = list(_messages(data, wanted))
    if len(found) > 1:
        _refuse("a part that comes twice")
    return found[0] if found else memoryview(b"")


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in fields(data) if number == wanted and isinstance(value, memoryview))


def _refuse(what: str) -> NoReturn:
    raise PolicyError(what)


def _text(data: memoryview, wanted: int) -> str:
    text = ""
    for value in _messages(data, wanted):
        text = _decoded(value)
    return text


def _decoded(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "surrogateescape")


def _number(data: memoryview, wanted: int) -> int:
    """A number that should come once: the last one counts."""
    found = 0
    for number, value in fields(data):
        if number == wanted and isinstance(value, int):
            found = value
    return found - (1 << 64) if found >> 63 else found


def _integers(data: memoryview, wanted: int) -> list[int]:
    """The signed numbers of a repeated field, packed or not: so many as a shape may have, and one more."""
    found: list[int] = []
    for number, value in fields(data):
        if number == wanted:
            found += [value] if isinstance(value, int) else itertools.islice(varints(value), _MAX_SHAPE + 1)
        if len(found) > _MAX_SHAPE:
            break
    return [number - (1 << 64) if number >> 63 else number for number in found]
