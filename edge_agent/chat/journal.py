"""The journal: a SQLite inbox and outbox that make the agent's ack a promise.

A prompt's life, each step committed before anybody is told of it:

    accept → queued → claim → running → answer → answered → delivered → (kept as long as answers are) → gone

Owns what the rows of `journal.db` say; the file, full disks and damage are `journal_file.py`'s. Every method is one
short transaction behind one lock; any thread may call it. What has been promised to somebody (accepted, answered)
survives a loss of power; what was only noted on the way (claimed, put back, delivered) survives the death of the
process: after a loss of power it is done again. Refuses a second answer for a row, a second row for an identity,
and, with `JournalUnavailable`, all work that it cannot commit. Contract: docs/mqtt.md, *Delivery*.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edge_agent.chat import messages
from edge_agent.chat.clock import Moment
from edge_agent.chat.journal_file import JournalFile
from edge_agent.chat.prompt import Acceptance, Answer, Arrival, Outgoing, Prompt, Source, State
from edge_agent.errors import IdReused, JournalUnavailable, ModelFailed, PromptError, QueueFull

if TYPE_CHECKING:
    import sqlite3

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ATTEMPTS = 2
"""A prompt that was running at this many daemon deaths is not run again."""

WALL_CLOCK_STEP_S = 5.0
MAX_FINISHED = 10_000
MAX_FINISHED_BYTES = 64 << 20


class Journal:
    """The only owner of `journal.db`; safe to call from any thread.

    Attributes:
        dropped_answers: answers that were forgotten before they could be delivered.
        damaged_rows: prompts whose row could not be read: answered 500, or removed where not even that could be.
    """

    def __init__(self, path: Path, *, moment: Moment) -> None:
        """Opens or makes the journal, carries over what a damaged one still holds, and takes up again what a
        dead daemon left running.

        Raises:
            JournalUnavailable: the folder cannot hold a journal.
        """
        self.path = path
        self.dropped_answers = 0
        self.damaged_rows = 0
        self._moment = moment  # the last one that somebody told: close enough for a damaged row's
        self._file = JournalFile(path)
        self._take_up_again(moment)

    def close(self) -> None:
        self._file.close()

    @property
    def trouble(self) -> str | None:
        """Why nothing can be committed or accepted, None when all is well; status says `degraded` then."""
        return self._file.trouble

    def mend(self) -> None:
        """Opens a journal that turned out damaged again, with what it still holds.

        Raises:
            JournalUnavailable: it cannot be opened; the next call tries again.
        """
        self._file.mend()

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
        with self._file.transaction() as db:
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
            if not self._file.keep_reserve():
                raise JournalUnavailable("the disk is full", remedy="free some space on the agent's disk")
            depth = _count_unanswered(db)
            if depth >= queue_depth:
                raise QueueFull(f"{depth} prompts wait already", retry_after_ms=retry_after_ms)
            return Acceptance(row=_insert(db, arrival, moment), new=True, state=State.QUEUED)

    def claim(self, model: str) -> Prompt | None:
        """The oldest waiting prompt of a model, its attempt committed; None when none waits."""
        with self._file.transaction(durable=False) as db:
            waiting = db.execute(
                "SELECT * FROM prompts WHERE state=? AND model=? ORDER BY row", (State.QUEUED, model)
            )
            prompt = next(self._read(db, waiting, _prompt), None)
            if prompt is None:
                return None
            attempts = prompt.attempts + 1
            db.execute(
                "UPDATE prompts SET state=?, attempts=? WHERE row=?", (State.RUNNING, attempts, prompt.row)
            )
            return replace(prompt, state=State.RUNNING, attempts=attempts)

    def waiting(self, model: str) -> bool:
        """True when a prompt of this model waits."""
        with self._file.transaction() as db:
            query = "SELECT 1 FROM prompts WHERE state=? AND model=? LIMIT 1"
            return db.execute(query, (State.QUEUED, model)).fetchone() is not None

    def running(self, row: int) -> bool:
        """True when a prompt is claimed and has no answer yet; True too when nobody can tell."""
        try:
            with self._file.transaction() as db:
                found = db.execute("SELECT state FROM prompts WHERE row=?", (row,)).fetchone()
        except JournalUnavailable:
            return True
        return found is not None and found["state"] == State.RUNNING

    def release(self, row: int) -> None:
        """Puts a running prompt back into the queue, its attempt not counted: an orderly stop is no death, and
        the death of a runner is none of those who were not its cause."""
        with self._file.transaction(durable=False) as db:
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
        with self._file.transaction() as db:
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
        with self._file.transaction() as db:
            db.execute(
                "UPDATE prompts SET answer=?, properties=? WHERE row=? AND state=?",
                (answer.payload, json.dumps(answer.properties), row, State.ANSWERED),
            )

    def outbox(self, source: Source, *, limit: int, skip: frozenset[int] = frozenset()) -> list[Outgoing]:
        """Up to `limit` undelivered answers, oldest first, without the rows in `skip`."""
        with self._file.transaction() as db:
            rows = db.execute(
                "SELECT * FROM prompts WHERE state=? AND source=? ORDER BY row LIMIT ?",
                (State.ANSWERED, source, limit + len(skip)),
            ).fetchall()
            return list(self._read(db, (row for row in rows if row["row"] not in skip), _outgoing))[:limit]

    def outgoing(self, row: int) -> Outgoing | None:
        """The answer of one row, None while it has none."""
        with self._file.transaction() as db:
            found = db.execute("SELECT * FROM prompts WHERE row=? AND answer IS NOT NULL", (row,))
            return next(self._read(db, found, _outgoing), None)

    def delivered(self, row: int) -> None:
        """The broker has the answer (PUBACK), or the control connection took it."""
        with self._file.transaction(durable=False) as db:
            db.execute(
                "UPDATE prompts SET state=? WHERE row=? AND state=?", (State.DELIVERED, row, State.ANSWERED)
            )

    def find(self, identity: bytes) -> Prompt | None:
        """The prompt of an identity: how a cancel finds its request."""
        with self._file.transaction() as db:
            found = db.execute("SELECT * FROM prompts WHERE identity=?", (identity,))
            return next(self._read(db, found, _prompt), None)

    def prompt(self, row: int) -> Prompt | None:
        """One row, None when it is gone."""
        with self._file.transaction() as db:
            found = db.execute("SELECT * FROM prompts WHERE row=?", (row,))
            return next(self._read(db, found, _prompt), None)

    def overdue(self, moment: Moment) -> list[Prompt]:
        """Unanswered prompts whose deadline has passed."""
        self._moment = moment
        with self._file.transaction() as db:
            rows = db.execute(
                "SELECT * FROM prompts WHERE state IN (?, ?) AND deadline_boot_s <= ? ORDER BY row",
                (State.QUEUED, State.RUNNING, moment.boot_s),
            )
            return list(self._read(db, rows, _prompt))

    def depth(self) -> int:
        """Prompts that wait or run."""
        with self._file.transaction() as db:
            return _count_unanswered(db)

    def undelivered(self) -> int:
        """Answers that wait for their PUBACK."""
        with self._file.transaction() as db:
            return int(
                db.execute("SELECT count(*) FROM prompts WHERE state=?", (State.ANSWERED,)).fetchone()[0]
            )

    def prune(self, *, moment: Moment, ttl_s: float) -> None:
        """Forgets old answers, by age, number and bytes; undelivered ones that go are counted."""
        self._file.keep_reserve()
        with self._file.transaction() as db:
            # The wall clock of a device without a battery becomes right after the boot: what this boot wrote
            # with a wrong one is put right, so that the next boot can tell its age. Small steps of the clock (NTP)
            # are left alone: they would write every row again each time.
            booted_s = moment.wall_s - moment.boot_s
            db.execute(
                "UPDATE prompts SET answered_wall_s = ? + answered_boot_s WHERE answered_boot_id=?"
                " AND abs(answered_wall_s - answered_boot_s - ?) > ?",
                (booted_s, moment.boot_id, booted_s, WALL_CLOCK_STEP_S),
            )
            db.execute(
                "UPDATE prompts SET accepted_wall_s = ? + accepted_boot_s WHERE boot_id=? AND answer IS NULL"
                " AND abs(accepted_wall_s - accepted_boot_s - ?) > ?",
                (booted_s, moment.boot_id, booted_s, WALL_CLOCK_STEP_S),
            )
            db.execute(
                "UPDATE prompts SET answered_boot_id=?, answered_boot_s=?, answered_wall_s=? WHERE state IN (?, ?)"
                " AND (typeof(answered_boot_id), typeof(answered_boot_s), typeof(answered_wall_s))"
                " != ('text', 'real', 'real')",
                (moment.boot_id, moment.boot_s, moment.wall_s, State.ANSWERED, State.DELIVERED),
            )
            rows = db.execute(
                "SELECT row, state, answered_boot_id, answered_boot_s, answered_wall_s,"
                " ifnull(length(answer), 0) + ifnull(length(document), 0) + 512 AS bytes"
                " FROM prompts WHERE state IN (?, ?)"
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
        self._file.shrink()

    def note(self, key: str) -> str:
        """Something small to remember over restarts; empty when it was never noted."""
        with self._file.transaction() as db:
            found = db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return str(found["value"]) if found else ""

    def set_note(self, key: str, value: str) -> None:
        with self._file.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES(?, ?)", (key, value))

    def broker_session(self) -> str:
        """Name of the broker session that mids belong to."""
        return self.note("broker_session")

    def begin_broker_session(self, name: str) -> None:
        """The broker has forgotten our session: mids of the old one mean nothing any more."""
        with self._file.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES('broker_session', ?)", (name,))
            db.execute("UPDATE prompts SET session=NULL, mid=NULL WHERE mid IS NOT NULL")

    def _take_up_again(self, moment: Moment) -> None:
        """After a death: running prompts queue again or, at their second death, fail; deadlines move to this boot.

        A control connection dies with its daemon, so its prompts have nobody to answer.
        """
        with self._file.transaction() as db:
            db.execute(
                "DELETE FROM prompts WHERE source=? AND state IN (?, ?, ?)",
                (Source.CONTROL, State.QUEUED, State.RUNNING, State.ANSWERED),
            )
            lost = db.execute(
                f"SELECT * FROM prompts WHERE state NOT IN ({_any(State)}) OR source NOT IN ({_any(Source)})",
                (*State, *Source),
            )
            for _ in self._read(db, lost, _prompt):
                pass  # no other query would find it: none of them can be read
            unanswered = db.execute(
                "SELECT * FROM prompts WHERE state IN (?, ?)", (State.QUEUED, State.RUNNING)
            )
            dead = []
            for prompt, accepted in self._read(db, unanswered, lambda row: (_prompt(row), _accepted(row))):
                accepted_boot_s = moment.boot_s - moment.since(accepted)
                deadline_boot_s = accepted_boot_s + prompt.deadline_boot_s - prompt.accepted_boot_s
                db.execute(
                    "UPDATE prompts SET state=?, boot_id=?, accepted_boot_s=?, deadline_boot_s=? WHERE row=?",
                    (State.QUEUED, moment.boot_id, accepted_boot_s, deadline_boot_s, prompt.row),
                )
                if prompt.attempts >= MAX_ATTEMPTS:
                    dead.append(prompt)
        for prompt in dead:
            error = ModelFailed(f"the agent died {MAX_ATTEMPTS} times while this prompt was running")
            self.answer(prompt.row, Answer.of_error(prompt.id, prompt.form, error), moment=moment)
            log.warning("prompt given up request=%s attempts=%d", prompt.id, MAX_ATTEMPTS)

    def _read(
        self, db: sqlite3.Connection, rows: Iterable[sqlite3.Row], read: Callable[[sqlite3.Row], T]
    ) -> Iterator[T]:
        """What rows say. SQLite has no checksums: one that a flipped bit has made nonsense gets its answer, once."""
        for row in list(rows):
            try:
                value = read(row)
            except (ValueError, TypeError, RecursionError):
                self._give_up(db, row)
            else:
                yield value

    def _give_up(self, db: sqlite3.Connection, row: sqlite3.Row) -> None:
        """Answers a damaged row with 500; removes one that has been answered, or whose client nobody can tell."""
        try:
            outgoing = _outgoing(row)
        except (ValueError, TypeError, RecursionError):
            outgoing = None
        if outgoing is not None and row["state"] in (State.ANSWERED, State.DELIVERED) and _is_known(row):
            return  # its answer is as it was, and all that is needed of it
        self.damaged_rows += 1
        log.warning("prompt damaged row=%s state=%r", row["row"], row["state"])
        try:
            prompt_id, form = _typed(row, "id", str), messages.Form(_typed(row, "form", str))
            _typed(row, "answer_topic", str)
        except (ValueError, TypeError):
            prompt_id = None
        if prompt_id is None or row["state"] == State.DELIVERED:
            db.execute("DELETE FROM prompts WHERE row=?", (row["row"],))
            return
        error = ModelFailed("what the agent had noted of this prompt is damaged")
        answer = outgoing.answer if outgoing else Answer.of_error(prompt_id, form, error)
        correlation = row["correlation"] if isinstance(row["correlation"], bytes) else None
        source = row["source"] if row["source"] in tuple(Source) else Source.MQTT
        db.execute(
            "UPDATE prompts SET state=?, source=?, correlation=?, answer=?, properties=?, answered_boot_id=?,"
            " answered_boot_s=?, answered_wall_s=? WHERE row=?",
            (
                State.ANSWERED, source, correlation, answer.payload, json.dumps(answer.properties),
                self._moment.boot_id, self._moment.boot_s, self._moment.wall_s, row["row"],
            ),
        )  # fmt: skip

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
    assert cursor.lastrowid is not None  # an INSERT has a row
    return cursor.lastrowid


def _count_unanswered(db: sqlite3.Connection) -> int:
    return int(
        db.execute(
            "SELECT count(*) FROM prompts WHERE state IN (?, ?)", (State.QUEUED, State.RUNNING)
        ).fetchone()[0]
    )


def _any(values: Iterable[object]) -> str:
    return ", ".join("?" for _ in values)


# --- Rows, and what they must be: SQLite promises no type ----------------------------------------------


def _prompt(row: sqlite3.Row) -> Prompt:
    """The prompt of a row.

    Raises:
        ValueError, TypeError, RecursionError: it is damaged.
    """
    return Prompt(
        row=row["row"],
        id=_typed(row, "id", str),
        source=Source(row["source"]),
        model=_typed(row, "model", str),
        document=_object(row, "document"),
        form=messages.Form(row["form"]),
        stream=bool(row["stream"]),
        answer_topic=_typed(row, "answer_topic", str),
        correlation=_correlation(row),
        state=State(row["state"]),
        attempts=_typed(row, "attempts", int),
        accepted_wall_s=_typed(row, "accepted_wall_s", float),
        accepted_boot_s=_typed(row, "accepted_boot_s", float),
        deadline_boot_s=_typed(row, "deadline_boot_s", float),
    )


def _accepted(row: sqlite3.Row) -> Moment:
    return Moment(
        boot_id=_typed(row, "boot_id", str),
        boot_s=_typed(row, "accepted_boot_s", float),
        wall_s=_typed(row, "accepted_wall_s", float),
    )


def _outgoing(row: sqlite3.Row) -> Outgoing:
    """The answer of a row; raises as `_prompt` does."""
    properties = _object(row, "properties")
    if not all(isinstance(value, str) for value in properties.values()):
        raise TypeError("properties")
    return Outgoing(
        row=row["row"],
        id=_typed(row, "id", str),
        topic=_typed(row, "answer_topic", str),
        correlation=_correlation(row),
        form=messages.Form(row["form"]),
        answer=Answer(payload=_typed(row, "answer", bytes), properties=properties),
    )


def _is_known(row: sqlite3.Row) -> bool:
    return row["state"] in tuple(State) and row["source"] in tuple(Source)


def _typed(row: sqlite3.Row, column: str, kind: type[T]) -> T:
    value = row[column]
    if not isinstance(value, kind):
        raise TypeError(column)
    return value


def _object(row: sqlite3.Row, column: str) -> dict[str, Any]:
    value = json.loads(_typed(row, column, str))
    if not isinstance(value, dict):
        raise TypeError(column)
    return value


def _correlation(row: sqlite3.Row) -> bytes | None:
    return None if row["correlation"] is None else _typed(row, "correlation", bytes)
