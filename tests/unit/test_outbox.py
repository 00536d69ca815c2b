"""What answers that a broker does not take cost the others: nothing."""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Answer, Outgoing, State
from edge_agent.errors import JournalUnavailable
from edge_agent.transport.outbox import MAX_REFUSALS, Refusal
from edge_agent.transport.retries import RETRY_WAITS_S, UNHEARD_WAITS_S
from edge_agent.transport.suspicion import LAST_WAIT_S, REFUSALS_LOST
from tests.support.scripted_broker import HANGS_UP, NOBODY_LISTENS, NOT_AUTHORIZED, SAYS_NOTHING, TAKES, Room

TRIES = 1 + len(RETRY_WAITS_S)
LONG_S = sum(RETRY_WAITS_S) + 60
NEW = "replies/good/1"


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    made = Room(tmp_path)
    yield made
    made.journal.close()


def forbids(way: str) -> object:
    """A broker with a rule against topics under `replies/bad`."""
    return lambda topic: way if topic.startswith("replies/bad") else TAKES


@pytest.fixture(params=[NOT_AUTHORIZED, HANGS_UP])
def strict(room: Room, request: pytest.FixtureRequest) -> Room:
    """A broker that has a rule, and says so or ends the connection."""
    room.rule = forbids(request.param)  # type: ignore[assignment]
    room.turn()
    return room


def test_an_answer_that_the_broker_does_not_take_is_undelivered_after_a_few_tries(
    strict: Room, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    row = strict.answer("replies/bad/1")
    strict.pass_by(LONG_S)
    assert strict.states() == [State.UNDELIVERED]
    assert strict.log == ["replies/bad/1"] * TRIES
    assert strict.counters["answers_undelivered"] == 1
    (line,) = [record.getMessage() for record in caplog.records if "undelivered" in record.getMessage()]
    assert f"row={row} tries={TRIES}" in line
    strict.pass_by(1000, step_s=10)
    strict.restart()
    strict.pass_by(1000, step_s=10)
    assert len(strict.log) == TRIES


def test_a_reply_that_nobody_asks_for_again_outlives_a_connection_and_a_refusal_does_not(room: Room) -> None:
    room.refuse("replies/refused", mid=5)
    answer = Answer(payload=b"{}", properties={})
    room.outbox.reply(
        Refusal(topic="replies/plan", correlation=None, form=Form.JSON, answer=answer, lasting=True)
    )
    room.outbox.end(room.connection)
    room.connect()
    room.turn()
    assert room.log == ["replies/plan"]
    room.outbox.end(room.connection)
    room.connect()
    room.turn()
    assert room.log == ["replies/plan"], "once"


def test_replies_to_whoever_asks_faster_than_the_broker_takes_them_are_bounded(room: Room) -> None:
    """Their questions were acked: nothing else holds anybody back."""
    answer = Answer(payload=b"{}", properties={})
    for number in range(MAX_REFUSALS + 10):
        topic = f"replies/{number}"
        room.outbox.reply(Refusal(topic=topic, correlation=None, form=Form.JSON, answer=answer, lasting=True))
    assert room.counters["refusals_dropped"] == 10
    for _ in range(MAX_REFUSALS):
        room.turn()
    assert room.log == [f"replies/{number}" for number in range(MAX_REFUSALS)]


def test_the_tries_are_counted_over_restarts(strict: Room) -> None:
    strict.answer("replies/bad/1")
    for _ in range(TRIES):
        strict.restart()
        strict.pass_by(max(RETRY_WAITS_S) + LAST_WAIT_S + 10)
    assert len(strict.log) == TRIES


def test_an_end_that_takes_every_puback_with_it_is_no_endless_loop(room: Room) -> None:
    """All that waits goes at once on a new connection, and nothing on it has worked before it ends."""
    room.rule, room.abrupt = forbids(HANGS_UP), True  # type: ignore[assignment]
    for topic in ("replies/good/1", "replies/bad/1", "replies/good/2"):
        room.answer(topic, told=False)
    room.restart()
    room.pass_by(LONG_S)
    assert room.states() == [State.DELIVERED, State.UNDELIVERED, State.DELIVERED]
    assert room.ends <= TRIES + 2, "one end that told nothing, and one beside another answer"


def test_a_mended_rule_gets_the_answer_that_was_refused(strict: Room) -> None:
    strict.answer("replies/bad/1")
    strict.pass_by(20)
    strict.rule = lambda topic: TAKES
    strict.pass_by(LONG_S)
    assert strict.states() == [State.DELIVERED]


def test_a_new_answer_goes_before_all_that_were_refused(room: Room) -> None:
    room.rule = forbids(NOT_AUTHORIZED)  # type: ignore[assignment]
    for number in range(200):
        room.answer(f"replies/bad/{number}")
        room.turn(0.01)
    room.pass_by(5)
    room.restart()
    for _ in range(20):
        before = len(room.log)
        room.answer(NEW)
        room.turn(1.0)
        assert room.log[before] == NEW


def test_a_new_answer_goes_before_those_that_an_earlier_version_left_behind(strict: Room) -> None:
    for number in range(200):
        strict.answer(f"replies/bad/{number}", told=False)
    strict.restart()
    ends = strict.ends
    waited = []
    for _ in range(20):
        strict.answer(NEW)
        before, turns = len(strict.log), 0
        while NEW not in strict.log[before:]:
            strict.turn(0.1)
            turns += 1
        waited.append(turns)
        strict.pass_by(5)
    assert sorted(waited)[15] <= 1, "a turn after it was given, but for a few that meet a connection's end"
    assert strict.ends - ends < 200 / 4


def test_answers_that_end_connections_end_few_of_them_however_many_there_are(room: Room) -> None:
    room.rule = forbids(HANGS_UP)  # type: ignore[assignment]
    for number in range(300):
        room.answer(f"replies/bad/{number}", told=False)
    room.restart()
    hour_s = 3600
    room.pass_by(hour_s)
    assert 5 < room.ends < 20 + hour_s / LAST_WAIT_S * 1.2


def test_who_was_under_way_beside_the_cause_gets_his_answers(room: Room) -> None:
    room.rule = forbids(HANGS_UP)  # type: ignore[assignment]
    room.turn()
    for number in range(8):
        room.answer(f"replies/good/{number}")
        room.answer(f"replies/bad/{number % 2}")
    room.pass_by(LONG_S)
    assert room.states().count(State.DELIVERED) == 8
    room.pass_by(LONG_S * 8, step_s=3)
    assert collections.Counter(room.states()) == {State.DELIVERED: 8, State.UNDELIVERED: 8}
    assert {topic for topic in room.log if "good" in topic} == {f"replies/good/{n}" for n in range(8)}
    room.answer("replies/good/0")
    room.turn()
    assert room.log[-1] == "replies/good/0", "nothing is held against it any more"


def test_a_client_that_asks_again_and_again_ends_no_second_connection(room: Room) -> None:
    room.rule = forbids(HANGS_UP)  # type: ignore[assignment]
    room.answer(NEW)
    room.turn()
    for _ in range(50):
        room.answer("replies/bad/1")
        room.answer(NEW)
        room.turn(0.01)
        room.turn(0.01)
    assert room.ends == 1
    assert room.states().count(State.DELIVERED) == 51


def test_a_broker_that_goes_away_at_each_answer_for_an_hour_costs_none_of_them(room: Room) -> None:
    """It restarts, is cut off, falls silent: nothing of it is the answer's fault."""
    room.turn()
    room.rule = lambda topic: SAYS_NOTHING
    rows = [room.answer(f"replies/good/{number}") for number in range(3)]
    for reason in [0x8B, 0x8D, 0x98, 0x8E] * 50:
        room.turn(1.0)
        room.hang_up(reason)
    for _ in range(50):  # a connection that breaks before the broker has said anything at all
        room.turn(1.0)
        room.hang_up()
    for _ in range(20):
        room.turn(60.0)  # half an hour without a word, then a reset
        room.hang_up()
    room.rule = lambda topic: TAKES
    room.pass_by(60)
    assert room.states() == [State.DELIVERED] * len(rows)


def test_a_refusal_that_ends_connections_is_not_sent_for_ever(room: Room) -> None:
    """Its message is not acked, so it comes again with each connection."""
    room.rule = forbids(HANGS_UP)  # type: ignore[assignment]
    room.turn()
    begun_s = room.now_s
    while not room.client.acked:
        assert room.now_s < begun_s + LONG_S
        ends = room.ends
        room.refuse("replies/bad/1", 7)
        while room.ends == ends and not room.client.acked:
            room.turn(1.0)
    assert room.client.acked == [7]
    assert room.ends == REFUSALS_LOST
    assert room.log == ["replies/bad/1"] * REFUSALS_LOST
    assert room.counters["refusals_dropped"] == 1


def test_a_refusal_reaches_its_client_though_the_line_broke_beneath_it_again_and_again(room: Room) -> None:
    """With other answers under way, and alone."""
    room.turn()
    for number in range(20):
        room.rule = lambda topic: SAYS_NOTHING if "good" in topic else TAKES
        if number % 2:
            room.answer("replies/good/2")
        room.refuse("replies/good/1", 7)
        room.turn(3)
        room.turn()
        assert "replies/good/1" in [message.topic for message in room.client.published]
        room.hang_up()
        if number % 4 < 3:  # four ends in a row
            continue
        room.rule = lambda topic: TAKES
        room.refuse("replies/good/1", 7)
        room.pass_by(5)
        assert room.client.acked == [7]
    assert room.counters["refusals_dropped"] == 0


def test_a_refusal_that_ends_connections_takes_no_other_with_it(room: Room) -> None:
    """Both come again with each connection, in the same moment."""
    room.rule = forbids(HANGS_UP)  # type: ignore[assignment]
    room.answer("replies/good/1")
    room.turn()
    acked: set[int] = set()
    begun_s, ends = room.now_s, -1
    while acked != {7, 8}:
        assert room.now_s < begun_s + LONG_S
        if room.ends != ends:
            ends = room.ends
            for mid, topic in ((7, "replies/bad/1"), (8, "replies/good/1")):
                if mid not in acked:
                    room.refuse(topic, mid)
        room.turn(0.5)
        acked |= set(room.client.acked)
    assert room.ends <= REFUSALS_LOST + 1
    assert room.counters["refusals_dropped"] == 1


def test_refusals_for_many_topics_that_end_connections_hold_up_delivery_for_a_minute_at_most(
    room: Room,
) -> None:
    """Un-acked messages up to the Receive Maximum: until then the broker sends no other."""
    room.rule = forbids(HANGS_UP)  # type: ignore[assignment]
    room.turn()
    waiting, acked = set(range(16)), set[int]()
    begun_s, ends = room.now_s, -1
    while waiting - acked:
        assert room.now_s < begun_s + 60
        if room.ends != ends:
            ends = room.ends
            for mid in sorted(waiting - acked):
                room.refuse(f"replies/bad/{mid}", mid)
        room.turn(0.5)
        acked |= set(room.client.acked)
    assert room.ends <= REFUSALS_LOST + 1


def test_an_answer_that_may_end_the_connection_does_not_wait_for_a_puback_that_does_not_come(
    room: Room,
) -> None:
    room.rule = lambda topic: SAYS_NOTHING if "mute" in topic else HANGS_UP if "good" in topic else TAKES
    room.turn()
    room.answer("replies/mute")
    room.turn(11)
    row = room.answer("replies/good/1")
    room.turn()
    assert room.ends == 1
    room.rule = lambda topic: SAYS_NOTHING if "mute" in topic else TAKES
    room.pass_by(30)
    assert room.states()[row - 1] is State.DELIVERED


def test_chunks_that_end_connections_are_left_out(room: Room) -> None:
    room.rule = forbids(HANGS_UP)  # type: ignore[assignment]
    room.turn()
    prompt = room.prompt("replies/bad/1")
    for _ in range(20):
        room.outbox.chunk(prompt, {})
        room.turn(0.05)
    assert room.ends == 1
    room.answer(NEW)
    room.pass_by(2)
    assert NEW in room.log


def test_chunks_that_end_connections_cost_no_answer_beside_them_a_try(room: Room) -> None:
    room.turn()
    room.answer(NEW)
    room.turn()
    room.rule = lambda topic: HANGS_UP if "bad" in topic else SAYS_NOTHING if "good" in topic else TAKES
    row = room.answer(NEW)
    room.turn()
    room.outbox.chunk(room.prompt("replies/bad/1"), {})
    room.turn()
    assert room.ends == 1
    outgoing = room.journal.deliveries.of(row)
    assert outgoing is not None and outgoing.tries == 0
    room.rule = forbids(HANGS_UP)  # type: ignore[assignment]
    room.pass_by(3)
    assert room.states()[row - 1] is State.DELIVERED


def test_an_answer_whose_ack_never_comes_holds_nobody_up(room: Room) -> None:
    room.turn()
    room.answer(NEW)
    room.hang_up()  # from here on the outbox is careful
    room.rule = lambda topic: SAYS_NOTHING if "mute" in topic else TAKES
    room.answer("replies/mute")
    room.answer("replies/good/2")
    room.pass_by(10)
    assert "replies/good/2" in room.log


# --- Nobody has subscribed ----------------------------------------------------------------------------------


def deaf(topic: str) -> str:
    """A broker whose clients for topics under `replies/away` are not there."""
    return NOBODY_LISTENS if topic.startswith("replies/away") else TAKES


def test_an_answer_that_nobody_subscribed_to_is_tried_for_five_minutes_and_is_then_undelivered(
    room: Room,
) -> None:
    room.rule = deaf
    room.answer("replies/away/1")
    times: list[float] = []
    begun_s = room.now_s
    while room.states() == [State.ANSWERED]:
        tried = len(room.log)
        room.turn(0.5)
        times += [room.now_s - begun_s] * (len(room.log) - tried)
    assert times[0] == 0.5
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) == len(UNHEARD_WAITS_S)
    assert all(wait <= gap <= wait + 2 for gap, wait in zip(gaps, UNHEARD_WAITS_S, strict=True))
    assert sum(UNHEARD_WAITS_S) == 300
    assert room.states() == [State.UNDELIVERED]
    assert room.counters["answers_undelivered"] == room.counters["answers_unheard"] == 1
    assert room.counters["answers_refused"] == 0, "it is no refusal"


def test_a_client_that_comes_back_gets_the_answer_at_the_next_try(room: Room) -> None:
    room.rule = deaf
    room.answer("replies/away/1")
    room.pass_by(100)
    room.rule = lambda topic: TAKES
    room.pass_by(17)
    assert room.states() == [State.DELIVERED]


def test_tries_before_nobody_are_counted_over_restarts_of_the_daemon(room: Room) -> None:
    room.rule = deaf
    room.answer("replies/away/1")
    for _ in range(10):
        room.restart()
        room.pass_by(60)
    assert len(room.log) == 1 + len(UNHEARD_WAITS_S)
    assert room.states() == [State.UNDELIVERED]


def test_the_first_answer_that_is_heard_brings_all_others_for_its_topic(room: Room) -> None:
    room.rule = deaf
    for _ in range(100):
        room.answer("replies/away/1")
    elsewhere = room.answer("replies/away/2")
    for _ in range(40):
        room.turn(1.0)
    room.rule = lambda topic: NOBODY_LISTENS if topic == "replies/away/2" else TAKES
    room.answer("replies/away/1")
    for _ in range(60):
        room.turn(0.01)
    assert room.states()[elsewhere - 1] is State.ANSWERED
    assert room.states().count(State.DELIVERED) == 101


def test_answers_that_nobody_hears_delay_no_other(room: Room) -> None:
    room.rule = deaf
    for number in range(150):
        room.answer(f"replies/away/{number}")
        room.turn(0.01)
    for _ in range(50):
        before = len(room.log)
        room.answer(NEW)
        room.turn(0.7)
        assert room.log[before] == NEW


def test_tries_before_nobody_and_refusals_are_counted_apart(room: Room) -> None:
    room.rule = deaf
    room.answer("replies/away/1")
    room.pass_by(100)
    room.rule = lambda topic: NOT_AUTHORIZED
    room.pass_by(20)
    room.rule = lambda topic: TAKES
    room.pass_by(LONG_S)
    assert room.states() == [State.DELIVERED]


def test_a_repeat_of_the_request_begins_the_tries_anew(room: Room) -> None:
    room.rule = deaf
    row = room.answer("replies/away/1", identity=b"same")
    room.pass_by(400)
    assert room.states() == [State.UNDELIVERED]
    assert room.accept("replies/away/1", identity=b"same") == row
    room.outbox.answered(row)
    room.turn(1.0)
    assert room.states() == [State.ANSWERED]
    outgoing = room.journal.deliveries.of(row)
    assert outgoing is not None and (outgoing.tries, outgoing.unheard) == (0, 1)


def rests(room: Room) -> bool:
    return room.outbox.rests


def test_it_rests_while_no_answer_waits(room: Room) -> None:
    room.pass_by(10)
    assert rests(room)
    room.answer(NEW)
    assert not rests(room)
    room.pass_by(10)
    assert room.log == [NEW]
    assert rests(room)
    room.outbox.begin()
    assert not rests(room), "a new connection may be to a broker that takes what the last one did not"


@pytest.mark.parametrize("way", [NOT_AUTHORIZED, NOBODY_LISTENS, HANGS_UP])
def test_it_does_not_rest_while_an_answer_is_to_be_tried_again(room: Room, way: str) -> None:
    room.rule = forbids(way)  # type: ignore[assignment]
    room.answer("replies/bad/1")
    while room.states() != [State.UNDELIVERED]:
        assert not rests(room)
        room.pass_by(1)


def test_a_rest_is_no_longer_than_a_minute_for_an_answer_that_nobody_told_of(room: Room) -> None:
    room.pass_by(10)
    room.answer(NEW, told=False)
    room.pass_by(65)
    assert room.log == [NEW]


def test_an_answer_that_comes_while_the_journal_is_asked_for_others_ends_the_rest(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told of by another thread; then the journal cannot even be read for a moment."""
    deliveries = room.journal.deliveries
    pending, unsent = deliveries.pending, deliveries.unsent

    def overtaken() -> int:
        found = pending()
        monkeypatch.setattr(deliveries, "pending", pending)
        room.answer(NEW)
        return found

    def fails(row: int) -> Outgoing | None:
        monkeypatch.setattr(deliveries, "unsent", unsent)
        raise JournalUnavailable("a disk that fails")

    room.turn(2.0)
    monkeypatch.setattr(deliveries, "pending", overtaken)
    room.turn(2.0)
    assert not rests(room)
    monkeypatch.setattr(deliveries, "unsent", fails)
    room.pass_by(5)
    assert room.log == [NEW]
