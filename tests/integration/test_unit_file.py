"""The unit file, judged by systemd's own tools. They need no running systemd."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from edge_agent.settings import InferenceSettings

UNIT = Path(__file__).parents[2] / "systemd" / "edge-agent.service"

_EXPOSURE_LIMIT = 1.3


def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    return unit["Service"]


def systemd_analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In the system's scope it makes /run/systemd; where that may not be, the user's scope is as strict."""
    scope = [] if Path("/run/systemd").is_dir() or os.access("/run", os.W_OK) else ["--user"]
    command = ["systemd-analyze", *scope, *map(str, arguments)]
    environment = {"XDG_RUNTIME_DIR": tempfile.gettempdir(), **os.environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_systemd_accepts_every_line(tmp_path: Path) -> None:
    program = service()["ExecStart"].split()[0]
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(program, sys.executable))  # verify wants one that is there
    result = systemd_analyze("verify", copy)
    complaints = [line for line in result.stderr.splitlines() if UNIT.name in line]
    assert (result.returncode, complaints) == (0, []), result.stderr


def test_a_line_that_systemd_does_not_know_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("WatchdogSec=30", "WatchdogSec=soon"))
    assert UNIT.name in systemd_analyze("verify", copy).stderr


def test_the_exposure_level_stays_low() -> None:
    result = systemd_analyze(
        "security", "--offline=true", f"--threshold={int(_EXPOSURE_LIMIT * 10)}", "--no-pager", UNIT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    level = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", result.stdout)
    assert level is not None, result.stdout
    assert float(level[1]) <= _EXPOSURE_LIMIT


def calls(*refused: bool) -> set[str]:
    """What the lines of the filter name: allowed, or refused."""
    lines = [
        line.partition("=")[2]
        for line in UNIT.read_text().splitlines()
        if line.startswith("SystemCallFilter=")
    ]
    return {
        name for line in lines if line.startswith("~") in refused for name in line.removeprefix("~").split()
    }


def test_runners_may_build_their_walls_and_nobody_looks_into_another_process() -> None:
    assert {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self", "seccomp"} <= calls(
        False
    )
    assert {"process_vm_readv", "process_vm_writev"} <= calls(True)
    assert calls(False) & calls(True) == set()


def test_memory_is_a_share_of_the_host() -> None:
    unit = service()
    shares = [int(unit[key].removesuffix("%")) for key in ("MemoryHigh", "MemoryMax")]
    assert 50 < shares[0] < shares[1] < 100


def test_stopping_waits_longer_than_the_running_prompt_may_take() -> None:
    assert int(service()["TimeoutStopSec"]) >= InferenceSettings().drain_s + 20


def test_invalid_settings_do_not_start_a_restart_loop() -> None:
    assert (service()["Restart"], service()["RestartPreventExitStatus"]) == ("always", "78")
