"""The journal: a SQLite inbox and outbox that make the agent's ack a promise.

A prompt's life, each step committed before anybody is told of it:

    accept → queued → claim → running → answer → answered → delivered → (kept as long as answers are) → gone

Owns `journal.db`. Every method is one short transaction behind one lock; any thread may call it. What has been
promised to somebody (accepted, answered) survives a loss of power; what was only noted on the way (claimed, put
back, delivered) survives the death of the process: after a loss of power it is done again. Refuses a
second answer for a row, a second row for an identity, and, with `JournalUnavailable`, all work that it cannot
commit. What a damaged file still holds is carried over into a new one; the damaged one is set aside.
Contract: docs/mqtt.md, *Delivery*.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from edge_agent.chat import messages
from edge_agent.chat.clock import Moment
from edge_agent.errors import IdReused, JournalUnavailable, ModelFailed, PromptError, QueueFull

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A prompt that was running at this many daemon deaths is not run again."""

MAX_FINISHED = 10_000
MAX_FINISHED_BYTES = 64 << 20
RESERVE_BYTES = 4 << 20
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_MAX_DAMAGED_KEPT = 3
_MAX_SALVAGE_ROWS = 200_000


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    ANSWERED = "answered"
    DELIVERED = "delivered"


class Source(StrEnum):
    """The way a prompt came in, and so the way its answer goes out."""

    MQTT = "mqtt"
    CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A broker's delivery of one message: what recognises it when it is delivered again."""

    session: str
    mid: int
    redelivered: bool


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A checked prompt on its way into the journal.

    Attributes:
        id: the client's, or one that the agent made.
        identity: digest of (answer topic, correlation or id), None where the client gave neither.
        body_sha256: of the message's body as it came.
        document: what the runner gets.
        deadline_s: seconds from now.
        topic_made: the client named no answer topic; a redelivery then comes with another made one.
    """

    id: str
    identity: bytes | None
    body_sha256: bytes
    source: Source
    model: str
    document: dict[str, Any]
    form: messages.Form
    stream: bool
    answer_topic: str
    correlation: bytes | None
    deadline_s: float
    delivery: Delivery | None = None
    topic_made: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A row as the rest of the agent sees it."""

    row: int
    id: str
    source: Source
    model: str
    document: dict[str, Any]
    form: messages.Form
    stream: bool
    answer_topic: str
    correlation: bytes | None
    state: State
    attempts: int
    accepted_wall_s: float
    accepted_boot_s: float
    deadline_boot_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A terminal answer: its exact bytes, and the user properties that go with them."""

    payload: bytes
    properties: dict[str, str]

    @classmethod
    def of_error(cls, prompt_id: str, form: messages.Form, error: PromptError) -> Answer:
        document = messages.error_document(prompt_id, error)
        return cls(payload=messages.encode_answer(document, form), properties={"status": str(error.status)})


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """An answer that waits for its PUBACK."""

    row: int
    id: str
    topic: str
    correlation: bytes | None
    form: messages.Form
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What became of an arrival: a new row, or the one that it repeats."""

    row: int
    new: bool
    state: State


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
CREATE UNIQUE INDEX IF NOT EXISTS prompts_identity ON prompts(identity) WHERE identity IS NOT NULL;
CREATE INDEX IF NOT EXISTS prompts_state ON prompts(state, model, row);
CREATE INDEX IF NOT EXISTS prompts_mid ON prompts(session, mid) WHERE mid IS NOT NULL;
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Journal:
    """The only owner of `journal.db`; safe to call from any thread.

    Attributes:
        trouble: why nothing can be committed or accepted, None when all is well; status says `degraded` then.
        dropped_answers: answers that were forgotten before they could be delivered.
    """

    def __init__(self, path: Path, *, moment: Moment) -> None:
        """Opens or makes the journal, carries over what a damaged one still holds, and takes up again what a
        dead daemon left running.

        Raises:
            JournalUnavailable: the folder cannot hold a journal.
        """
        self.path = path
        self.trouble: str | None = None
        self.dropped_answers = 0
        self._lock = threading.RLock()
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
            raise JournalUnavailable(f"journal {path} cannot be opened: {error}") from error
        self._keep_reserve()
        self._take_up_again(moment)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def accept(
        self,
        arrival: Arrival,
        *,
        moment: Moment,
        queue_depth: int,
        retry_after_ms: int,
        refusal: PromptError | None = None,
    ) -> Acceptance:
        """Commits a prompt, or finds the one that it repeats.

        A repeat of a finished prompt puts its answer back into the outbox, byte for byte.

        Args:
            refusal: why nothing new may be accepted now (no model); a repeat is recognised all the same.

        Raises:
            PromptError: `refusal`, and the prompt is new.
            IdReused: the identity is known with another body.
            QueueFull: `queue_depth` prompts wait or run already.
            JournalUnavailable: nothing can be committed now.
        """
        with self._transaction() as db:
            known = self._find_repeated(db, arrival)
            if known is not None:
                row, body_sha256, state = known
                if body_sha256 != arrival.body_sha256:
                    raise IdReused(f"id {arrival.id!r} was used for another request on this answer topic")
                if state is State.DELIVERED:
                    db.execute("UPDATE prompts SET state=? WHERE row=?", (State.ANSWERED, row))
                    state = State.ANSWERED
                return Acceptance(row=row, new=False, state=state)
            if refusal is not None:
                raise refusal
            if not self._keep_reserve():
                raise JournalUnavailable("the disk is full", remedy="free some space on the agent's disk")
            depth = _count_unanswered(db)
            if depth >= queue_depth:
                raise QueueFull(f"{depth} prompts wait already", retry_after_ms=retry_after_ms)
            return Acceptance(row=_insert(db, arrival, moment), new=True, state=State.QUEUED)

    def claim(self, model: str) -> Prompt | None:
        """The oldest waiting prompt of a model, its attempt committed; None when none waits."""
        with self._transaction(durable=False) as db:
            for found in db.execute(
                "SELECT * FROM prompts WHERE state=? AND model=? ORDER BY row", (State.QUEUED, model)
            ).fetchall():
                db.execute(
                    "UPDATE prompts SET state=?, attempts=attempts+1 WHERE row=?",
                    (State.RUNNING, found["row"]),
                )
                try:
                    return _prompt(found, state=State.RUNNING, attempts=found["attempts"] + 1)
                except (ValueError, TypeError):  # carried over from a damaged file, and damaged itself
                    log.warning("prompt unreadable row=%s", found["row"])
                    db.execute("DELETE FROM prompts WHERE row=?", (found["row"],))
            return None

    def waiting(self, model: str) -> bool:
        """True when a prompt of this model waits."""
        with self._transaction() as db:
            query = "SELECT 1 FROM prompts WHERE state=? AND model=? LIMIT 1"
            return db.execute(query, (State.QUEUED, model)).fetchone() is not None

    def running(self, row: int) -> bool:
        """True when a prompt is claimed and has no answer yet; True too when nobody can tell."""
        try:
            with self._transaction() as db:
                found = db.execute("SELECT state FROM prompts WHERE row=?", (row,)).fetchone()
        except JournalUnavailable:
            return True
        return found is not None and found["state"] == State.RUNNING

    def release(self, row: int) -> None:
        """Puts a running prompt back into the queue, its attempt not counted: an orderly stop is no death, and
        the death of a runner is none of those who were not its cause."""
        with self._transaction(durable=False) as db:
            db.execute(
                "UPDATE prompts SET state=?, attempts=attempts-1 WHERE row=? AND state=?",
                (State.QUEUED, row, State.RUNNING),
            )

    def answer(self, row: int, answer: Answer, *, moment: Moment, attempt: int | None = None) -> bool:
        """Commits the one terminal answer of a prompt.

        Args:
            attempt: the attempt that the answer comes from; one that was put back since then does not count.

        Returns:
            False when the prompt has an answer already (it was cancelled, or its deadline passed): the caller's
            answer is void and must not be sent.
        """
        with self._transaction() as db:
            cursor = db.execute(
                "UPDATE prompts SET state=?, answer=?, properties=?, answered_boot_id=?, answered_boot_s=?,"
                " answered_wall_s=? WHERE row=? AND (state=? OR (state=? AND ? IS NULL))"
                " AND attempts=ifnull(?, attempts)",
                (
                    State.ANSWERED, answer.payload, json.dumps(answer.properties), moment.boot_id, moment.boot_s,
                    moment.wall_s, row, State.RUNNING, State.QUEUED, attempt, attempt,
                ),
            )  # fmt: skip
            return cursor.rowcount == 1

    def replace_answer(self, row: int, answer: Answer) -> None:
        """Puts another answer in the place of one that the broker can never take (too large)."""
        with self._transaction() as db:
            db.execute(
                "UPDATE prompts SET answer=?, properties=? WHERE row=? AND state=?",
                (answer.payload, json.dumps(answer.properties), row, State.ANSWERED),
            )

    def outbox(self, source: Source, *, limit: int, skip: frozenset[int] = frozenset()) -> list[Outgoing]:
        """Up to `limit` undelivered answers, oldest first, without the rows in `skip`."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT row, id, answer_topic, correlation, form, answer, properties FROM prompts"
                " WHERE state=? AND source=? ORDER BY row LIMIT ?",
                (State.ANSWERED, source, limit + len(skip)),
            ).fetchall()
        return [_outgoing(row) for row in rows if row["row"] not in skip][:limit]

    def outgoing(self, row: int) -> Outgoing | None:
        """The answer of one row, None while it has none."""
        with self._transaction() as db:
            found = db.execute(
                "SELECT row, id, answer_topic, correlation, form, answer, properties FROM prompts"
                " WHERE row=? AND answer IS NOT NULL",
                (row,),
            ).fetchone()
        return _outgoing(found) if found else None

    def delivered(self, row: int) -> None:
        """The broker has the answer (PUBACK), or the control connection took it."""
        with self._transaction(durable=False) as db:
            db.execute(
                "UPDATE prompts SET state=? WHERE row=? AND state=?", (State.DELIVERED, row, State.ANSWERED)
            )

    def find(self, identity: bytes) -> Prompt | None:
        """The prompt of an identity: how a cancel finds its request."""
        with self._transaction() as db:
            found = db.execute("SELECT * FROM prompts WHERE identity=?", (identity,)).fetchone()
        return _prompt(found) if found else None

    def prompt(self, row: int) -> Prompt | None:
        """One row, None when it is gone."""
        with self._transaction() as db:
            found = db.execute("SELECT * FROM prompts WHERE row=?", (row,)).fetchone()
        return _prompt(found) if found else None

    def overdue(self, moment: Moment) -> list[Prompt]:
        """Unanswered prompts whose deadline has passed."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT * FROM prompts WHERE state IN (?, ?) AND deadline_boot_s <= ? ORDER BY row",
                (State.QUEUED, State.RUNNING, moment.boot_s),
            ).fetchall()
        return [_prompt(row) for row in rows]

    def depth(self) -> int:
        """Prompts that wait or run."""
        with self._transaction() as db:
            return _count_unanswered(db)

    def undelivered(self) -> int:
        """Answers that wait for their PUBACK."""
        with self._transaction() as db:
            return int(
                db.execute("SELECT count(*) FROM prompts WHERE state=?", (State.ANSWERED,)).fetchone()[0]
            )

    def mend(self) -> None:
        """Opens a journal that turned out damaged again, with what it still holds.

        Raises:
            JournalUnavailable: it cannot be opened; the next call tries again.
        """
        with self._lock:
            if not self._damaged and self.path.exists():
                return
            if not self.path.exists():
                log.warning("journal removed path=%s: what it held is lost", self.path)
            try:
                self._db.close()
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._db = _open_or_salvage(self.path)
            except (sqlite3.Error, OSError) as error:
                raise JournalUnavailable(f"journal {self.path} cannot be opened: {error}") from error
            self._damaged = False
            self.trouble = None

    def prune(self, *, moment: Moment, ttl_s: float) -> None:
        """Forgets old answers, by age, number and bytes; undelivered ones that go are counted."""
        self._keep_reserve()
        with self._transaction() as db:
            # The wall clock of a device without a battery becomes right after the boot: what this boot wrote
            # with a wrong one is put right, so that the next boot can tell its age.
            db.execute(
                "UPDATE prompts SET answered_wall_s = ? - (? - answered_boot_s) WHERE answered_boot_id=?",
                (moment.wall_s, moment.boot_s, moment.boot_id),
            )
            db.execute(
                "UPDATE prompts SET accepted_wall_s = ? - (? - accepted_boot_s) WHERE boot_id=? AND answer IS NULL",
                (moment.wall_s, moment.boot_s, moment.boot_id),
            )
            rows = db.execute(
                "SELECT row, state, answered_boot_id, answered_boot_s, answered_wall_s,"
                " length(answer) + length(document) + 512 AS bytes FROM prompts WHERE state IN (?, ?)"
                " ORDER BY state=? DESC, answered_wall_s DESC, row DESC",
                (State.ANSWERED, State.DELIVERED, State.ANSWERED),
            ).fetchall()
            kept_bytes = 0
            for position, row in enumerate(rows):
                kept_bytes += row["bytes"]
                answered = Moment(
                    boot_id=row["answered_boot_id"],
                    boot_s=row["answered_boot_s"],
                    wall_s=row["answered_wall_s"],
                )
                if (
                    moment.since(answered) > ttl_s
                    or position >= MAX_FINISHED
                    or kept_bytes > MAX_FINISHED_BYTES
                ):
                    db.execute("DELETE FROM prompts WHERE row=?", (row["row"],))
                    self.dropped_answers += row["state"] == State.ANSWERED
        with (
            self._lock,
            contextlib.suppress(sqlite3.Error),
        ):  # gives pages back when it can; nothing depends on it
            self._db.executescript("PRAGMA incremental_vacuum(256)")

    def note(self, key: str) -> str:
        """Something small to remember over restarts; empty when it was never noted."""
        with self._transaction() as db:
            found = db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return str(found["value"]) if found else ""

    def set_note(self, key: str, value: str) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES(?, ?)", (key, value))

    def broker_session(self) -> str:
        """Name of the broker session that mids belong to."""
        return self.note("broker_session")

    def begin_broker_session(self, name: str) -> None:
        """The broker has forgotten our session: mids of the old one mean nothing any more."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES('broker_session', ?)", (name,))
            db.execute("UPDATE prompts SET session=NULL, mid=NULL WHERE mid IS NOT NULL")

    def _take_up_again(self, moment: Moment) -> None:
        """After a death: running prompts queue again or, at their second death, fail; deadlines move to this boot.

        A control connection dies with its daemon, so its prompts have nobody to answer.
        """
        with self._transaction() as db:
            db.execute(
                "DELETE FROM prompts WHERE source=? AND state IN (?, ?, ?)",
                (Source.CONTROL, State.QUEUED, State.RUNNING, State.ANSWERED),
            )
            for row in db.execute(
                "SELECT * FROM prompts WHERE state IN (?, ?)", (State.QUEUED, State.RUNNING)
            ).fetchall():
                accepted = Moment(
                    boot_id=row["boot_id"], boot_s=row["accepted_boot_s"], wall_s=row["accepted_wall_s"]
                )
                accepted_boot_s = moment.boot_s - moment.since(accepted)
                deadline_boot_s = accepted_boot_s + row["deadline_boot_s"] - row["accepted_boot_s"]
                db.execute(
                    "UPDATE prompts SET state=?, boot_id=?, accepted_boot_s=?, deadline_boot_s=? WHERE row=?",
                    (State.QUEUED, moment.boot_id, accepted_boot_s, deadline_boot_s, row["row"]),
                )
            dead = db.execute(
                "SELECT row, id, form FROM prompts WHERE state=? AND attempts>=?",
                (State.QUEUED, MAX_ATTEMPTS),
            ).fetchall()
        for row in dead:
            error = ModelFailed(f"the agent died {MAX_ATTEMPTS} times while this prompt was running")
            self.answer(
                row["row"], Answer.of_error(row["id"], messages.Form(row["form"]), error), moment=moment
            )
            log.warning("prompt given up request=%s attempts=%d", row["id"], MAX_ATTEMPTS)

    def _find_repeated(self, db: sqlite3.Connection, arrival: Arrival) -> tuple[int, bytes, State] | None:
        """The row that an arrival repeats: by identity, else by the broker's own redelivery."""
        delivery = arrival.delivery
        found = None
        if arrival.identity is not None:
            found = db.execute("SELECT * FROM prompts WHERE identity=?", (arrival.identity,)).fetchone()
        elif delivery is not None and delivery.redelivered:
            found = db.execute(
                "SELECT * FROM prompts WHERE session=? AND mid=? AND body_sha256=? AND identity IS NULL"
                " AND (answer_topic=? OR (topic_made AND ?))",
                (
                    delivery.session,
                    delivery.mid,
                    arrival.body_sha256,
                    arrival.answer_topic,
                    arrival.topic_made,
                ),
            ).fetchone()
        if delivery is not None and not delivery.redelivered:
            # A mid that comes with something new was acked: it recognises nothing old any more.
            db.execute(
                "UPDATE prompts SET session=NULL, mid=NULL WHERE session=? AND mid=?",
                (delivery.session, delivery.mid),
            )
        return (found["row"], found["body_sha256"], State(found["state"])) if found else None

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One immediate transaction; SQLite's errors become `JournalUnavailable` and set `trouble`.

        Args:
            durable: it waits for the disk. Without that it survives this process, and costs no milliseconds.
        """
        with self._lock:
            try:
                self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
                self.trouble = (
                    None if self._reserve.is_file() else "the disk is full: no prompts are accepted"
                )
            except PromptError:
                self._roll_back()
                raise
            except (sqlite3.Error, OSError) as error:
                self._roll_back()
                self._note_failure(error)
                raise JournalUnavailable(f"the journal cannot be written: {error}") from error
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        with contextlib.suppress(
            sqlite3.Error
        ):  # a failed disk may not even roll back; the next BEGIN says so
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _note_failure(self, error: sqlite3.Error | OSError) -> None:
        """A full disk gets the reserve, a damaged file is mended by the next `mend`."""
        if self.trouble is None:
            log.warning("journal failed path=%s error=%s", self.path, error)
        self.trouble = str(error)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):  # over a disk quota, SQLite says I/O error
            with contextlib.suppress(OSError):
                self._reserve.unlink(missing_ok=True)
        self._damaged = self._damaged or code in _DAMAGED

    def _keep_reserve(self) -> bool:
        """Space that is given up when the disk is full, so that accepted prompts can still be answered.

        Returns:
            False when there is no room for it: nothing new may be accepted.
        """
        try:
            if self._reserve.is_file():
                return True
            with open(self._reserve, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError as error:
            log.warning("journal reserve cannot be kept path=%s error=%s", self._reserve, error)
            with contextlib.suppress(OSError):
                self._reserve.unlink(missing_ok=True)
            return False
        return True


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    db.row_factory = sqlite3.Row
    try:
        db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(f"PRAGMA journal_size_limit={RESERVE_BYTES}")
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check found damage")
        db.executescript(_SCHEMA)
        path.chmod(0o600)
    except BaseException:
        db.close()
        raise
    return db


def _open_or_salvage(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.OperationalError:
        raise  # locked, full or not permitted: the content is not in doubt
    except sqlite3.DatabaseError as error:
        log.warning("journal damaged path=%s error=%s", path, error)
    aside = _set_aside(path)
    db = _connect(path)
    carried = 0
    for values in _readable_rows(aside):
        columns = ", ".join(values)
        try:
            db.execute(
                f"INSERT INTO prompts({columns}) VALUES({', '.join('?' * len(values))})",
                tuple(values.values()),
            )
            carried += 1
        except sqlite3.Error:
            log.warning("journal row lost row=%s", values.get("row"))
    log.warning("journal rebuilt rows=%d damaged_file=%s", carried, aside)
    return db


def _set_aside(path: Path) -> Path:
    """Moves the damaged file and its write-ahead log to a name of their own; keeps the newest few."""
    number = 1
    while path.with_name(f"{path.name}.damaged-{number}").exists():
        number += 1
    aside = path.with_name(f"{path.name}.damaged-{number}")
    for suffix in ("-wal", "-shm", ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    for old in range(1, number - _MAX_DAMAGED_KEPT + 1):
        for suffix in ("-wal", "-shm", ""):
            path.with_name(f"{path.name}.damaged-{old}{suffix}").unlink(missing_ok=True)
    return aside


def _readable_rows(aside: Path) -> Iterator[dict[str, Any]]:
    """Every row that can still be read: by number, so that a bad page costs its own rows only."""
    db = sqlite3.connect(aside, isolation_level=None)
    db.row_factory = sqlite3.Row
    try:
        columns = {row["name"] for row in db.execute("PRAGMA table_info(prompts)")}
        first = _readable(db, "SELECT row FROM prompts ORDER BY row ASC LIMIT 1")
        last = _readable(db, "SELECT row FROM prompts ORDER BY row DESC LIMIT 1") or _readable(
            db, "SELECT seq FROM sqlite_sequence WHERE name='prompts'"
        )
        if last is None or "row" not in columns:
            return
        for number in range(max(first[0] if first else 1, last[0] - _MAX_SALVAGE_ROWS), last[0] + 1):
            row = _readable(db, "SELECT * FROM prompts WHERE row=?", number)
            if row is not None:
                yield dict(row)
    except sqlite3.Error as error:
        log.warning("journal salvage ended error=%s", error)
    finally:
        db.close()


def _readable(db: sqlite3.Connection, query: str, *values: int) -> sqlite3.Row | None:
    """The first row of a query; None where there is none, or none that can be read."""
    try:
        row: sqlite3.Row | None = db.execute(query, values).fetchone()
    except sqlite3.Error:
        return None
    return row


def _insert(db: sqlite3.Connection, arrival: Arrival, moment: Moment) -> int:
    delivery = arrival.delivery
    cursor = db.execute(
        "INSERT INTO prompts(id, identity, body_sha256, source, model, document, form, stream, answer_topic,"
        " topic_made, correlation, session, mid, state, boot_id, accepted_boot_s, accepted_wall_s, deadline_boot_s)"
        " VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            arrival.id, arrival.identity, arrival.body_sha256, arrival.source, arrival.model,
            json.dumps(arrival.document), arrival.form, arrival.stream, arrival.answer_topic,
            arrival.topic_made, arrival.correlation,
            delivery.session if delivery else None, delivery.mid if delivery else None, State.QUEUED,
            moment.boot_id, moment.boot_s, moment.wall_s, moment.boot_s + arrival.deadline_s,
        ),
    )  # fmt: skip
    if cursor.lastrowid is None:  # pragma: no cover - an INSERT has a row
        raise sqlite3.DatabaseError("no row was inserted")
    return cursor.lastrowid


def _count_unanswered(db: sqlite3.Connection) -> int:
    return int(
        db.execute(
            "SELECT count(*) FROM prompts WHERE state IN (?, ?)", (State.QUEUED, State.RUNNING)
        ).fetchone()[0]
    )


def _prompt(row: sqlite3.Row, *, state: State | None = None, attempts: int | None = None) -> Prompt:
    return Prompt(
        row=row["row"],
        id=row["id"],
        source=Source(row["source"]),
        model=row["model"],
        document=json.loads(row["document"]),
        form=messages.Form(row["form"]),
        stream=bool(row["stream"]),
        answer_topic=row["answer_topic"],
        correlation=row["correlation"],
        state=state or State(row["state"]),
        attempts=row["attempts"] if attempts is None else attempts,
        accepted_wall_s=row["accepted_wall_s"],
        accepted_boot_s=row["accepted_boot_s"],
        deadline_boot_s=row["deadline_boot_s"],
    )


def _outgoing(row: sqlite3.Row) -> Outgoing:
    return Outgoing(
        row=row["row"],
        id=row["id"],
        topic=row["answer_topic"],
        correlation=row["correlation"],
        form=messages.Form(row["form"]),
        answer=Answer(payload=row["answer"], properties=json.loads(row["properties"])),
    )
