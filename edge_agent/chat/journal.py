"""The journal: a SQLite inbox and outbox that make the agent's ack a promise.

A prompt's life, each step committed before anybody is told of it:

    accept → queued → claim → running → answer → answered → delivered → (kept as long as answers are) → gone

Owns the life of the rows of `journal.db`. What a row says, and what becomes of a damaged one, is in `rows.py`; what a
dead daemon left in `recovery.py`; the way of answers out in `deliveries.py`; how long they are kept in
`retention.py`; the file, full disks and damage to it in `journal_file.py`. Every method is one short transaction
behind one lock; any thread may call it. What has been promised to somebody (accepted, answered) survives a loss of
power. What was only noted on the way (claimed, put back, delivered) survives the death of the process, and is done
again after a loss of power. Refuses a second answer for a row, a second row for an identity, and, with
`JournalUnavailable`, all work that it cannot commit. Contract: docs/mqtt.md, *Delivery*.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.chat.clock import Moment
from edge_agent.chat.deliveries import Deliveries
from edge_agent.chat.fairness import Turns, check_share
from edge_agent.chat.journal_file import JournalFile
from edge_agent.chat.prompt import Acceptance, Answer, Arrival, Prompt, State
from edge_agent.chat.recovery import MAX_ATTEMPTS, take_up_again
from edge_agent.chat.retention import correct_times, forget_finished
from edge_agent.chat.rows import Rows, marks_for, prompt_of
from edge_agent.errors import IdReused, JournalUnavailable, ModelFailed, PromptError

if TYPE_CHECKING:
    import sqlite3

log = logging.getLogger(__name__)


class Journal:
    """The only owner of `journal.db`; safe to call from any thread.

    Attributes:
        deliveries: its answers on their way out.
        dropped_answers: answers that were forgotten before they could be delivered.
        given_up: the models of the prompts that got an error when it was opened: the agent died of them too often.
    """

    def __init__(self, path: Path, *, moment: Moment) -> None:
        """Opens or makes the journal, carries over what a damaged one still holds, and queues again what a dead
        daemon left running.

        Raises:
            JournalUnavailable: the folder cannot hold a journal.
        """
        self.path = path
        self.dropped_answers = 0
        self.given_up: list[str] = []
        self._rows = Rows(moment)
        self._turns = Turns()
        self._file = JournalFile(path)
        self.deliveries = Deliveries(self._file, self._rows)
        self._take_up_again(moment)

    def close(self) -> None:
        self._file.close()

    @property
    def damaged_rows(self) -> int:
        """Prompts whose row could not be read: answered 500, or removed where not even that could be."""
        return self._rows.damaged

    @property
    def trouble(self) -> str | None:
        """Why nothing can be committed or accepted, None when all is well; status says `degraded` then."""
        return self._file.trouble

    def mend(self) -> None:
        """Opens a journal that turned out damaged again, with what it still holds, and keeps `trouble` true.

        Raises:
            JournalUnavailable: it cannot be opened or written; a later call tries again.
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
            QueueFull: there is no room in the queue, or the client has its share of it.
            JournalUnavailable: nothing can be committed now.
        """
        with self._file.transaction() as db:
            known = _find_repeated(db, arrival)
            if known is not None:
                row, body_sha256, state = known
                if body_sha256 != arrival.body_sha256:
                    raise IdReused(f"id {arrival.id!r} was used for another request")
                if state in (State.DELIVERED, State.UNDELIVERED):
                    db.execute(
                        "UPDATE prompts SET state=?, tries=0, unheard=0, retry_boot_s=0 WHERE row=?",
                        (State.ANSWERED, row),
                    )
                    state = State.ANSWERED
                return Acceptance(row=row, new=False, state=state)
            if refusal is not None:
                raise refusal
            if not self._file.keep_reserve():
                raise JournalUnavailable(
                    "the agent's disk is full or failing", remedy="`edge-agent status` on the device says why"
                )
            check_share(
                _count_by_client(db),
                arrival.client,
                queue_depth=queue_depth,
                retry_after_ms=retry_after_ms,
            )
            self._file.newest_row = _insert(db, arrival, moment)
            return Acceptance(row=self._file.newest_row, new=True, state=State.QUEUED)

    def claim(self, model: str) -> Prompt | None:
        """The oldest waiting prompt of the client whose turn it is, its attempt committed; None when none waits for
        this model."""
        with self._file.transaction(durable=False) as db:
            prompt = None
            while prompt is None:
                waiting = dict(
                    db.execute(
                        "SELECT client, min(row) FROM prompts WHERE state=? AND model=? GROUP BY client",
                        (State.QUEUED, model),
                    ).fetchall()
                )
                if not waiting:
                    return None
                row = waiting[self._turns.choose(waiting, _count_by_client(db, State.RUNNING))]
                found = db.execute("SELECT * FROM prompts WHERE row=?", (row,))
                prompt = next(self._rows.read(db, found, prompt_of), None)  # a damaged one waits no more
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
        """True when a prompt is claimed and has no answer yet, or when nobody can tell."""
        try:
            with self._file.transaction() as db:
                found = db.execute("SELECT state FROM prompts WHERE row=?", (row,)).fetchone()
        except JournalUnavailable:
            return True
        return found is not None and found["state"] == State.RUNNING

    def release(self, row: int) -> None:
        """Puts a running prompt back into the queue and does not count its attempt: an orderly stop is no death, nor
        is the death of a runner that the prompt did not cause."""
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
                "UPDATE prompts SET state=?, answer=?, properties=?, tries=0, unheard=0, retry_boot_s=0,"
                " answered_boot_id=?, answered_boot_s=?, answered_wall_s=?"
                " WHERE row=? AND (state=? OR (state=? AND ? IS NULL)) AND attempts=ifnull(?, attempts)",
                (
                    State.ANSWERED, answer.payload, json.dumps(answer.properties), moment.boot_id, moment.boot_s,
                    moment.wall_s, row, State.RUNNING, State.QUEUED, attempt, attempt,
                ),
            )  # fmt: skip
            return cursor.rowcount == 1

    def find(self, identity: bytes) -> Prompt | None:
        """The prompt of an identity: how a cancel finds its request."""
        with self._file.transaction() as db:
            found = db.execute("SELECT * FROM prompts WHERE identity=?", (identity,))
            return next(self._rows.read(db, found, prompt_of), None)

    def prompt(self, row: int) -> Prompt | None:
        """One row, None when it is gone."""
        with self._file.transaction() as db:
            found = db.execute("SELECT * FROM prompts WHERE row=?", (row,))
            return next(self._rows.read(db, found, prompt_of), None)

    def overdue(self, moment: Moment) -> list[Prompt]:
        """Unanswered prompts whose deadline has passed."""
        self._rows.moment = moment
        with self._file.transaction() as db:
            rows = db.execute(
                "SELECT * FROM prompts WHERE state IN (?, ?) AND deadline_boot_s <= ? ORDER BY row",
                (State.QUEUED, State.RUNNING, moment.boot_s),
            )
            return list(self._rows.read(db, rows, prompt_of))

    def depth(self) -> int:
        """Prompts that wait or run."""
        with self._file.transaction() as db:
            return sum(_count_by_client(db).values())

    def prune(self, *, moment: Moment, ttl_s: float) -> None:
        """Forgets old answers, by age, number and bytes, and counts those that were never delivered."""
        self._file.keep_reserve()
        with self._file.transaction() as db:
            correct_times(db, moment)
            self.dropped_answers += forget_finished(db, moment, ttl_s=ttl_s)
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
        """The broker has forgotten our session: the mids of the old one mean nothing any more."""
        with self._file.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES('broker_session', ?)", (name,))
            db.execute("UPDATE prompts SET session=NULL, mid=NULL WHERE mid IS NOT NULL")

    def _take_up_again(self, moment: Moment) -> None:
        """After a death: running prompts queue again or, at their second death, fail; deadlines move to this boot."""
        with self._file.transaction() as db:
            dead = take_up_again(db, self._rows, moment)
        for prompt in dead:
            error = ModelFailed(f"the agent died {MAX_ATTEMPTS} times while this prompt was running")
            self.answer(prompt.row, Answer.of_error(prompt.id, prompt.form, error), moment=moment)
            self.given_up.append(prompt.model)
            log.warning("prompt given up request=%s code=model_failed attempts=%d", prompt.id, MAX_ATTEMPTS)


def _find_repeated(db: sqlite3.Connection, arrival: Arrival) -> tuple[int, bytes, State] | None:
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
        # A mid that comes with something new was acked: it identifies nothing old any more.
        db.execute(
            "UPDATE prompts SET session=NULL, mid=NULL WHERE session=? AND mid=?",
            (delivery.session, delivery.mid),
        )
    return (found["row"], found["body_sha256"], State(found["state"])) if found else None


def _insert(db: sqlite3.Connection, arrival: Arrival, moment: Moment) -> int:
    delivery = arrival.delivery
    cursor = db.execute(
        "INSERT INTO prompts(id, identity, body_sha256, source, model, document, form, stream, answer_topic,"
        " topic_made, correlation, session, mid, state, boot_id, accepted_boot_s, accepted_wall_s, deadline_boot_s,"
        " client) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            arrival.id, arrival.identity, arrival.body_sha256, arrival.source, arrival.model,
            json.dumps(arrival.document), arrival.form, arrival.stream, arrival.answer_topic,
            arrival.topic_made, arrival.correlation,
            delivery.session if delivery else None, delivery.mid if delivery else None, State.QUEUED,
            moment.boot_id, moment.boot_s, moment.wall_s, moment.boot_s + arrival.deadline_s,
            arrival.client,
        ),
    )  # fmt: skip
    assert cursor.lastrowid is not None  # an INSERT has a row
    return cursor.lastrowid


def _count_by_client(db: sqlite3.Connection, *states: State) -> dict[object, int]:
    """Client → how many of its prompts are in these states; without any: wait or run."""
    wanted = states or (State.QUEUED, State.RUNNING)
    rows = db.execute(
        f"SELECT client, count(*) FROM prompts WHERE state IN ({marks_for(wanted)}) GROUP BY client", wanted
    )
    return dict(rows.fetchall())
