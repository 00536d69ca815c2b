"""What devices answer before anything moves, and how a console that follows them sees each change."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest

from edge_agent.cli.fleet import plan as command
from edge_agent.fleet import survey
from edge_agent.fleet.broker import Outgoing
from edge_agent.fleet.devices import Fleet
from edge_agent.fleet.plan import ANSWER_TIMEOUT_S, AT_ONCE, OUTCOMES, SLOW_S, Answer, ask, read_answer
from edge_agent.terminal import Rows
from tests.support.scripted_fleet import TOPICS, ScriptedFleetBroker, device, status

NOW = 1_790_000_000.0
CAN: dict[str, Any] = {
    "missing_bytes": 100,
    "free_bytes": 1_000,
    "fits": True,
    "would_start_at": None,
    "code": None,
    "reason": "",
}


def planned(broker: ScriptedFleetBroker, expected: tuple[str, ...] = ()) -> dict[str, Answer]:
    fleet = Fleet(TOPICS, expected)
    fleet.take_all(broker.collect(survey.filters(TOPICS, None)))
    answers = ask(
        broker, TOPICS, fleet.devices(), model="assistant", version=8, now=NOW, clock=broker.clock.clock
    )
    return {answer.device_id: answer for answer in answers}


def fleet_of(count: int, **fields: Any) -> ScriptedFleetBroker:
    retained: dict[str, bytes] = {}
    for number in range(count):
        retained |= device(f"d{number:04}", **fields)
    return ScriptedFleetBroker(retained)


def asked(broker: ScriptedFleetBroker) -> list[str]:
    return [message.topic for message in broker.published if message.topic.endswith("/ctl/plan")]


def answering(broker: ScriptedFleetBroker, **answer: Any) -> None:
    """Each device answers at once."""

    def reply(message: Outgoing) -> None:
        request = json.loads(message.body)
        body = {"id": request["id"], **CAN, **answer}
        broker.say(request["reply_to"], body, retain=False)

    broker.on_publish = reply


def test_each_device_is_asked_and_answers_for_itself() -> None:
    broker = fleet_of(2)
    answering(broker)
    assert {answer.outcome for answer in planned(broker).values()} == {"now"}
    request = json.loads(broker.published[0].body)
    assert broker.published[0].topic == "edge/v1/d0000/ctl/plan"
    assert (request["model"], request["version"]) == ("assistant", 8)
    assert request["reply_to"] == f"replies/console/d0000/{request['id']}"
    assert not any(message.retain for message in broker.published)


def test_who_is_not_there_is_not_asked() -> None:
    other = {TOPICS.of("other").reported: b'{"models": {"small": {"version": 1}}}'}
    other[TOPICS.of("other").status] = json.dumps(status()).encode()
    broker = ScriptedFleetBroker({**device("gone", "offline"), **other})
    answers = planned(broker, expected=("new",))
    assert {each: answer.outcome for each, answer in answers.items()} == {
        "gone": "offline",
        "new": "never_seen",
        "other": "no_model",
    }
    assert asked(broker) == []


def test_a_device_that_does_not_answer_has_had_its_time() -> None:
    broker = fleet_of(1)
    began_s = broker.clock.now_s
    assert planned(broker)["d0000"].outcome == "silent"
    assert ANSWER_TIMEOUT_S <= broker.clock.now_s - began_s <= ANSWER_TIMEOUT_S + 2


def test_devices_that_do_not_answer_hold_up_the_others_for_a_moment_only() -> None:
    broker = fleet_of(AT_ONCE * 4)
    began_s = broker.clock.now_s
    assert {answer.outcome for answer in planned(broker).values()} == {"silent"}
    assert broker.clock.now_s - began_s <= 3 * SLOW_S + ANSWER_TIMEOUT_S + 2


def test_a_thousand_devices_are_asked_a_few_at_a_time() -> None:
    broker = fleet_of(200)
    unanswered: list[Any] = []
    most = 0

    def answer_together(message: Outgoing) -> None:
        nonlocal most
        unanswered.append(json.loads(message.body))
        most = max(most, len(unanswered))
        if len(unanswered) == AT_ONCE or len(asked(broker)) == 200:
            for request in unanswered:
                broker.say(request["reply_to"], {"id": request["id"], **CAN}, retain=False)
            unanswered.clear()

    broker.on_publish = answer_together
    assert Counter(answer.outcome for answer in planned(broker).values()) == {"now": 200}
    assert most == AT_ONCE
    assert broker.clock.now_s < SLOW_S, "nobody had to wait for a time to pass"


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ({}, "now"),
        ({"would_start_at": NOW + 1}, "now"),
        ({"fits": None}, "now"),
        ({"would_start_at": NOW + 3_600}, "later"),
        ({"code": "link_held"}, "later"),
        ({"code": "link_held", "would_start_at": NOW + 3_600}, "later"),
        ({"fits": False}, "cannot"),
        ({"code": "memory_short", "fits": False}, "cannot"),
        ({"code": "cache_full", "fits": False}, "cannot"),
        ({"code": "quarantined"}, "cannot"),
        ({"code": "pinned", "fits": None}, "cannot"),
        ({"code": "registry_unreachable", "fits": None}, "unknown"),
        ({"code": "queue_full", "fits": None}, "unknown"),
        ({"code": "unknown_model", "fits": None}, "no_model"),
        ({"code": "quarantined", "would_start_at": NOW + 3_600}, "cannot"),
    ],
)
def test_an_answer_says_whether_and_when(answer: dict[str, Any], outcome: str) -> None:
    broker = fleet_of(1)
    answering(broker, **answer)
    found = planned(broker)["d0000"]
    assert found.outcome == outcome
    assert (found.missing_bytes, found.free_bytes) == (100, 1_000)
    assert found.code == answer.get("code")


@pytest.mark.parametrize("body", [b"", b"rubbish", b"[]", b'{"id": "another"}'])
def test_what_is_no_answer_counts_as_none(body: bytes) -> None:
    assert read_answer("a", body, plan_id="plan-1", now=NOW) is None


def test_an_answer_of_another_form_ends_no_plan() -> None:
    odd = {"missing_bytes": "many", "free_bytes": -1, "fits": "yes", "would_start_at": [], "code": 7}
    answer = read_answer("a", json.dumps(odd).encode(), plan_id="plan-1", now=NOW)
    assert answer == Answer(device_id="a", outcome="now")


def test_a_plan_for_people_groups_the_answers() -> None:
    answers = [
        Answer(device_id="a", outcome="now", missing_bytes=2_000_000),
        Answer(device_id="b", outcome="now", missing_bytes=1_000_000),
        Answer(device_id="c", outcome="cannot", code="memory_short", fits=False),
        Answer(device_id="d", outcome="later", code="link_held", would_start_at=NOW, missing_bytes=0),
        Answer(device_id="e", outcome="silent"),
    ]
    title, _, rows = command.page("assistant", 8, answers)
    assert title == "model assistant, version 8: 5 devices"
    assert isinstance(rows, Rows)
    assert [row[:4] for row in rows.rows] == [
        ("can take it now", 2, None, "3.0 MB, 2.0 MB at most"),
        ("can take it later", 1, "link_held", "nothing"),
        ("cannot take it", 1, "memory_short", ""),
        ("did not answer", 1, None, ""),
    ]
    document = command.document("assistant", 8, answers)
    assert document["counts"] == {
        **dict.fromkeys(OUTCOMES, 0),
        "now": 2,
        "later": 1,
        "cannot": 1,
        "silent": 1,
    }
    assert document["devices"][2]["device"] == "c"
    assert document["devices"][2]["code"] == "memory_short"


def test_a_fleet_that_is_followed_shows_each_change() -> None:
    broker = fleet_of(3)
    fleet = Fleet(TOPICS)
    changes = survey.follow(broker, fleet, survey.filters(TOPICS, None), clock=broker.clock.clock)
    assert next(changes) == {"d0000", "d0001", "d0002"}
    broker.say(TOPICS.of("d0001").status, status("offline"))
    broker.say(TOPICS.rollout("assistant"), {"state": "planned"})
    assert next(changes) == {"d0001"}
    assert fleet.device("d0001").state == "offline"
    assert next(changes) == frozenset()


def test_a_fleet_that_never_is_quiet_is_shown_all_the_same() -> None:
    broker = fleet_of(1)
    numbers = itertools.count()

    def speak(_now_s: float) -> None:
        broker.say(TOPICS.of("d0000").status, status(seq=next(numbers)))

    broker.on_wait = speak
    changes = survey.follow(broker, Fleet(TOPICS), survey.filters(TOPICS, None), clock=broker.clock.clock)
    for _ in range(3):
        assert next(changes) == {"d0000"}
