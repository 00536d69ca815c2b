"""A machine whose power can be cut, as `PowerCuts` sees it: `Rig`, and what its parts have in common.

There are two: an emulated machine (`emulated.py`), and a container on a block device of this host's kernel
(`container.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.machine.device import Device
from tests.machine.disk import BLOCK_BYTES
from tests.machine.schedule import Pace

ACTIVITY_OVER = "/run/activity.over"
"""Where the machine says, in memory, with which exit code the activity has ended."""
COMPLAINTS = ("EXT4-fs error", "EXT4-fs warning", "I/O error")
"""What the kernel says of a file system that is damaged, or of a disk that fails."""
_KEPT, _LOST = b"kept", b"lost"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What the end of the power took.

    Attributes:
        disk_bytes: what the disk had been told and had not made durable.
        kernel_bytes: what the kernel had not yet told the disk; None where nobody can look.
        over: the exit code of the activity, if it had ended.
    """

    disk_bytes: int
    kernel_bytes: int | None
    over: int | None


class Rig(Protocol):
    """A machine whose power can be cut. One thread."""

    @property
    def host(self) -> str:
        """This host, as the machine sees it."""
        ...

    @property
    def pace(self) -> Pace: ...

    def install(self) -> None:
        """Makes the disk that every run begins with, if it is not there."""
        ...

    def boot(self, scratch: Path, arguments: Sequence[str]) -> Device:
        """Switches it on with new, empty caches in front of what is durable.

        Args:
            scratch: the file of a second disk.
            arguments: of the first one, as `tests.machine.disk` takes them.
        """
        ...

    def mark(self) -> None:
        """Runs what `marks` says, on the second disk."""
        ...

    def stall_after(self, writes: int) -> None:
        """The first disk will take so many writes more, and say nothing from then on. See `disk.py`."""
        ...

    def stalled(self) -> bool: ...

    def over(self) -> int | None:
        """What is in ACTIVITY_OVER, if it is there."""
        ...

    def cut(self) -> Loss:
        """Ends the power of machine and disks."""
        ...

    def complaints(self) -> list[str]:
        """The kernel's, about the file system, since the boot."""
        ...

    def switch_off(self) -> None:
        """In order."""
        ...

    def close(self) -> None:
        """Without any order, if it is on."""
        ...


def marks(device: str) -> Iterator[str]:
    """Command lines that write to a disk what must be there after a cut, and what must not."""
    for number, (mark, flags) in enumerate(((_KEPT, "direct conv=fsync"), (_LOST, "direct"))):
        yield (
            f"printf %-{BLOCK_BYTES}s {mark.decode()} | dd of={device} bs={BLOCK_BYTES} seek={number} "
            f"iflag=fullblock oflag={flags} 2>&1"
        )


def was_cut(scratch: bytes) -> bool:
    """Whether the second disk forgot what was not flushed, and kept what was."""
    return scratch.startswith(_KEPT) and _LOST not in scratch
