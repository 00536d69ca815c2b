"""The steps about versions: bundles that are not what was signed, upgrades while prompts run, and the way back."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from tests.boot.agent import CURRENT, Agent, expect
from tests.boot.container import Container, wait_until

_HANGS_UP = """
import os, pty, sys
pid, terminal = pty.fork()
if not pid:
    os.execv(sys.argv[1], sys.argv[1:])
said = b""
while b"starting the service" not in said:
    said += os.read(terminal, 4096)
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""

_POWER_GOES = """
import os, subprocess, sys
script = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, bufsize=0)
said = b""
while b"starting the service" not in said:
    said += os.read(script.stdout.fileno(), 4096)
os.execvp("systemctl", ["systemctl", "--force", "--force", "reboot"])
"""
_SLOW_START = r"[Service]\nExecStartPre=/bin/sleep 120\n"
"""Until the power goes: what is in /run goes with it."""


class Upgrades:
    """The steps, in their order; `bundle` is installed before and after.

    Args:
        bundle, newer, broken: bundles to install; `broken`'s daemon does not start.
    """

    def __init__(
        self, container: Container, agent: Agent, *, bundle: Path, newer: Path, broken: Path
    ) -> None:
        self._in = container
        self._agent = agent
        self._bundle = bundle
        self._newer = newer
        self._broken = broken

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("changed bundles", self.changed_bundles),
            ("upgrade while prompts run", self.upgrade),
            ("upgrade that does not start", self.broken_upgrade),
            ("the same, and the line drops", self.dropped_upgrade),
            ("the same, and the power goes", self.cut_upgrade),
            ("going back", self.go_back),
            ("going forth, and the power goes", self.cut_start),
        ]

    def changed_bundles(self) -> str:
        """Nothing of a bundle runs before its signature is checked, and nothing is installed that it does not cover."""
        before, daemon = self._agent.current(), self._in.unit("MainPID")
        refused = [
            next(
                line for line in self._agent.install(self._newer, change=change, fails=True) if reason in line
            )
            for change, reason in ((forge, "was not signed with"), (damage, "the bundle is damaged"))
        ]
        expect((self._agent.current(), self._in.unit("MainPID")) == (before, daemon), "something has changed")
        expect(not (self._in.root / "root/sprung").exists(), "the forged script has run")
        self._agent.probe()
        return f"{'; '.join(refused)}; {before} goes on"

    def upgrade(self) -> str:
        before, daemon = self._agent.current(), self._in.unit("MainPID")
        client = self._in.beside(sys.executable, "-m", "tests.boot.prompts", "0")
        try:
            self._agent.install(self._newer)
            self._agent.wait_ready()
            result = json.loads(client.communicate("enough", timeout=300)[0])
        finally:
            client.kill()
            client.wait()
        expect(result["200"] == result["right"] == result["asked"] > 20, str(result))
        expect(self._agent.current() != before, "the version is the old one")
        return f"{before} → {self._agent.current()}, daemon {daemon} → {self._in.unit('MainPID')}: {result}"

    def broken_upgrade(self) -> str:
        before = self._agent.current()
        said = self._agent.install(self._broken, fails=True)
        expect(self._agent.current() == before, f"current is {self._agent.current()}")
        self._agent.wait_ready()
        self._agent.probe()
        return f"{said[-1]}; answers again"

    def dropped_upgrade(self) -> str:
        """The terminal goes while the script waits for the service: SIGHUP, and nobody to write to."""
        before = self._agent.current()
        self._agent.install(self._broken, fails=True, through=("python3", "-c", _HANGS_UP))
        expect(self._agent.current() == before, f"current is {self._agent.current()}")
        self._agent.wait_ready()
        self._agent.probe()
        return f"{before} is current again; answers"

    def go_back(self) -> str:
        before = self._agent.current()
        self._in.run(f"{CURRENT}/install.sh", "use", version_of(self._bundle))
        expect(self._agent.current() == version_of(self._bundle), self._agent.current())
        self._agent.wait_ready()
        self._agent.probe()
        return f"{before} → {self._agent.current()}, answers again"

    def cut_upgrade(self) -> str:
        """Nobody is there any more who would go back, but the unit that the next boot starts."""
        before = self._agent.current()
        self._start_slowly()
        self._agent.install(self._broken, through=("python3", "-c", _POWER_GOES))  # reboot(2) ends with 0
        expect(self._trial() == before, f"on trial after {self._trial()!r}")
        self._in.wait_reboot()
        wait_until(lambda: self._trial() == "", 180, "the end of the trial")
        expect(self._agent.current() == before, f"current is {self._agent.current()}")
        journal = ("journalctl", "--boot", "--unit=edge-agent-settle", "--output=cat")
        wait_until(
            lambda: f"version {before} is running again" in self._in.run(*journal).stdout, 180, "the way back"
        )
        self._agent.wait_ready()
        self._agent.probe()
        self._in.run("systemctl", "reset-failed", "edge-agent-settle")
        return f"{before} is current again; answers"

    def cut_start(self) -> str:
        """The version was as good as the one before it: it stays."""
        before, wanted = self._agent.current(), version_of(self._newer)
        self._start_slowly()
        use = (f"{CURRENT}/install.sh", "use", wanted)
        self._in.run("python3", "-c", _POWER_GOES, *use, check=False)
        expect(self._trial() == before, f"on trial after {self._trial()!r}")
        self._in.wait_reboot()
        wait_until(lambda: self._trial() == "", 180, "the end of the trial")
        expect(self._agent.current() == wanted, f"current is {self._agent.current()}")
        self._agent.wait_ready()
        self._agent.probe()
        self._in.run(f"{CURRENT}/install.sh", "use", before)
        self._agent.wait_ready()
        return f"{wanted} is current, and has started; {before} again"

    def _start_slowly(self) -> None:
        folder = "/run/systemd/system/edge-agent.service.d"
        self._in.run("sh", "-c", f"mkdir -p {folder} && printf '{_SLOW_START}' >{folder}/slow.conf")
        self._in.run("systemctl", "daemon-reload")

    def _trial(self) -> str:
        """The version to go back to; empty if none is on trial."""
        mark = self._in.root / "opt/edge-agent/.trial"
        return mark.read_text().splitlines()[0] if mark.exists() else ""


def version_of(bundle: Path) -> str:
    return bundle.name.split("-")[2]


def forge(bundle: Path) -> None:
    """Another program in it, with sums that fit."""
    (bundle / "install.sh").write_text("#!/bin/sh\ntouch /root/sprung\n")
    names = [line.split("  ", 1)[1] for line in (bundle / "SHA256SUMS").read_text().splitlines()]
    digests = ((name, hashlib.sha256((bundle / name).read_bytes()).hexdigest()) for name in names)
    (bundle / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests))


def damage(bundle: Path) -> None:
    with (bundle / "edge-agent.service").open("a") as file:
        file.write("# and more\n")
