"""Bytes from a socket or a pipe, cut into lines of bounded length: what every process here speaks is JSON lines.

Pure. Whoever reads the bytes waits for them in its own way, has its own bound, and raises its own error: the reader
says what is wrong with a line, the caller says whose line it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


class LineReader:
    """Takes bytes as they come and gives them back line by line. One owner thread.

    Args:
        limit_bytes: of one line, without its newline. No more than that, and what came with it, is ever held.
        broken: makes the error from what is wrong with a line ("a line of more than 10 bytes").
    """

    def __init__(self, *, limit_bytes: int, broken: Callable[[str], Exception]) -> None:
        self._limit_bytes = limit_bytes
        self._broken = broken
        self._buffer = bytearray()
        self._searched = 0

    def add(self, data: bytes) -> None:
        """Bytes that came; take every line out before more are added."""
        self._buffer += data

    def line(self) -> bytes | None:
        """The next line without its newline, None while it is not whole.

        Raises:
            Exception: `broken`'s, for a line over the bound; the rest of the stream means nothing then.
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
        """The object that the next line holds, None while the line is not whole.

        Raises:
            Exception: `broken`'s, for a line over the bound, or one that holds anything else.
        """
        line = self.line()
        if line is None:
            return None
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._broken("a line that is not JSON") from error
        if not isinstance(document, dict):
            raise self._broken("a line that is not an object")
        return document
