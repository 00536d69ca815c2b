"""Locks of files and folders, between threads and processes: the one place that calls flock.

A lock belongs to an open file. The kernel releases it when the file is closed or its process dies, so there is no
stale lock. Each `Lock` opens the file itself, so two of them exclude each other even within one process.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from edge_agent.host.clock import CLOCK, Clock

_POLL_S = 0.01


class Lock:
    """An open file or folder, and the lock on it. Leaving the block closes both.

    Args:
        descriptor: of an open file; this object owns and closes it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Opens a folder to lock it.

        Raises:
            OSError: it is not there, or not a folder.
        """
        return cls(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock and closes the file."""
        os.close(self._descriptor)

    def try_exclusive(self) -> bool:
        """Takes the lock exclusively. Returns False at once if somebody else has it."""
        return self._try(fcntl.LOCK_EX)

    def wait_exclusive(self, wait_s: float, *, clock: Clock = CLOCK) -> bool:
        """Takes the lock exclusively, trying for up to `wait_s`. Returns False if somebody else had it all the time."""
        return _wait(self.try_exclusive, wait_s, clock)

    def wait_shared(self, wait_s: float, *, clock: Clock = CLOCK) -> bool:
        """Takes the lock together with others who share it, trying for up to `wait_s`. Returns False if somebody had it
        exclusively all the time.
        """
        return _wait(lambda: self._try(fcntl.LOCK_SH), wait_s, clock)

    def is_of(self, path: Path) -> bool:
        """Whether `path` is still what was opened: it may have been removed and made again."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _wait(attempt: Callable[[], bool], wait_s: float, clock: Clock) -> bool:
    deadline_s = clock.now_s() + wait_s
    while not attempt():
        if clock.now_s() >= deadline_s:
            return False
        clock.sleep(_POLL_S)
    return True
