"""An emulated machine: qemu without KVM, one disk, a serial line, a network that ends at this host.

Owns the qemu process, its sockets and its logs. What the kernel says is in `kernel.log`; commands go over a second
serial line (`console.py`). Inside, the host is 10.0.2.2, and there is no way to anywhere else. `cut` is the end of the
power: qemu gets SIGKILL, and with it goes what its disk was told and not made to keep (`disk.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.machine.console import Console, MachineError, Reply
from tests.support.processes import wait_until

_QEMU = Path(__file__).parents[2] / ".tools" / "qemu" / "root"
BOOT_TIMEOUT_S = 900.0
HOST = "10.0.2.2"
"""This host, as the machine sees it."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a machine is made of.

    Attributes:
        arch: `x86_64` or `aarch64`.
        cpu: a model of qemu's: `max`, or `cortex-a72`, which is a Raspberry Pi 4's.
        memory_mb: of the machine.
        clock: what its clock shows at the start (`utc`, or a date that qemu's `-rtc base=` takes).
        mount: more options for the root file system.
    """

    arch: str
    cpu: str = "max"
    memory_mb: int = 2048
    clock: str = "utc"
    mount: str = ""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A folder with a kernel and its first file system, made by prepare.sh."""

    folder: Path

    @property
    def disk(self) -> Path:
        """A root file system."""
        return self.folder / "disk.raw"

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"


class Machine:
    """One machine; started and cut as often as wanted. One thread.

    Args:
        image: its kernel.
        disk: what qemu takes as a drive: `file=…` or `file.driver=nbd,…`.
        more: further disks in files, read-only: the first is /dev/vdb.
        logs: a folder that exists.
    """

    def __init__(
        self, hardware: Hardware, image: Image, disk: str, logs: Path, *, more: Sequence[str] = ()
    ) -> None:
        self.hardware = hardware
        self._image = image
        self._disk = disk
        self._more = more
        self._logs = logs
        self._folder = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        self._console: Console | None = None

    @property
    def kernel_log(self) -> str:
        path = self._logs / "kernel.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def instructions(self) -> Path:
        """What qemu writes when its monitor is told `log in_asm`."""
        return self._logs / "instructions.log"

    def start(self, *, wait: bool = True) -> None:
        """Switches it on and, with `wait`, waits for its shell."""
        for name in ("console", "monitor"):
            (self._folder / name).unlink(missing_ok=True)
        with (self._logs / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        process = self._process
        wait_until(lambda: process.poll() is not None or (self._folder / "monitor").exists(), 60, "qemu")
        if process.poll() is not None:
            raise MachineError(
                f"qemu ended with {process.returncode}: {(self._logs / 'qemu.log').read_text()}"
            )
        self._console = Console(self._folder / "console")
        if wait:
            self.wait_shell()

    def wait_shell(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        self.console.wait_ready(timeout_s)

    def wait_off(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Waits until it has switched itself off."""
        assert self._process is not None
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise MachineError(f"the machine is still on after {timeout_s:g} s") from error
        self.cut()

    @property
    def console(self) -> Console:
        if self._console is None:
            raise MachineError("the machine is off")
        return self._console

    def run(self, *command: str, check: bool = True, timeout_s: float = 300.0) -> Reply:
        return self.console.run(*command, check=check, timeout_s=timeout_s)

    def reboot(self) -> None:
        """An orderly reboot."""
        self.run("systemctl --no-block reboot", check=False)
        self.wait_shell()

    def switch_off(self) -> None:
        """An orderly end."""
        self.run("systemctl --no-block poweroff", check=False)
        self.wait_off()

    def cut(self) -> None:
        """The power is gone."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._process = None
        if self._console is not None:
            self._console.close()
            self._console = None

    def close(self) -> None:
        self.cut()
        shutil.rmtree(self._folder, ignore_errors=True)

    def monitor(self, command: str) -> str:
        """Says something to qemu's own monitor."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(30)
            line.connect(str(self._folder / "monitor"))
            said = _until_prompt(line)
            line.sendall(command.encode() + b"\n")
            said = _until_prompt(line)
        return said.decode(errors="replace")

    def _command(self) -> list[str]:
        return [
            *emulator(self.hardware),
            *("-m", str(self.hardware.memory_mb), "-smp", str(min(2, os.cpu_count() or 1))),
            *("-nodefaults", "-no-user-config", "-display", "none", "-rtc", f"base={self.hardware.clock}"),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)),
            *("-append", self._kernel_options()),
            *("-serial", f"file:{self._logs / 'kernel.log'}"),
            *("-monitor", f"unix:{self._folder / 'monitor'},server=on,wait=off"),
            *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=shell"),
            *("-chardev", f"socket,id=shell,path={self._folder / 'console'},server=on,wait=off"),
            *("-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "virtio-rng-pci", "-D", str(self.instructions)),
            *drive("root", self._disk),
            *(word for number, more in enumerate(self._more) for word in drive(f"more{number}", more)),
        ]

    def _kernel_options(self) -> str:
        serial = "ttyAMA0" if self.hardware.arch == "aarch64" else "ttyS0"
        mount = f" machine.mount={self.hardware.mount}" if self.hardware.mount else ""
        return f"console={serial} panic=-1 quiet loglevel=4 systemd.show_status=false{mount}"


def emulator(hardware: Hardware) -> list[str]:
    """qemu for an architecture, and the machine that it emulates; never KVM, which a builder may not have."""
    name = f"qemu-system-{hardware.arch}"
    kind = "virt" if hardware.arch == "aarch64" else "q35"
    folders = [word for path in firmware() for word in ("-L", str(path))]
    # The algorithm of Arm's signed pointers, computed exactly, would cost half of the speed.
    cpu = "max,pauth-impdef=on" if (hardware.arch, hardware.cpu) == ("aarch64", "max") else hardware.cpu
    return [name, *folders, "-machine", kind, "-cpu", cpu, "-accel", "tcg,thread=multi"]


def firmware() -> list[Path]:
    """Where qemu's own files are, when it came into .tools and not onto the system."""
    shares = [_QEMU / "usr/share" / name for name in ("qemu", "seabios")]
    return [path for path in shares if path.is_dir()]


def drive(name: str, options: str) -> list[str]:
    return ["-drive", f"id={name},if=none,format=raw,{options}", "-device", f"virtio-blk-pci,drive={name}"]


def _until_prompt(line: socket.socket) -> bytes:
    said, deadline_s = b"", time.monotonic() + 30
    while not said.endswith(b"(qemu) ") and time.monotonic() < deadline_s:
        content = line.recv(4096)
        if not content:
            break
        said += content
    return said
