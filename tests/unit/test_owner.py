"""Root's commands beside a stopped service. Run by another user, the same lines hold: nobody changes."""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.owner import acting_as_owner_of
from tests.support.host import OTHER_USER

NAMELESS = next(uid for uid in range(50_000, 65_000) if uid not in {entry.pw_uid for entry in pwd.getpwall()})


@pytest.fixture(params=[OTHER_USER, NAMELESS], ids=["a user", "no user of this host"])
def owner(request: pytest.FixtureRequest) -> int:
    """Whose the state directory is; a container's volume may be nobody's that this host knows."""
    return int(request.param) if os.geteuid() == 0 else os.geteuid()


@pytest.fixture
def state_dir(owner: int) -> Iterator[Path]:
    """A state directory of the service's user; its parents can be entered by everybody."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        state = Path(folder) / "state"
        state.mkdir()
        if os.geteuid() == 0:
            os.chown(state, owner, owner)
        yield state


def test_what_is_made_belongs_to_the_owner_of_the_state_directory(state_dir: Path, owner: int) -> None:
    before = os.getresuid(), os.getresgid(), os.getgroups()
    with acting_as_owner_of(state_dir):
        (state_dir / "lock").touch()
    assert (state_dir / "lock").stat().st_uid == owner
    assert (os.getresuid(), os.getresgid(), os.getgroups()) == before


def test_a_process_that_is_started_cannot_become_root_again(state_dir: Path, owner: int) -> None:
    """Real, effective, saved and file-system user: Source: proc(5), Uid."""
    with acting_as_owner_of(state_dir):
        said = subprocess.run(
            ["grep", "^Uid:", "/proc/self/status"], capture_output=True, text=True, check=True, cwd="/"
        ).stdout
    assert said.split()[1:] == [str(owner)] * 4


def test_a_state_directory_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    before = os.getresuid()
    with acting_as_owner_of(tmp_path / "none"):
        assert os.getresuid() == before
