"""The journal's file: SQLite that outlives a full disk and its own damage.

Owns `journal.db`, its tables, the lock in front of it, and a reserve of disk space that is given up when the disk is
full, so that accepted prompts can still be answered. Knows whether the disk takes what is written to it: once it did
not, only a write that reached it says otherwise. What a damaged file still holds is carried over into a new one; the
damaged file is set aside, and the newest few of those are kept. SQLite's errors become `JournalUnavailable`. The
only importer of sqlite3.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_agent.errors import JournalUnavailable, disk_remedy
from edge_agent.topics import ANONYMOUS

log = logging.getLogger(__name__)

RESERVE_BYTES = 4 << 20
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_PARTS = ("-wal", "-shm", "")
"""What a database consists of, itself last."""
_MAX_DAMAGED_KEPT = 3
_MAX_SALVAGE_ROWS = 200_000
_TRY_INTERVAL_S = 2.0
"""Between two tries to write to a disk that has failed."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS prompts(
  row INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL, identity BLOB, body_sha256 BLOB NOT NULL,
  source TEXT NOT NULL, model TEXT NOT NULL, document TEXT NOT NULL, form TEXT NOT NULL, stream INTEGER NOT NULL,
  answer_topic TEXT NOT NULL, topic_made INTEGER NOT NULL, correlation BLOB, session TEXT, mid INTEGER,
  state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  boot_id TEXT NOT NULL, accepted_boot_s REAL NOT NULL, accepted_wall_s REAL NOT NULL, deadline_boot_s REAL NOT NULL,
  answer BLOB, properties TEXT, answered_boot_id TEXT, answered_boot_s REAL, answered_wall_s REAL
);
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_ADDED = {
    "tries": "INTEGER NOT NULL DEFAULT 0",
    "unheard": "INTEGER NOT NULL DEFAULT 0",
    "retry_boot_s": "REAL NOT NULL DEFAULT 0",
    "client": f"TEXT NOT NULL DEFAULT '{ANONYMOUS}'",
}
"""Columns that the journal of an earlier version lacks. Each has a default, so that an earlier version can go on with
this journal, too."""
_INDEXES = """
CREATE UNIQUE INDEX IF NOT EXISTS prompts_identity ON prompts(identity) WHERE identity IS NOT NULL;
CREATE INDEX IF NOT EXISTS prompts_state ON prompts(state, model, row);
CREATE INDEX IF NOT EXISTS prompts_mid ON prompts(session, mid) WHERE mid IS NOT NULL;
CREATE INDEX IF NOT EXISTS prompts_outbox ON prompts(source, retry_boot_s, row) WHERE state='answered';
"""


class JournalFile:
    """One connection behind one lock; any thread.

    Attributes:
        trouble: why nothing can be committed or accepted, None when all is well. Ends with a durable write, and with
            nothing else: on a read-only disk, every transaction that changes nothing still succeeds.
        newest_row: the number of the newest prompt. A file that replaces a lost one goes on after it: what runs, or is
            on its way to the broker, is known by its number, and must not be taken for a prompt that came since.
    """

    def __init__(self, path: Path, *, now_s: Callable[[], float] = time.monotonic) -> None:
        """Opens or makes the file.

        Args:
            now_s: monotonic seconds.

        Raises:
            JournalUnavailable: the folder cannot hold one.
        """
        self.path = path
        self.trouble: str | None = None
        self._lock = threading.RLock()
        self._now_s = now_s
        self._try_at_s = 0.0
        self._damaged = False
        self._reserve = path.with_name(path.name + ".reserve")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._db = _open_or_salvage(path)
            except sqlite3.OperationalError:  # a full disk has room for the answers in the reserve
                self._reserve.unlink(missing_ok=True)
                self._db = _open_or_salvage(path)
        except (sqlite3.Error, OSError) as error:
            raise _cannot_open(path, error) from error
        self.newest_row = _newest_row(self._db)
        self.keep_reserve()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One immediate transaction; SQLite's errors become `JournalUnavailable` and set `trouble`.

        Args:
            durable: it waits for the disk. Without that it survives this process, and costs no milliseconds.
        """
        with self._lock:
            try:
                self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
                changes = self._db.total_changes
                yield self._db
                if durable and self._db.total_changes > changes:
                    self._refuse_read_only()
                self._db.execute("COMMIT")
            except (sqlite3.Error, OSError) as error:
                self._roll_back()
                self._note_failure(error)
                raise JournalUnavailable(f"the journal cannot be written: {self.trouble}") from error
            except BaseException:
                self._roll_back()
                raise
            if durable and self._db.total_changes > changes and self._has_reserve():
                self.trouble = None

    def _has_reserve(self) -> bool:
        try:
            return self._reserve.is_file()
        except OSError:  # a disk that fails does not even say
            return False

    def keep_reserve(self) -> bool:
        """Takes the reserve of disk space, unless it is there.

        Returns:
            False when there is no room for it: nothing new may be accepted.
        """
        try:
            if self._reserve.is_file():
                return True
            with open(self._reserve, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError as error:
            if self.trouble is None:
                log.warning(
                    "journal reserve cannot be kept code=journal_unavailable path=%s error=%s",
                    self._reserve,
                    error,
                )
            self.trouble = self.trouble or f"no prompts are accepted: {_reason(error)}"
            with contextlib.suppress(OSError):
                self._reserve.unlink(missing_ok=True)
            return False
        return True

    def mend(self) -> None:
        """Finds out, without traffic, what is wrong, and puts it right when that can be done.

        A journal that turned out damaged is opened again, with what it still holds. A disk that became read-only is
        noticed. One that failed is tried again from time to time.

        Raises:
            JournalUnavailable: it cannot be opened or written; a later call tries again.
        """
        with self._lock:
            try:
                removed = not self.path.exists()
            except OSError as error:  # a disk that fails does not even say
                removed = False
                self._note_failure(error)
            if self._damaged or removed:
                self._reopen(removed=removed)
            elif self.trouble is None and (refusal := self._refusal()):
                self._note_failure(refusal)
            if self.trouble is not None and self._now_s() >= self._try_at_s:
                self._try_at_s = self._now_s() + _TRY_INTERVAL_S
                self._try_to_write()

    def shrink(self) -> None:
        """Gives pages back to the disk when it can; nothing depends on it."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.executescript("PRAGMA incremental_vacuum(256)")

    def _reopen(self, *, removed: bool) -> None:
        self._damaged = True  # until it is open again: what follows may fail after it has made a new file
        if removed:
            log.warning("journal removed code=file_damaged path=%s: what it held is lost", self.path)
        try:
            self._db.close()
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = _open_or_salvage(self.path)
            _go_on_after(self._db, self.newest_row)
        except (sqlite3.Error, OSError) as error:
            raise _cannot_open(self.path, error) from error
        self._damaged = False
        self._try_at_s = self._now_s()  # it can be written again as soon as it is whole

    def _refusal(self) -> OSError | None:
        """Why the file system refuses to open a file for writing; None if it does not.

        That writes nothing, so it may be asked often. A kernel that gave up on a file system refuses it, though
        `statvfs` may still say that it is writable, and SQLite calls it an I/O error. Not asked of `journal.db`
        itself: closing that would take away the locks that SQLite has on it.
        """
        try:
            os.close(os.open(self._reserve, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            return None  # given up on a full disk, which is known, or removed: the next prompt takes it again
        except OSError as error:
            return error
        return None

    def _refuse_read_only(self) -> None:
        """For a file system that became read-only under an open file: it may still take writes, into memory, and ext4
        answers an fsync then and does nothing. Source: Linux 6.1, ext4_sync_file."""
        refusal = self._refusal()
        if refusal is not None and refusal.errno == errno.EROFS:
            raise refusal

    def _try_to_write(self) -> None:
        """Ends the trouble if the disk takes a write again."""
        if self.keep_reserve():
            with self.transaction() as db:
                db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES('written', '')")
            log.info("journal can be written again path=%s", self.path)

    def _roll_back(self) -> None:
        with contextlib.suppress(
            sqlite3.Error
        ):  # a failed disk may not even roll back; the next BEGIN says so
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _note_failure(self, error: sqlite3.Error | OSError) -> None:
        """A full disk gets the reserve, a damaged file is mended by the next `mend`."""
        if self.trouble is None:
            log.warning("journal failed code=journal_unavailable path=%s error=%s", self.path, error)
        self.trouble = _reason(self._refusal() or error)
        self._try_at_s = self._now_s() + _TRY_INTERVAL_S
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):  # over a disk quota, SQLite says I/O error
            with contextlib.suppress(OSError):
                self._reserve.unlink(missing_ok=True)
        self._damaged = self._damaged or code in _DAMAGED


def _cannot_open(path: Path, error: sqlite3.Error | OSError) -> JournalUnavailable:
    return JournalUnavailable(f"journal {path} cannot be opened: {_reason(error)}")


def _reason(error: sqlite3.Error | OSError) -> str:
    """What failed, and what to do if that is known."""
    if not isinstance(error, OSError):
        return str(error)
    remedy = disk_remedy(error)
    return f"{error.strerror}; {remedy}" if remedy else str(error)


def _connect(path: Path) -> sqlite3.Connection:
    db = _open(path)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA journal_size_limit={RESERVE_BYTES}")
        # Not quick_check: an index that says something else than its table makes every later change fail.
        if db.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("integrity_check found damage")
        _make_tables(db)
    except BaseException:
        db.close()
        raise
    return db


def _make_tables(db: sqlite3.Connection) -> None:
    """Makes the tables, or gives those of an earlier version what they lack."""
    db.executescript(_SCHEMA)
    for name in _ADDED.keys() - _columns(db):
        db.execute(f"ALTER TABLE prompts ADD COLUMN {name} {_ADDED[name]}")
    db.executescript(_INDEXES)


def _newest_row(db: sqlite3.Connection) -> int:
    """The number of the newest prompt that this file has had. Source: SQLite, *AUTOINCREMENT*."""
    found = db.execute("SELECT seq FROM sqlite_sequence WHERE name='prompts'").fetchone()
    return found["seq"] if found and isinstance(found["seq"], int) else 0


def _go_on_after(db: sqlite3.Connection, row: int) -> None:
    """Gives no prompt this number, or a lower one, that has none yet."""
    if _newest_row(db) < row:
        db.execute("DELETE FROM sqlite_sequence WHERE name='prompts'")
        db.execute("INSERT INTO sqlite_sequence(name, seq) VALUES('prompts', ?)", (row,))


def _open(path: Path) -> sqlite3.Connection:
    """A connection to a file that only its owner can read: SQLite gives -wal and -shm the mode that it finds."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for suffix in _PARTS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).chmod(0o600)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    db.row_factory = sqlite3.Row
    db.text_factory = _text
    try:
        db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        db.execute("PRAGMA synchronous=FULL")
    except BaseException:
        db.close()
        raise
    return db


def _text(value: bytes) -> str | bytes:
    """A text column. Damaged text comes as bytes, which its reader recognises; SQLite's own error would name no row
    and end the whole query."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _open_or_salvage(path: Path) -> sqlite3.Connection:
    """Opens the journal; a damaged one is replaced by what it still holds.

    At each moment either the old file or a whole new one (`.new`) is there, and the next open goes on from it:

        build .rebuilding → rename to .new → old one aside → .new takes its name
    """
    _put_in_place(path)
    try:
        return _connect(path)
    except sqlite3.OperationalError:
        raise  # locked, full or not permitted: the content is not in doubt
    except sqlite3.DatabaseError as error:
        log.warning("journal damaged code=file_damaged path=%s error=%s", path, error)
    _rebuild(path)
    _put_in_place(path)
    return _connect(path)


def _put_in_place(path: Path) -> None:
    """Gives a rebuilt journal the name of the damaged one, which is set aside. Resumes after an interruption."""
    new = path.with_name(path.name + ".new")
    if not new.exists():
        return
    aside = _set_aside(path)
    _sync_folder(path.parent)  # an old write-ahead log beside the new file would be played into it
    new.rename(path)
    _sync_folder(path.parent)
    log.warning("journal replaced by what it held code=file_damaged path=%s damaged_file=%s", path, aside)


def _rebuild(path: Path) -> None:
    """Writes what a damaged journal still holds to `.new`, in one transaction."""
    rebuilding = path.with_name(path.name + ".rebuilding")
    for suffix in ("", "-journal"):
        rebuilding.with_name(rebuilding.name + suffix).unlink(missing_ok=True)
    carried = 0
    with contextlib.closing(_open(rebuilding)) as db:
        _make_tables(db)
        known = _columns(db)
        db.execute("BEGIN IMMEDIATE")
        for table, row in _readable_rows(path):
            values = {name: value for name, value in row.items() if table == "meta" or name in known}
            try:
                db.execute(
                    f"INSERT INTO {table}({', '.join(values)}) VALUES({', '.join('?' * len(values))})",
                    tuple(values.values()),
                )
                carried += 1
            except sqlite3.IntegrityError:
                log.warning("journal row lost code=file_damaged table=%s row=%s", table, values.get("row"))
        db.execute("COMMIT")
    rebuilding.rename(path.with_name(path.name + ".new"))
    _sync_folder(path.parent)
    log.warning("journal rebuilt code=file_damaged rows=%d", carried)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(path: Path) -> Path:
    """Moves the damaged file and its write-ahead log to a name of their own; keeps the newest few."""
    number = 1
    while path.with_name(f"{path.name}.damaged-{number}").exists():
        number += 1
    aside = path.with_name(f"{path.name}.damaged-{number}")
    for suffix in _PARTS:
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    for old in range(1, number - _MAX_DAMAGED_KEPT + 1):
        for suffix in _PARTS:
            path.with_name(f"{path.name}.damaged-{old}{suffix}").unlink(missing_ok=True)
    return aside


def _readable_rows(damaged: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every (table, row) that can still be read: prompts by number, so that a bad page costs its own rows only."""
    with contextlib.closing(sqlite3.connect(damaged, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        db.text_factory = _text
        if "row" not in _columns(db):
            return
        first = _readable(db, "SELECT row FROM prompts ORDER BY row ASC LIMIT 1")
        last = _readable(db, "SELECT row FROM prompts ORDER BY row DESC LIMIT 1") or _readable(
            db, "SELECT seq FROM sqlite_sequence WHERE name='prompts'"
        )
        start = max(first[0] if first else 1, last[0] - _MAX_SALVAGE_ROWS) if last else 0
        for number in range(start, last[0] + 1 if last else 0):
            row = _readable(db, "SELECT * FROM prompts WHERE row=?", number)
            if row is not None:
                yield "prompts", dict(row)
        try:
            notes = db.execute("SELECT key, value FROM meta").fetchall()
        except sqlite3.Error as error:
            log.warning("journal notes lost code=file_damaged error=%s", error)
            return
        for note in notes:
            yield "meta", dict(note)


def _columns(db: sqlite3.Connection) -> set[str]:
    """The columns of the prompts; none where the file is no database.

    Raises:
        sqlite3.OperationalError: it cannot be read now (a full disk): that says nothing of its content.
    """
    try:
        return {column["name"] for column in db.execute("PRAGMA table_info(prompts)")}
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return set()


def _readable(db: sqlite3.Connection, query: str, *values: int) -> sqlite3.Row | None:
    """The first row of a query; None where there is none, or none that can be read."""
    try:
        row: sqlite3.Row | None = db.execute(query, values).fetchone()
    except sqlite3.Error:
        return None
    return row
