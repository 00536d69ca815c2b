"""How `install.sh settle` ends the trial of a version: its own functions, and a systemctl that says what the test says.

With systemd and a power cut: `./build.sh boot-test`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLD, NEW = "1.0.0", "1.1.0"

_SYSTEMCTL = """#!/bin/bash
echo "$*" >>"$SAID/calls"
case "$*" in
    *is-enabled*) cat "$SAID/enabled" ;;
    *is-system-running*) cat "$SAID/running" ;;
    *is-active*) exit 3 ;;
    "start edge-agent.service" | "restart edge-agent.service")
        for name in $(<"$SAID/starts"); do
            [[ $(readlink "$BASE/current") != "$name" ]] || exit 0
        done
        exit 1
        ;;
esac
"""
_SETTLE = """
source <(sed '/^main "\\$@"$/,$d' "$SCRIPT")
root=$FOLDER here=$FOLDER
set_places
systemd_runs() { true; }
settle
"""


class Device:
    """Two versions, the newer one current and on trial.

    Attributes:
        starts: the versions that start.
        enabled, running: what systemctl says of the service, and of the system.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "opt" / "edge-agent"
        self.starts: list[str] = []
        self.enabled, self.running = "enabled", "starting"
        for name in (OLD, NEW):
            share = self.base / name / "share" / "edge-agent"
            share.mkdir(parents=True)
            (self.base / name / ".complete").write_text("digest\n")
            (share / "edge-agent.service").write_text(f"# of {name}\n")
        (self.base / "current").symlink_to(NEW)
        (self.base / ".trial").write_text(f"{OLD}\ndisabled\n")
        self.unit = folder / "etc" / "systemd" / "system" / "edge-agent.service"
        self.unit.parent.mkdir(parents=True)
        self.unit.write_text(f"# of {NEW}\n")
        self._said = folder / "said"
        self._said.mkdir()
        (self._said / "systemctl").write_text(_SYSTEMCTL)
        (self._said / "systemctl").chmod(0o755)

    def settle(self) -> subprocess.CompletedProcess[str]:
        for name, text in (
            ("starts", " ".join(self.starts)),
            ("enabled", self.enabled),
            ("running", self.running),
            ("calls", ""),
        ):
            (self._said / name).write_text(f"{text}\n" if text else "")
        bash = shutil.which("bash")
        assert bash is not None
        return subprocess.run(
            [bash, "-c", _SETTLE],
            env={
                "PATH": f"{self._said}:/usr/bin:/bin",
                "SCRIPT": str(ROOT / "systemd" / "install.sh"),
                "FOLDER": str(self.folder),
                "BASE": str(self.base),
                "SAID": str(self._said),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def current(self) -> str:
        return str((self.base / "current").readlink())

    @property
    def on_trial(self) -> bool:
        return (self.base / ".trial").exists()

    @property
    def calls(self) -> list[str]:
        return (self._said / "calls").read_text().splitlines()

    @property
    def started(self) -> list[str]:
        """How systemctl was asked to start it."""
        return [call.split()[0] for call in self.calls if call.endswith("start edge-agent.service")]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_a_version_that_starts_stays(device: Device) -> None:
    device.starts = [NEW]
    result = device.settle()
    assert result.returncode == 0, result.stderr
    assert (device.current, device.on_trial, device.started) == (NEW, False, ["start"])


def test_one_that_does_not_start_gives_way_to_the_one_that_did(device: Device) -> None:
    device.starts = [OLD]
    result = device.settle()
    assert (result.returncode, f"version {OLD} is running again" in result.stderr) == (1, True)
    assert (device.current, device.on_trial, device.started) == (OLD, False, ["start", "restart"])
    assert device.unit.read_text() == f"# of {OLD}\n"


def test_so_does_its_openai_interface_that_the_new_one_did_not_know(device: Device) -> None:
    device.starts = [OLD]
    (device.base / ".trial").write_text(f"{OLD}\nenabled\n")
    (device.base / OLD / "share" / "edge-agent" / "edge-agent-http.socket").write_text("# of the old one\n")
    assert device.settle().returncode == 1
    assert (device.unit.parent / "edge-agent-http.socket").exists()
    assert "--quiet enable --now edge-agent-http.socket" in device.calls


def test_a_system_that_goes_down_says_nothing_of_the_version(device: Device) -> None:
    device.running = "stopping"
    result = device.settle()
    assert (result.returncode, "the next boot tells" in result.stderr) == (1, True)
    assert (device.current, device.on_trial) == (NEW, True)


def test_without_the_old_version_the_new_one_stays_and_somebody_is_told(device: Device) -> None:
    (device.base / OLD / ".complete").unlink()
    result = device.settle()
    assert (result.returncode, "the service does not start" in result.stderr) == (1, True)
    assert (device.current, device.on_trial) == (NEW, False)


def test_a_service_that_an_operator_has_disabled_is_not_started(device: Device) -> None:
    device.enabled = "disabled"
    result = device.settle()
    assert result.returncode == 0, result.stderr
    assert (device.current, device.on_trial, device.started) == (NEW, True, [])


def test_a_switch_that_was_cut_before_its_units_were_written_is_ended_with_them(device: Device) -> None:
    device.starts = [NEW]
    device.unit.write_text(f"# of {OLD}\n")
    result = device.settle()
    assert result.returncode == 0, result.stderr
    assert device.unit.read_text() == f"# of {NEW}\n"
    assert device.started == ["restart"], "it runs under the units of the other one"


def test_a_way_back_that_was_cut_is_ended(device: Device) -> None:
    (device.base / "current").unlink()
    (device.base / "current").symlink_to(OLD)
    device.starts = [OLD]
    result = device.settle()
    assert result.returncode == 0, result.stderr
    assert (device.current, device.on_trial, device.started) == (OLD, False, ["restart"])
    assert device.unit.read_text() == f"# of {OLD}\n"


def test_nothing_on_trial_is_nothing_to_do(device: Device) -> None:
    (device.base / ".trial").unlink()
    result = device.settle()
    assert (result.returncode, device.started) == (0, [])
