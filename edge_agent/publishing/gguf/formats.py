"""The formats in which a GGUF file holds weights, as codes, scales and minima. Nothing is rounded.

A row is a sequence of blocks. Every quantized format here says

    weight = scale * (code - half) + minimum        half = 2 ** (bits - 1)

for the weights that share a scale, which is also what onnxruntime's MatMulNBits computes, but for the minimum. Scales
and minima are products and sums of float16 numbers and small whole ones. As float32, scales are exact; a minimum is
exact, or rounded once in its last place (2 ** -24 of itself).
Source: ggml-common.h and ggml-quants.c of llama.cpp (`dequantize_row_*`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30
NAMES: Mapping[int, str] = {
    F32: "F32",
    F16: "F16",
    Q4_0: "Q4_0",
    Q4_1: "Q4_1",
    Q5_0: "Q5_0",
    Q5_1: "Q5_1",
    Q8_0: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    Q4_K: "Q4_K",
    Q5_K: "Q5_K",
    Q6_K: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    BF16: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a format's blocks are read. The functions take blocks, [blocks, block_bytes] uint8.

    Attributes:
        block_weights: weights in a block of the file.
        block_bytes: its size.
        bits: of a code here, 4 or 8; 0 for a format of plain floats.
        group: weights that share a scale here.
        codes: [blocks, block_weights] uint8.
        scales: [blocks, block_weights / group] float32.
        minima: the same; None where every minimum is 0.
        floats: [blocks, block_weights] float32, of a format of plain floats.
    """

    block_weights: int
    block_bytes: int
    bits: int = 0
    group: int = 0
    codes: Callable[[Bytes], Bytes] | None = None
    scales: Callable[[Bytes], Floats] | None = None
    minima: Callable[[Bytes], Floats] | None = None
    floats: Callable[[Bytes], Floats] | None = None

    @property
    def half(self) -> int:
        return 1 << (self.bits - 1)


def _half_floats(blocks: Bytes, at: int) -> Floats:
    """[blocks, 1] float32 of the float16 numbers at an offset."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """The low halves of all bytes, then the high ones."""
    return np.concatenate([data & 15, data >> 4], axis=1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """[blocks, 32] uint8, 0 or 16, from 32 bits."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q5(blocks: Bytes, at: int) -> Bytes:
    """Codes of Q5_0 and Q5_1, moved so that their middle, 16, is that of a byte."""
    return (_nibbles(blocks[:, at + 4 : at + 20]) | _fifth_bits(blocks, at)) + np.uint8(128 - 16)


def _k_factors(blocks: Bytes) -> tuple[Floats, Floats]:
    """The 6-bit factors of the scales and of the minima in Q4_K and Q5_K, each [blocks, 8] float32."""
    packed = blocks[:, 4:16]
    low_scales, low_minima, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low_scales & 63, (rest & 15) | (low_scales >> 6 << 4)], axis=1)
    minima = np.concatenate([low_minima & 63, (rest >> 4) | (low_minima >> 6 << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_scales(blocks: Bytes) -> Floats:
    return _half_floats(blocks, 0) * _k_factors(blocks)[0]


def _k_minima(half: int) -> Callable[[Bytes], Floats]:
    def read(blocks: Bytes) -> Floats:
        scales, minima = _k_factors(blocks)
        # Each product is exact in float32; only their difference is rounded.
        return _half_floats(blocks, 0) * scales * half - _half_floats(blocks, 2) * minima

    return read


def _k_nibbles(data: Bytes) -> Bytes:
    """Of 128 bytes: for each 32 of them the low halves, then the high ones."""
    quarters = data.reshape(-1, 4, 32)
    return np.stack([quarters & 15, quarters >> 4], axis=2).reshape(-1, 256)


def _q5_k(blocks: Bytes) -> Bytes:
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & np.uint8(1)
    return (_k_nibbles(blocks[:, 48:176]) | (fifth << np.uint8(4)).reshape(-1, 256)) + np.uint8(128 - 16)


def _q6_k(blocks: Bytes) -> Bytes:
    low = blocks[:, 0:128].reshape(-1, 2, 2, 32)  # [half of the block, its 64 bytes as two rows]
    low = np.concatenate([low & 15, low >> 4], axis=2)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[
        None, None, :, None
    ] & np.uint8(3)
    return (low | high << np.uint8(4)).reshape(-1, 256) + np.uint8(128 - 32)


def _q6_scales(blocks: Bytes) -> Floats:
    return _half_floats(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)


FORMATS: Mapping[int, Format] = {
    F32: Format(block_weights=1, block_bytes=4, floats=lambda b: b.view("<f4").astype(np.float32)),
    F16: Format(block_weights=1, block_bytes=2, floats=lambda b: b.view("<f2").astype(np.float32)),
    BF16: Format(
        block_weights=1,
        block_bytes=2,
        floats=lambda b: (b.view("<u2").astype(np.uint32) << 16).view(np.float32),
    ),
    Q4_0: Format(
        block_weights=32,
        block_bytes=18,
        bits=4,
        group=32,
        codes=lambda b: _nibbles(b[:, 2:18]),
        scales=lambda b: _half_floats(b, 0),
    ),
    Q4_1: Format(
        block_weights=32,
        block_bytes=20,
        bits=4,
        group=32,
        codes=lambda b: _nibbles(b[:, 4:20]),
        scales=lambda b: _half_floats(b, 0),
        minima=lambda b: _half_floats(b, 2) + _half_floats(b, 0) * 8,
    ),
    Q5_0: Format(
        block_weights=32,
        block_bytes=22,
        bits=8,
        group=32,
        codes=lambda b: _q5(b, 2),
        scales=lambda b: _half_floats(b, 0),
    ),
    Q5_1: Format(
        block_weights=32,
        block_bytes=24,
        bits=8,
        group=32,
        codes=lambda b: _q5(b, 4),
        scales=lambda b: _half_floats(b, 0),
        minima=lambda b: _half_floats(b, 2) + _half_floats(b, 0) * 16,
    ),
    Q8_0: Format(
        block_weights=32,
        block_bytes=34,
        bits=8,
        group=32,
        codes=lambda b: b[:, 2:34] ^ np.uint8(128),
        scales=lambda b: _half_floats(b, 0),
    ),
    Q4_K: Format(
        block_weights=256,
        block_bytes=144,
        bits=4,
        group=32,
        codes=lambda b: _k_nibbles(b[:, 16:144]),
        scales=_k_scales,
        minima=_k_minima(8),
    ),
    Q5_K: Format(
        block_weights=256,
        block_bytes=176,
        bits=8,
        group=32,
        codes=_q5_k,
        scales=_k_scales,
        minima=_k_minima(16),
    ),
    Q6_K: Format(
        block_weights=256,
        block_bytes=210,
        bits=8,
        group=16,
        codes=_q6_k,
        scales=_q6_scales,
    ),
}
"""What can be converted, by the number that the file has for it."""
