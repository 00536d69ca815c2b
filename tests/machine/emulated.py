"""An emulated machine whose power can be cut: qemu on two disks that forget, as `Rig` has it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.machine.device import Device, Slot
from tests.machine.machine import HOST, Hardware, Machine
from tests.machine.place import Place
from tests.machine.rig import ACTIVITY_OVER, COMPLAINTS, Loss, marks
from tests.machine.schedule import Activity, Pace
from tests.machine.served import ServedDisk

_SCRATCH = "/dev/vdc"
_PACE = Pace(
    longest_s={
        Activity.PROMPTS: 30.0,
        Activity.UPDATE: 120.0,
        Activity.IMPORT: 60.0,
        Activity.JOURNAL: 45.0,
        Activity.UPGRADE: 420.0,
    },
    prompts_s=3.0,
    answer_s=900.0,
    ready_s=1200.0,
)


class EmulatedRig:
    """See `Rig`."""

    host = HOST
    pace = _PACE

    def __init__(self, place: Place, hardware: Hardware) -> None:
        self._place = place
        self._hardware = hardware
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ea-")))
        self._slot = Slot()
        self._disks: list[ServedDisk] = []

    def install(self) -> None:
        """`Life` has done it."""

    def boot(self, scratch: Path, arguments: Sequence[str]) -> Device:
        log = self._place.work / "disk.log"
        self._disks = [
            ServedDisk(self._place.disk, self._folder / "root", log, arguments),
            ServedDisk(scratch, self._folder / "scratch", log),
        ]
        drive, beside = (disk.drive for disk in self._disks)
        more = [f"file={self._place.payload()},readonly=on", beside]
        self._slot.start(Machine(self._hardware, self._place.image, drive, self._place.work, more=more))
        return self._slot.device

    def mark(self) -> None:
        for line in marks(_SCRATCH):
            self._slot.device.run(line)

    def stall_after(self, writes: int) -> None:
        self._disks[0].stall_after(writes)

    def stalled(self) -> bool:
        return self._disks[0].stalled

    def over(self) -> int | None:
        said = self._slot.device.run(f"cat {ACTIVITY_OVER} 2>/dev/null", check=False).text.strip()
        return int(said) if said else None

    def cut(self) -> Loss:
        """What has ended after it was looked at counts as going on, and so does what a stalled disk may hold up."""
        over = None if self.stalled() else self.over()
        self._slot.close()
        lost, _ = (disk.cut() for disk in self._disks)
        return Loss(disk_bytes=lost, kernel_bytes=None, over=over)

    def complaints(self) -> list[str]:
        signs = "|".join(COMPLAINTS)
        return self._slot.device.run(f"dmesg | grep -E {signs!r}", check=False).text.splitlines()

    def switch_off(self) -> None:
        self._slot.switch_off()
        for each in self._disks:
            each.wait_off()

    def close(self) -> None:
        self._slot.close()
        for each in self._disks:
            each.cut()
        self._stack.close()
