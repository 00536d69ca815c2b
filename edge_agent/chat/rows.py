"""The journal's rows as values, and what becomes of a row that is damaged.

SQLite promises no types and has no checksums. Whatever a flipped bit has made of a row, its prompt is answered once or
removed, and no other prompt is held up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from edge_agent.chat import messages
from edge_agent.chat.clock import Moment
from edge_agent.chat.prompt import Answer, Outgoing, Prompt, Source, State
from edge_agent.errors import ModelFailed

if TYPE_CHECKING:
    import sqlite3

log = logging.getLogger(__name__)

T = TypeVar("T")

FINISHED = (State.ANSWERED, State.DELIVERED, State.UNDELIVERED)
"""With an answer."""


class Rows:
    """Reads rows inside the journal's transactions.

    Attributes:
        damaged: rows that could not be read; they were answered 500, or removed where not even that was possible.
        moment: the last one that is known, close enough for the answer to a damaged row.
    """

    def __init__(self, moment: Moment) -> None:
        self.damaged = 0
        self.moment = moment

    def read(
        self, db: sqlite3.Connection, rows: Iterable[sqlite3.Row], read: Callable[[sqlite3.Row], T]
    ) -> Iterator[T]:
        """The values of rows that can be read; a damaged row is given up."""
        for row in list(rows):
            try:
                value = read(row)
            except (ValueError, TypeError, RecursionError):
                self._give_up(db, row)
            else:
                yield value

    def _give_up(self, db: sqlite3.Connection, row: sqlite3.Row) -> None:
        """Answers a damaged row with 500; removes one that was delivered, or whose client is unknown."""
        try:
            outgoing = outgoing_of(row)
        except (ValueError, TypeError, RecursionError):
            outgoing = None
        if outgoing is not None and row["state"] in FINISHED and _is_known(row):
            return  # the answer is undamaged, and nothing else of the row is needed
        self.damaged += 1
        log.warning("prompt damaged code=file_damaged row=%s state=%r", row["row"], row["state"])
        try:
            prompt_id, form = _typed(row, "id", str), messages.Form(_typed(row, "form", str))
            _typed(row, "answer_topic", str)
        except (ValueError, TypeError):
            prompt_id = None
        if prompt_id is None or row["state"] in (State.DELIVERED, State.UNDELIVERED):
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
                self.moment.boot_id, self.moment.boot_s, self.moment.wall_s, row["row"],
            ),
        )  # fmt: skip


def prompt_of(row: sqlite3.Row) -> Prompt:
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
        client=_typed(row, "client", str),
        state=State(row["state"]),
        attempts=_typed(row, "attempts", int),
        accepted_wall_s=_typed(row, "accepted_wall_s", float),
        accepted_boot_s=_typed(row, "accepted_boot_s", float),
        deadline_boot_s=_typed(row, "deadline_boot_s", float),
    )


def accepted_of(row: sqlite3.Row) -> Moment:
    return Moment(
        boot_id=_typed(row, "boot_id", str),
        boot_s=_typed(row, "accepted_boot_s", float),
        wall_s=_typed(row, "accepted_wall_s", float),
    )


def outgoing_of(row: sqlite3.Row) -> Outgoing:
    """The answer of a row; raises as `prompt_of` does."""
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
        tries=row["tries"] if isinstance(row["tries"], int) else 0,
        unheard=row["unheard"] if isinstance(row["unheard"], int) else 0,
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


def marks_for(values: Iterable[object]) -> str:
    """A statement's parameters for values that stand in a list."""
    return ", ".join("?" for _ in values)
