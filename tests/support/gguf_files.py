"""Writes small GGUF files, and says what their weights are, as ggml-quants.c says it: block by block, in float64.

Nothing here knows how the agent reads them. Source: ggml, docs/gguf.md and ggml-quants.c (`dequantize_row_*`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30
BLOCKS: Mapping[int, tuple[int, int, tuple[int, ...]]] = {
    F32: (1, 4, ()),
    F16: (1, 2, ()),
    BF16: (1, 2, ()),
    Q4_0: (32, 18, (0,)),
    Q4_1: (32, 20, (0, 2)),
    Q5_0: (32, 22, (0,)),
    Q5_1: (32, 24, (0, 2)),
    Q8_0: (32, 34, (0,)),
    Q4_K: (256, 144, (0, 2)),
    Q5_K: (256, 176, (0, 2)),
    Q6_K: (256, 210, (208,)),
}
"""Format → weights in a block, its bytes, where float16 numbers lie in it."""
_CODES = {Q4_0: 8, Q4_1: 8, Q5_0: 16, Q5_1: 16, Q8_0: 128, Q4_K: 8 * 32, Q5_K: 16 * 32, Q6_K: 32 * 64}
"""How large the largest weight is, in scales."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One tensor: [rows, columns], or [length].

    Attributes:
        raw: [rows, bytes of a row] uint8, as in the file.
    """

    shape: tuple[int, ...]
    type: int
    raw: Raw

    @property
    def values(self) -> Doubles:
        size = BLOCKS[self.type][1]
        return READ[self.type](self.raw.reshape(-1, size)).reshape(self.shape)


def floats(values: npt.ArrayLike, kind: int = F32) -> Weights:
    """A tensor of plain floats."""
    array = np.asarray(values, np.float32)
    halves = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
    data = {F32: array.astype("<f4").tobytes(), F16: array.astype("<f2").tobytes(), BF16: halves}[kind]
    rows = array.shape[0] if array.ndim > 1 else 1
    return Weights(shape=array.shape, type=kind, raw=np.frombuffer(data, np.uint8).reshape(rows, -1))


def random(generator: np.random.Generator, kind: int, rows: int, columns: int, size: float) -> Weights:
    """A quantized matrix of random codes, or random floats, with weights up to about `size`."""
    if kind not in _CODES:
        return floats(generator.uniform(-size, size, (rows, columns)), kind)
    block, length, halves = BLOCKS[kind]
    raw = generator.integers(0, 256, (rows * columns // block, length), dtype=np.uint8)
    scale = size / _CODES[kind]
    for number, at in enumerate(halves):
        sign = 1 if kind in (Q4_K, Q5_K) or number == 0 else -1
        middle = (
            scale if number == 0 else scale * (_CODES[kind] / 32 if kind in (Q4_K, Q5_K) else _CODES[kind])
        )
        values = (generator.uniform(0.7, 1.3, len(raw)) * middle * sign).astype("<f2")
        raw[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return Weights(shape=(rows, columns), type=kind, raw=raw.reshape(rows, -1))


def _half(raw: Raw, at: int) -> Doubles:
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2")[:, 0].astype(np.float64)


def _of_nibbles(raw: Raw, *, codes: int, fifth: int | None, half: int, minimum: int | None) -> Doubles:
    """Q4_0, Q4_1, Q5_0, Q5_1: weight j and weight j + 16 share a byte."""
    found = np.zeros((len(raw), 32))
    for j in range(16):
        for place, nibble in ((j, raw[:, codes + j] & 15), (j + 16, raw[:, codes + j] >> 4)):
            code = nibble.astype(np.int64)
            if fifth is not None:
                code |= (raw[:, fifth + place // 8].astype(np.int64) >> place % 8 & 1) << 4
            found[:, place] = _half(raw, 0) * (code - half)
            if minimum is not None:
                found[:, place] += _half(raw, minimum)
    return found


def _of_bytes(raw: Raw) -> Doubles:
    return _half(raw, 0)[:, None] * raw[:, 2:34].view(np.int8)


def _k_factor(raw: Raw, j: int) -> tuple[Doubles, Doubles]:
    """get_scale_min_k4."""
    q = raw[:, 4:16].astype(np.float64).astype(np.int64)
    if j < 4:
        return (q[:, j] & 63).astype(np.float64), (q[:, j + 4] & 63).astype(np.float64)
    scale = q[:, j + 4] & 15 | q[:, j - 4] >> 6 << 4
    minimum = q[:, j + 4] >> 4 | q[:, j] >> 6 << 4
    return scale.astype(np.float64), minimum.astype(np.float64)


def _of_k(raw: Raw, *, codes: int, fifth: int | None) -> Doubles:
    """Q4_K, Q5_K."""
    found = np.zeros((len(raw), 256))
    for group in range(8):
        scale, minimum = _k_factor(raw, group)
        for each in range(32):
            byte = raw[:, codes + group // 2 * 32 + each].astype(np.int64)
            code = byte >> 4 if group % 2 else byte & 15
            if fifth is not None:
                code = code + 16 * (raw[:, fifth + each].astype(np.int64) >> group & 1)
            found[:, group * 32 + each] = _half(raw, 0) * scale * code - _half(raw, 2) * minimum
    return found


def _of_q6_k(raw: Raw) -> Doubles:
    found = np.zeros((len(raw), 256))
    scales = raw[:, 192:208].view(np.int8).astype(np.float64)
    for half in range(2):
        for each in range(32):
            first, second = (raw[:, half * 64 + each + more].astype(np.int64) for more in (0, 32))
            high = raw[:, 128 + half * 32 + each].astype(np.int64)
            parts = (first & 15, second & 15, first >> 4, second >> 4)
            for number, low in enumerate(parts):
                code = (low | (high >> 2 * number & 3) << 4) - 32
                scale = scales[:, half * 8 + number * 2 + each // 16]
                found[:, half * 128 + number * 32 + each] = _half(raw, 208) * scale * code
    return found


READ: Mapping[int, Callable[[Raw], Doubles]] = {
    F32: lambda raw: raw.view("<f4").astype(np.float64),
    F16: lambda raw: raw.view("<f2").astype(np.float64),
    BF16: lambda raw: (raw.view("<u2").astype(np.uint32) << 16).view("<f4").astype(np.float64),
    Q4_0: lambda raw: _of_nibbles(raw, codes=2, fifth=None, half=8, minimum=None),
    Q4_1: lambda raw: _of_nibbles(raw, codes=4, fifth=None, half=0, minimum=2),
    Q5_0: lambda raw: _of_nibbles(raw, codes=6, fifth=2, half=16, minimum=None),
    Q5_1: lambda raw: _of_nibbles(raw, codes=8, fifth=4, half=0, minimum=2),
    Q8_0: _of_bytes,
    Q4_K: lambda raw: _of_k(raw, codes=16, fifth=None),
    Q5_K: lambda raw: _of_k(raw, codes=48, fifth=16),
    Q6_K: _of_q6_k,
}


@dataclass(kw_only=True)
class File:
    """What will be written; a test may change any of it first."""

    metadata: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, Weights] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path

    def encode(self, *, alignment: int = 32) -> bytes:
        table, data = b"", b""
        for name, tensor in self.tensors.items():
            data += bytes(-len(data) % alignment)
            sizes = tuple(reversed(tensor.shape))
            table += text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
            table += struct.pack("<IQ", tensor.type, len(data))
            data += tensor.raw.tobytes()
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))
        head += b"".join(text(key) + value(content) for key, content in self.metadata.items()) + table
        return head + bytes(-len(head) % alignment) + data


def text(content: str) -> bytes:
    data = content.encode()
    return struct.pack("<Q", len(data)) + data


def value(content: object) -> bytes:
    """A typed value: bool, uint32, float32, text, or a list of one of the last three or int32."""
    if isinstance(content, bool):
        return struct.pack("<I?", 7, content)
    if isinstance(content, int):
        return struct.pack("<II", 4, content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    if isinstance(content, str):
        return struct.pack("<I", 8) + text(content)
    assert isinstance(content, Sequence)
    head = struct.pack("<I", 9)
    if isinstance(content[0], str):
        return head + struct.pack("<IQ", 8, len(content)) + b"".join(map(text, content))
    kind, code = (6, "f") if isinstance(content[0], float) else (5, "i")
    return head + struct.pack(f"<IQ{len(content)}{code}", kind, len(content), *content)
