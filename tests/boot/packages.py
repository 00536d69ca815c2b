"""The steps about the Debian package, with apt and without a network: they begin and end without an installed agent."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.boot import DEVICE
from tests.boot.agent import Agent, expect
from tests.boot.container import STATE, Container, wait_until
from tests.boot.upgrades import version_of

CONFIG = f"""\
device_id = "{DEVICE}"

[models.assistant]
uri = "models:/sample@prod"

[mqtt]
host = "localhost"
port = 1883

[cache]
min_free_bytes = 0
"""
# Where install.sh would switch to the new version, the power goes: with dpkg and everything that it has started.
_CUT = """\
#!/bin/sh
case "$*" in *.current*) kill -KILL 0 ;; esac
exec /bin/mv "$@"
"""
_APT = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--assume-yes", "--allow-downgrades")


class Packages:
    """The steps, in their order.

    Args:
        bundle, newer, broken: bundles, whose packages lie beside them; `broken`'s daemon does not start.
        model: a model version, made by `models export`.
    """

    def __init__(
        self, container: Container, agent: Agent, *, bundle: Path, newer: Path, broken: Path, model: Path
    ) -> None:
        self._in = container
        self._agent = agent
        self._first, self._newer, self._broken = map(package_of, (bundle, newer, broken))
        self._versions = {package_of(each): version_of(each) for each in (bundle, newer, broken)}
        self._model = model

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("package held against Debian's rules", self.lint),
            ("package installed where no systemd runs", self.install_into_an_image),
            ("package at its first boot", self.first_boot),
            ("package whose upgrade is cut", self.cut_upgrade),
            ("package that does not start", self.broken_upgrade),
            ("package going back, service disabled", self.downgrade_disabled),
            ("package removed", self.remove),
            ("package purged", self.purge),
        ]

    def lint(self) -> str:
        command = ["lintian", "--no-cfg", "--allow-root", "--fail-on", "error", str(self._first)]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        expect(said.returncode == 0, said.stdout + said.stderr)
        return f"{self._first.name}: lintian finds no error, {said.stdout.count('W: ')} warnings"

    def install_into_an_image(self) -> str:
        devices = self._in.run("ls", "/sys/class/net").stdout.split()
        expect(devices == ["lo"], f"network devices: {devices}")
        # Secrets of the steps before: a purge leaves them, and they fit no other settings.
        self._in.run("sh", "-c", "rm -f /etc/credstore/*")
        command = f"mount -t tmpfs none /run && exec {' '.join(_APT)} install {self._bring(self._first)}"
        said = self._in.run("unshare", "--mount", "sh", "-c", command, timeout_s=600).stdout
        expect("no systemd runs here" in said, said)
        enabled = self._in.run("systemctl", "is-enabled", "edge-agent").stdout.strip()
        expect(enabled == "enabled", f"the unit is {enabled}")
        running = self._in.run("systemctl", "is-active", "edge-agent", check=False).stdout.strip()
        expect(running == "inactive", f"the service is {running}")
        self._expect_installed(self._first)
        return f"devices: lo; {self._state()}; enabled, not started"

    def first_boot(self) -> str:
        self._in.reboot()
        wait_until(lambda: self._in.unit("ActiveState") == "active", 60, "the service")
        self._agent.settings(CONFIG)
        self._in.run("systemctl", "start", "mosquitto")
        self._in.run("systemctl", "restart", "edge-agent")
        self._agent.wait_connected()
        shutil.copyfile(self._model, self._in.root / "root/model.tar")
        self._in.run("edge-agent", "models", "import", "/root/model.tar")
        return f"active by itself; {self._agent.probe()}"

    def cut_upgrade(self) -> str:
        before, daemon = self._agent.current(), self._in.unit("MainPID")
        knife = self._in.root / "usr/local/sbin/mv"
        knife.write_text(_CUT)
        knife.chmod(0o755)
        self._in.run("setsid", "--wait", "dpkg", "-i", self._bring(self._newer), check=False, timeout_s=600)
        knife.unlink()
        cut = self._state()
        expect(cut == f"{self._versions[self._newer]} half-configured", cut)
        expect((self._agent.current(), self._in.unit("MainPID")) == (before, daemon), "something has changed")
        self._agent.probe()
        self._in.run("dpkg", "--configure", "--pending", timeout_s=600)
        self._agent.wait_ready()
        self._expect_installed(self._newer)
        expect((self._in.root / "opt/edge-agent" / before).is_dir(), f"{before} is gone")
        expect((self._in.root / "etc/edge-agent/config.toml").read_text() == CONFIG, "other settings")
        expect(self._in.unit("MainPID") != daemon, "the daemon is the old one")
        return f"{cut}, {before} went on; then {self._state()}: {self._agent.probe()}; {before} and settings stay"

    def broken_upgrade(self) -> str:
        before = self._agent.current()
        result = self._in.run(*_APT, "install", self._bring(self._broken), check=False, timeout_s=600)
        expect(result.returncode != 0, result.stdout + result.stderr)
        failed = self._state()
        expect(failed == f"{self._versions[self._broken]} half-configured", failed)
        expect(self._agent.current() == before, f"current is {self._agent.current()}")
        self._agent.wait_ready()
        self._agent.probe()
        self._in.run(*_APT, "install", self._bring(self._newer), timeout_s=600)
        self._expect_installed(self._newer)
        self._agent.wait_ready()
        self._agent.probe()
        return f"apt ended with {result.returncode}, {failed}, {before} answers; then {self._state()}"

    def downgrade_disabled(self) -> str:
        """What an operator has switched off stays off."""
        self._in.run("systemctl", "disable", "--now", "edge-agent")
        self._in.run(*_APT, "install", self._bring(self._first), timeout_s=600)
        self._expect_installed(self._first)
        asked = ("is-enabled", "is-active")
        found = [self._in.run("systemctl", ask, "edge-agent", check=False).stdout.strip() for ask in asked]
        expect(found == ["disabled", "inactive"], str(found))
        self._in.run("systemctl", "enable", "--now", "edge-agent")
        self._agent.wait_ready()
        return f"{self._state()}, {' and '.join(found)}; enabled again: {self._agent.probe()}"

    def remove(self) -> str:
        self._in.run(*_APT, "remove", "edge-agent")
        expect(self._in.unit("LoadState") == "not-found", self._in.unit("LoadState"))
        expect(not self._agent.runner(), "a runner is still there")
        left = self._left("opt/edge-agent", "usr/lib/edge-agent", "usr/bin/edge-agent")
        expect(not left, f"left: {left}")
        stays = ("etc/edge-agent/config.toml", f"{STATE}/journal.db")
        expect(self._left(*stays) == list(stays), "settings or state are gone")
        return f"{self._state()}; the service is gone; settings and state stay"

    def purge(self) -> str:
        self._in.run(*_APT, "purge", "edge-agent")
        places = (
            "etc/edge-agent",
            "opt/edge-agent",
            "etc/sysusers.d/edge-agent.conf",
            "var/lib/dpkg/info/edge-agent.*",
        )
        left = self._left(*places, f"{STATE}/*", "etc/systemd/system/edge-agent*", "usr/share/doc/edge-agent")
        user = self._in.run("id", "edge-agent", check=False).returncode == 0
        expect(not left and not user and not self._state(), f"left: {left}, user: {user}, {self._state()}")
        return "nothing stays"

    def _bring(self, package: Path) -> str:
        """Gives its path inside."""
        shutil.copyfile(package, self._in.root / "root" / package.name)
        return f"/root/{package.name}"

    def _state(self) -> str:
        """What dpkg says of it; empty if it knows nothing."""
        query = ("dpkg-query", "--show", "--showformat", "${Version} ${db:Status-Status}", "edge-agent")
        return self._in.run(*query, check=False).stdout.strip()

    def _expect_installed(self, package: Path) -> None:
        version = self._versions[package]
        expect(self._state() == f"{version} installed", self._state())
        expect(self._agent.current() == version, f"current is {self._agent.current()}")
        changed = self._in.run("dpkg", "--verify", "edge-agent").stdout
        expect(not changed, changed)

    def _left(self, *places: str) -> list[str]:
        """The places that are there, as patterns below the root."""
        return [place for place in places if any(self._in.root.glob(place))]


def package_of(bundle: Path) -> Path:
    """The package that lies beside a bundle."""
    (package,) = bundle.parent.glob(f"edge-agent_{version_of(bundle)}_*.deb")
    return package
