"""The daemon and its systemd unit, seen from outside."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import edge_agent
from edge_agent.doctor.finding import Finding, fail, ok, warn
from edge_agent.documents import page
from edge_agent.environment import search_path
from edge_agent.errors import DaemonNotRunning, EdgeAgentError
from edge_agent.settings import Settings, find_control_socket
from edge_agent.terminal import reason_of, troubles_of
from edge_agent.transport import control

UNIT = "edge-agent.service"
_STATUS_TIMEOUT_S = 10.0
_SYSTEMCTL_TIMEOUT_S = 10.0
_INVALID_SETTINGS = 78
_PROPERTIES = (
    "LoadState",
    "User",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "NRestarts",
    "Result",
    "ExecMainStatus",
    "ActiveEnterTimestamp",
    "MemoryCurrent",
    "MemoryMax",
    "DropInPaths",
)

_CHECKED_ELSEWHERE = {"quarantined": "cache.state", "fallback_in_use": "models.fallback"}
"""Codes of `troubles` for which there is a check."""


@dataclass(frozen=True, kw_only=True)
class DaemonStatus:
    """The daemon's answer to a status request.

    Attributes:
        document: as `status --json` prints it; None if no daemon answered.
        problem: why a daemon that seems to be running did not answer; empty if none is running.
    """

    document: Mapping[str, Any] | None = None
    problem: str = ""
    remedy: str = ""


def ask_daemon(settings: Settings) -> DaemonStatus:
    """Asks for the status over the control socket, within a time limit."""
    try:
        for event in control.call(find_control_socket(settings), "status", timeout_s=_STATUS_TIMEOUT_S):
            if event.get("event") == "done":
                return DaemonStatus(document=event["status"])
        return DaemonStatus(
            problem="it closed the connection without an answer", remedy=f"see `journalctl -u {UNIT}`"
        )
    except DaemonNotRunning:
        return DaemonStatus()
    except TimeoutError:
        return DaemonStatus(
            problem=f"it did not answer within {_STATUS_TIMEOUT_S:.0f} s",
            remedy=f"the watchdog restarts a daemon that hangs; see `journalctl -u {UNIT}`",
        )
    except EdgeAgentError as error:
        return DaemonStatus(problem=error.message, remedy=error.remedy or f"see `journalctl -u {UNIT}`")


def check_daemon(settings: Settings, status: DaemonStatus) -> Iterator[Finding]:
    document = status.document
    if status.problem:
        yield fail("daemon", status.problem, status.remedy)
        return
    if document is None:
        yield warn(
            "daemon",
            f"not running: nothing answers on {find_control_socket(settings)}",
            "start it with `systemctl start edge-agent` or `edge-agent run`",
        )
        return
    state, queue = document["state"], document["queue_depth"]
    line = f"{state}, version {document['agent_version']}, {queue} prompts queued"
    troubles = list(_troubles(document))
    if state == "degraded" or troubles:
        said = f"{line}; {'; '.join(troubles)}" if troubles else line
        yield warn("daemon", said, f"{page('operating.md', 'States')} says what to do for each")
    else:
        yield ok("daemon", line)
    if document["agent_version"] != edge_agent.__version__:
        yield warn(
            "daemon.version",
            f"version {document['agent_version']} runs, {edge_agent.__version__} is installed",
            "`systemctl restart edge-agent`",
        )


def check_unit() -> Iterator[Finding]:
    """Checks the systemd service, if this host has one."""
    unit = unit_properties()
    if unit.get("LoadState") != "loaded":
        yield ok("unit", "not installed as a systemd service")
        return
    active, restarts = unit["ActiveState"], unit.get("NRestarts", "0")
    line = f"{active} ({unit['SubState']}), {unit['UnitFileState']}, restarted {restarts} times by systemd"
    if active == "failed" and unit.get("ExecMainStatus") == str(_INVALID_SETTINGS):
        yield fail(
            "unit", f"{line}: the settings are invalid", "correct them, then `systemctl restart edge-agent`"
        )
    elif active == "failed":
        yield fail("unit", f"{line}: {unit.get('Result')}", f"see `journalctl -u {UNIT}`")
    elif unit["UnitFileState"] != "enabled":
        yield warn("unit", line, "`systemctl enable edge-agent` starts it at boot")
    elif active == "inactive":
        yield warn("unit", line, "`systemctl start edge-agent`")
    elif restarts not in ("", "0"):
        yield warn(
            "unit", line, f"`journalctl -u {UNIT}` says why; `systemctl reset-failed` resets the count"
        )
    else:
        yield ok("unit", line)


def unit_properties() -> dict[str, str]:
    """Some properties from `systemctl show`; empty on a host without systemd."""
    systemctl = shutil.which("systemctl", path=search_path())
    if systemctl is None:
        return {}
    command = [systemctl, "show", UNIT, *(f"--property={name}" for name in _PROPERTIES)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_SYSTEMCTL_TIMEOUT_S, check=False, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)


def _troubles(document: Mapping[str, Any]) -> Iterator[str]:
    """What the daemon says of itself. A check of its own finds the same thing for some of it: that one is named."""
    found = troubles_of(document)
    of_broker = [trouble["code"] for trouble in document.get("broker", {}).get("troubles", ())]
    elsewhere = {**_CHECKED_ELSEWHERE, **dict.fromkeys(of_broker, "the broker")}
    yield from (text for code, text in found if code not in elsewhere)
    yield from _model_troubles(document)
    if places := dict.fromkeys(elsewhere[code] for code, _ in found if code in elsewhere):
        yield f"see {', '.join(places)}"


def _model_troubles(document: Mapping[str, Any]) -> Iterator[str]:
    for model in document["models"]:
        waits = (model.get("attempt") or {}).get("step") == "held"  # nothing is wrong
        if model["state"] in ("failed", "absent") or (model.get("update_problem") and not waits):
            reason = reason_of(model) or "no version is in the cache"
            yield f"model {model['name']} is {model['state']}: {reason}"
