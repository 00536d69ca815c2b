"""What a dead daemon left in the journal, and what becomes of it when the next one opens it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_agent.chat.clock import Moment
from edge_agent.chat.prompt import Prompt, Source, State
from edge_agent.chat.rows import Rows, accepted_of, marks_for, prompt_of

if TYPE_CHECKING:
    import sqlite3

MAX_ATTEMPTS = 2
"""A prompt that was running at this many daemon deaths is not run again."""


def take_up_again(db: sqlite3.Connection, rows: Rows, moment: Moment) -> list[Prompt]:
    """Queues again what was running, moves deadlines to this boot, and makes postponed answers due.

    A control connection dies with its daemon, so its prompts have nobody to answer, but for those with an identity:
    their client may ask again.

    Returns:
        Prompts that were running at `MAX_ATTEMPTS` deaths: they must be answered, not run.
    """
    db.execute(
        "DELETE FROM prompts WHERE source=? AND state IN (?, ?, ?) AND identity IS NULL",
        (Source.CONTROL, State.QUEUED, State.RUNNING, State.ANSWERED),
    )
    db.execute(
        "UPDATE prompts SET state=? WHERE source=? AND state=?",
        (State.DELIVERED, Source.CONTROL, State.ANSWERED),
    )
    db.execute(
        "UPDATE prompts SET tries=iif(typeof(tries)='integer', tries, 0),"
        " unheard=iif(typeof(unheard)='integer', unheard, 0),"
        " retry_boot_s=iif(typeof(retry_boot_s)='real' AND retry_boot_s>0, ?, 0) WHERE retry_boot_s!=0"
        " OR typeof(tries)!='integer' OR typeof(unheard)!='integer'",
        (moment.boot_s,),
    )
    lost = db.execute(
        f"SELECT * FROM prompts WHERE state NOT IN ({marks_for(State)}) OR source NOT IN ({marks_for(Source)})",
        (*State, *Source),
    )
    for _ in rows.read(db, lost, prompt_of):
        pass  # no other query would find these rows, and none of them can be read
    unanswered = db.execute("SELECT * FROM prompts WHERE state IN (?, ?)", (State.QUEUED, State.RUNNING))
    dead = []
    for prompt, accepted in rows.read(db, unanswered, lambda row: (prompt_of(row), accepted_of(row))):
        accepted_boot_s = moment.boot_s - moment.since(accepted)
        deadline_boot_s = accepted_boot_s + prompt.deadline_boot_s - prompt.accepted_boot_s
        db.execute(
            "UPDATE prompts SET state=?, boot_id=?, accepted_boot_s=?, deadline_boot_s=? WHERE row=?",
            (State.QUEUED, moment.boot_id, accepted_boot_s, deadline_boot_s, prompt.row),
        )
        if prompt.attempts >= MAX_ATTEMPTS:
            dead.append(prompt)
    return dead
