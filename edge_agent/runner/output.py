"""The end of what a child prints: kept in case it dies, and drained so that it never blocks."""

from __future__ import annotations

import collections
import threading
from typing import IO

_LINES = 40
_LINE_BYTES = 500
_READ_BYTES = 1 << 16


class OutputTail:
    """Reads a child's output in a thread of its own until the child closes it.

    Args:
        stream: closed at its end.
        name: of the thread.
    """

    def __init__(self, stream: IO[bytes], *, name: str) -> None:
        self._stream = stream
        self._lines: collections.deque[str] = collections.deque(maxlen=_LINES)
        self._thread = threading.Thread(target=self._drain, name=name, daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        return " | ".join(self._lines)

    def wait(self, timeout_s: float) -> None:
        """Returns when all of it has been read, or after `timeout_s`."""
        self._thread.join(timeout_s)

    def _drain(self) -> None:
        with self._stream as stream:
            while line := stream.readline(_READ_BYTES):
                self._lines.append(line[:_LINE_BYTES].decode("utf-8", "replace").rstrip())
