"""The agent in the container, as root on the device handles it: installs it, sets it up, asks it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.boot import ANSWER, DEVICE, QUESTION
from tests.boot.container import BootTestError, Container, wait_until
from tests.support import old_kernel

BUNDLE = "root/bundle"
CURRENT = "/opt/edge-agent/current"
_KEY = "root/release.pub"
_OLD_KERNEL = "usr/local/lib/old_kernel.py"  # the unit does not see /root


class Agent:
    """One container's. One thread.

    Args:
        release_key: the public key that signed the bundles.
    """

    def __init__(self, container: Container, release_key: Path) -> None:
        self._in = container
        self._release_key = release_key

    def unpack(self, bundle: Path) -> Path:
        """Gives the folder, seen from here."""
        folder = self._in.root / BUNDLE
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        subprocess.run(["tar", "xzf", bundle, "-C", folder, "--strip-components=1"], check=True)
        return folder

    def install(
        self,
        bundle: Path,
        *,
        change: Callable[[Path], None] | None = None,
        fails: bool = False,
        lacks: str = "",
        through: Sequence[str] = (),
    ) -> list[str]:
        """Unpacks a bundle inside, and has its signature checked and it installed: by the script that is installed, if
        one is, else by its own.

        Args:
            change: what is done to the unpacked bundle first.
            lacks: what the kernel lacks that install.sh sees, as in old_kernel.py.
            through: a command that runs the one behind it.

        Returns:
            the lines that it said.
        """
        folder = self.unpack(bundle)
        if change:
            change(folder)
        shutil.copyfile(self._release_key, self._in.root / _KEY)
        installed = (self._in.root / "opt/edge-agent/current").is_symlink()
        script = f"{CURRENT if installed else f'/{BUNDLE}'}/install.sh"
        arguments = (script, "install", "--from", f"/{BUNDLE}", "--verify-key", f"/{_KEY}")
        result = self._in.run(*through, *self._old(lacks), *arguments, check=False, timeout_s=600)
        expect((result.returncode != 0) == fails, result.stdout + result.stderr)
        return (result.stdout + result.stderr).strip().splitlines()

    def install_unsigned(self, bundle: Path) -> None:
        """As an operator does who has no key."""
        self.unpack(bundle)
        self._in.run(f"/{BUNDLE}/install.sh", timeout_s=600)

    def settings(self, content: str) -> None:
        (self._in.root / "etc/edge-agent/config.toml").write_text(content)

    def credential(self, name: str, content: str) -> None:
        file = self._in.root / "etc/credstore" / name
        file.touch(mode=0o600)
        file.write_text(content)

    def restart(self) -> None:
        self._in.run("systemctl", "restart", "edge-agent")
        self.wait_ready()

    def on_kernel(self, lacks: str) -> None:
        """From its next start on, the service finds a kernel that lacks something; with an empty text, this one."""
        folder = self._in.root / "etc/systemd/system/edge-agent.service.d"
        shutil.rmtree(folder, ignore_errors=True)
        if lacks:
            folder.mkdir()
            command = " ".join([*self._old(lacks), f"{CURRENT}/bin/edge-agent", "run"])
            (folder / "old-kernel.conf").write_text(f"[Service]\nExecStart=\nExecStart={command}\n")
        self._in.run("systemctl", "daemon-reload")

    def probe(self) -> str:
        """Asks the first model twice, over the control socket and over MQTT."""
        said = self._in.run("edge-agent", "probe", QUESTION).stdout.strip().splitlines()
        expect(said[0] == ANSWER, str(said))
        topics = ("-t", f"edge/v1/{DEVICE}/req/chat", "-e", "replies/boot")
        over_mqtt = self._in.run(
            "mosquitto_rr", "-V", "5", "-W", "60", *topics, "-m", QUESTION
        ).stdout.strip()
        expect(over_mqtt == ANSWER, over_mqtt)
        return f"{said[0]} ({said[-1]}); the same over MQTT"

    def ask(self, model: str, prompt: str) -> str:
        said = self._in.run("edge-agent", "probe", "--json", "--model", model, prompt).stdout
        return str(json.loads(said)["answer"])

    def status(self) -> dict[str, Any]:
        said = self._in.run("edge-agent", "status", "--json", check=False).stdout
        document: dict[str, Any] = json.loads(said or '{"models": [], "broker": {"connected": false}}')
        return document

    def model(self, name: str) -> dict[str, Any]:
        """Its entry in the status."""
        (found,) = [model for model in self.status()["models"] if model["name"] == name]
        return dict(found)

    def wait_ready(self) -> None:
        wait_until(lambda: self.status().get("state") in ("ready", "degraded"), 90, "a daemon that answers")
        wait_until(self.runner, 60, "a runner")

    def wait_connected(self) -> None:
        wait_until(lambda: self.status()["broker"]["connected"], 60, "the connection to the broker")

    def findings(self, *, expected: int, lacks: str = "") -> list[dict[str, str]]:
        """What doctor says.

        Args:
            expected: the exit code.
            lacks: what the kernel lacks that doctor sees, as in old_kernel.py.
        """
        result = self._in.run(*self._old(lacks), f"{CURRENT}/bin/edge-agent", "doctor", "--json", check=False)
        expect(
            result.returncode == expected,
            f"doctor ended with {result.returncode}: {result.stdout}{result.stderr}",
        )
        findings: list[dict[str, str]] = json.loads(result.stdout)["findings"]
        return findings

    def failures(self) -> list[dict[str, str]]:
        return [finding for finding in self.findings(expected=1) if finding["level"] == "fail"]

    def runner(self) -> str:
        """The processes that have a model loaded; empty while there is none."""
        search = (  # the brackets keep the shell from finding itself
            "for p in /proc/[0-9]*; do grep -qs [e]dge_agent.runner.child $p/cmdline && echo ${p#/proc/}; done"
        )
        return " ".join(self._in.run("sh", "-c", search, check=False).stdout.split())

    def current(self) -> str:
        return self._in.run("readlink", CURRENT).stdout.strip()

    def _old(self, lacks: str) -> tuple[str, ...]:
        """What a command begins with that runs on such a kernel."""
        if not lacks:
            return ()
        shutil.copyfile(old_kernel.__file__, self._in.root / _OLD_KERNEL)
        return f"{CURRENT}/bin/python", f"/{_OLD_KERNEL}", lacks


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BootTestError(otherwise)
