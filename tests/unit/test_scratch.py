"""Temporary folders of children: whose they are, and what becomes of them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.host.clock import Clock
from edge_agent.runner import scratch
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.runner.scratch import make_scratch, remove_scratch

DEEP = """
import os, sys
os.chdir(sys.argv[1])
for _ in range(1100):  # more than Python recurses, and longer than a path may be
    os.mkdir("deep")
    os.chdir("deep")
open("file", "w").close()
"""
REMOVE_AS_ORDINARY = """
import ctypes, resource, struct, sys
from pathlib import Path
from edge_agent.runner import scratch
assert ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0  # also root asks for leave now
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
scratch.REMOVAL_S = 60.0
scratch.remove_scratch(Path(sys.argv[1]))
"""
MAKE = "from edge_agent.runner.scratch import make_scratch; print(make_scratch())"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "REMOVAL_S", 60.0)  # no test is about how fast a disk is
    yield tmp_path
    # Where a test has failed, Python could not remove what is left, and later test runs would meet it.
    subprocess.run(["rm", "-rf", "--", tmp_path], check=True, timeout=60)


def test_a_folder_is_private_and_goes_with_its_content() -> None:
    made = make_scratch()
    assert made is not None
    assert made.stat().st_mode & 0o777 == 0o700
    (made / "left" / "behind").mkdir(parents=True)
    remove_scratch(made)
    remove_scratch(made)
    assert not made.exists()


def test_those_of_a_daemon_that_died_are_removed_and_no_others(folder: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", MAKE], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    orphan = Path(result.stdout.strip())
    assert orphan.is_dir()
    ours, other = make_scratch(), folder / "edge-agent-scratch-1-4194999-x"
    other.mkdir()  # of another container: its numbers mean nothing here
    newest = make_scratch()
    assert not orphan.exists()
    assert set(folder.iterdir()) == {ours, newest, other}


def test_without_a_place_for_it_there_is_none(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder / "missing"))
    assert make_scratch() is None


def run(program: str, folder: Path | None) -> None:
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, timeout=60)


def new() -> Path:
    made = make_scratch()
    assert made is not None
    return made


def left_by_the_next(folder: Path) -> set[Path]:
    """What is there beside the folder of the next child."""
    newest = new()
    return set(folder.iterdir()) - {newest}


def test_a_tree_that_is_deeper_than_any_path_goes_with_few_open_files() -> None:
    made = new()
    (made / "beside").mkdir()
    run(DEEP, made / "beside")
    run(REMOVE_AS_ORDINARY, made)
    assert not made.exists()


@pytest.mark.parametrize("mode", [0o300, 0o100, 0o000, 0o500])
def test_folders_go_whatever_their_mode_is(mode: int) -> None:
    made = new()
    inner = made / "a" / "b" / "c"
    inner.mkdir(parents=True)
    for folder in (inner, *inner.parents[:2]):
        (folder / "file").touch(0o000)
        (folder / "empty").mkdir(mode)
        folder.chmod(mode)
    run(REMOVE_AS_ORDINARY, made)
    assert not made.exists()


def test_a_link_is_removed_and_not_what_it_leads_to(folder: Path) -> None:
    outside = folder / "outside"
    outside.mkdir(0o750)
    (outside / "kept").touch(0o640)
    made = new()
    (made / "a" / "b").mkdir(parents=True)
    for place in (made, made / "a", made / "a" / "b"):
        (place / "folder").symlink_to(outside)
        (place / "file").symlink_to(outside / "kept")
    remove_scratch(made)
    made.symlink_to(outside)
    remove_scratch(made)
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert outside.stat().st_mode & 0o777 == 0o750
    assert (outside / "kept").stat().st_mode & 0o777 == 0o640


def test_what_is_not_removed_in_time_is_named_and_left_to_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, seconds = new(), itertools.count()
    monkeypatch.setattr(scratch, "REMOVAL_S", 3.0)
    for number in range(20):
        (made / "a" / str(number)).mkdir(parents=True)
    remove_scratch(made, clock=Clock(now_s=lambda: float(next(seconds))))
    (left,) = folder.iterdir()
    assert f"temporary folder stays code=disk_failed folder={left} reason='not within 3 s'" in caplog.text
    assert next(seconds) == 4, "it began at 0, and looked for the last time at 3"
    monkeypatch.setattr(scratch, "REMOVAL_S", 60.0)
    assert left_by_the_next(folder) == set()


def test_whatever_stops_the_removal_does_not_stop_the_daemon(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def scandir(_: int) -> None:
        raise RecursionError("too deep")

    made = new()
    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", scandir)
        remove_scratch(made)
    assert "reason='too deep'" in caplog.text


def test_an_orphan_that_is_deep_hinders_nobody(folder: Path) -> None:
    made = new()
    orphan = made.rename(str(made).replace(f"-{os.getpid()}-", "-4194303-"))  # no process has this number
    run(DEEP, orphan)
    assert left_by_the_next(folder) == set()


@pytest.mark.parametrize("owner", ["99999999999999999999", "4194305", "x", "-1", ""])
def test_names_that_no_daemon_gives_are_left_alone(owner: str, folder: Path) -> None:
    made = new()
    strange = Path(str(made).replace(f"-{os.getpid()}-", f"-{owner}-"))
    strange.mkdir()
    assert left_by_the_next(folder) == {made, strange}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_the_folder_of_another_user_is_left_alone(folder: Path) -> None:
    made = new()
    others = made.rename(str(made).replace(f"-{os.getpid()}-", "-4194303-"))
    os.chown(others, 65534, 65534)
    assert left_by_the_next(folder) == {others}


def test_a_runner_that_left_a_deep_tree_is_killed_like_any_other(folder: Path) -> None:
    runner = RunnerProcess(model="assistant", environment=child_environment(folder))
    run(DEEP, next(folder.iterdir()))
    runner.kill()
    assert not runner.alive
    assert list(folder.iterdir()) == []
