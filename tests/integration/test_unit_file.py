"""The unit file, judged by systemd's own tools. They need no running systemd."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edge_agent.settings.http import HttpSettings
from edge_agent.settings.limits import InferenceSettings

FOLDER = Path(__file__).parents[2] / "systemd"
UNIT = FOLDER / "edge-agent.service"
HTTP = FOLDER / "edge-agent-http.service"
SOCKET = FOLDER / "edge-agent-http.socket"

_EXPOSURE_LIMIT = 1.3


def service(path: Path = UNIT) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(path)
    return unit["Service"]


def systemd_analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In the system's scope it makes /run/systemd; where that may not be, the user's scope is as strict."""
    scope = [] if Path("/run/systemd").is_dir() or os.access("/run", os.W_OK) else ["--user"]
    command = ["systemd-analyze", *scope, *map(str, arguments)]
    environment = {"XDG_RUNTIME_DIR": tempfile.gettempdir(), **os.environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.mark.parametrize("unit", [UNIT, HTTP, SOCKET], ids=lambda unit: unit.name)
def test_systemd_accepts_every_line(tmp_path: Path, unit: Path) -> None:
    program = service()["ExecStart"].split()[0]
    for path in (UNIT, HTTP, SOCKET):  # verify wants the program to be there, and the units that one names
        (tmp_path / path.name).write_text(path.read_text().replace(program, sys.executable))
    result = systemd_analyze("verify", tmp_path / unit.name)
    complaints = [line for line in result.stderr.splitlines() if unit.name in line]
    assert (result.returncode, complaints) == (0, []), result.stderr


def test_systemd_accepts_the_unit_that_ends_a_trial(tmp_path: Path) -> None:
    script = (FOLDER / "install.sh").read_text()
    (text,) = re.findall(r"^settle_unit\(\) \{\n    cat <<'TEXT'\n(.*?)^TEXT$", script, re.M | re.S)
    unit = tmp_path / "edge-agent-settle.service"
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", text))
    result = systemd_analyze("verify", unit)
    complaints = [line for line in result.stderr.splitlines() if unit.name in line]
    assert (result.returncode, complaints) == (0, []), result.stderr


def test_systemd_accepts_the_timer_of_the_docs(tmp_path: Path) -> None:
    page = (FOLDER.parent / "docs" / "operating.md").read_text("utf-8")
    units = dict(re.findall(r"```ini\n# /etc/systemd/system/(edge-agent-metrics\.\w+)\n(.*?)```", page, re.S))
    assert sorted(units) == ["edge-agent-metrics.service", "edge-agent-metrics.timer"]
    for name, text in units.items():
        (tmp_path / name).write_text(text.replace(service()["ExecStart"].split()[0], sys.executable))
    result = systemd_analyze("verify", tmp_path / "edge-agent-metrics.timer")
    complaints = [line for line in result.stderr.splitlines() if "edge-agent-metrics" in line]
    assert (result.returncode, complaints) == (0, []), result.stderr


def test_a_line_that_systemd_does_not_know_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("WatchdogSec=30", "WatchdogSec=soon"))
    assert UNIT.name in systemd_analyze("verify", copy).stderr


@pytest.mark.parametrize("unit", [UNIT, HTTP], ids=lambda unit: unit.name)
def test_the_exposure_level_stays_low(unit: Path) -> None:
    result = systemd_analyze(
        "security", "--offline=true", f"--threshold={int(_EXPOSURE_LIMIT * 10)}", "--no-pager", unit
    )
    assert result.returncode == 0, result.stdout + result.stderr
    level = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", result.stdout)
    assert level is not None, result.stdout
    assert float(level[1]) <= _EXPOSURE_LIMIT


def calls(unit: Path, *refused: bool) -> set[str]:
    """What the lines of the filter name: allowed, or refused."""
    lines = [
        line.partition("=")[2]
        for line in unit.read_text().splitlines()
        if line.startswith("SystemCallFilter=")
    ]
    return {
        name for line in lines if line.startswith("~") in refused for name in line.removeprefix("~").split()
    }


@pytest.mark.parametrize("unit", [UNIT, HTTP], ids=lambda unit: unit.name)
def test_walls_may_be_built_and_nobody_looks_into_another_process(unit: Path) -> None:
    walls = {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self", "seccomp"}
    assert walls <= calls(unit, False)
    assert {"process_vm_readv", "process_vm_writev"} <= calls(unit, True)
    assert calls(unit, False) & calls(unit, True) == set()


def test_the_openai_interface_is_another_user_without_a_network() -> None:
    unit = service(HTTP)
    assert (unit["DynamicUser"], unit["SupplementaryGroups"]) == ("yes", service()["Group"])
    assert (unit["PrivateNetwork"], unit["RestrictAddressFamilies"]) == ("yes", "AF_UNIX")
    assert "User" not in unit and "StateDirectory" not in unit
    state, run = service()["StateDirectory"], service()["RuntimeDirectory"]
    places = f"STATE_DIRECTORY=/var/lib/{state} RUNTIME_DIRECTORY=/run/{run}"
    assert unit["Environment"] == places, "its settings' defaults are the daemon's: it has no home"


def test_by_itself_it_is_open_to_this_device_only() -> None:
    lines = [line for line in SOCKET.read_text().splitlines() if line.startswith("Listen")]
    assert lines == [f"ListenStream={HttpSettings().listen}", "ListenStream=/run/edge-agent-http.sock"]
    assert "SocketMode=0660" in SOCKET.read_text()


def test_memory_is_a_share_of_the_host() -> None:
    unit = service()
    shares = [int(unit[key].removesuffix("%")) for key in ("MemoryHigh", "MemoryMax")]
    assert 50 < shares[0] < shares[1] < 100


def test_stopping_waits_longer_than_the_running_prompt_may_take() -> None:
    assert int(service()["TimeoutStopSec"]) >= InferenceSettings().drain_s + 20


def test_invalid_settings_do_not_start_a_restart_loop() -> None:
    assert (service()["Restart"], service()["RestartPreventExitStatus"]) == ("always", "78")
    # A connection that waits would start the interface again at once.
    assert (service(HTTP)["Restart"], "RestartPreventExitStatus" in service(HTTP)) == ("on-failure", False)
