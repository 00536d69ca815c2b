"""How long the journal keeps what is finished: by age, number and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_agent.chat.clock import Moment
from edge_agent.chat.prompt import State
from edge_agent.chat.rows import FINISHED
from edge_agent.host.clock import SET_AFTER_S

if TYPE_CHECKING:
    import sqlite3

WALL_CLOCK_STEP_S = 5.0
MAX_FINISHED = 10_000
MAX_FINISHED_BYTES = 64 << 20


def correct_times(db: sqlite3.Connection, moment: Moment) -> None:
    """Corrects the times that this boot wrote with a wrong wall clock, and gives one to an answer that has none."""
    # A device without a clock battery learns the time after it has booted. What this boot wrote before is corrected,
    # so that the next boot can tell its age. Small steps of the clock (NTP) are left alone: each of them would write
    # every row again.
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
    if moment.wall_s >= SET_AFTER_S:
        # Of a boot that never learned the time nobody can tell how long ago it was: its answers are as of now.
        db.execute(
            "UPDATE prompts SET answered_boot_id=?, answered_boot_s=?, answered_wall_s=?"
            " WHERE state IN (?, ?, ?) AND answered_boot_id != ? AND answered_wall_s < ?",
            (moment.boot_id, moment.boot_s, moment.wall_s, *FINISHED, moment.boot_id, SET_AFTER_S),
        )
    db.execute(
        "UPDATE prompts SET answered_boot_id=?, answered_boot_s=?, answered_wall_s=? WHERE state IN (?, ?, ?)"
        " AND (typeof(answered_boot_id), typeof(answered_boot_s), typeof(answered_wall_s))"
        " != ('text', 'real', 'real')",
        (moment.boot_id, moment.boot_s, moment.wall_s, *FINISHED),
    )


def forget_finished(db: sqlite3.Connection, moment: Moment, *, ttl_s: float) -> int:
    """Deletes answers over the limits, first those that wait for nobody. Gives the number of those that still waited
    to be delivered."""
    rows = db.execute(
        "SELECT row, state, answered_boot_id, answered_boot_s, answered_wall_s,"
        " ifnull(length(answer), 0) + ifnull(length(document), 0) + 512 AS bytes"
        " FROM prompts WHERE state IN (?, ?, ?)"
        " ORDER BY state=? DESC, answered_wall_s DESC, row DESC",
        (*FINISHED, State.ANSWERED),
    ).fetchall()
    kept_bytes = dropped = 0
    for position, row in enumerate(rows):
        kept_bytes += row["bytes"]
        answered = Moment(
            boot_id=row["answered_boot_id"],
            boot_s=row["answered_boot_s"],
            wall_s=row["answered_wall_s"],
        )
        if moment.since(answered) > ttl_s or position >= MAX_FINISHED or kept_bytes > MAX_FINISHED_BYTES:
            db.execute("DELETE FROM prompts WHERE row=?", (row["row"],))
            dropped += row["state"] == State.ANSWERED
    return dropped
