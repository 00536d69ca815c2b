"""Locks of files and folders, between threads and processes: the one place that calls flock.

A lock belongs to an open file. The kernel lets go of it when the file is closed, or its process dies, so there is
no stale lock. Each `Lock` has opened the file for itself: two of them exclude each other in one process, too.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from edge_agent.host.clock import CLOCK, Clock

_POLL_S = 0.01


class Lock:
    """An open file or folder, and the lock on it; both go with the block.

    Args:
        descriptor: of an open file, which belongs to this object from now on.
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
        """Lets go of the lock and the file."""
        os.close(self._descriptor)

    def try_exclusive(self) -> bool:
        """Takes the lock for this object alone, or says at once that somebody else has it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait_exclusive(self, wait_s: float, *, clock: Clock = CLOCK) -> bool:
        """The same, and asks again for `wait_s`; False when somebody else had it all the time."""
        deadline_s = clock.now_s() + wait_s
        while not self.try_exclusive():
            if clock.now_s() >= deadline_s:
                return False
            clock.sleep(_POLL_S)
        return True

    def share(self) -> None:
        """Takes the lock together with all others who share it; waits for one who has it alone.

        That one only removes what the lock is on, and does not wait for anything itself.
        """
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def is_of(self, path: Path) -> bool:
        """Whether the name still belongs to what is open here: it may have been removed and made again."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False
