"""The wire format of Protocol Buffers, as far as an ONNX file needs it: fields one after the other, over a view of the
file, without a copy. The bytes are untrusted: every length is checked.

What it cannot read, the C++ reader cannot either. Source: protobuf.dev, *Encoding*.
"""

from __future__ import annotations

from collections.abc import Iterator

Value = int | memoryview

_VARINT, _FIXED64, _BYTES, _GROUP, _END_GROUP, _FIXED32 = range(6)
_MAX_GROUPS = 100


def fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """(field number, value) of each field of a message; groups, which ONNX does not use, are passed over.

    Raises:
        ValueError, IndexError: the bytes are no message.
    """
    position, groups = 0, 0
    while position < len(data):
        key, position = varint(data, position)
        kind, number = key & 7, key >> 3
        if kind in (_GROUP, _END_GROUP):
            groups += 1 if kind == _GROUP else -1
            if not 0 <= groups <= _MAX_GROUPS:
                raise ValueError("groups")
            continue
        if kind == _VARINT:
            value, position = varint(data, position)
            if not groups:
                yield number, value
            continue
        if kind == _BYTES:
            length, position = varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError("wire type")
        if length > len(data) - position:
            raise ValueError("length")
        if not groups:
            yield number, data[position : position + length]
        position += length


def varint(data: memoryview, position: int) -> tuple[int, int]:
    """(an unsigned number of 64 bits, the position behind it)."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
    raise ValueError("varint")


def varints(data: memoryview) -> Iterator[int]:
    """The numbers of a packed field."""
    position = 0
    while position < len(data):
        value, position = varint(data, position)
        yield value
