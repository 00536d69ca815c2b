"""The steps about walls: a package attacks the device from inside the unit, on this kernel and on older ones."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from edge_agent.host.confinement import MINIMUM, Wall
from tests.boot.agent import Agent, expect
from tests.boot.container import STATE, Container
from tests.support.attacking_model import LOOKS, MODEL, asking
from tests.support.attacks import ATTACKS, Scene

GUEST = f"""
[models.guest]
uri = "models:/{MODEL}/1"
"""
ALLOWED = "\n[trust]\nallow_unsigned_code = true\n"
LANDLOCK = {Wall.FILES, Wall.TCP, Wall.SIGNALS}
_PORT = 1883
_ABSTRACT = "boot-test"
_LISTEN = (
    f"import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind('\\0{_ABSTRACT}'); s.listen(); "
    "print('listening', flush=True); sys.stdin.read()"
)


class Walls:
    """The steps, in their order. They leave the guest active and its code allowed.

    Args:
        guest: the attacking package, as a version in a file.
        newer: a bundle of a higher version than the current one.
        config: settings of the device without the guest.
    """

    def __init__(self, container: Container, agent: Agent, *, guest: Path, newer: Path, config: str) -> None:
        self._in = container
        self._agent = agent
        self._guest = guest
        self._newer = newer
        self._config = config
        self._stand = walls_of_this_host()

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("walls around the model", self.stand),
            ("code that nobody allowed", self.refuse_code),
            ("attacks from an allowed package", self.attack),
            ("upgrade on a kernel without Landlock", self.upgrade_without_landlock),
            ("service on a kernel without Landlock", self.serve_without_landlock),
            ("attacks without Landlock", self.attack_without_landlock),
            ("attacks with the Landlock of Debian 12", self.attack_with_old_landlock),
        ]

    def stand(self) -> str:
        """The unit must take none from what the host can build."""
        expect(self._stand >= set(MINIMUM), f"this host cannot show what it takes: {sorted(self._stand)}")
        self._expect_walls("assistant", self._stand)
        return f"in the unit as outside: {', '.join(sorted(self._stand))}"

    def refuse_code(self) -> str:
        self._agent.settings(self._config + GUEST)
        self._agent.restart()
        shutil.copyfile(self._guest, self._in.root / "root/guest.tar")
        refused = self._in.run("edge-agent", "models", "import", "/root/guest.tar", check=False)
        expect(refused.returncode == 1 and "allow_unsigned_code" in refused.stderr, str(refused))
        return " ".join(refused.stderr.split())

    def attack(self) -> str:
        self._agent.settings(self._config + GUEST + ALLOWED)
        self._agent.restart()
        self._in.run("edge-agent", "models", "import", "/root/guest.tar")
        daemon, runners = self._in.unit("MainPID"), self._agent.runner()
        said = self._expect_attacks_fail()
        self._expect_walls("guest", self._stand)
        expect(self._in.unit("MainPID") == daemon, "the daemon is another one")
        expect(self._agent.runner() == runners, "a runner is another one")
        return f"{said}; daemon and runners live, and the other model answers"

    def upgrade_without_landlock(self) -> str:
        """The device is told before its model stops."""
        before = self._agent.current()
        self._agent.on_kernel("landlock")
        lines = self._agent.install(self._newer, lacks="landlock")
        found = [number for number, line in enumerate(lines) if "attention: model guest" in line]
        expect(
            len(found) == 1 and found[0] < lines.index("install.sh: starting the service"), "\n".join(lines)
        )
        self._agent.wait_ready()
        expect(self._agent.current() != before, "the version is the old one")
        return f"{before} → {self._agent.current()}: {lines[found[0]]}"

    def serve_without_landlock(self) -> str:
        self._expect_walls("assistant", self._stand - LANDLOCK)
        self._agent.probe()
        guest = self._agent.model("guest")
        reason = str(guest["reason"])
        expect(guest["state"] == "failed" and "cannot confine (files:" in reason, str(guest))
        found = {each["check"]: each for each in self._agent.findings(expected=1, lacks="landlock")}
        failed = [(name, each["code"]) for name, each in found.items() if each["level"] == "fail"]
        expect(failed == [("models.walls", "unconfined")], str(failed))
        expect(all(f"{wall}:" in found["host.walls"]["message"] for wall in LANDLOCK), str(found))
        # Outside of the unit this kernel has everything, and doctor can see that something takes it away.
        found = {each["check"]: each for each in self._agent.findings(expected=0)}
        taken = found["models.walls"]["message"]
        expect(all(wall in taken for wall in LANDLOCK), taken)
        return f"the shipped wrapper answers, the guest is {guest['state']}; doctor fails {failed}"

    def attack_without_landlock(self) -> str:
        """What is not there is noticed: else the attacks would show nothing."""
        self._agent.settings(self._config + GUEST + ALLOWED + "unconfined_code = true\n")
        self._agent.restart()
        found = self._attack(LOOKS)
        expect(found == dict.fromkeys(LOOKS, ""), f"failed without a wall: {found}")
        self._agent.settings(self._config + GUEST + ALLOWED)
        return f"with trust.unconfined_code these succeed: {', '.join(LOOKS)}"

    def attack_with_old_landlock(self) -> str:
        self._agent.on_kernel("landlock-2")
        self._agent.restart()
        self._expect_walls("guest", self._stand - {Wall.TCP, Wall.SIGNALS})
        said = self._expect_attacks_fail()
        self._agent.on_kernel("")
        self._agent.restart()
        self._expect_walls("guest", self._stand)
        return f"{said}; without tcp and signals, which system_calls supplies"

    # --- Shared -----------------------------------------------------------------------------------------

    def _expect_walls(self, model: str, stand: set[Wall]) -> None:
        walls = self._agent.model(model)["walls"]
        expect(walls is not None and set(walls["stand"]) == stand, f"{model}: {walls}")
        expect(set(walls["missing"]) == set(Wall) - stand, f"{model}: {walls}")

    def _expect_attacks_fail(self) -> str:
        found = self._attack(ATTACKS)
        succeeded = [name for name, outcome in found.items() if not outcome]
        expect(len(found) == len(ATTACKS) and not succeeded, f"succeeded: {succeeded}")
        self._agent.probe()
        return f"{len(found)} of {len(ATTACKS)} failed"

    def _attack(self, attacks: Iterable[str]) -> dict[str, str]:
        with self._abstract_socket():
            found: dict[str, str] = json.loads(self._agent.ask("guest", asking(self._scene(), attacks)))
        return found

    def _scene(self) -> Scene:
        """The real device. What is named here is there: an attack must not fail because its aim is missing."""
        daemon = self._in.unit("MainPID")
        mapped = self._in.run("sh", "-c", f"grep -m 1 'rw-p.*heap' /proc/{daemon}/maps").stdout
        models = f"/{STATE}/models"
        scene = Scene(
            state=Path("/", STATE),
            journal=Path("/", STATE, "journal.db"),
            blob=Path(self._first(f"{models}/blobs/sha256/*")),
            package=Path(self._first(f"{models}/versions/guest/*/")),
            other_package=Path(self._first(f"{models}/versions/assistant/*/")),
            credential=Path("/run/credentials/edge-agent.service/mqtt-password"),
            scratch=Path("/tmp"),
            control=Path("/run/edge-agent/control.sock"),
            datagrams=Path("/run/systemd/notify"),
            abstract=_ABSTRACT,
            daemon=int(daemon),
            port=_PORT,
            address=int(mapped.partition("-")[0], 16),
        )
        for path in (scene.journal, scene.credential, scene.control, scene.datagrams):
            self._in.run("test", "-e", str(path))
        return scene

    def _first(self, pattern: str) -> str:
        return self._in.run("sh", "-c", f"ls -d {pattern} | head -n 1").stdout.strip()

    @contextlib.contextmanager
    def _abstract_socket(self) -> Iterator[None]:
        server = self._in.beside(sys.executable, "-c", _LISTEN)
        try:
            expect(
                server.stdout is not None and "listening" in server.stdout.readline(), "no abstract socket"
            )
            yield
        finally:
            server.kill()
            server.communicate()


def walls_of_this_host() -> set[Wall]:
    command = [sys.executable, "-m", "edge_agent.host.confinement"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return set(map(Wall, json.loads(said)["stand"]))
