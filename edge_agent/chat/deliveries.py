"""The way of answers out of the journal: what is sent next, what is tried again, what is given up.

An answer waits, is postponed (refused, heard by nobody, or suspected of having ended a connection; it is tried again at
its time), and ends as delivered or undelivered. Owns the order: an answer that was tried never stands before one that
was not. When to try again is up to whoever sends.

    answered ─ waiting → sent → delivered
                          └ refused, unheard → postponed → sent → … → undelivered
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING

from edge_agent.chat.clock import Moment
from edge_agent.chat.journal_file import JournalFile
from edge_agent.chat.prompt import Answer, Outgoing, Source, State
from edge_agent.chat.rows import Rows, outgoing_of

if TYPE_CHECKING:
    import sqlite3

_WAITS = f"state='{State.ANSWERED}'"
"""Not a parameter: SQLite uses a partial index only where it sees its condition."""


class Deliveries:
    """The journal's answers. Any thread; each method is one transaction and raises `JournalUnavailable`."""

    def __init__(self, file: JournalFile, rows: Rows) -> None:
        self._file = file
        self._rows = rows

    def waiting(self, source: Source, *, limit: int, skip: Collection[int] = ()) -> list[Outgoing]:
        """Up to `limit` answers that the broker has not refused so far, oldest first, without the rows in `skip`."""
        with self._file.transaction() as db:
            found = db.execute(
                f"SELECT * FROM prompts WHERE {_WAITS} AND source=? AND retry_boot_s=0 ORDER BY row LIMIT ?",
                (source, limit + len(skip)),
            )
            return self._read(db, found, limit, skip)

    def due(
        self, source: Source, *, moment: Moment, limit: int, skip: Collection[int] = ()
    ) -> list[Outgoing]:
        """Up to `limit` postponed answers whose time has come, the earliest first."""
        with self._file.transaction() as db:
            found = db.execute(
                f"SELECT * FROM prompts WHERE {_WAITS} AND source=? AND retry_boot_s>0 AND retry_boot_s<=?"
                " ORDER BY retry_boot_s, row LIMIT ?",
                (source, moment.boot_s, limit + len(skip)),
            )
            return self._read(db, found, limit, skip)

    def unsent(self, row: int) -> Outgoing | None:
        """The answer of one row, while it waits to be delivered."""
        with self._file.transaction() as db:
            found = db.execute(f"SELECT * FROM prompts WHERE row=? AND {_WAITS}", (row,))
            return next(self._rows.read(db, found, outgoing_of), None)

    def of(self, row: int) -> Outgoing | None:
        """The answer of one row, None while it has none."""
        with self._file.transaction() as db:
            found = db.execute("SELECT * FROM prompts WHERE row=? AND answer IS NOT NULL", (row,))
            return next(self._rows.read(db, found, outgoing_of), None)

    def replace(self, row: int, answer: Answer) -> None:
        """Replaces an answer that the broker can never take (it is too large)."""
        with self._file.transaction() as db:
            db.execute(
                f"UPDATE prompts SET answer=?, properties=? WHERE row=? AND {_WAITS}",
                (answer.payload, json.dumps(answer.properties), row),
            )

    def delivered(self, row: int) -> None:
        """The broker has the answer (PUBACK), or the control connection took it."""
        self._end(row, State.DELIVERED)

    def give_up(self, row: int) -> None:
        """The broker does not take the answer, or nobody does. Only a repeat of its request puts it back."""
        self._end(row, State.UNDELIVERED)

    def postpone(self, row: int, *, tries: int, unheard: int = 0, until_boot_s: float) -> None:
        """Tries an answer again later, behind all that were not tried.

        Args:
            tries: how often the broker has refused it by now.
            unheard: how often nobody had subscribed.
            until_boot_s: when, as a moment's `boot_s`; over 0.
        """
        with self._file.transaction(durable=False) as db:
            db.execute(
                f"UPDATE prompts SET tries=?, unheard=?, retry_boot_s=? WHERE row=? AND {_WAITS}",
                (tries, unheard, until_boot_s, row),
            )

    def heard(self, topic: str) -> None:
        """Somebody listens to this topic again: answers for it that nobody had heard wait for nothing any more."""
        with self._file.transaction(durable=False) as db:
            db.execute(
                f"UPDATE prompts SET retry_boot_s=0 WHERE {_WAITS} AND source=? AND retry_boot_s>0 AND unheard>0"
                " AND tries=0 AND answer_topic=?",
                (Source.MQTT, topic),
            )

    def suspect(self, topics: Collection[str], *, moment: Moment) -> None:
        """Puts all answers to these topics behind the others; they are due at once, and tried one at a time."""
        with self._file.transaction(durable=False) as db:
            for topic in topics:
                db.execute(
                    f"UPDATE prompts SET retry_boot_s=? WHERE {_WAITS} AND source=? AND retry_boot_s=0"
                    " AND answer_topic=?",
                    (moment.boot_s, Source.MQTT, topic),
                )

    def pending(self) -> int:
        """Answers that wait to be delivered."""
        with self._file.transaction() as db:
            return int(db.execute(f"SELECT count(*) FROM prompts WHERE {_WAITS}").fetchone()[0])

    def _end(self, row: int, state: State) -> None:
        with self._file.transaction(durable=False) as db:
            db.execute(f"UPDATE prompts SET state=? WHERE row=? AND {_WAITS}", (state, row))

    def _read(
        self, db: sqlite3.Connection, found: sqlite3.Cursor, limit: int, skip: Collection[int]
    ) -> list[Outgoing]:
        wanted = [row for row in found.fetchall() if row["row"] not in skip]
        return list(self._rows.read(db, wanted, outgoing_of))[:limit]
