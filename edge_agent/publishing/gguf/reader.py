"""Reads a GGUF file's metadata and its table of tensors. The file is untrusted input.

Every count, length, size and offset is bounded, and held against the file's size, before anything is allocated or
read by it. What is not understood is an error, not a guess. Weights are read when they are used, a piece at a time. The
file is not mapped: one that becomes shorter, or lies on a medium that fails, would end the process instead.

    header      magic, version, number of tensors, number of keys
    metadata    key, type, value; a list has elements of one plain type
    tensors     name, sizes, type, offset from the beginning of the data
    data        each tensor at a multiple of `general.alignment`, none over another
Source: ggml, docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

import numpy as np

from edge_agent.errors import PublishError
from edge_agent.publishing import kinds
from edge_agent.publishing.gguf.formats import FORMATS, NAMES, Bytes

MAX_HEADER_BYTES = 128 << 20
MAX_TENSORS = 20_000
MAX_KEYS = 4_096
MAX_ITEMS = 1 << 22
"""Of all lists together: a large vocabulary has 300,000 tokens with a type each, and 600,000 merges."""
MAX_TEXT_BYTES = 1 << 20
MAX_NAME_BYTES = 256
MAX_DIMENSIONS = 4
_MAX_SIZE = 1 << 40
_MAX_ALIGNMENT = 1 << 16
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value type → `struct` code."""
_TEXT, _LIST = 8, 9

Plain = int | float | bool | str
Value = Plain | list[Plain]


class Source:
    """The open file, from which weights are read while it is open."""

    def __init__(self, path: Path, stream: BufferedReader) -> None:
        self._path = path
        self._stream = stream
        self._before = self._state()

    @property
    def size_bytes(self) -> int:
        return self._before[0]

    def read(self, offset: int, size: int) -> Bytes:
        """[size] uint8.

        Raises:
            PublishError: the file has become shorter, or cannot be read.
        """
        data = np.empty(size, np.uint8)
        try:
            self._stream.seek(offset)
            found = self._stream.readinto(data.data)
        except OSError as error:
            raise PublishError(f"{self._path} cannot be read: {error.strerror}") from error
        if found != size:
            raise self._changed()
        return data

    def check_unchanged(self) -> None:
        """Raises a PublishError if it was written to since it was opened."""
        if self._state() != self._before:
            raise self._changed()

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._stream.fileno())
        return found.st_size, found.st_mtime_ns

    def _changed(self) -> PublishError:
        return PublishError(
            f"{self._path} was changed while it was read", remedy="publish it again when it is complete"
        )


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor as it lies in the file.

    Attributes:
        shape: rows first: `(rows, columns)`, or `(length,)`. The file has it the other way round.
        type: number of its format, a key of `formats.FORMATS`.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    row_bytes: int
    source: Source

    @property
    def format_name(self) -> str:
        return NAMES[self.type]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def size_bytes(self) -> int:
        return self.rows * self.row_bytes

    def read(self, start: int, end: int) -> Bytes:
        """[rows, bytes of a row] uint8 of the rows from `start` to `end`.

        Raises:
            PublishError: they are not there any more, or cannot be read.
        """
        size = (end - start) * self.row_bytes
        return self.source.read(self.offset + start * self.row_bytes, size).reshape(-1, self.row_bytes)


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A file whose metadata and table have been checked; its tensors can be read while it is open."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]

    def keys_under(self, prefix: str) -> dict[str, Value]:
        """Those that begin with it, without it."""
        found = ((key, value) for key, value in self.metadata.items() if key.startswith(prefix))
        return {key.removeprefix(prefix): value for key, value in found}


@contextmanager
def opened(path: Path) -> Iterator[GgufFile]:
    """Opens a file and reads what stands before its data.

    Raises:
        PublishError: it is no GGUF file, is damaged, or has tensors of a format that is not known here; or, at the
            end, it was changed meanwhile.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise PublishError(f"{path} cannot be read: {error.strerror}") from error
    with stream:
        source = Source(path, stream)
        try:
            file = _Header(stream, source).read(path)
        except OSError as error:
            raise PublishError(f"{path} cannot be read: {error.strerror}") from error
        except _Damaged as error:
            raise PublishError(f"{path} is not a GGUF file that can be read: {error}") from error
        yield file
        source.check_unchanged()


class _Damaged(Exception):
    """Says what is wrong with the file."""


class _Header:
    """What stands before the data, read from its beginning to its end."""

    def __init__(self, stream: BufferedReader, source: Source) -> None:
        self._stream = stream
        self._source = source
        self._at = 0
        self._items_left = MAX_ITEMS

    def read(self, path: Path) -> GgufFile:
        if self._take(len(kinds.GGUF_MAGIC)) != kinds.GGUF_MAGIC:
            raise _Damaged("it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            raise _Damaged(f"its version is {version}; 2 and 3 are known, in little-endian order")
        tensor_count = self._count(MAX_TENSORS, "tensors")
        key_count = self._count(MAX_KEYS, "keys")
        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = self._text(MAX_NAME_BYTES)
            if key in metadata:
                raise _Damaged(f"the key {key!r} stands in it twice")
            metadata[key] = self._value(self._number("I"), key)
        tensors: dict[str, Tensor] = {}
        for _ in range(tensor_count):
            name = self._text(MAX_NAME_BYTES)
            if name in tensors:
                raise _Damaged(f"the tensor {name!r} stands in it twice")
            tensors[name] = self._tensor(name)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= _MAX_ALIGNMENT or alignment % 8:
            raise _Damaged(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self._check_places(tensors, start, alignment)
        placed = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}
        return GgufFile(path=path, metadata=metadata, tensors=placed)

    def _tensor(self, name: str) -> Tensor:
        """An entry of the table, whose offset counts from the beginning of the data yet."""
        count = self._number("I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise _Damaged(f"{name!r} has {count} dimensions")
        sizes = [self._number("Q") for _ in range(count)]
        if not all(0 < size <= _MAX_SIZE for size in sizes) or math.prod(sizes) > _MAX_SIZE:
            raise _Damaged(f"{name!r} has sizes of {sizes}")
        kind, offset = self._number("I"), self._number("Q")
        if kind not in FORMATS:
            known = ", ".join(sorted(NAMES[number] for number in FORMATS))
            raise _Damaged(f"{name!r} has the format {NAMES.get(kind, kind)}; {known} can be converted")
        form = FORMATS[kind]
        if sizes[0] % form.block_weights:
            raise _Damaged(f"{name!r} has rows of {sizes[0]}, no multiple of {form.block_weights}")
        return Tensor(
            name=name,
            shape=tuple(reversed(sizes)),
            type=kind,
            offset=offset,
            row_bytes=sizes[0] // form.block_weights * form.block_bytes,
            source=self._source,
        )

    def _check_places(self, tensors: Mapping[str, Tensor], start: int, alignment: int) -> None:
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset % alignment or tensor.offset < end:
                raise _Damaged(
                    f"{name!r} lies at {tensor.offset}, over another tensor or at no multiple of {alignment}"
                )
            end = tensor.offset + tensor.size_bytes
            if start + end > self._source.size_bytes:
                raise _Damaged(f"{name!r} ends behind the end of the file: it is not complete")

    def _value(self, kind: int, key: str) -> Value:
        if kind == _LIST:
            kind = self._number("I")
            count = self._count(self._items_left, f"items of {key!r}")
            self._items_left -= count
            if kind == _TEXT:
                return [self._text(MAX_TEXT_BYTES) for _ in range(count)]
            code = self._code(kind, key)
            return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}"))))
        if kind == _TEXT:
            return self._text(MAX_TEXT_BYTES)
        return self._plain(self._code(kind, key))

    def _code(self, kind: int, key: str) -> str:
        if kind not in _PLAIN:
            raise _Damaged(f"{key!r} has a value of an unknown type, {kind}")
        return _PLAIN[kind]

    def _plain(self, code: str) -> Plain:
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return value  # type: ignore[no-any-return]

    def _number(self, code: str) -> int:
        return int(self._plain(code))

    def _count(self, most: int, what: str) -> int:
        count = self._number("Q")
        if count > most:
            raise _Damaged(f"it has {count} {what}, at most {most} are read")
        return count

    def _text(self, most: int) -> str:
        size = self._number("Q")
        if size > most:
            raise _Damaged(f"a text in it has {size} bytes, at most {most} are read there")
        try:
            return str(self._take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise _Damaged("a text in it is not UTF-8") from error

    def _take(self, size: int) -> bytes:
        self._at += size
        if self._at > self._source.size_bytes:
            raise _Damaged("it ends in its header")
        if self._at > MAX_HEADER_BYTES:
            raise _Damaged("its header is too long")
        data = self._stream.read(size)
        if len(data) != size:
            raise _Damaged("it became shorter while it was read")
        return data
