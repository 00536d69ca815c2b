"""The steps of the device's life. Each gives the line that is printed, or raises BootTestError."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.boot import ANSWER, DEVICE, QUESTION
from tests.boot.agent import CURRENT, Agent, expect
from tests.boot.container import STATE, Container, wait_until
from tests.boot.interface import Interface
from tests.boot.packages import Packages
from tests.boot.upgrades import Upgrades
from tests.boot.walls import Walls
from tests.support.certificates import Authority

EXPOSURE_LIMIT = 1.3

CONFIG = f"""\
device_id = "{DEVICE}"

[models.assistant]
uri = "models:/sample@prod"

[mqtt]
host = "localhost"
port = 8883
username = "{DEVICE}"
ca_file = "/etc/edge-agent/ca.crt"
cert_file = "/etc/edge-agent/device.crt"
key_file = "/run/credentials/edge-agent.service/mqtt-key"

[cache]
min_free_bytes = 0
"""
BROKER = """\
per_listener_settings true
autosave_on_changes true
autosave_interval 1

listener 8883 127.0.0.1
cafile /etc/mosquitto/certs/ca.crt
certfile /etc/mosquitto/certs/server.crt
keyfile /etc/mosquitto/certs/server.key
require_certificate true
allow_anonymous false
password_file /etc/mosquitto/passwords

listener 1883 127.0.0.1
allow_anonymous true
"""
SECRET = "boot test's password"


@dataclass(frozen=True, kw_only=True)
class Files:
    """What the steps bring into the container.

    Attributes:
        bundle, newer, broken: bundles to install, with their packages beside them; `broken`'s daemon does not start.
        release_key: the public key that signed them.
        model: a model version, made by `models export`.
        guest: a version of the package that attacks, in a file.
        real_model: a folder of the model builder's, of a real language model.
    """

    bundle: Path
    newer: Path
    broken: Path
    release_key: Path
    model: Path
    guest: Path
    real_model: Path


class Device:
    """The steps, in their order."""

    def __init__(self, container: Container, files: Files) -> None:
        self._in = container
        self._files = files
        self._agent = Agent(container, files.release_key)
        self._upgrades = Upgrades(
            container, self._agent, bundle=files.bundle, newer=files.newer, broken=files.broken
        )
        self._packages = Packages(
            container,
            self._agent,
            bundle=files.bundle,
            newer=files.newer,
            broken=files.broken,
            model=files.model,
        )
        self._interface = Interface(container, self._agent, exposure_limit=EXPOSURE_LIMIT)
        self._walls = Walls(container, self._agent, guest=files.guest, newer=files.newer, config=CONFIG)

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("boot", self.boot),
            ("install without a network", self.install),
            ("documents that messages name", self.documents),
            ("a conversation with a real model, straight from its folder", self.converse),
            ("exposure of the unit", self.exposure),
            ("broker, settings, credentials", self.configure),
            ("import of the model", self.import_model),
            ("probe", self._agent.probe),
            ("doctor", self.doctor),
            *self._interface.steps(),
            ("runner killed", self.kill_runner),
            ("daemon stopped, watchdog", self.stop_threads),
            ("invalid settings", self.break_settings),
            ("a file of root's in the cache", self.stray_file),
            ("root beside a stopped service", self.work_as_root),
            ("full disk", self.fill_disk),
            *self._upgrades.steps(),
            *self._walls.steps(),
            ("reboot", self.reboot),
            ("probe after the reboot", self._agent.probe),
            ("support archive", self.support_archive),
            ("uninstall", self.uninstall),
            *self._packages.steps(),
        ]

    def boot(self) -> str:
        self._in.boot()
        system = self._in.run("systemctl", "is-system-running", check=False).stdout.strip()
        return f"{system}; {self._in.run('systemctl', '--version').stdout.splitlines()[0]}"

    def install(self) -> str:
        devices = self._in.run("ls", "/sys/class/net").stdout.split()
        expect(devices == ["lo"], f"network devices: {devices}")
        ensurepip = self._in.run("python3", "-c", "import ensurepip", check=False).returncode == 0
        self._agent.install(self._files.bundle)
        enabled = self._in.run("systemctl", "is-enabled", "edge-agent").stdout.strip()
        expect(enabled == "enabled", f"the unit is {enabled}")
        expect(self._in.unit("ActiveState") == "active", self._in.unit("ActiveState"))
        user = self._in.run("id", "edge-agent").stdout.strip()
        version = self._in.run("edge-agent", "--version").stdout.strip()
        return f"{version}; devices: lo; ensurepip here: {ensurepip}; {user}; unit enabled and active"

    def documents(self) -> str:
        """Whoever reads a message can read the document that it names."""
        name = "from edge_agent.documents import page; print(page('operating.md'))"
        named = self._in.run(f"{CURRENT}/bin/python", "-I", "-c", name).stdout.strip()
        expect(named == f"{CURRENT}/share/doc/edge-agent/operating.md", named)
        shown = self._in.run("systemctl", "show", "--value", "-p", "Documentation", "edge-agent").stdout
        for path in (named, shown.strip().removeprefix("file:")):
            self._in.run("runuser", "-u", "nobody", "--", "test", "-r", path)
        count = len(self._in.run("find", Path(named).parent.as_posix(), "-name", "*.md").stdout.split())
        return f"{named} and the unit's Documentation= are there for everybody; {count} documents"

    def converse(self) -> str:
        """README's shortest way from a bundle to a conversation: nothing is configured yet."""
        folder = self._in.root / "root/real-model"
        shutil.copytree(self._files.real_model, folder)
        chat = "printf 'What is the capital of Italy?\\n' | edge-agent chat --direct /root/real-model"
        said = self._in.run("sh", "-c", chat).stdout.strip()
        expect("Rome" in said, said)
        shutil.rmtree(folder)
        return said

    def exposure(self) -> str:
        said = self._in.run("systemd-analyze", "security", "--no-pager", "edge-agent").stdout
        found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", said)
        expect(found is not None and float(found[1]) <= EXPOSURE_LIMIT, said[-300:])
        memory = self._in.run("cat", "/proc/meminfo").stdout
        host_bytes = int(memory.split()[1]) * 1024
        limit_bytes = int(self._in.unit("MemoryMax").replace("infinity", "0"))
        expect(0 < limit_bytes < host_bytes, f"MemoryMax is {limit_bytes} of {host_bytes} bytes")
        share = f"at most {limit_bytes / host_bytes:.0%} of the host's memory"
        return f"{found[0] if found else ''}; {share}"

    def configure(self) -> str:
        """TLS with the device's certificate, whose key is a credential, and a password, which is another."""
        root = self._in.root
        with tempfile.TemporaryDirectory() as folder:
            authority = Authority(Path(folder), "boot test")
            server, device = authority.server(("localhost", "127.0.0.1")), authority.client(DEVICE)
            certificates = root / "etc/mosquitto/certs"
            for source, target in (
                (authority.file, certificates / "ca.crt"),
                (server.certificate, certificates / "server.crt"),
                (server.key, certificates / "server.key"),
                (authority.file, root / "etc/edge-agent/ca.crt"),
                (device.certificate, root / "etc/edge-agent/device.crt"),
            ):
                shutil.copyfile(source, target)
                target.chmod(0o644)
            self._agent.credential("mqtt-key", device.key.read_text())
        self._agent.credential("mqtt-password", SECRET + "\n")
        self._agent.credential("mlflow-tracking-token", "a token")
        (root / "etc/mosquitto/conf.d/edge-agent.conf").write_text(BROKER)
        self._in.run("mosquitto_passwd", "-b", "-c", "/etc/mosquitto/passwords", DEVICE, SECRET)
        self._in.run("chmod", "644", "/etc/mosquitto/passwords")
        self._in.run("systemctl", "enable", "mosquitto")
        self._in.run("systemctl", "restart", "mosquitto")
        self._agent.settings(CONFIG)
        self._in.run("systemctl", "restart", "edge-agent")
        self._agent.wait_connected()
        names = self._in.run("ls", "/run/credentials/edge-agent.service").stdout.split()
        shown = self._in.run("sh", "-c", "cat /proc/[0-9]*/cmdline").stdout + self._in.journal(1000)
        expect(SECRET not in shown, "the password is in the process list or the journal")
        return f"connected over TLS; credentials {' '.join(names)}; none in the process list or the journal"

    def import_model(self) -> str:
        shutil.copyfile(self._files.model, self._in.root / "root/model.tar")
        said = self._in.run("edge-agent", "models", "import", "/root/model.tar").stdout.strip()
        expect(self._agent.status()["models"][0]["state"] == "ready", str(self._agent.status()["models"]))
        return said

    def doctor(self) -> str:
        findings = self._agent.findings(expected=0)
        levels = [finding["level"] for finding in findings]
        unit = next(finding["message"] for finding in findings if finding["check"] == "unit")
        warnings = [finding["message"] for finding in findings if finding["level"] == "warn"]
        return f"{levels.count('ok')} ok, {levels.count('fail')} failed; unit: {unit}; to look at: {warnings}"

    def kill_runner(self) -> str:
        daemon, runner = self._in.unit("MainPID"), self._agent.runner()
        began_s = time.monotonic()
        self._in.run("sh", "-c", f"kill -KILL {runner}")
        wait_until(lambda: self._agent.runner() not in ("", runner), 60, "another runner")
        self._agent.probe()
        took_s = time.monotonic() - began_s
        expect(self._in.unit("MainPID") == daemon, "the daemon is another one")
        return f"runner {runner} → {self._agent.runner()}, daemon {daemon} stays, two answers {took_s:.1f} s later"

    def stop_threads(self) -> str:
        """SIGSTOP stops every thread of the daemon: nothing feeds the watchdog any more."""
        daemon, restarts = self._in.unit("MainPID"), int(self._in.unit("NRestarts"))
        began_s = time.monotonic()
        self._in.run("sh", "-c", f"kill -STOP {daemon}")
        wait_until(lambda: int(self._in.unit("NRestarts")) > restarts, 180, "a restart by the watchdog")
        wait_until(lambda: self._in.unit("ActiveState") == "active", 120, "the service")
        took_s = time.monotonic() - began_s
        expect("Watchdog timeout" in self._in.journal(200), "no watchdog in the journal")
        self._agent.wait_ready()
        self._agent.probe()
        return f"watchdog, daemon {daemon} → {self._in.unit('MainPID')} after {took_s:.0f} s, answers again"

    def break_settings(self) -> str:
        restarts = self._in.unit("NRestarts")
        self._agent.settings(CONFIG.replace("port = 8883", 'port = "the usual one"'))
        self._in.run("systemctl", "restart", "edge-agent", check=False)
        wait_until(lambda: self._in.unit("ActiveState") == "failed", 60, "the failure")
        # Where systemd is going to start a unit again, SubState is another one: auto-restart, or failed-before-….
        code, state, count = (self._in.unit(name) for name in ("ExecMainStatus", "SubState", "NRestarts"))
        expect((code, state) == ("78", "failed"), f"exit {code}, then {state}")
        expect(count in ("0", restarts), f"restarted {count} times")
        expect("mqtt.port" in self._in.journal(), "the key is not named in the journal")
        failures = [finding["check"] for finding in self._agent.failures()]
        expect({"settings", "unit"} <= set(failures), str(failures))
        self._agent.settings(CONFIG)
        self._in.run("systemctl", "restart", "edge-agent")
        self._agent.wait_ready()
        self._agent.probe()
        return f"exit 78, key named, no restart is due, doctor fails {failures}; mended: answers again"

    def stray_file(self) -> str:
        stray = f"/{STATE}/models/stray"
        self._in.run("touch", stray)
        (found,) = self._agent.failures()
        self._in.run("sh", "-c", found["remedy"])
        self._agent.findings(expected=0)
        self._in.run("rm", stray)
        return f"doctor: {found['check']}, remedy {found['remedy']!r} works"

    def work_as_root(self) -> str:
        """What root does to the cache while the service is stopped must not lock the service out."""
        self._in.run("systemctl", "stop", "edge-agent")
        self._in.run("rm", "-f", f"/{STATE}/models/lock")
        self._in.run("edge-agent", "models", "import", "/root/model.tar")
        self._in.run("edge-agent", "models", "verify")
        direct = self._in.run("edge-agent", "probe", "--direct", QUESTION).stdout.splitlines()[0]
        expect(direct == ANSWER, direct)
        owners = set(self._in.run("find", f"/{STATE}", "-printf", "%u\n").stdout.split())
        expect(owners == {"edge-agent"}, f"owners in the state directory: {owners}")
        self._in.run("systemctl", "start", "edge-agent")
        self._agent.wait_ready()
        self._agent.wait_connected()
        self._agent.probe()
        return f"import, verify and probe --direct: everything is {owners.pop()}'s; the service answers"

    def fill_disk(self) -> str:
        """Twice: the journal gives up its reserve the first time, and has none the second time."""
        daemon, seen = self._in.unit("MainPID"), []
        for number in (1, 2):
            filled = self._in.run("dd", "if=/dev/zero", f"of=/{STATE}/filler{number}", "bs=4k", check=False)
            expect("No space left" in filled.stderr, filled.stderr)
            result = self._ask(20)
            expect(result.get("200", 0) + result.get("503", 0) == 20, str(result))
            seen.append(f"{result.get('200', 0)} answered, {result.get('503', 0)} refused with 503")
        state = self._agent.status()["state"]
        self._in.run("sh", "-c", f"rm /{STATE}/filler*")
        wait_until(lambda: self._ask(1).get("200") == 1, 90, "an answer with space again")
        wait_until(lambda: self._agent.status()["state"] == "ready", 90, "the state ready")
        expect(self._in.unit("MainPID") == daemon, "the daemon did not live through it")
        self._agent.probe()
        return (
            f"{'; without its reserve: '.join(seen)}; {state}; daemon {daemon} lives, ready with space again"
        )

    def reboot(self) -> str:
        self._in.reboot()
        wait_until(lambda: self._in.unit("ActiveState") == "active", 60, "the service")
        self._agent.wait_ready()
        self._agent.wait_connected()
        system = self._in.run("systemctl", "is-system-running", check=False).stdout.strip()
        return f"{system}; service active by itself, connected to the broker"

    def support_archive(self) -> str:
        self._in.run("edge-agent", "doctor", "--bundle", "/root/support.tar.gz")
        text = self._in.run("tar", "xzOf", "/root/support.tar.gz").stdout
        lines = self._in.run("tar", "xzOf", "/root/support.tar.gz", "edge-agent-support/log.txt").stdout
        expect("answer delivered" in lines, lines[-500:])
        planted = [SECRET, "a token", "PRIVATE KEY", QUESTION, ANSWER]
        found = [secret for secret in planted if secret in text]
        expect(not found, f"in the support archive: {found}")
        return f"{len(lines.splitlines())} log lines, no secret, no prompt"

    def uninstall(self) -> str:
        self._in.run("/opt/edge-agent/current/install.sh", "uninstall")
        expect((self._in.root / STATE / "journal.db").exists(), "the state is gone")
        expect(not (self._in.root / "opt/edge-agent").exists(), "the program is still there")
        expect(self._in.unit("LoadState") == "not-found", self._in.unit("LoadState"))
        self._agent.install_unsigned(self._files.bundle)
        self._agent.wait_ready()
        self._agent.probe()
        self._in.run("/opt/edge-agent/current/install.sh", "uninstall", "--purge")
        places = (
            f"{STATE}/journal.db",
            "etc/edge-agent",
            "opt/edge-agent",
            "etc/systemd/system/edge-agent.service",
            "etc/systemd/system/edge-agent-http.service",
            "etc/systemd/system/edge-agent-http.socket",
            "etc/systemd/system/edge-agent-settle.service",
        )
        left = [place for place in places if (self._in.root / place).exists()]
        user = self._in.run("id", "edge-agent", check=False).returncode == 0
        expect(not left and not user, f"left: {left}, user: {user}")
        return "the state stays, and serves the next installation; with --purge nothing stays"

    def _ask(self, count: int) -> dict[str, int]:
        client = self._in.beside(sys.executable, "-m", "tests.boot.prompts", str(count))
        try:
            result: dict[str, int] = json.loads(client.communicate(timeout=300)[0])
        finally:
            client.kill()
            client.wait()
        return result
