"""Temporary folders of children: whose they are, and what becomes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.runner.scratch import make_scratch, remove_scratch

MAKE = "from edge_agent.runner.scratch import make_scratch; print(make_scratch())"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


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
