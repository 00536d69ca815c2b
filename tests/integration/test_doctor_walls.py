"""What doctor and install.sh say of the walls, on this kernel and on one that lacks some of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.cache.store import Store
from edge_agent.host.confinement import Wall
from edge_agent.package.trust import TrustDecision
from tests.support import committed
from tests.unit.serving.test_walls import CODE

ROOT = Path(__file__).parents[2]
CHECK = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from edge_agent import settings
from edge_agent.doctor import walls
found = walls.check(settings.load(Path(sys.argv[1])), json.loads(sys.argv[2]))
print(json.dumps([asdict(finding) for finding in found]))
"""


def device(folder: Path, decision: TrustDecision, *, unconfined: bool = False) -> Path:
    """The settings of a device whose active version came with this decision."""
    config = folder / "config.toml"
    config.write_text(
        f'state_dir = "{folder}/state"\n[models.assistant]\nuri = "models:/phi@prod"\n'
        f"[trust]\nallow_unsigned_code = true\nunconfined_code = {str(unconfined).lower()}\n"
    )
    store = Store(folder / "state")
    store.create()
    record = committed.commit(store, 7, decision=decision)
    store.change_state("assistant", lambda state: state.switched(record.key))
    return config


def run(*arguments: str, lacks: str = "") -> str:
    old = [sys.executable, "-m", "tests.support.old_kernel", lacks] if lacks else []
    result = subprocess.run(
        [*old, sys.executable, *arguments],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env={**os.environ},
    )  # fmt: skip
    assert result.stdout or result.returncode == 0, result.stderr
    return result.stdout


def walls_of(config: Path, lacks: str = "", status: object = None) -> dict[str, dict[str, str]]:
    """doctor's findings about walls, beside a daemon with this status."""
    said = run("-c", CHECK, str(config), json.dumps(status), lacks=lacks)
    return {finding["check"]: finding for finding in json.loads(said)}


def test_where_all_walls_stand_there_is_nothing_to_do(tmp_path: Path) -> None:
    config = device(tmp_path, CODE)
    (found,) = walls_of(config).values()
    assert (found["check"], found["level"]) == ("host.walls", "ok")
    assert all(wall in found["message"] for wall in Wall)
    assert run("-m", "edge_agent.doctor.walls", str(config)) == ""


@pytest.mark.parametrize("lacks", ["landlock", "seccomp"])
def test_a_model_that_will_not_run_is_named_before_it_stops(lacks: str, tmp_path: Path) -> None:
    config = device(tmp_path, CODE)
    found = walls_of(config, lacks)
    assert (found["host.walls"]["level"], found["models.walls"]["level"]) == ("warn", "fail")
    assert found["models.walls"]["code"] == "unconfined"
    said = run("-m", "edge_agent.doctor.walls", str(config), lacks=lacks)
    assert said.startswith("model assistant: version 7 runs code of its own, which this host cannot confine")
    assert "set trust.unconfined_code = true" in said
    assert len(said.splitlines()) == 1


def test_data_and_the_shipped_wrapper_run_on_an_old_kernel(tmp_path: Path) -> None:
    config = device(tmp_path, committed.DECISION)
    assert set(walls_of(config, "landlock")) == {"host.walls"}
    assert run("-m", "edge_agent.doctor.walls", str(config), lacks="landlock") == ""


def test_code_that_may_run_without_walls_is_a_warning(tmp_path: Path) -> None:
    config = device(tmp_path, CODE, unconfined=True)
    assert walls_of(config, "landlock")["models.walls"]["level"] == "warn"
    assert run("-m", "edge_agent.doctor.walls", str(config), lacks="landlock") == ""


def test_a_wall_that_something_around_the_service_takes_away_is_named(tmp_path: Path) -> None:
    """As a container's filter does, of which doctor outside knows nothing."""
    config = device(tmp_path, committed.DECISION)
    missing = {"stand": [Wall.MEMORY], "missing": {Wall.FILES: "no Landlock", Wall.TCP: "no Landlock"}}
    models = [
        {"name": "assistant", "walls": missing},
        {"name": "idle", "walls": None},
        {"name": "old"},
        {"name": "well", "walls": {"stand": list(Wall), "missing": {}}},
    ]
    found = walls_of(config, status={"models": models})
    assert (found["host.walls"]["level"], found["models.walls"]["level"]) == ("ok", "warn")
    assert found["models.walls"]["message"].startswith("model assistant runs without files, tcp, which this")
    assert set(walls_of(config, "landlock", status={"models": models})) == {"host.walls"}
