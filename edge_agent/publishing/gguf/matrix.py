"""A matrix of a GGUF file, or several of one format put one above the other, as an ONNX graph needs it.

Rows keep their bytes: to put them in another order loses nothing. They are decoded a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edge_agent.errors import PublishError
from edge_agent.publishing.gguf.formats import FORMATS, Bytes, Floats, Format
from edge_agent.publishing.gguf.reader import Tensor

PIECE_BYTES = 16 << 20
Order = npt.NDArray[np.intp]
_Numbers = TypeVar("_Numbers", Bytes, Floats)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Rows of tensors of one format and one length.

    Attributes:
        orders: for each tensor the order in which its rows are taken; None for its own.
    """

    tensors: tuple[Tensor, ...]
    orders: tuple[Order | None, ...]

    @classmethod
    def of(cls, *tensors: Tensor, orders: Sequence[Order | None] = ()) -> Matrix:
        return cls(tensors=tensors, orders=tuple(orders) or (None,) * len(tensors))

    @property
    def format(self) -> Format:
        return FORMATS[self.tensors[0].type]

    @property
    def rows(self) -> int:
        return sum(tensor.shape[0] for tensor in self.tensors)

    @property
    def columns(self) -> int:
        return self.tensors[0].shape[1]

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.columns // self.format.group

    def codes(self) -> Iterator[Bytes]:
        """[rows of a piece, columns * bits / 8] uint8; of two codes in a byte the first one is the lower half."""
        read = _there(self.format.codes)
        for blocks, rows in self._pieces():
            codes = read(blocks).reshape(rows, self.columns)
            yield codes if self.format.bits == 8 else codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)

    def scales(self) -> Iterator[Floats]:
        """[rows of a piece, groups] float32."""
        return self._numbers(_there(self.format.scales), self.groups)

    def minima(self) -> Iterator[Floats]:
        """The same of minima."""
        return self._numbers(_there(self.format.minima), self.groups)

    def floats(self) -> Iterator[Floats]:
        """[rows of a piece, columns] float32, of a format of plain floats."""
        return self._numbers(_there(self.format.floats), self.columns)

    def _numbers(self, read: Callable[[Bytes], Floats], width: int) -> Iterator[Floats]:
        for blocks, rows in self._pieces():
            yield _finite(read(blocks), self.tensors[0].name).reshape(rows, width)

    def _pieces(self) -> Iterator[tuple[Bytes, int]]:
        """(blocks, [blocks, block_bytes] uint8; how many rows they are)."""
        for tensor, order in zip(self.tensors, self.orders, strict=True):
            step = max(1, PIECE_BYTES // tensor.row_bytes)
            for start in range(0, tensor.rows, step):
                end = min(start + step, tensor.rows)
                piece = tensor.read(start, end) if order is None else _in_order(tensor, order[start:end])
                yield piece.reshape(-1, self.format.block_bytes), end - start


def _in_order(tensor: Tensor, order: Order) -> Bytes:
    """Those rows, of which the order puts none into another head: no more than a head is read beside them."""
    first = int(order.min())
    return tensor.read(first, int(order.max()) + 1)[order - first]


def vector(tensor: Tensor) -> Floats:
    """[length] float32 of a tensor of plain floats with one dimension (`architecture.read` refuses another one).

    Raises:
        PublishError: one of them is no number.
    """
    form = FORMATS[tensor.type]
    blocks = tensor.read(0, tensor.rows).reshape(-1, form.block_bytes)
    return _finite(_there(form.floats)(blocks), tensor.name).reshape(-1)


def halves_order(heads: int, head_size: int) -> Order:
    """The order of rows that brings neighbours (0, 1), (2, 3), … of each head into its two halves."""
    return np.arange(heads * head_size).reshape(heads, head_size // 2, 2).swapaxes(1, 2).reshape(-1)


def _finite(values: Floats, name: str) -> Floats:
    if not np.isfinite(values).all():
        raise PublishError(f"the tensor {name!r} has weights that are no numbers: the file is damaged")
    return values


def _there(part: Callable[[Bytes], _Numbers] | None) -> Callable[[Bytes], _Numbers]:
    if part is None:
        raise ValueError("the format has no such part")
    return part
