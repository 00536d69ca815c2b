"""Files that a command writes where its user says: in a folder where others may have prepared names and links."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.cache import durable
from edge_agent.doctor import support_archive


def archive(path: Path) -> None:
    assert support_archive.write(path, [], None) == ["doctor.json"]


def version_file(path: Path) -> None:
    with durable.replacing(path) as descriptor:
        durable.write_all(descriptor, b"new")


WRITERS = {"doctor --bundle": archive, "models export": version_file}


@pytest.fixture(autouse=True)
def one_member(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_archive, "_members", lambda *_: iter([("doctor.json", b"[]")]))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_neither_a_prepared_file_nor_a_link_is_written_through(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    folder, victim = tmp_path / "everybodys", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("kept")
    target = folder / "x"
    prepared = [folder / "x.tmp", folder / f".x.{os.getpid()}.tmp", folder / ".x.tmp", target]
    for path in prepared:
        path.symlink_to(victim)
    write(target)
    assert victim.read_text() == "kept"
    assert target.is_file() and not target.is_symlink()
    assert all(path.is_symlink() for path in prepared[:-1])
    assert set(folder.iterdir()) == set(prepared), "nothing else is left"


def test_a_file_that_somebody_holds_open_is_replaced_and_not_written_to(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("theirs")
    with target.open("rb") as held:
        archive(target)
        assert held.read() == b"theirs"
    with tarfile.open(target) as tar:
        assert tar.getnames() == ["edge-agent-support/doctor.json"]


def test_the_support_archive_is_its_owners_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    write_all = durable.write_all

    def look(descriptor: int, data: bytes) -> None:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        write_all(descriptor, data)

    monkeypatch.setattr(durable, "write_all", look)
    archive(tmp_path / "x")
    assert seen == [0o600]
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(OSError, match="medium"), durable.replacing(target):
        raise OSError("the medium fails")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]
