"""The machine as a device: what root does on it, over the serial line, and what a client outside sees of it.

`Device` installs bundles, sets the agent up and asks it. The broker is outside; the machine has a way to it and to
nothing else, and no way at all while the bundle is installed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tests.machine.console import MachineError, Reply
from tests.machine.machine import HOST, Machine
from tests.support.processes import wait_until

NAME = "press-7"
CURRENT = "/opt/edge-agent/current"
STATE = "/var/lib/edge-agent"
PAYLOAD = "/root/payload"
_CONFIG = "/etc/edge-agent/config.toml"
QUESTIONS = (
    "What is the capital of Spain?",
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is 2 plus 3?",
)
_INSTALL_TIMEOUT_S = 5400.0
_STAMPS = """while IFS= read -r line; do printf '%d %s\\n' $EPOCHSECONDS "$line"; done; printf '%d\\n' $EPOCHSECONDS"""


def settings(port: int, *, registry: str = "", host: str = HOST) -> str:
    """Of a device whose broker is on this host.

    Args:
        host: this host, as the device sees it.
        registry: its URI; without one, versions come from files.
    """
    lines = [
        f'device_id = "{NAME}"',
        "[models.assistant]",
        'uri = "models:/sample@prod"',
        "[mqtt]",
        f'host = "{host}"',
        f"port = {port}",
        "[cache]",
        "min_free_bytes = 0",
    ]
    if registry:
        lines += ["[registry]", f'uri = "{registry}"', "poll_interval_s = 86400"]
    return "\n".join(lines) + "\n"


class Shell(Protocol):
    """What runs commands on a device, as root."""

    def run(self, *command: str, check: bool = True, timeout_s: float = 300.0) -> Reply:
        """As `Console.run`."""
        ...


class Device:
    """One machine's agent. One thread."""

    def __init__(self, machine: Shell) -> None:
        self.run = machine.run

    # --- As root does it ------------------------------------------------------------------------------

    def unpack_payload(self) -> None:
        """What a stick would bring: bundles, their key, a model; an archive on the second disk."""
        self.run(f"mkdir -p {PAYLOAD} && tar xf /dev/vdb -C {PAYLOAD}", timeout_s=600)

    def start_install(self, bundle: str) -> str:
        """The command line that installs a bundle of the payload, its signature checked."""
        folder = f"/root/{bundle.removesuffix('.tar.gz')}"
        script = f"{CURRENT}/install.sh" if self.installed() else f"{folder}/install.sh"
        self.run(f"cd /root && tar xzf {PAYLOAD}/{bundle}", timeout_s=600)
        return f"{script} install --from {folder} --verify-key {PAYLOAD}/release.pub"

    def install(self, bundle: str) -> list[str]:
        """Gives the lines that install.sh said, each with the seconds until the next one."""
        command = f"{self.start_install(bundle)} 2>&1 | {_STAMPS}; exit ${{PIPESTATUS[0]}}"
        return durations(self.run(command, timeout_s=_INSTALL_TIMEOUT_S).text)

    def installed(self) -> bool:
        return self.run(f"test -L {CURRENT}", check=False).code == 0

    def use(self, version: str) -> None:
        self.run(f"{CURRENT}/install.sh use {version}", timeout_s=_INSTALL_TIMEOUT_S)

    def current(self) -> str:
        return self.run("readlink", CURRENT).text.strip()

    def write(self, path: str, content: str) -> None:
        encoded = base64.b64encode(content.encode()).decode()
        self.run(
            f"echo {encoded} | base64 -d > {path}.new && sync {path}.new && mv {path}.new {path} && sync"
        )

    def configure(self, content: str) -> bool:
        """Gives the agent these settings. True where it had others, and has to be restarted."""
        if self.run(f"cat {_CONFIG}", check=False).text == content.rstrip("\n"):
            return False
        self.write(_CONFIG, content)
        return True

    def network(self, state: str) -> None:
        """`up` or `down`. On a slow host, udev still loads the driver when systemd says that all is running."""
        self.run("udevadm settle --timeout=600", timeout_s=660)
        self.run(f"ip link set dev $(ls /sys/class/net | grep -v lo) {state}")

    # --- What it says ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        said = self.run("edge-agent status --json 2>/dev/null", check=False, timeout_s=120).text
        try:
            document: dict[str, Any] = json.loads(said)
        except ValueError:
            return {}
        return document

    def wait(
        self, holds: Callable[[], bool], timeout_s: float, what: str, seen: Callable[[], str] = str
    ) -> None:
        """
        Raises:
            MachineError: it does not hold in time; `seen` says what does.
        """
        try:
            wait_until(holds, timeout_s, what)
        except TimeoutError as error:
            raise MachineError(f"{error}: {seen()}") from error

    def versions(self) -> list[int]:
        """Those of the model that are in the cache and may run."""
        said = self.run("edge-agent models list --json 2>/dev/null", check=False, timeout_s=120).text
        return [each["version"] for each in json.loads(said) if each["state"] != "quarantined"]

    def unit(self, name: str) -> str:
        return self.run("systemctl", "show", "edge-agent", "--value", f"--property={name}").text.strip()

    def journal(self, lines: int = 30) -> str:
        said = self.run(f"journalctl --no-pager -b -u edge-agent -n {lines} -o short-monotonic", check=False)
        return said.text

    def doctor(self) -> list[dict[str, str]]:
        """Its findings; none failed.

        Raises:
            MachineError: one did.
        """
        said = self.run("edge-agent doctor --json 2>/dev/null", check=False)
        findings: list[dict[str, str]] = json.loads(said.text)["findings"]
        failed = [finding for finding in findings if finding["level"] == "fail"]
        if failed or said.code:
            raise MachineError(f"doctor ended with {said.code}: {failed}")
        return findings


class Slot:
    """The machine that is on, if one is. One thread."""

    def __init__(self) -> None:
        self._machine: Machine | None = None

    @property
    def machine(self) -> Machine:
        """
        Raises:
            MachineError: none is on.
        """
        if self._machine is None:
            raise MachineError("the machine is off")
        return self._machine

    @property
    def device(self) -> Device:
        return Device(self.machine)

    def start(self, machine: Machine) -> None:
        """Ends the one that is on, and switches this one on."""
        self.close()
        self._machine = machine
        machine.start()

    def switch_off(self) -> None:
        """In order."""
        self.machine.switch_off()
        self.close()

    def close(self) -> None:
        """Without any order, if it is on."""
        machine, self._machine = self._machine, None
        if machine is not None:
            machine.close()


def durations(said: str) -> list[str]:
    """`line (SECONDS s)` for each of install.sh's lines.

    Args:
        said: each line with the second in which it came before it; the last second alone.
    """
    stamped = [line.partition(" ") for line in said.splitlines() if line.strip()]
    times = [int(second) for second, _, _ in stamped]
    return [
        f"{text.removeprefix('install.sh: ')} ({after - before} s)"
        for (_, _, text), before, after in zip(stamped, times, times[1:], strict=False)
    ]


def payload(files: dict[str, Path], target: Path) -> Path:
    """An archive as a disk: the machine reads it with tar from the device itself."""
    import tarfile

    with tarfile.open(target, "w") as archive:
        for name, path in files.items():
            archive.add(path, name)
    return target
