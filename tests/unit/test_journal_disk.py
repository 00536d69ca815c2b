"""A disk that refuses the journal: noticed without a prompt, and over only when a write has reached it."""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from edge_agent.chat import journal_file
from edge_agent.chat.journal_file import JournalFile
from edge_agent.errors import JournalUnavailable


class Disk:
    """The reserve's place on a disk that can be made to refuse, and a clock for the tries to write to it again."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 100.0
        self.file = JournalFile(folder / "journal.db", now_s=lambda: self.now_s)
        self._reserve = folder / "journal.db.reserve"

    def refuse(self) -> None:
        self._reserve.unlink()
        self._reserve.mkdir()

    def recover(self) -> None:
        self._reserve.rmdir()

    def mend(self) -> str | None:
        self.now_s += 10
        with contextlib.suppress(JournalUnavailable):
            self.file.mend()
        return self.file.trouble


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.file.close()


def test_a_disk_that_refuses_is_noticed_without_a_prompt_and_so_is_its_end(disk: Disk) -> None:
    assert disk.mend() is None
    disk.refuse()
    assert "directory" in str(disk.mend())
    disk.recover()
    assert disk.mend() is None


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), OSError(errno.EMFILE, "")])
def test_a_journal_that_was_removed_and_cannot_be_made_anew_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    file = JournalFile(tmp_path / "journal.db")

    def fail(path: Path) -> NoReturn:
        path.touch()  # as an open does that goes on to fail
        raise error

    (tmp_path / "journal.db").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(journal_file, "_open_or_salvage", fail)
        for _ in range(3):
            with pytest.raises(JournalUnavailable):
                file.mend()
    file.mend()
    with file.transaction() as db:
        db.execute("SELECT count(*) FROM prompts")
    file.close()


@pytest.mark.parametrize("durable", [True, False])
def test_trouble_outlives_every_transaction_that_writes_nothing_to_the_disk(
    disk: Disk, durable: bool
) -> None:
    disk.refuse()
    trouble = disk.mend()
    with disk.file.transaction() as db:
        db.execute("SELECT count(*) FROM prompts")
    with disk.file.transaction(durable=durable) as db:
        db.execute("UPDATE prompts SET state='x' WHERE row=77")
    with disk.file.transaction(durable=False) as db:
        db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES('a', 'b')")
    assert trouble and disk.file.trouble == trouble
    disk.recover()
    assert disk.file.keep_reserve()
    with disk.file.transaction() as db:
        db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES('a', 'b')")
    assert disk.file.trouble is None


def test_a_disk_that_fails_is_tried_again_from_time_to_time_and_not_at_each_turn(disk: Disk) -> None:
    disk.refuse()
    disk.mend()
    tries: list[str] = []
    disk.file._db.set_trace_callback(tries.append)
    disk.recover()
    for _ in range(5):
        disk.file.mend()
    assert tries == [] and disk.file.trouble
    assert disk.mend() is None
    assert any("meta" in statement for statement in tries)


def test_the_reason_is_the_file_systems_and_not_sqlites(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS), "reserve")
    monkeypatch.setattr(disk.file, "_refusal", lambda: read_only)
    with pytest.raises(JournalUnavailable, match="read-write"), disk.file.transaction():
        raise sqlite3.OperationalError("disk I/O error")
    assert str(disk.file.trouble).startswith("Read-only file system; mount it read-write")


def test_nothing_is_taken_where_a_read_only_disk_still_answers_writes_and_flushes(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS), "reserve")
    with monkeypatch.context() as patched:
        patched.setattr(disk.file, "_refusal", lambda: read_only)
        with pytest.raises(JournalUnavailable, match="read-write"), disk.file.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES('a', 'b')")
        with disk.file.transaction() as db:
            assert db.execute("SELECT * FROM meta WHERE key='a'").fetchone() is None
        assert disk.file.trouble
    assert disk.mend() is None


def test_a_disk_that_does_not_even_say_what_is_there_is_trouble_and_no_end(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", fails)
        patched.setattr(Path, "is_file", fails)
        assert "dmesg" in str(disk.mend())
        with disk.file.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES('a', 'b')")
        assert disk.file.trouble, "the reserve could not be seen"
    assert disk.mend() is None
