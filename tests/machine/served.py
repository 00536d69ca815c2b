"""A file behind a `ForgetfulDisk` in a process of its own, which ends when the power does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.machine import disk
from tests.support.processes import Child, wait_until

_STOP_TIMEOUT_S = 60.0


class ServedDisk:
    """One disk, from one boot to the next. One thread.

    Args:
        arguments: of `tests.machine.disk`, beside the file and the socket.
    """

    def __init__(self, file: Path, socket: Path, log: Path, arguments: Sequence[str] = ()) -> None:
        self.socket = socket
        socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.machine.disk", "--file", str(file), "--socket", str(socket)]
        self._child = Child([*command, *arguments], log, {"PYTHONPATH": str(Path(__file__).parents[2])})
        wait_until(lambda: socket.exists() or not self._child.running, 60, "the disk")

    @property
    def drive(self) -> str:
        """As qemu takes it."""
        return f"file.driver=nbd,file.server.type=unix,file.server.path={self.socket},cache=writeback"

    @property
    def stalled(self) -> bool:
        return disk.stalled(self.socket)

    def stall_after(self, writes: int) -> None:
        disk.stall_after(self.socket, writes)

    def cut(self) -> int:
        """Gives how many bytes are lost."""
        self._child.kill()
        return disk.forgotten_bytes(self.socket)

    def wait_off(self) -> None:
        """Its machine was switched off in order, and it ends by itself."""
        wait_until(lambda: not self._child.running, _STOP_TIMEOUT_S, "the end of the disk")
