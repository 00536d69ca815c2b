"""Writes small ONNX files, field by field, so that a test can say what no exporter would. Source: onnx.proto3."""

from __future__ import annotations

from collections.abc import Sequence

INT64 = 7


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*parts, number))


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes | str) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(data)) + data


def tensor(
    name: str, values: Sequence[int], *, raw: bool = False, shape: Sequence[int] | None = None
) -> bytes:
    """A TensorProto of int64."""
    dims = b"".join(number(1, size) for size in (shape if shape is not None else [len(values)]))
    if raw:
        data = message(9, b"".join(value.to_bytes(8, "little", signed=True) for value in values))
    else:
        data = message(7, b"".join(map(varint, values)))
    return dims + number(2, INT64) + message(8, name) + data


def attribute(name: str, *parts: bytes) -> bytes:
    return message(1, name) + b"".join(parts)


def node(
    kind: str, inputs: Sequence[str] = (), outputs: Sequence[str] = ("y",), *more: bytes, domain: str = ""
) -> bytes:
    """A NodeProto; `more` are its attributes."""
    return (
        b"".join(message(1, name) for name in inputs)
        + b"".join(message(2, name) for name in outputs)
        + message(4, kind)
        + b"".join(message(5, each) for each in more)
        + (message(7, domain) if domain else b"")
    )


def graph(nodes: Sequence[bytes], tensors: Sequence[bytes] = ()) -> bytes:
    return b"".join(message(1, each) for each in nodes) + b"".join(message(5, each) for each in tensors)


def function(name: str, nodes: Sequence[bytes], domain: str = "own") -> bytes:
    return message(1, name) + b"".join(message(7, each) for each in nodes) + message(10, domain)


def model(nodes: Sequence[bytes], tensors: Sequence[bytes] = (), functions: Sequence[bytes] = ()) -> bytes:
    return (
        number(1, 8) + message(7, graph(nodes, tensors)) + b"".join(message(25, each) for each in functions)
    )
