"""What code from elsewhere cannot do behind the walls, and what it could do if one of them were missing.

`tests/support/attacks.py` has the attacks, and says of each which walls stop it. Each is tried behind all walls, behind
none, behind each alone, and behind all but one: so a wall that is missing, or does nothing, is noticed, and so is an
attack that would have failed anyhow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

import pytest

from edge_agent.host.confinement import MINIMUM, Wall
from tests.support.attacks import ATTACKS

pytestmark = pytest.mark.attack

ROOT = Path(__file__).parents[2]
ALL = frozenset(Wall)


def outcomes(walls: Set[Wall], folder: Path) -> dict[str, str]:
    """The error that each attack met behind these walls; empty for one that succeeded."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.attacks", str(folder)],
        input=json.dumps({"walls": sorted(walls)}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout)
    return found


def unexpected(walls: Set[Wall], found: dict[str, str]) -> dict[str, str]:
    """The attacks that went otherwise than their table says."""
    assert found.keys() == ATTACKS.keys()
    wrong = {}
    for name, outcome in found.items():
        stopped = bool(ATTACKS[name].walls & walls)
        if stopped and not outcome:
            wrong[name] = "succeeded"
        if not stopped and outcome and not ATTACKS[name].unless:
            wrong[name] = f"failed: {outcome}"
    return wrong


@pytest.fixture(scope="module")
def standing() -> frozenset[Wall]:
    """The walls that this host can build."""
    command = [sys.executable, "-m", "edge_agent.host.confinement"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    stand = frozenset(map(Wall, json.loads(result.stdout)["stand"]))
    assert stand >= set(MINIMUM), f"this host cannot show what it takes: {result.stdout}"
    return stand


def test_there_are_many_attacks_and_each_wall_stops_some() -> None:
    assert len(ATTACKS) >= 60
    assert frozenset[Wall]().union(*(attack.walls for attack in ATTACKS.values())) == ALL - {Wall.MEMORY}


def test_behind_all_walls_every_attack_fails(standing: frozenset[Wall], tmp_path: Path) -> None:
    found = outcomes(standing, tmp_path)
    assert [name for name, outcome in found.items() if not outcome] == []


def test_behind_no_wall_every_attack_succeeds(tmp_path: Path) -> None:
    assert unexpected(frozenset(), outcomes(frozenset(), tmp_path)) == {}


@pytest.mark.parametrize("wall", Wall)
def test_one_wall_alone_stops_what_it_is_for(wall: Wall, standing: frozenset[Wall], tmp_path: Path) -> None:
    walls = {wall} & standing
    assert unexpected(walls, outcomes(walls, tmp_path)) == {}


@pytest.mark.parametrize("wall", Wall)
def test_one_missing_wall_lets_in_what_it_alone_stops(
    wall: Wall, standing: frozenset[Wall], tmp_path: Path
) -> None:
    walls = standing - {wall}
    assert unexpected(walls, outcomes(walls, tmp_path)) == {}


def test_the_minimum_stops_all_but_what_an_open_file_or_too_much_of_something_does(tmp_path: Path) -> None:
    """A kernel with the oldest Landlock and a filter: what newer versions of Landlock guard, the filter guards."""
    found = outcomes(set(MINIMUM), tmp_path)
    spare = {Wall.DESCRIPTORS, Wall.LIMITS}
    assert {name for name, outcome in found.items() if not outcome} == {
        name for name, attack in ATTACKS.items() if attack.walls <= spare
    }


PEEK = """
import ctypes, os, sys
from pathlib import Path
from edge_agent.host import confinement, memory
from edge_agent.host.confinement import Confinement, Wall, confine
from tests.support.attacks import _become_ordinary
memory.total_bytes()
_become_ordinary()
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    for wall in set(Wall) - set(sys.argv[1].split(",")):
        confinement.BUILDERS[wall] = lambda _: None
    confine(Confinement(keep=(ready[1], go[0])))
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    os._exit(0)
os.read(ready[0], 1)
for name in ("environ", "mem", "status"):
    try:
        with open(f"/proc/{child}/{name}", "rb"):
            print(name)
    except OSError:
        pass
os.write(go[1], b"x")
"""


@pytest.mark.parametrize(("walls", "seen"), [(ALL, "status"), (ALL - {Wall.MEMORY}, "environ mem status")])
def test_other_processes_of_its_user_do_not_look_into_it(walls: frozenset[Wall], seen: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PEEK, ",".join(sorted(walls))],
        capture_output=True, text=True, timeout=60, check=True, cwd=ROOT,
    )  # fmt: skip
    assert result.stdout.split() == seen.split()


def test_a_process_with_threads_is_refused() -> None:
    program = (
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "from edge_agent.host.confinement import *; confine(Confinement())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert "several threads" in result.stderr
    assert os.waitstatus_to_exitcode(result.returncode << 8) == 1


DAEMON = """
import os
from edge_agent import daemon
from tests.support.attacks import _become_ordinary
class Visible:
    def __init__(self, *_): ...
    def run(self):
        print(os.stat("/proc/self/environ").st_uid, os.getuid())
        return 0
daemon.Daemon = Visible
_become_ordinary()
daemon.run(None)
"""


def test_the_daemon_is_hidden_from_other_processes_of_its_user() -> None:
    result = subprocess.run(
        [sys.executable, "-c", DAEMON], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    owner, user = map(int, result.stdout.split())
    assert (owner, user != 0) == (0, True), "what is not dumpable belongs to root"
