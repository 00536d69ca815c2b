"""The journal's promise: one answer for each accepted prompt, over restarts, damage and clocks that jump."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.chat.clock import Moment
from edge_agent.chat.intake import identity
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Answer, Arrival, Delivery, Source, State
from edge_agent.chat.recovery import MAX_ATTEMPTS
from edge_agent.errors import IdReused, JournalUnavailable, NoModel, QueueFull
from edge_agent.topics import ANONYMOUS

START = Moment(boot_id="boot-1", boot_s=100.0, wall_s=1_000_000.0)


def later(seconds: float, moment: Moment = START) -> Moment:
    return replace(moment, boot_s=moment.boot_s + seconds, wall_s=moment.wall_s + seconds)


def arrival(
    number: int = 1, *, body: bytes = b"body", named: bool = True, delivery: Delivery | None = None
) -> Arrival:
    topic = "replies/a"
    return Arrival(
        id=f"id-{number}",
        identity=identity(topic, None, f"id-{number}") if named else None,
        body_sha256=body,
        source=Source.MQTT,
        model="assistant",
        document={"messages": [{"role": "user", "content": f"question {number}"}]},
        form=Form.JSON,
        stream=False,
        answer_topic=topic,
        correlation=b"c",
        deadline_s=60.0,
        delivery=delivery,
    )


ANSWER = Answer(payload=b'{"answer": 1}', properties={"status": "200"})


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db", moment=START)
    yield journal
    journal.close()


def accept(journal: Journal, what: Arrival, *, moment: Moment = START, depth: int = 32) -> int:
    return journal.accept(what, moment=moment, queue_depth=depth, retry_after_ms=500).row


def reopened(journal: Journal, moment: Moment) -> Journal:
    """The journal as the next daemon finds it after this one was killed."""
    journal.close()
    return Journal(journal.path, moment=moment)


def test_a_prompt_goes_from_queued_to_delivered(journal: Journal) -> None:
    row = accept(journal, arrival())
    claimed = journal.claim("assistant")
    assert claimed is not None
    assert (claimed.row, claimed.attempts, claimed.state) == (row, 1, State.RUNNING)
    assert journal.answer(row, ANSWER, moment=later(1), attempt=1)
    (waiting,) = journal.deliveries.waiting(Source.MQTT, limit=8)
    assert (waiting.row, waiting.topic, waiting.correlation, waiting.answer) == (
        row,
        "replies/a",
        b"c",
        ANSWER,
    )
    journal.deliveries.delivered(row)
    assert journal.deliveries.waiting(Source.MQTT, limit=8) == []
    assert journal.depth() == 0


def test_prompts_are_claimed_in_the_order_in_which_they_came(journal: Journal) -> None:
    rows = [accept(journal, arrival(number)) for number in range(5)]
    claimed = [journal.claim("assistant") for _ in rows]
    assert [prompt.row for prompt in claimed if prompt] == rows
    assert journal.claim("assistant") is None
    assert journal.claim("other") is None


def test_a_second_answer_is_void(journal: Journal) -> None:
    row = accept(journal, arrival())
    assert journal.answer(row, ANSWER, moment=START)
    assert not journal.answer(row, Answer(payload=b"other", properties={}), moment=START)
    assert journal.deliveries.waiting(Source.MQTT, limit=8)[0].answer == ANSWER


def test_an_answer_from_an_attempt_that_was_put_back_is_void(journal: Journal) -> None:
    row = accept(journal, arrival())
    journal.claim("assistant")
    journal.release(row)
    assert not journal.answer(row, ANSWER, moment=START, attempt=1)
    again = journal.claim("assistant")
    assert again is not None
    assert again.attempts == 1


def test_a_repeat_while_it_waits_or_runs_is_nothing_new(journal: Journal) -> None:
    row = accept(journal, arrival())
    for state in (State.QUEUED, State.RUNNING):
        acceptance = journal.accept(arrival(), moment=START, queue_depth=1, retry_after_ms=1)
        assert (acceptance.row, acceptance.new, acceptance.state) == (row, False, state)
        journal.claim("assistant")


def test_a_repeat_of_a_finished_prompt_gets_the_same_bytes_again(journal: Journal) -> None:
    row = accept(journal, arrival())
    journal.answer(row, ANSWER, moment=START)
    journal.deliveries.delivered(row)
    assert accept(journal, arrival()) == row
    assert [outgoing.answer for outgoing in journal.deliveries.waiting(Source.MQTT, limit=8)] == [ANSWER]
    assert journal.claim("assistant") is None


def test_a_repeat_gives_an_undelivered_answer_a_new_chance(journal: Journal) -> None:
    row = accept(journal, arrival())
    journal.answer(row, ANSWER, moment=START)
    journal.deliveries.postpone(row, tries=4, until_boot_s=1e6)
    journal.deliveries.give_up(row)
    assert journal.deliveries.pending() == 0
    assert accept(journal, arrival()) == row
    (outgoing,) = journal.deliveries.waiting(Source.MQTT, limit=8)
    assert (outgoing.row, outgoing.tries) == (row, 0)


def test_a_postponed_answer_stands_behind_all_others_and_comes_at_its_time(journal: Journal) -> None:
    old, new = accept(journal, arrival(1)), accept(journal, arrival(2))
    for row in (old, new):
        journal.answer(row, ANSWER, moment=START)
    journal.deliveries.postpone(old, tries=1, until_boot_s=later(10).boot_s)
    assert [each.row for each in journal.deliveries.waiting(Source.MQTT, limit=8)] == [new]
    assert journal.deliveries.due(Source.MQTT, moment=later(9), limit=8) == []
    (due,) = journal.deliveries.due(Source.MQTT, moment=later(10), limit=8)
    assert (due.row, due.tries) == (old, 1)


def test_after_a_reboot_a_postponed_answer_is_due_and_still_stands_behind(journal: Journal) -> None:
    row = accept(journal, arrival())
    journal.answer(row, ANSWER, moment=START)
    journal.deliveries.postpone(row, tries=3, until_boot_s=later(240).boot_s)
    rebooted = replace(START, boot_id="boot-2", boot_s=5.0)
    journal = reopened(journal, rebooted)
    assert journal.deliveries.waiting(Source.MQTT, limit=8) == []
    (due,) = journal.deliveries.due(Source.MQTT, moment=rebooted, limit=8)
    assert due.tries == 3
    journal.close()


def test_of_ten_thousand_refused_answers_a_look_for_new_ones_reads_none(journal: Journal) -> None:
    for number in range(20):
        row = accept(journal, arrival(number))
        journal.answer(row, ANSWER, moment=START)
        journal.deliveries.postpone(row, tries=1, until_boot_s=1e6)
    with journal._file.transaction() as db:
        plan = db.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM prompts WHERE state='answered' AND source=? AND retry_boot_s=0"
            " ORDER BY row LIMIT ?",
            ("mqtt", 16),
        ).fetchall()
    assert ["prompts_outbox (source=? AND retry_boot_s=?)" in row["detail"] for row in plan] == [True]


def test_an_id_with_another_body_is_refused(journal: Journal) -> None:
    accept(journal, arrival())
    with pytest.raises(IdReused):
        accept(journal, arrival(body=b"another"))


def test_a_full_queue_refuses_at_once_and_forgets_the_refusal(journal: Journal) -> None:
    row = accept(journal, arrival(1), depth=1)
    with pytest.raises(QueueFull) as caught:
        accept(journal, arrival(2), depth=1)
    assert caught.value.retry_after_ms == 500
    journal.answer(row, ANSWER, moment=START)
    assert accept(journal, arrival(2), depth=1) != row


def test_a_redelivery_without_an_id_is_recognised_by_session_and_mid(journal: Journal) -> None:
    first = Delivery(session="s", mid=7, redelivered=False)
    row = accept(journal, arrival(named=False, delivery=first))
    assert accept(journal, arrival(named=False, delivery=replace(first, redelivered=True))) == row


def test_a_redelivery_is_recognised_though_the_agent_made_another_answer_topic(journal: Journal) -> None:
    first = Delivery(session="s", mid=7, redelivered=False)
    made = replace(arrival(named=False, delivery=first), topic_made=True, answer_topic="edge/v1/dev/rsp/one")
    row = accept(journal, made)
    again = replace(made, answer_topic="edge/v1/dev/rsp/two", delivery=replace(first, redelivered=True))
    assert accept(journal, again) == row


def test_a_repeat_is_recognised_while_nothing_new_is_accepted(journal: Journal) -> None:
    row = accept(journal, arrival())
    refusal = NoModel("not now")
    known = journal.accept(arrival(), moment=START, queue_depth=1, retry_after_ms=1, refusal=refusal)
    assert (known.row, known.new) == (row, False)
    with pytest.raises(NoModel):
        journal.accept(arrival(2), moment=START, queue_depth=9, retry_after_ms=1, refusal=refusal)


def test_an_answer_given_before_the_clock_was_right_is_not_old_after_a_reboot(journal: Journal) -> None:
    wrong = replace(START, wall_s=0.0)
    row = accept(journal, arrival(), moment=wrong)
    journal.answer(row, ANSWER, moment=wrong)
    journal.prune(moment=replace(later(10), wall_s=2_000_000_000.0), ttl_s=86_400)
    rebooted = Moment(boot_id="boot-2", boot_s=1.0, wall_s=2_000_000_100.0)
    journal = reopened(journal, rebooted)
    journal.prune(moment=rebooted, ttl_s=86_400)
    assert journal.deliveries.pending() == 1


def test_an_answer_of_a_boot_that_never_learned_the_time_is_not_old_after_a_reboot(journal: Journal) -> None:
    """Nobody can tell how old it is: it is kept for as long as one that was given now."""
    wrong = replace(START, wall_s=0.0)
    journal.answer(accept(journal, arrival(), moment=wrong), ANSWER, moment=wrong)
    rebooted = Moment(boot_id="boot-2", boot_s=1.0, wall_s=2_000_000_100.0)
    journal = reopened(journal, rebooted)
    journal.prune(moment=rebooted, ttl_s=86_400)
    journal.prune(moment=later(86_300, rebooted), ttl_s=86_400)
    assert journal.deliveries.pending() == 1
    journal.prune(moment=later(86_500, rebooted), ttl_s=86_400)
    assert journal.deliveries.pending() == 0


def test_a_look_at_old_answers_writes_nothing_that_has_not_changed(journal: Journal) -> None:
    for number in range(5):
        journal.answer(accept(journal, arrival(number)), ANSWER, moment=START)
    accept(journal, arrival(5))
    before = journal._file._db.total_changes
    journal.prune(moment=later(60, replace(START, wall_s=START.wall_s + 0.2)), ttl_s=86_400)
    assert journal._file._db.total_changes == before
    journal.prune(moment=later(60, replace(START, wall_s=START.wall_s + 100)), ttl_s=86_400)
    assert journal._file._db.total_changes == before + 6, "a clock that was put right"


def test_a_row_that_cannot_be_read_stops_nobody_and_is_answered_500(journal: Journal) -> None:
    bad, good = accept(journal, arrival(1)), accept(journal, arrival(2))
    journal._file._db.execute("UPDATE prompts SET document='{broken' WHERE row=?", (bad,))
    claimed = journal.claim("assistant")
    assert claimed is not None
    assert claimed.row == good
    (outgoing,) = journal.deliveries.waiting(Source.MQTT, limit=8)
    assert (outgoing.row, outgoing.topic) == (bad, "replies/a")
    assert b'"status":500' in outgoing.answer.payload
    assert journal.damaged_rows == 1


def settle_all(journal: Journal) -> list[int]:
    """All that a daemon asks of the journal, until nothing is left to do. Gives the rows whose answer went out."""
    late = later(1e12)
    while (prompt := journal.claim("assistant")) is not None:
        journal.answer(prompt.row, ANSWER, moment=late, attempt=prompt.attempts)
    for prompt in journal.overdue(late):
        assert journal.prompt(prompt.row) is not None
        journal.answer(prompt.row, ANSWER, moment=late)
    for number in range(5):
        journal.find(identity("replies/a", None, f"id-{number}") or b"")
    sent = []
    for _ in range(3):  # one that is damaged comes with the next look
        for outgoing in journal.deliveries.waiting(Source.MQTT, limit=32):
            sent.append(outgoing.row)
            journal.deliveries.delivered(outgoing.row)
    journal.prune(moment=later(1), ttl_s=60)
    assert (journal.depth(), journal.deliveries.pending()) == (0, 0), "nothing stays behind"
    return sent


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("nonsense", ["CAST(x'ff' AS TEXT)", "'jsoo'", "x'00'"])
def test_whatever_is_damaged_in_a_row_it_is_answered_once_or_removed(
    journal: Journal, state: State, nonsense: str
) -> None:
    columns = [column["name"] for column in journal._file._db.execute("PRAGMA table_info(prompts)")][1:]
    rows = {}
    for number, column in enumerate(columns):
        rows[column] = accept(journal, arrival(number))
        if state is not State.QUEUED:
            journal.claim("assistant")
        if state not in (State.QUEUED, State.RUNNING):
            journal.answer(rows[column], ANSWER, moment=START)
        if state is State.DELIVERED:
            journal.deliveries.delivered(rows[column])
        if state is State.UNDELIVERED:
            journal.deliveries.give_up(rows[column])
    for column, row in rows.items():
        journal._file._db.execute(f"UPDATE prompts SET {column}={nonsense} WHERE row=?", (row,))
    journal = reopened(journal, later(1))
    sent = settle_all(journal)
    if state in (State.DELIVERED, State.UNDELIVERED):
        assert set(sent) <= {rows["state"], rows["source"]}, "a repeat where nobody can tell"
    else:
        without = {rows[column] for column in ("id", "form", "answer_topic")}
        assert set(rows.values()) - set(sent) <= without
    assert len(sent) == len(set(sent))
    assert journal.damaged_rows > 0
    journal = reopened(journal, later(2))
    assert settle_all(journal) == []
    journal.close()


def test_no_flipped_bit_on_the_disk_keeps_the_agent_from_its_work(tmp_path: Path) -> None:
    path = tmp_path / "whole.db"
    journal = Journal(path, moment=START)
    for number in range(3):
        accept(journal, arrival(number))
    journal.claim("assistant")
    journal.answer(accept(journal, arrival(3)), ANSWER, moment=START)
    journal.close()
    whole = path.read_bytes()
    first, last = whole.rindex(b"id-3"), whole.rindex(b"boot-1") + 60
    assert 500 < last - first < 4096, "one page has all rows"
    damaged = 0
    for at in range(first - 40, last, 17):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path = tmp_path / f"{at}.db"
        path.write_bytes(flipped)
        journal = Journal(path, moment=later(1))
        assert len(settle_all(journal)) <= 4
        damaged += journal.damaged_rows
        journal.close()
    assert damaged > 3


def test_the_same_text_twice_without_an_id_is_two_prompts(journal: Journal) -> None:
    rows = {
        accept(journal, arrival(named=False, delivery=Delivery(session="s", mid=mid, redelivered=False)))
        for mid in (7, 8)
    }
    assert len(rows) == 2


def test_a_mid_that_was_used_again_recognises_only_its_last_message(journal: Journal) -> None:
    delivery = Delivery(session="s", mid=7, redelivered=False)
    old = accept(journal, arrival(named=False, delivery=delivery))
    new = accept(journal, arrival(named=False, body=b"new", delivery=delivery))
    again = replace(delivery, redelivered=True)
    assert accept(journal, arrival(named=False, body=b"new", delivery=again)) == new
    assert accept(journal, arrival(named=False, delivery=again)) not in (old, new)


def test_mids_of_a_session_that_the_broker_lost_recognise_nothing(journal: Journal) -> None:
    journal.begin_broker_session("s")
    delivery = Delivery(session=journal.broker_session(), mid=7, redelivered=False)
    row = accept(journal, arrival(named=False, delivery=delivery))
    journal.begin_broker_session("t")
    again = Delivery(session=journal.broker_session(), mid=7, redelivered=True)
    assert accept(journal, arrival(named=False, delivery=again)) != row


def test_after_a_death_what_ran_runs_again_and_what_was_answered_is_sent(journal: Journal) -> None:
    running, waiting, done = (accept(journal, arrival(number)) for number in (1, 2, 3))
    journal.answer(done, ANSWER, moment=START)
    journal.claim("assistant")
    journal = reopened(journal, later(5))
    assert [outgoing.row for outgoing in journal.deliveries.waiting(Source.MQTT, limit=8)] == [done]
    claimed = [journal.claim("assistant"), journal.claim("assistant")]
    assert [(prompt.row, prompt.attempts) for prompt in claimed if prompt] == [(running, 2), (waiting, 1)]


def test_a_prompt_that_ran_at_two_deaths_is_answered_500_and_not_run_again(journal: Journal) -> None:
    row = accept(journal, arrival())
    for _ in range(MAX_ATTEMPTS):
        assert journal.claim("assistant") is not None
        journal = reopened(journal, START)
    assert journal.claim("assistant") is None
    (outgoing,) = journal.deliveries.waiting(Source.MQTT, limit=8)
    assert outgoing.row == row
    assert b'"status":500' in outgoing.answer.payload
    assert journal.given_up == ["assistant"], "for the metrics"
    assert reopened(journal, START).given_up == []


def test_prompts_of_the_control_socket_that_nobody_can_ask_for_again_die_with_the_daemon(
    journal: Journal,
) -> None:
    accept(journal, replace(arrival(named=False), source=Source.CONTROL))
    journal = reopened(journal, START)
    assert journal.depth() == 0


def test_a_deadline_holds_over_a_restart_in_the_same_boot_whatever_the_wall_clock_says(
    journal: Journal,
) -> None:
    row = accept(journal, arrival())
    jumped = Moment(boot_id="boot-1", boot_s=130.0, wall_s=9_999_999_999.0)
    journal = reopened(journal, jumped)
    assert journal.overdue(jumped) == []
    assert [prompt.row for prompt in journal.overdue(replace(jumped, boot_s=160.0))] == [row]


def test_a_deadline_counts_the_time_without_power_by_the_wall_clock(journal: Journal) -> None:
    accept(journal, arrival(1))
    soon = Moment(boot_id="boot-2", boot_s=3.0, wall_s=START.wall_s + 30)
    journal = reopened(journal, soon)
    assert journal.overdue(soon) == []
    much_later = Moment(boot_id="boot-3", boot_s=3.0, wall_s=START.wall_s + 90)
    journal = reopened(journal, much_later)
    assert len(journal.overdue(much_later)) == 1


def test_a_device_that_boots_in_the_past_does_not_lose_its_prompts(journal: Journal) -> None:
    accept(journal, arrival())
    past = Moment(boot_id="boot-2", boot_s=3.0, wall_s=0.0)
    journal = reopened(journal, past)
    assert journal.overdue(past) == []
    assert len(journal.overdue(replace(past, boot_s=64.0))) == 1


def test_old_answers_are_forgotten_and_undelivered_ones_counted(journal: Journal) -> None:
    delivered, undelivered = accept(journal, arrival(1)), accept(journal, arrival(2))
    for row in (delivered, undelivered):
        journal.answer(row, ANSWER, moment=START)
    journal.deliveries.delivered(delivered)
    journal.prune(moment=later(50), ttl_s=60)
    assert journal.deliveries.pending() == 1
    journal.prune(moment=later(61), ttl_s=60)
    assert journal.deliveries.pending() == 0
    assert journal.dropped_answers == 1
    assert accept(journal, arrival(1)) not in (delivered, undelivered)


def test_the_file_does_not_grow_with_the_number_of_prompts(journal: Journal) -> None:
    sizes = []
    for round_number in range(4):
        for number in range(60):
            row = accept(journal, arrival(round_number * 100 + number))
            journal.answer(row, Answer(payload=b"x" * 20_000, properties={}), moment=START)
            journal.deliveries.delivered(row)
        journal.prune(moment=later(100), ttl_s=1)
        sizes.append(journal.path.stat().st_size)
    assert sizes[-1] <= 2 * sizes[0]


def damage_one_page(path: Path) -> None:
    """Overwrites one page in the middle of those that hold rows, in place."""
    data = path.read_bytes()
    leaf = 0x0D  # the first byte of a page that holds rows; SQLite's file format, section 1.6
    pages = [
        at for at in range(0, len(data), 4096) if data[at] == leaf and b"question" in data[at : at + 4096]
    ]
    with path.open("r+b") as file:
        file.seek(pages[len(pages) // 2])
        file.write(b"\xa5" * 4096)


def test_a_damaged_journal_is_set_aside_and_what_was_readable_is_kept(journal: Journal) -> None:
    rows = [accept(journal, arrival(number), depth=1000) for number in range(300)]
    journal.close()
    data = bytearray(journal.path.read_bytes())
    leaf = 0x0D  # the first byte of a page that holds rows; SQLite's file format, section 1.6
    pages = [
        at for at in range(0, len(data), 4096) if data[at] == leaf and b"question" in data[at : at + 4096]
    ]
    middle = pages[len(pages) // 2]
    data[middle : middle + 4096] = b"\xa5" * 4096
    journal.path.write_bytes(data)
    journal = Journal(journal.path, moment=START)
    kept = journal.depth()
    assert len(rows) // 2 < kept < len(rows), "one page of many was damaged"
    assert journal.path.with_name("journal.db.damaged-1").exists()
    accept(journal, arrival(1000), depth=1000)
    journal.close()


CUT_OFF = """
import os, signal, sys
from pathlib import Path
from edge_agent.chat import journal_file
from edge_agent.chat.clock import Moment
from edge_agent.chat.journal import Journal

point, calls = int(sys.argv[2]), 0

def count(function):
    def call(*arguments):
        global calls
        calls += 1
        if calls == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

def rows(path, readable=journal_file._readable_rows):
    for number, row in enumerate(readable(path)):
        if point == 0 and number == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

journal_file._readable_rows = rows
Path.rename, journal_file._sync_folder = count(Path.rename), count(journal_file._sync_folder)
Journal(Path(sys.argv[1]), moment=Moment(boot_id="boot-1", boot_s=100.0, wall_s=1e6)).close()
"""


def test_a_rebuild_that_is_killed_at_any_step_loses_no_prompt(journal: Journal, tmp_path: Path) -> None:
    for number in range(150):
        accept(journal, arrival(number), depth=1000)
    journal.begin_broker_session("s")
    journal._file._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    accept(journal, arrival(150), depth=1000)  # in the write-ahead log
    damage_one_page(journal.path)

    def copied(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for part in ("journal.db", "journal.db-wal"):
            shutil.copy(tmp_path / part, folder / part)
        return folder / "journal.db"

    def reopened_ids(path: Path) -> tuple[set[str], str]:
        after = Journal(path, moment=START)
        ids = {prompt.id for prompt in after.overdue(later(1000))}
        session = after.broker_session()
        after.close()
        return ids, session

    expected, session = reopened_ids(copied("whole"))
    assert 75 < len(expected) < 151 and "id-150" in expected and session == "s"
    for point in range(20):
        path = copied(str(point))
        command = [sys.executable, "-c", CUT_OFF, str(path), str(point)]
        status = subprocess.run(command, timeout=60, check=False).returncode
        assert reopened_ids(path) == (expected, session), f"cut off at {point}"
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert 5 < point < 19, "every step had its turn"


SCHEMA_0_1_0 = """
CREATE TABLE prompts(
  row INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL, identity BLOB, body_sha256 BLOB NOT NULL,
  source TEXT NOT NULL, model TEXT NOT NULL, document TEXT NOT NULL, form TEXT NOT NULL, stream INTEGER NOT NULL,
  answer_topic TEXT NOT NULL, topic_made INTEGER NOT NULL, correlation BLOB, session TEXT, mid INTEGER,
  state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  boot_id TEXT NOT NULL, accepted_boot_s REAL NOT NULL, accepted_wall_s REAL NOT NULL, deadline_boot_s REAL NOT NULL,
  answer BLOB, properties TEXT, answered_boot_id TEXT, answered_boot_s REAL, answered_wall_s REAL
);
CREATE UNIQUE INDEX prompts_identity ON prompts(identity) WHERE identity IS NOT NULL;
CREATE INDEX prompts_state ON prompts(state, model, row);
CREATE INDEX prompts_mid ON prompts(session, mid) WHERE mid IS NOT NULL;
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
INSERT_0_1_0 = """
INSERT INTO prompts(id, identity, body_sha256, source, model, document, form, stream, answer_topic, topic_made,
  correlation, session, mid, state, boot_id, accepted_boot_s, accepted_wall_s, deadline_boot_s, answer, properties,
  answered_boot_id, answered_boot_s, answered_wall_s)
VALUES(?, ?, x'00', 'mqtt', 'assistant', '{}', 'json', 0, 'replies/a', 0, NULL, NULL, NULL, ?, 'boot-1', 100.0,
  1000000.0, 160.0, x'7b7d', '{}', 'boot-1', 100.0, 1000000.0)
"""


def test_the_journal_of_0_1_0_is_taken_over_row_by_row_and_can_go_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with sqlite3.connect(path) as db:
        db.executescript(SCHEMA_0_1_0)
        for number, state in enumerate(("queued", "running", "answered", "delivered")):
            db.execute(INSERT_0_1_0, (f"id-{number}", bytes([number]), state))
    db.close()
    for _ in range(2):  # the second time there is nothing to add
        journal = Journal(path, moment=START)
        assert journal.depth() == 2
        assert [each.id for each in journal.deliveries.waiting(Source.MQTT, limit=8)] == ["id-2"]
        assert journal.damaged_rows == 0
        journal.close()
    prompt = (journal := Journal(path, moment=START)).claim("assistant")
    assert prompt is not None and prompt.client == ANONYMOUS
    journal.close()
    with sqlite3.connect(path) as db:  # 0.1.0 names the columns that it writes
        db.execute(INSERT_0_1_0, ("id-9", b"9", "queued"))
    db.close()
    journal = Journal(path, moment=START)
    assert journal.depth() == 3
    journal.close()


def test_nobody_else_can_read_any_file_of_the_journal(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        for start in range(2):
            journal = Journal(tmp_path / "journal.db", moment=START)
            accept(journal, arrival(start))
            names = ("journal.db", "journal.db-wal", "journal.db-shm")
            assert {(tmp_path / name).stat().st_mode & 0o777 for name in names} == {0o600}
            journal.close()
            (tmp_path / "journal.db").chmod(0o644)
    finally:
        os.umask(mask)


def test_a_file_that_is_no_database_gives_way_to_a_new_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"not a database at all" * 1000)
    journal = Journal(path, moment=START)
    assert journal.depth() == 0
    journal.close()


def test_on_a_full_disk_nothing_is_accepted_and_what_was_accepted_is_answered(journal: Journal) -> None:
    row = accept(journal, arrival(1))
    pages = journal._file._db.execute("PRAGMA page_count").fetchone()[0]
    journal._file._db.execute(f"PRAGMA max_page_count={pages}")  # SQLite's own "database or disk is full"
    large = Answer(payload=b"x" * 100_000, properties={"status": "200"})
    with pytest.raises(JournalUnavailable):
        journal.answer(row, large, moment=START)
    assert journal.trouble
    reserve = journal.path.with_name("journal.db.reserve")
    assert not reserve.exists(), "the reserve was not given up"
    reserve.mkdir()  # no room for it yet
    with pytest.raises(JournalUnavailable, match="full"):
        accept(journal, arrival(2))
    journal._file._db.execute("PRAGMA max_page_count=1000000")
    assert journal.answer(row, large, moment=START)
    reserve.rmdir()
    assert accept(journal, arrival(2)) != row
    assert journal.trouble is None


def test_damage_that_shows_while_the_agent_runs_is_mended(journal: Journal) -> None:
    rows = [accept(journal, arrival(number), depth=1000) for number in range(200)]
    journal._file._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    damage_one_page(journal.path)
    journal._file._db.execute("PRAGMA shrink_memory").fetchall()
    with pytest.raises(JournalUnavailable):
        for row in rows:
            journal.prompt(row)
    assert journal.trouble
    journal.mend()
    assert len(rows) // 2 < journal.depth() < len(rows)
    assert journal.trouble is None


def test_a_journal_that_cannot_commit_says_so_and_recovers(journal: Journal) -> None:
    with sqlite3.connect(journal.path, isolation_level=None) as other:
        journal._file._db.execute("PRAGMA busy_timeout=50")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(JournalUnavailable):
            accept(journal, arrival())
        assert journal.trouble
        other.execute("ROLLBACK")
    other.close()
    accept(journal, arrival())
    assert journal.trouble is None


@pytest.mark.parametrize("lost", ["the newest rows", "the file"])
def test_a_prompt_never_has_the_number_of_one_that_is_lost(journal: Journal, lost: str) -> None:
    """What runs, or is on its way to the broker, is known by its number only."""
    accept(journal, arrival(1))
    accept(journal, arrival(2))
    claimed = [journal.claim("assistant"), journal.claim("assistant")]
    running = claimed[-1]
    assert running is not None
    if lost == "the file":
        for part in journal.path.parent.glob("journal.db*"):
            part.unlink()
    else:
        with journal._file.transaction() as db:
            db.execute("DELETE FROM prompts WHERE row=?", (running.row,))
            db.execute("DELETE FROM sqlite_sequence")
        journal._file._damaged = True
    journal.mend()
    row = accept(journal, arrival(3))
    while (other := journal.claim("assistant")) is not None:
        newest = other
    assert newest.row == row > running.row
    assert not journal.answer(running.row, ANSWER, moment=START, attempt=running.attempts)
