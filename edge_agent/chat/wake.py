"""A flag that any thread can set and that a thread can wait for together with file descriptors."""

from __future__ import annotations

import contextlib
import os
import select


class Wake:
    """Set by any thread; waited for by one."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        os.eventfd_write(self._descriptor, 1)

    def wait(self, timeout_s: float | None, *others: int) -> None:
        """Clears the flag once it is set, another descriptor is readable, or `timeout_s` has passed, if it is given."""
        with contextlib.suppress(OSError, ValueError):  # another descriptor was closed: its owner finds out
            select.select([self._descriptor, *others], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)
