"""`edge-agent doctor` beside a daemon: its findings, and what is in the support archive that it writes."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from edge_agent.doctor.finding import Level
from tests.support.processes import Daemon


def doctor(daemon: Daemon, *options: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and for each check the finding that is worst."""
    result = daemon.cli("doctor", "--json", *options, timeout_s=120)
    document = json.loads(result.stdout)
    order = list(Level)
    worst: dict[str, dict[str, str]] = {}
    for finding in document["findings"]:
        known = worst.get(finding["check"])
        if known is None or order.index(Level(finding["level"])) > order.index(Level(known["level"])):
            worst[finding["check"]] = finding
    assert document["ok"] == (result.returncode == 0)
    assert all(finding["remedy"] for finding in document["findings"] if finding["level"] != "ok")
    return result.returncode, worst


def contents(file: Path) -> str:
    with tarfile.open(file) as archive:
        members = [archive.extractfile(member) for member in archive]
        return "\n".join(member.read().decode() for member in members if member is not None)
