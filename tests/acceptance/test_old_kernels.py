"""The whole agent on kernels that build fewer walls: what still runs, what does not, and who says so.

A device has two models: the sample model, whose code is the agent's own, and a package that attacks the device it
runs on, which the settings allow.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.host.confinement import Wall
from edge_agent.publishing.register import Published
from tests.support import attacking_model, old_kernel
from tests.support.attacks import ATTACKS, staged
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, clean_environment, wait_until
from tests.support.sample_device import SAMPLE, settings_for
from tests.support.version_files import export_package

pytestmark = pytest.mark.attack

SPAIN, MADRID = "What is the capital of Spain?", "The capital of Spain is Madrid."
LANDLOCK = {Wall.FILES, Wall.TCP, Wall.SIGNALS}


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The attacking package, as a version in a file."""
    folder = tmp_path_factory.mktemp("guest")
    package = attacking_model.make_package(folder / "package")
    return export_package(folder, package, attacking_model.MODEL, version=1).file


class Device:
    """A device with both models. Its kernel builds all walls until `start_on`."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def start_on(self, lacks: str) -> None:
        self.daemon.before = [sys.executable, old_kernel.__file__, lacks]
        self.daemon.start()

    def bring(self, file: Path) -> None:
        result = self.daemon.cli("models", "import", str(file), "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["state"] == "active"

    def model(self, name: str) -> dict[str, Any]:
        (found,) = [model for model in self.daemon.status()["models"] if model["name"] == name]
        return dict(found)

    def ask(self, model: str, prompt: str) -> str:
        result = self.daemon.cli("probe", "--json", "--model", model, prompt)
        assert result.returncode == 0, result.stderr
        return str(json.loads(result.stdout)["answer"])

    def refusal(self, model: str, prompt: str) -> str:
        """What is said instead of an answer. A prompt that comes while the model is tried again is taken, and ends at
        its deadline: then once more."""

        def refused() -> str:
            result = self.daemon.cli("probe", "--timeout", "2", "--model", model, prompt)
            assert result.returncode in (4, 5), result.stderr
            return result.stderr if result.returncode == 4 else ""

        return wait_until(refused, 60, "a refusal")

    def doctor(self) -> dict[str, dict[str, str]]:
        """Its findings, on the same kernel."""
        command = [sys.executable, "-m", "edge_agent", "--config", str(self.daemon.config_file)]
        result = subprocess.run(
            [*self.daemon.before, *command, "doctor", "--json"],
            capture_output=True, text=True, timeout=120, check=False, env=clean_environment(),
        )  # fmt: skip
        return {finding["check"]: finding for finding in json.loads(result.stdout)["findings"]}


@pytest.fixture
def device(
    new_daemon: Callable[..., Daemon], broker: Broker, mlflow_server: Server, published: Published
) -> Device:
    settings = settings_for(broker, mlflow_server.uri, device="old", trust={"allow_unsigned_code": True})
    models = {
        "assistant": {"uri": f"models:/{SAMPLE}@prod"},
        "guest": {"uri": f"models:/{attacking_model.MODEL}/1"},
    }
    return Device(new_daemon({**settings, "models": models}))


def test_without_landlock_the_agents_own_code_runs_and_other_code_does_not(
    device: Device, guest: Path
) -> None:
    """The models came while the kernel built all walls."""
    assert device.daemon.cli("models", "pull", "assistant").returncode == 0
    device.bring(guest)
    device.start_on("landlock")
    assert device.ask("assistant", SPAIN) == MADRID
    walls = device.model("assistant")["walls"]
    assert set(walls["stand"]) == set(Wall) - LANDLOCK
    assert set(walls["missing"]) == LANDLOCK

    def failed() -> dict[str, Any] | None:
        guest = device.model("guest")
        return guest if guest["state"] == "failed" else None

    refused = wait_until(failed, 60, "the guest to be refused")  # it is tried again now and then
    assert refused is not None
    assert (refused["state"], refused["version"], refused["walls"]) == ("failed", 1, None)
    assert refused["quarantined"] == {}, "it is not the version's doing"
    for said in (refused["reason"], device.refusal("guest", "Hi")):
        assert "cannot confine (files: this kernel has no Landlock" in said
        assert "set trust.unconfined_code = true" in said
    found = device.doctor()
    assert found["host.walls"]["level"] == "warn"
    assert all(f"{wall}: this kernel" in found["host.walls"]["message"] for wall in LANDLOCK)
    assert (found["models.walls"]["level"], found["models.walls"]["code"]) == ("fail", "unconfined")
    assert "model guest: version 1 runs code of its own" in found["models.walls"]["message"]


@pytest.mark.parametrize(
    "abi", [pytest.param(1, id="Linux 5.13", marks=pytest.mark.long), pytest.param(2, id="Debian 12")]
)
def test_with_an_old_landlock_everything_runs_and_the_filter_supplies_the_rest(
    abi: int, device: Device, guest: Path, tmp_path: Path
) -> None:
    """Brought there: the sync has its walls on that kernel, too."""
    device.start_on(f"landlock-{abi}")
    device.bring(guest)
    assert device.daemon.cli("models", "pull", "assistant").returncode == 0
    assert device.ask("assistant", SPAIN) == MADRID
    missing = {wall: device.model("guest")["walls"]["missing"].get(wall, "") for wall in Wall}
    assert {wall for wall, why in missing.items() if f"version {abi} of Landlock" in why} == {
        Wall.TCP, Wall.SIGNALS
    }  # fmt: skip
    attacks = [name for name, each in ATTACKS.items() if os.geteuid() != 0 or not each.ordinary]
    with staged(tmp_path / "device") as scene:
        found = json.loads(device.ask("guest", attacking_model.asking(scene, attacks)))
    assert [name for name, outcome in found.items() if not outcome] == []
    assert len(found) == len(attacks) > 70
    walls = device.doctor()["host.walls"]
    assert walls["level"] == "ok"
    assert "missing, and supplied by system_calls: tcp: this kernel" in walls["message"]


ASK = """
import ctypes, struct
from edge_agent.host import landlock
def create(rights, size):
    try:
        landlock._call(444, struct.pack("=3Q", rights, 0, 0)[:size], size, 0)
        return "done"
    except OSError as error:
        return error.errno
print(landlock.abi(), create(0x1FFF, 8), create(0x2000, 8), create(0x4000, 8), create(1, 16), create(1, 24))
"""


@pytest.mark.parametrize(
    ("abi", "refer", "truncate", "ports", "scope"),
    [
        (1, errno.EINVAL, errno.EINVAL, errno.E2BIG, errno.E2BIG),
        (2, "done", errno.EINVAL, errno.E2BIG, errno.E2BIG),
        (3, "done", "done", errno.E2BIG, errno.E2BIG),
        (4, "done", "done", "done", errno.E2BIG),
        (6, "done", "done", "done", "done"),
    ],
)
def test_an_old_landlock_refuses_what_came_later(
    abi: int, refer: int | str, truncate: int | str, ports: int | str, scope: int | str
) -> None:
    """Of the stand-in for the old kernel, without which the other tests would show nothing."""
    command = [sys.executable, old_kernel.__file__, f"landlock-{abi}", sys.executable, "-c", ASK]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == [str(each) for each in (abi, "done", refer, truncate, ports, scope)]
