"""Power cuts: a machine whose disk forgets what was not flushed, cut off again and again.

    boot → everything as promised? → an activity, and prompts from outside → SIGKILL to machine and disk → boot …

The boot after a cut is the one in which the next activity begins, on the same disk, which stays in the work folder with
the number of cuts that it has lived through: the same seed goes on from there. Each cut writes a mark to a second disk
without a flush, and one with; a cut after which the first is still there, or the second is not, has not been a power
cut, and the run fails.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.machine import inside, models
from tests.machine.console import MachineError
from tests.machine.device import CURRENT, NAME, PAYLOAD, QUESTIONS, STATE, Device, Slot, settings
from tests.machine.disk import BLOCK_BYTES, forgotten_bytes
from tests.machine.machine import HOST, Hardware, Machine
from tests.machine.outside import Outside, Prompts
from tests.machine.place import Place
from tests.machine.schedule import Activity, Cut, Seen, cuts, damage
from tests.support.client import connected
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.mosquitto import running_broker
from tests.support.processes import Child, wait_until

_INSIDE = "/root/inside.py"
_SCRATCH_BYTES = 256 * BLOCK_BYTES
_KEPT, _LOST = b"kept", b"lost"
HEADER = " cut  activity          after  early  lost KiB  prompts  waiting  again  ready  found"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for.

    Attributes:
        count: cuts in this run; `seed` has them.
        lying: the disk says that it has flushed, and has not. Outside of every promise: only a start is asked for.
    """

    seed: int
    count: int
    lying: bool = False


class ServedDisk:
    """One file behind a `ForgetfulDisk` in a process of its own, which a cut ends with the machine."""

    def __init__(self, file: Path, socket: Path, log: Path, arguments: Sequence[str] = ()) -> None:
        self._socket = socket
        socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.machine.disk", "--file", str(file), "--socket", str(socket)]
        self._child = Child([*command, *arguments], log, {"PYTHONPATH": str(Path(__file__).parents[2])})
        wait_until(lambda: socket.exists() or not self._child.running, 60, "the disk")

    @property
    def drive(self) -> str:
        return f"file.driver=nbd,file.server.type=unix,file.server.path={self._socket},cache=writeback"

    def cut(self) -> int:
        """Gives how many bytes are lost."""
        self._child.kill()
        return forgotten_bytes(self._socket)

    def wait_off(self) -> None:
        """Its machine was switched off in order, and it ends by itself."""
        wait_until(lambda: not self._child.running, 60, "the end of the disk")


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What a cut took.

    Attributes:
        lost_bytes: what the disk had been told and had not made durable.
        prompts: those that the broker had taken since the boot; `waiting` of them had no answer.
    """

    lost_bytes: int
    prompts: int
    waiting: int


class PowerCuts:
    """One run of cuts. One thread, and one that sends prompts.

    Args:
        report: takes each line of the table.
        right: the answers that the versions of the model have to the first question.
    """

    def __init__(
        self,
        place: Place,
        hardware: Hardware,
        options: Options,
        *,
        right: Sequence[str],
        report: Callable[[str], None],
    ) -> None:
        self._place = place
        self._hardware = hardware
        self._options = options
        self._right = right
        self._report = report
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ea-")))
        broker = self._stack.enter_context(running_broker(self._folder, persistence=True))
        self._outside = Outside(self._stack.enter_context(connected(broker, device=NAME)))
        self._registry: Server = self._stack.enter_context(running_mlflow_server(self._folder))
        self._settings = settings(broker.port, registry=f"http://{HOST}:{self._registry.port}")
        self._prompts = Prompts(self._outside)
        self._slot = Slot()
        self._disks: list[ServedDisk] = []
        self._scratch = self._folder / "scratch.raw"
        self._progress = place.work / "progress.json"

    def run(self) -> int:
        """Gives 1 as soon as a cut has done harm, else 0."""
        first = self._begin()
        models.publish(self._registry)
        self._report(HEADER)
        last: tuple[Cut, _Cost] | None = None
        for cut in cuts(self._options.seed, first, self._options.count + 1):
            began_s = time.monotonic()
            self._boot(cut)
            booted_s = time.monotonic() - began_s
            if last is None:
                self._set_up(self._slot.device)
                self._outside.wait_ready(seen=self._slot.device.journal)
            elif not self._verdict(*last, booted_s):
                return 1
            if cut.number == first + self._options.count:
                break
            last = cut, self._cut(cut)
        self._slot.switch_off()
        for each in self._disks:
            each.wait_off()
        return 0

    def close(self) -> None:
        self._prompts.stop()
        self._slot.close()
        for each in self._disks:
            each.cut()
        self._stack.close()

    # --- One cut ----------------------------------------------------------------------------------------

    def _begin(self) -> int:
        """The disk of this seed, as it is after the cuts that it has had; the number of the next one."""
        with contextlib.suppress(FileNotFoundError):
            progress = json.loads(self._progress.read_text())
            if progress["seed"] == self._options.seed and progress["bundles"] == self._place.installed.name:
                return int(progress["cuts"])
        self._place.copy(self._place.installed)
        self._note(0)
        return 0

    def _note(self, done: int) -> None:
        noted = {"seed": self._options.seed, "bundles": self._place.installed.name, "cuts": done}
        self._progress.write_text(json.dumps(noted))

    def _boot(self, cut: Cut) -> None:
        """Switches it on with new, empty caches in front of what is durable."""
        seed = f"{self._options.seed} disk {cut.number}"
        root = ["--seed", seed, "--early", str(cut.early), *(["--lies"] if self._options.lying else [])]
        self._scratch.write_bytes(bytes(_SCRATCH_BYTES))
        self._disks = [
            ServedDisk(self._place.disk, self._folder / "root", self._folder / "disk.log", root),
            ServedDisk(self._scratch, self._folder / "scratch", self._folder / "disk.log"),
        ]
        stick = f"file={self._place.payload()},readonly=on"
        more = [stick, self._disks[1].drive]
        drive = self._disks[0].drive
        self._slot.start(Machine(self._hardware, self._place.image, drive, self._place.work, more=more))

    def _cut(self, cut: Cut) -> _Cost:
        """Lets the activity begin, and ends the power."""
        device = self._slot.device
        self._mark(device)
        self._prompts.start()
        self._begin_activity(device, cut.activity)
        # The seed's moment, not a condition: whatever is going on then is what is cut off.
        threading.Event().wait(cut.delay_s)
        self._outside.forget()
        self._slot.close()
        lost, _ = (disk.cut() for disk in self._disks)
        self._prompts.stop()
        self._note(cut.number + 1)
        mark = self._scratch.read_bytes()
        if mark[: len(_KEPT)] != _KEPT or _LOST in mark:
            raise MachineError(
                f"this was no power cut: the disk has {mark[:4]!r}, {mark[BLOCK_BYTES:][:4]!r}"
            )
        return _Cost(lost_bytes=lost, prompts=self._prompts.count, waiting=self._prompts.waiting)

    def _mark(self, device: Device) -> None:
        """What must be there after the cut, and what must not."""
        for number, (mark, flags) in enumerate(((_KEPT, "direct conv=fsync"), (_LOST, "direct"))):
            device.run(
                f"printf %-{BLOCK_BYTES}s {mark.decode()} | dd of=/dev/vdc bs={BLOCK_BYTES} seek={number} "
                f"iflag=fullblock oflag={flags} 2>&1"
            )

    def _begin_activity(self, device: Device, activity: Activity) -> None:
        if activity is Activity.UPDATE:
            self._remove_other(device)
            models.move_alias(self._registry, self._other())
            _background(device, "edge-agent models pull")
        elif activity is Activity.IMPORT:
            other = self._other()
            self._remove_other(device)
            _background(device, f"edge-agent models import {PAYLOAD}/{models.file(other)}")
        elif activity is Activity.JOURNAL:
            journal = f"{STATE}/journal.db"
            device.run("systemctl stop edge-agent", timeout_s=600)
            device.run(f"python3 {_INSIDE} damage {journal}")
            device.run(f"chown edge-agent: {journal}*")
            _background(device, "systemctl start edge-agent")
        elif activity is Activity.UPGRADE:
            current = device.current()
            bundles = (self._place.bundle, self._place.newer)
            (bundle,) = [each for each in bundles if self._place.version(each) != current]
            device.run(f"rm -rf /opt/edge-agent/{self._place.version(bundle)}*", timeout_s=600)
            _background(device, device.start_install(bundle))

    def _other(self) -> int:
        """The version that is not active."""
        return 3 - int(self._outside.status()["models"][0]["version"])

    def _remove_other(self, device: Device) -> None:
        """So that there is something to fetch."""
        device.run(f"edge-agent models rm assistant {self._other()}", check=False)

    # --- What it left -----------------------------------------------------------------------------------

    def _verdict(self, cut: Cut, cost: _Cost, boot_s: float) -> bool:
        """Looks at the device that has booted after a cut, and prints a row."""
        began_s = time.monotonic()
        seen = self._look(cut)
        ready_s = boot_s + time.monotonic() - began_s
        if self._options.lying:  # only that it starts
            found = damage(seen, self._right)
            wrong = [] if seen.state == "ready" else ["the agent has not started"]
        else:
            wrong = found = damage(seen, self._right)
        repeated = sum(len(each.answers) - 1 for each in seen.prompts if each.answers)
        row = (
            f"{cut.number:>4}  {cut.activity:<16} {cut.delay_s:>6.1f}  {cut.early:>5.0%} {cost.lost_bytes // 1024:>9}"
            f" {cost.prompts:>8} {cost.waiting:>8} {repeated:>7} {ready_s:>6.0f}  "
            f"{'as promised' if not found else '; '.join(found)}"
        )
        self._report(row)
        if wrong:
            self._report(self._slot.device.journal(200))
        return not wrong

    def _look(self, cut: Cut) -> Seen:
        device, seen = self._slot.device, Seen()
        mounts = device.run("grep ' / ext4 ' /proc/mounts").text.split()
        seen.mounted = mounts[3] if len(mounts) > 3 else ""
        said = device.run("dmesg | grep -E 'EXT4-fs (error|warning)|I/O error'", check=False).text
        seen.complaints = said.splitlines()
        try:
            seen.state = str(self._outside.wait_ready(seen=device.journal)["state"])
        except MachineError as error:
            seen.state = str(error)
            return seen
        seen.prompts = self._prompts.take()
        (seen.answer,) = self._outside.ask(QUESTIONS[:1])
        verified = device.run("edge-agent models verify 2>&1", check=False)
        seen.verified = (verified.code, verified.text)
        seen.current = device.current()
        seen.versions = device.run(f"{CURRENT}/install.sh list", check=False).text.split()
        if cut.activity is Activity.UPGRADE:
            folders = [f"/opt/edge-agent/{version}" for version in seen.versions]
            lines = [
                device.run(f"python3 {_INSIDE} records {folder}", timeout_s=900).text.splitlines()
                for folder in folders
            ]
            seen.damaged = [name for found in lines for name in found if name]
        return seen

    def _set_up(self, device: Device) -> None:
        """The broker and the registry of this run, where the disk is from another one."""
        if device.run("cat /etc/edge-agent/config.toml", check=False).text == self._settings.rstrip("\n"):
            return
        device.write("/etc/edge-agent/config.toml", self._settings)
        device.write(_INSIDE, Path(inside.__file__).read_text())
        device.run("systemctl restart edge-agent", check=False, timeout_s=600)


def _background(device: Device, command: str) -> None:
    """Begins what the power's end will find going on."""
    device.run(f"setsid sh -c {command!r} >/root/activity.log 2>&1 </dev/null & true")
