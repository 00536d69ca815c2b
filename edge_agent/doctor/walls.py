"""The walls around models: which this host can build, which models do not run without those that it cannot, and which
models run without those that it could.

`python -m edge_agent.doctor.walls FILE` prints a line for each model of these settings that would not run; `install.sh`
asks that before it switches versions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_agent import settings as settings_module
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.doctor import cache
from edge_agent.doctor.finding import Finding, Level, fail, ok, warn
from edge_agent.documents import page
from edge_agent.errors import EdgeAgentError, Unconfined
from edge_agent.host.confinement import Walls
from edge_agent.package import trust
from edge_agent.runner.process import child_environment
from edge_agent.settings import Settings
from edge_agent.terminal import echo

_TIMEOUT_S = 30.0


def _remedy() -> str:
    return f"{page('operating.md', 'Walls')} says what this kernel needs"


def check(settings: Settings, status: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """
    Args:
        status: the running daemon's; None if none runs.
    """
    walls = _built(settings)
    stand = ", ".join(walls.stand) or "none"
    lacking = walls.lacking()
    missing = "; ".join(f"{wall}: {why}" for wall, why in walls.missing.items())
    if lacking:
        yield warn("host.walls", f"{stand}; missing: {missing}", _remedy())
    elif missing:
        yield ok("host.walls", f"{stand}; missing, and supplied by system_calls: {missing}")
    else:
        yield ok("host.walls", f"{stand}: all stand around each model")
    if lacking:
        yield from (_without_walls(record, settings, lacking) for record in _with_own_code(settings))
    yield from _taken(walls, status or {})


def _built(settings: Settings) -> Walls:
    """What a process builds around itself that has a runner's environment."""
    result = subprocess.run(
        [sys.executable, "-m", "edge_agent.host.confinement"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        cwd="/",
        env=child_environment(settings.state_dir),
    )
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EdgeAgentError(f"a process that builds walls ended with {result.returncode}: {said}")
    document = json.loads(result.stdout)
    return Walls(stand=tuple(document["stand"]), missing=document["missing"])


def _taken(walls: Walls, status: Mapping[str, Any]) -> Iterator[Finding]:
    """What models lack that this process, which is not in the service's unit or container, can build."""
    for model in status.get("models", ()):
        missing = (model.get("walls") or {}).get("missing", {})
        if taken := [wall for wall in missing if wall in walls.stand]:
            yield warn(
                "models.walls",
                f"model {model['name']} runs without {', '.join(taken)}, which this host can build: "
                "a filter around the service forbids it",
                "look for it in `systemctl cat edge-agent` and in the container's seccomp profile; "
                f"{page('operating.md', 'Walls')} names the calls",
            )


def _with_own_code(settings: Settings) -> list[VersionRecord]:
    """The active versions that run code of their own."""
    store = Store(settings.state_dir)
    state = cache.state_or_empty(store)
    active = {name: state.model(name).active for name in settings.models}
    records = [record for name, key in active.items() if key and (record := store.record(name, key))]
    return [record for record in records if trust.runs_own_code(record.trust)]


def _without_walls(record: VersionRecord, settings: Settings, lacking: str) -> Finding:
    what = f"model {record.name}: version {record.version} runs code of its own"
    if settings.trust.unconfined_code:
        return warn(
            "models.walls", f"{what}, without walls, as trust.unconfined_code says ({lacking})", _remedy()
        )
    return fail(
        "models.walls",
        f"{what}, which this host cannot confine ({lacking}): it does not run",
        f"{_remedy()}; or set trust.unconfined_code = true",
        code=Unconfined.code,
    )


def main() -> None:
    """See the module."""
    for finding in check(settings_module.load(Path(sys.argv[1]))):
        if finding.level is Level.FAIL:
            echo(f"{finding.message}; {finding.remedy}")


if __name__ == "__main__":
    main()
