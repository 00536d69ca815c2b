"""A `ForgetfulDisk` as a block device of this host's kernel: `BlockDevice`.

    file system → /dev/loopN → a file that nbdfuse mounts → NBD → ForgetfulDisk → file

The loop device has a write-back cache for the file system above it (`queue/write_cache`), and turns a flush into fsync
of its file, which nbdfuse turns into a flush of the disk; a write with FUA is a write and a flush. What was written
goes through at once, so nothing is kept between the file system and the disk. Each device is a new file in a new mount:
no page of an earlier one can be read. Source: drivers/block/loop.c, nbdfuse(1).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.machine.served import ServedDisk
from tests.support.processes import Child, wait_until

_TIMEOUT_S = 60.0
BOUND_TO_US = ("setpriv", "--pdeathsig", "KILL")
"""Before a command that must not outlive this process."""


class BlockDevice:
    """One device, from one boot to the next. One thread.

    Args:
        file: where nbdfuse mounts it; made.

    Attributes:
        path: the loop device.
    """

    def __init__(self, disk: ServedDisk, file: Path, log: Path) -> None:
        self.disk = disk
        self._file = file
        self._held: int | None = None
        file.write_bytes(b"")
        self._fuse = Child([*BOUND_TO_US, "nbdfuse", str(file), "--unix", str(disk.socket)], log)
        try:
            wait_until(lambda: not self._fuse.running or file.stat().st_size, _TIMEOUT_S, "nbdfuse")
            assert self._fuse.running, self._fuse.log_text()
            self.path = Path(_said("losetup", "--find", "--show", str(file)))
            # In use, it goes away with its last user instead of now: however this process ends.
            self._held = os.open(self.path, os.O_RDONLY)
            _said("losetup", "--detach", str(self.path))
        except BaseException:
            self.cut()
            self.close()
            raise

    @property
    def unwritten_bytes(self) -> int:
        """What the kernel has in memory for it and has not written, or is writing."""
        major_minor = Path(f"/sys/block/{self.path.name}/dev").read_text().strip()
        lines = Path(f"/sys/kernel/debug/bdi/{major_minor}/stats").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        return sum(int(values[name].split()[0]) << 10 for name in ("BdiWriteback", "BdiReclaimable"))

    def cut(self) -> int:
        """The end of the power; gives how many bytes the disk loses. The device gives errors from now on."""
        lost = self.disk.cut()
        self._fuse.kill()
        return lost

    def close(self) -> None:
        """After `cut`, or when nobody uses it. Returns when nothing is behind the device any more.

        Raises:
            TimeoutError: somebody still uses it.
        """
        held, self._held = self._held, None
        if held is not None:
            os.close(held)
            # What a killed container had mounted goes a moment after it.
            wait_until(lambda: not self._is_behind(), _TIMEOUT_S, f"the end of {self.path}")
        subprocess.run(["umount", "--lazy", self._file], check=False, stderr=subprocess.DEVNULL)
        self._fuse.stop()
        self.disk.cut()

    def _is_behind(self) -> bool:
        """Whether the device is still this one: another process may have taken its number."""
        backing = Path(f"/sys/block/{self.path.name}/loop/backing_file")
        try:
            return backing.read_text().startswith(str(self._file))
        except OSError:
            return False


def _said(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S
    ).stdout.strip()
