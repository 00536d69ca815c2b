"""A Debian root booted by systemd-nspawn: its own systemd, its own network namespace with loopback alone.

Owns the processes, a small file system for the state, and a copy of the root; `close` takes all of it away. The
container is not registered and gets no unit: that works inside other containers, and on hosts of either cgroup
version, too. Source: systemd-nspawn(1), `--register=`, `--keep-unit`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STATE = "var/lib/edge-agent"
_CGROUP = "edge-agent-boot-test"
_BOOT_TIMEOUT_S = 120.0
_REBOOT_STATUS = 133
_COMMAND_TIMEOUT_S = 300.0
_POLL_S = 0.2
_LANDLOCK = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")
_ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LANG=C.UTF-8",
)


class BootTestError(Exception):
    """Something that should have happened did not."""


class Container:
    """One container. One thread.

    Args:
        root: a Debian root; it is copied, and stays as it is.
        folder: for the copy and the console's log; removed at the end.
        state_bytes: size of the file system for the state: small, so that it can be filled.
    """

    def __init__(self, root: Path, folder: Path, *, state_bytes: int) -> None:
        self.root = folder / "root"
        self.console = folder / "console.log"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        subprocess.run(["cp", "-a", "--reflink=auto", root, self.root], check=True)
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n")  # debootstrap leaves it to an installer
        state = self.root / STATE
        state.mkdir(parents=True)
        options = f"size={state_bytes},mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "edge-agent-state", state], check=True)

    def boot(self) -> None:
        """Starts it and waits until its systemd has done what it does at boot."""
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--boot"]
        # A device's systemd has no filter around it. nspawn's own lacks these calls.
        command += [f"--system-call-filter={' '.join(_LANDLOCK)}"]
        with self.console.open("ab") as console:
            self._process = subprocess.Popen(
                [*command, "--console=pipe", f"--directory={self.root}"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                preexec_fn=_enter_cgroup,
            )
        self._wait_booted()

    def reboot(self) -> None:
        """An orderly reboot. systemd-nspawn ends and asks for it, as it would ask a service manager."""
        self.run("systemctl", "--no-block", "reboot", check=False)  # its bus may be gone before it answers
        self.wait_reboot()

    def wait_reboot(self) -> None:
        """Boots again what something inside has ended, in order or as a power cut does."""
        if self._process is None:
            raise BootTestError("the container was not booted")
        status = self._process.wait(_BOOT_TIMEOUT_S)
        if status != _REBOOT_STATUS:
            raise BootTestError(f"systemd-nspawn ended with {status}:\n{self.console_tail()}")
        self.boot()

    def run(
        self, *command: str, check: bool = True, timeout_s: float = _COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside, as root.

        Raises:
            BootTestError: it failed, and `check` is set; what it said is in it.
        """
        leader = self._leader()
        if leader is None:
            return subprocess.CompletedProcess(command, 255, "", "the container does not run")
        result = subprocess.run(
            [
                *("nsenter", f"--target={leader}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"),
                *("--root", "--wd", "env", "--ignore-environment", "--chdir=/root", *_ENVIRONMENT, *command),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        if check and result.returncode:
            said = f"{result.stdout}{result.stderr}"
            raise BootTestError(f"{' '.join(command)} ended with {result.returncode}:\n{said}")
        return result

    def beside(self, *command: str | Path) -> subprocess.Popen[str]:
        """Starts a program of this host in the container's network."""
        enter = ["nsenter", f"--target={self._leader()}", "--net"]
        return subprocess.Popen(
            [*enter, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def unit(self, name: str) -> str:
        """One property of the service."""
        return self.run("systemctl", "show", "edge-agent", "--value", f"--property={name}").stdout.strip()

    def journal(self, lines: int = 30) -> str:
        """The service's last lines."""
        return self.run(
            *(
                "journalctl",
                "--no-pager",
                "--unit=edge-agent",
                f"--lines={lines}",
                "--output=short-monotonic",
            ),
            check=False,
        ).stdout

    def console_tail(self) -> str:
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-30:])

    def close(self) -> None:
        """Ends everything, whatever state it is in."""
        if (leader := self._leader()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, signal.SIGKILL)  # PID 1 of its namespace: all of them go with it
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(15)
        subprocess.run(["umount", "--lazy", self.root / STATE], check=False)
        _remove_cgroups()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_booted(self) -> None:
        def state() -> str:
            if self._process is None or self._process.poll() is not None:
                raise BootTestError(f"systemd-nspawn ended:\n{self.console_tail()}")
            said = self.run("systemctl", "is-system-running", check=False).stdout.strip()
            return said if said in ("running", "degraded") else ""

        wait_until(state, _BOOT_TIMEOUT_S, "the container's boot")

    def _leader(self) -> int | None:
        """The container's PID 1, seen from here."""
        if self._process is None:
            return None
        try:
            children = (
                Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            )
        except OSError:
            return None
        return int(children[-1]) if children else None


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Raises BootTestError when the condition stays false."""
    limit_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > limit_s:
            raise BootTestError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(_POLL_S)


def _cgroup_folders() -> Iterator[Path]:
    """Where this process may make a cgroup of its own without asking a service manager."""
    if not Path("/run/systemd/system").is_dir():
        for name in ("systemd", "unified"):
            if Path(f"/sys/fs/cgroup/{name}/cgroup.procs").exists():
                yield Path(f"/sys/fs/cgroup/{name}/{_CGROUP}")


def _enter_cgroup() -> None:
    """systemd-nspawn delegates the cgroup that it is in: it gets one that can be removed."""
    for folder in _cgroup_folders():
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.procs").write_text(str(os.getpid()))


def _remove_cgroups() -> None:
    for folder in _cgroup_folders():
        for inner, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(inner)  # noqa: PTH106 - a cgroup's folder has files that need not be removed first
