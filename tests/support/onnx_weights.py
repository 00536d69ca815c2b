"""Reads what an ONNX file says of its nodes and tensors, with the weights in the file beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.package.protobuf import fields

_TYPES: Mapping[int, npt.DTypeLike] = {1: "<f4", 2: "u1", 6: "<i4", 7: "<i8"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """Nodes as (operator, inputs, outputs); tensors by name."""

    nodes: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    tensors: Mapping[str, npt.NDArray[Any]]


def read(file: Path) -> Model:
    graph = next(_messages(memoryview(file.read_bytes()), 7))
    return Model(
        nodes=tuple(
            (_texts(node, 4)[0], tuple(_texts(node, 1)), tuple(_texts(node, 2)))
            for node in _messages(graph, 1)
        ),
        tensors=dict(_tensor(each, file.parent) for each in _messages(graph, 5)),
    )


def dequantized(model: Model, title: str, bits: int) -> npt.NDArray[np.float64]:
    """[rows, columns] of a quantized matrix, as the graph's codes, scales and minima say, without rounding."""
    codes, scales = model.tensors[f"{title}.codes"], model.tensors[f"{title}.scales"].astype(np.float64)
    rows, groups = scales.shape
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    found = scales[..., None] * (codes.reshape(rows, groups, -1).astype(np.float64) - (1 << bits - 1))
    if f"{title}.minima" in model.tensors:
        found = found + model.tensors[f"{title}.minima"].astype(np.float64).reshape(rows, groups, 1)
    result: npt.NDArray[np.float64] = found.reshape(rows, -1)
    return result


def _tensor(data: memoryview, folder: Path) -> tuple[str, npt.NDArray[Any]]:
    shape = [value for number, value in fields(data) if number == 1 and isinstance(value, int)]
    (kind,) = (value for number, value in fields(data) if number == 2 and isinstance(value, int))
    places = {_texts(entry, 1)[0]: _texts(entry, 2)[0] for entry in _messages(data, 13)}
    if places:
        with (folder / places["location"]).open("rb") as stream:
            stream.seek(int(places["offset"]))
            raw = stream.read(int(places["length"]))
    else:
        raw = bytes(next(_messages(data, 9)))
    return _texts(data, 8)[0], np.frombuffer(raw, np.dtype(_TYPES[kind])).reshape(shape)


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in fields(data) if number == wanted and isinstance(value, memoryview))


def _texts(data: memoryview, wanted: int) -> list[str]:
    return [str(value, "utf-8") for value in _messages(data, wanted)]
