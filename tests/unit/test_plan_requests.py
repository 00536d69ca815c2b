"""What becomes of a message on `ctl/plan`, and where its answer goes. What a plan says is scripted."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.chat.prompt import Answer
from edge_agent.errors import QueueFull, UnknownModel
from edge_agent.topics import Topics
from edge_agent.transport.inbound import Inbound
from edge_agent.transport.plan_requests import MAX_BYTES, Planned, PlanRequests

ROOT = "edge/v1/dev"
QUESTION: dict[str, Any] = {
    "id": "p-1",
    "reply_to": "replies/console/dev",
    "model": "assistant",
    "version": 7,
}
NOTHING = {"missing_bytes": None, "free_bytes": None, "fits": None, "would_start_at": None}


@dataclass(frozen=True, kw_only=True)
class Said:
    fits: bool

    def document(self) -> Mapping[str, Any]:
        return {**NOTHING, "fits": self.fits, "code": None, "reason": ""}


class Room:
    """The handler, those whom it asks, and what goes back."""

    def __init__(self) -> None:
        self.counters: collections.Counter[str] = collections.Counter()
        self.sent: list[tuple[str, bytes | None, dict[str, Any]]] = []
        self.asked: list[tuple[str, int, Callable[[Planned], None]]] = []
        self.refusal: Exception | None = None
        topics = Topics(prefix="edge", device_id="dev", reply_prefixes=("replies/",))
        self.requests = PlanRequests(topics=topics, replies=self, ask=self.ask)

    def reply(self, *, topic: str, correlation: bytes | None, answer: Answer) -> None:
        self.sent.append((topic, correlation, json.loads(answer.payload)))

    def ask(self, name: str, version: int, answer: Callable[[Planned], None]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((name, version, answer))

    def send(self, question: Mapping[str, Any] | bytes, **properties: Any) -> None:
        payload = question if isinstance(question, bytes) else json.dumps(question).encode()
        given = {"retained": False, "response_topic": None, "correlation": None, **properties}
        self.requests.on_plan(
            Inbound(topic=f"{ROOT}/ctl/plan", payload=payload, expiry_s=None, delivery=None, **given)
        )


@pytest.fixture
def room() -> Room:
    return Room()


def without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in QUESTION.items() if key not in names}


@pytest.mark.parametrize(
    ("question", "properties", "topic"),
    [
        (QUESTION, {}, "replies/console/dev"),
        (without("reply_to"), {}, f"{ROOT}/rsp/p-1"),
        (without("reply_to"), {"response_topic": "replies/x", "correlation": b"c"}, "replies/x"),
        (b"\xef\xbb\xbf" + json.dumps(QUESTION).encode(), {}, "replies/console/dev"),
    ],
    ids=["body", "no topic", "properties", "a byte order mark"],
)
def test_a_question_is_answered_once_it_is_known(
    room: Room, question: Mapping[str, Any] | bytes, properties: dict[str, Any], topic: str
) -> None:
    room.send(question, **properties)
    ((name, version, answer),) = room.asked
    assert (name, version, room.sent) == ("assistant", 7, []), "the network thread waits for nothing"
    answer(Said(fits=True))
    said = {"id": "p-1", **NOTHING, "fits": True, "code": None, "reason": ""}
    assert room.sent == [(topic, properties.get("correlation"), said)]


def test_without_an_id_the_answer_has_one_that_is_made(room: Room) -> None:
    room.send(without("id"))
    room.asked[0][2](Said(fits=False))
    assert room.sent[0][2]["id"]


@pytest.mark.parametrize(
    "question",
    [
        {**QUESTION, "surprise": 1},
        {**QUESTION, "model": None},
        {**QUESTION, "model": ["assistant"]},
        {**QUESTION, "version": "7"},
        {**QUESTION, "version": 0},
        {**QUESTION, "version": True},
        {**QUESTION, "version": 7.0},
        {**QUESTION, "version": 10**18},
        {**QUESTION, "id": "a b"},
        {**QUESTION, "id": None},
        without("model"),
        without("version"),
    ],
)
def test_what_is_no_question_is_answered_with_a_code_and_counted(
    room: Room, question: dict[str, Any]
) -> None:
    room.send(question)
    ((topic, _, said),) = room.sent
    assert (topic, said["code"], room.asked) == ("replies/console/dev", "bad_request", [])
    assert {key: said[key] for key in NOTHING} == NOTHING
    assert said["reason"]
    assert room.counters["plans_malformed"] == 1


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[1]", b"\xff", b"7", b"[" * 2000, b'{"id": "p-1"' + b" " * MAX_BYTES + b"}"],
)
def test_bytes_that_are_none_are_answered_where_the_message_names_a_topic(room: Room, payload: bytes) -> None:
    room.send(payload, response_topic="replies/x", correlation=b"c")
    assert [(topic, correlation, said["code"]) for topic, correlation, said in room.sent] == [
        ("replies/x", b"c", "bad_request")
    ]
    room.send(payload)
    assert len(room.sent) == 1, "nobody is known who could hear it"
    assert room.counters["plans_malformed"] == 2


@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: json.dumps({"id": text}).encode()))
def test_no_bytes_raise_anything(payload: bytes) -> None:
    room = Room()
    room.send(payload, response_topic="replies/x")
    assert [said["code"] for _, _, said in room.sent] == ["bad_request"]


@pytest.mark.parametrize(
    "topic", ["elsewhere/x", "replies/+", "$SYS/x", "", f"{ROOT}/ctl/plan", "replies/" + "x" * 300, 5, ["x"]]
)
def test_an_answer_topic_that_is_not_allowed_gets_nothing(room: Room, topic: object) -> None:
    room.send({**QUESTION, "reply_to": topic})
    assert (room.sent, room.asked, room.counters["plans_malformed"]) == ([], [], 1)


def test_correlation_data_that_is_too_long_is_not_echoed(room: Room) -> None:
    room.send(QUESTION, correlation=b"c" * 65)
    ((_, correlation, said),) = room.sent
    assert (correlation, said["code"]) == (None, "bad_request")


def test_a_question_that_somebody_retained_is_dropped(room: Room) -> None:
    room.send(QUESTION, retained=True)
    assert (room.sent, room.asked, room.counters["retained_requests"]) == ([], [], 1)


@pytest.mark.parametrize("error", [QueueFull("8 plans wait already"), UnknownModel("no such model")])
def test_a_question_that_is_not_taken_is_answered_at_once(room: Room, error: Exception) -> None:
    room.refusal = error
    room.send(QUESTION)
    ((_, _, said),) = room.sent
    assert said == {"id": "p-1", **NOTHING, "code": error.code, "reason": str(error)}  # type: ignore[attr-defined]
    assert room.counters["plans_refused"] == 1
