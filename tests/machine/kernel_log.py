"""What this host's kernel says from a moment on: `KernelLog`; about which device: `names`.

Source: Documentation/ABI/testing/dev-kmsg.
"""

from __future__ import annotations

import contextlib
import os
import re


class KernelLog:
    """One reader. One thread."""

    def __init__(self) -> None:
        self._file = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        self._lines: list[str] = []
        self.forget()

    def forget(self) -> None:
        """What was said until now."""
        os.lseek(self._file, 0, os.SEEK_END)
        self._lines = []

    def lines(self) -> list[str]:
        """What was said since then."""
        with contextlib.suppress(BlockingIOError):
            while True:
                with contextlib.suppress(BrokenPipeError):  # it said more than its buffer holds
                    record = os.read(self._file, 8192).decode(errors="replace")
                    self._lines.append(record.partition(";")[2].splitlines()[0])
        return self._lines

    def close(self) -> None:
        os.close(self._file)


def names(line: str, device: str) -> bool:
    """Whether a line is about a device: loop1 is in `loop10` as well, which may be anybody's."""
    return re.search(rf"\b{re.escape(device)}\b", line) is not None
