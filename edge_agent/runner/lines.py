"""Cuts the bytes of a socket or a pipe into JSON lines of bounded length, which all processes here speak.

Pure. The caller waits for the bytes in its own way and gives its own bound and error: the reader says what is wrong
with a line, the caller says whose line it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def strict_json(line: bytes) -> Any:
    """The document in a line. `NaN` and `Infinity`, which Python reads and writes, are no JSON; neither is 1e999 a
    number that anybody could mean.

    Raises:
        ValueError: it is not JSON, or has such a number.
        RecursionError: it is nested too deep.
    """
    return json.loads(line, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


class LineReader:
    """Takes bytes as they arrive and returns them line by line. One owner thread.

    Args:
        limit_bytes: of one line, without its newline. Little more than that is ever held.
        broken: makes the error from what is wrong with a line ("a line of more than 10 bytes").
    """

    def __init__(self, *, limit_bytes: int, broken: Callable[[str], Exception]) -> None:
        self._limit_bytes = limit_bytes
        self._broken = broken
        self._buffer = bytearray()
        self._searched = 0

    def add(self, data: bytes) -> None:
        """Adds bytes that arrived. Take out every whole line before adding more."""
        self._buffer += data

    def line(self) -> bytes | None:
        """The next line without its newline, or None until it is whole.

        Raises:
            Exception: from `broken`, for a line over the bound. The stream cannot be used any further.
        """
        end = self._buffer.find(b"\n", self._searched)
        length = end if end >= 0 else len(self._buffer)
        if length > self._limit_bytes:
            raise self._broken(f"a line of more than {self._limit_bytes} bytes")
        if end < 0:
            self._searched = length
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def document(self) -> dict[str, Any] | None:
        """The object in the next line, or None until the line is whole.

        Raises:
            Exception: from `broken`, for a line over the bound or one that is no JSON object.
        """
        line = self.line()
        if line is None:
            return None
        try:
            document = strict_json(line)
        except (ValueError, RecursionError) as error:
            raise self._broken("a line that is not JSON") from error
        if not isinstance(document, dict):
            raise self._broken("a line that is not an object")
        return document
