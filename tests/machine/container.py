"""A container whose power can be cut: systemd-nspawn on an ext4 of its own, as `Rig` has it. At the speed of this host.

Its processes are real, and so are the host's file system, page cache and block layer below them; kernel and boot loader
are not its own. It needs a mount namespace and a network namespace around it, which `./build.sh` makes: no mount stays,
whatever becomes of this process, and there is nothing but loopback to reach.

The power ends in this order, and no other:

1. The processes are frozen. None of them runs an instruction any more, so what follows is seen by nobody, and nothing
   that happens to the disk from now on can be answered, acknowledged or reported. They are not waited for: one that
   waits for the disk in the kernel must be cut there, and stops before it returns from the kernel.
2. The disk gets SIGKILL, and with it goes its cache; then nbdfuse, and with it goes what was on the way. From now on
   the kernel cannot write.
3. The frozen processes get SIGKILL, all at once; they end without running.
4. The file system is unmounted. The kernel tries to write what it has, gets errors, and forgets it. The next boot is a
   new mount of a new device: it has what the disk's file has.

A disk that went first would let a daemon see errors that no power cut shows it. Processes that were killed first would
let the kernel go on to write what they had left.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.machine import models
from tests.machine.block import BOUND_TO_US, BlockDevice
from tests.machine.cgroup import Cgroup
from tests.machine.console import MachineError, Reply
from tests.machine.device import PAYLOAD, Device, settings
from tests.machine.kernel_log import KernelLog, names
from tests.machine.place import Place
from tests.machine.rig import ACTIVITY_OVER, COMPLAINTS, Loss, marks
from tests.machine.schedule import Activity, Pace
from tests.machine.served import ServedDisk
from tests.support.processes import wait_until

_PACE = Pace(
    longest_s={
        Activity.PROMPTS: 6.0,
        Activity.UPDATE: 4.0,
        Activity.IMPORT: 4.0,
        Activity.JOURNAL: 6.0,
        Activity.UPGRADE: 90.0,
    },
    prompts_s=0.1,
    answer_s=120.0,
    ready_s=180.0,
)
_BOOT_TIMEOUT_S = 180.0
_LANDLOCK = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")
_ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LANG=C.UTF-8",
)

_FSCK_REPAIRED = 1 | 2
"""The bits of e2fsck's exit code that say that it has repaired something."""


class Container:
    """One systemd, from its boot to its end. One thread.

    Args:
        root: where its root file system is mounted.
        payload: a folder of this host that it sees, to read.
        console: what it says; appended.
    """

    def __init__(self, root: Path, payload: Path, console: Path) -> None:
        self._console = console
        self._cgroup = Cgroup(f"ea-{os.getpid()}")
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "--console=pipe"]
        # A device's systemd has no filter around it. nspawn's own lacks these calls.
        command += [f"--system-call-filter={' '.join(_LANDLOCK)}", "--link-journal=no", "--resolv-conf=off"]
        command += ["--timezone=off", f"--bind-ro={payload}:{PAYLOAD}", f"--directory={root}"]
        with console.open("ab") as output:
            self._process = subprocess.Popen(
                [*BOUND_TO_US, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=self._cgroup.entering("machine"),
            )

    def wait_booted(self) -> None:
        def state() -> str:
            if self._process.poll() is not None:
                raise MachineError(f"systemd-nspawn ended:\n{self._tail()}")
            if self.leader is None:
                return ""
            said = self.run("systemctl is-system-running", check=False).text.strip()
            return said if said in ("running", "degraded") else ""

        try:
            wait_until(state, _BOOT_TIMEOUT_S, "the container's boot")
        except TimeoutError as error:
            raise MachineError(f"{error}:\n{self._tail()}") from error

    def run(self, *command: str, check: bool = True, timeout_s: float = 300.0) -> Reply:
        """As `Console.run`. The command is frozen and killed with the rest, and so is what it leaves behind."""
        line = shlex.join(command) if len(command) > 1 else command[0]
        enter = ["nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc", "--pid", "--cgroup"]
        try:
            ended = subprocess.run(
                [*enter, "--root", "--wd", "env", "-i", "--chdir=/root", *_ENVIRONMENT, "bash", "-c", line],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
                preexec_fn=self._cgroup.entering("commands"),
            )
        except subprocess.TimeoutExpired as error:
            raise MachineError(f"waited too long for: {line}") from error
        if check and ended.returncode:
            raise MachineError(f"{line} ended with {ended.returncode}:\n{ended.stdout}")
        return Reply(0, ended.returncode, ended.stdout.rstrip("\n"))

    def file(self, path: str) -> str | None:
        """What is in a file, asking none of its processes; None where there is none."""
        try:
            return Path(f"/proc/{self.leader}/root{path}").read_text()
        except FileNotFoundError:
            return None

    def freeze(self) -> None:
        self._cgroup.freeze()

    def kill(self) -> None:
        self._cgroup.kill()
        self._process.wait(60)
        self._cgroup.remove()

    def switch_off(self) -> None:
        """In order."""
        self.run("systemctl --no-block poweroff", check=False)
        try:
            self._process.wait(_BOOT_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise MachineError(f"the container is still on:\n{self._tail()}") from error
        self.kill()

    @property
    def leader(self) -> int | None:
        """Its PID 1, seen from here."""
        return leader_of(self._process.pid)

    def _tail(self) -> str:
        return "\n".join(self._console.read_text(errors="replace").splitlines()[-30:])


def leader_of(process: int) -> int | None:
    """The last child of a process that has process numbers of its own; None where there is none yet.

    What nspawn starts first has this host's still, and this host's files: a command in there would be one on this host.
    """
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        if children and not Path(f"/proc/{children[-1]}/ns/pid").samefile("/proc/self/ns/pid"):
            return int(children[-1])
    return None


class ContainerRig:
    """See `Rig`.

    Args:
        payload: a folder that the container sees: bundles, their key, models in files.
        mount: more options for its file system.
    """

    host = "127.0.0.1"
    pace = _PACE

    def __init__(self, place: Place, payload: Path, mount: str) -> None:
        self._place = place
        self._payload = payload
        self._options = ",".join(filter(None, ("errors=remount-ro", mount)))
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ea-")))
        self._root = self._folder / "root"
        self._root.mkdir()
        self._container: Container | None = None
        self._disks: list[BlockDevice] = []
        self._kernel = KernelLog()
        self._was_cut = False
        if not Path("/sys/kernel/debug/bdi").is_dir():
            subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)

    def install(self) -> None:
        """The first bundle, and a model from a file."""
        if self._place.installed.exists():
            return
        scratch = self._folder / "scratch.raw"
        scratch.write_bytes(bytes(1 << 20))
        self._place.copy(self._place.image.disk)
        device = self.boot(scratch, ())
        device.install(self._place.bundle)
        device.configure(settings(1883, host=self.host))
        device.run("systemctl restart edge-agent", timeout_s=600)
        device.run(f"edge-agent models import {PAYLOAD}/{models.file(1)}", timeout_s=600)
        self.switch_off()
        self._place.keep_installed()

    def boot(self, scratch: Path, arguments: Sequence[str]) -> Device:
        log = self._place.work / "disk.log"
        self._kernel.forget()
        for name, file, more in (("root", self._place.disk, arguments), ("scratch", scratch, ())):
            disk = ServedDisk(file, self._folder / f"{name}.socket", log, more)
            self._disks.append(BlockDevice(disk, self._folder / f"{name}.disk", log))
        device, lies = self._disks[0].path, "--lies" in arguments
        if lies:
            _repair(device)
        subprocess.run(["mount", "-t", "ext4", "-o", self._options, device, self._root], check=True)
        if self._was_cut and not lies and not self._recovered():
            raise MachineError("this was no power cut: the file system had been unmounted")
        self._container = Container(self._root, self._payload, self._place.work / "console.log")
        self._container.wait_booted()
        return Device(self._container)

    def mark(self) -> None:
        for line in marks(str(self._disks[1].path)):
            subprocess.run(["bash", "-c", line], check=True, capture_output=True, timeout=60)

    def stall_after(self, writes: int) -> None:
        self._disks[0].disk.stall_after(writes)

    def stalled(self) -> bool:
        return self._disks[0].disk.stalled

    def over(self) -> int | None:
        said = self._on.file(ACTIVITY_OVER)
        return int(said) if said else None

    def cut(self) -> Loss:
        """See above for the order."""
        root, scratch = self._disks
        unwritten = root.unwritten_bytes
        self._on.freeze()
        lost = root.cut()
        scratch.cut()
        over = self.over()
        self._end()
        self._was_cut = True
        return Loss(disk_bytes=lost, kernel_bytes=unwritten, over=over)

    def complaints(self) -> list[str]:
        return [line for line in self._lines() if any(sign in line for sign in COMPLAINTS)]

    def switch_off(self) -> None:
        self._on.switch_off()
        self._container = None
        self._end()

    def close(self) -> None:
        for each in self._disks:
            each.cut()
        self._end()
        self._kernel.close()
        self._stack.close()

    @property
    def _on(self) -> Container:
        if self._container is None:
            raise MachineError("the container is off")
        return self._container

    def _recovered(self) -> bool:
        """Whether the mount found a journal that had to be replayed."""
        return any("recovery complete" in line for line in self._lines())

    def _lines(self) -> list[str]:
        return [line for line in self._kernel.lines() if names(line, self._disks[0].path.name)]

    def _end(self) -> None:
        """Kills what still runs, and takes mount and devices away."""
        container, self._container = self._container, None
        if container is not None:
            container.kill()
        if os.path.ismount(self._root):
            subprocess.run(["umount", self._root], check=True)
        disks, self._disks = self._disks, []
        for each in disks:
            each.close()


def _repair(device: Path) -> None:
    """As a device does that boots with `fsck.repair=yes`: a disk that lies loses what ext4's journal builds on.

    Raises:
        MachineError: the file system cannot be repaired.
    """
    done = subprocess.run(["e2fsck", "-f", "-y", device], capture_output=True, text=True, timeout=600)
    if done.returncode & ~_FSCK_REPAIRED:
        raise MachineError(f"e2fsck ended with {done.returncode}: {done.stdout[-2000:]}")
