"""What becomes of a message: accepted, repeated or refused, and where its answer goes."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_agent.chat.clock import Moment
from edge_agent.chat.intake import Intake
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Answer, Delivery, Prompt
from edge_agent.errors import BadRequest
from edge_agent.topics import Topics
from edge_agent.transport.inbound import Inbound
from edge_agent.transport.requests import Requests

NOW = Moment(boot_id="boot-1", boot_s=100.0, wall_s=1_000_000.0)
ROOT = "edge/v1/dev"


@dataclass(kw_only=True)
class Model:
    """A model that is here, and its worker.

    Attributes:
        fault: raised to whoever asks whether it is here.
    """

    fault: Exception | None = None
    reason: str = ""
    service_s: float = 2.0
    abandoned: list[int] = field(default_factory=list)

    @property
    def available(self) -> bool:
        if self.fault:
            raise self.fault
        return True

    def notify(self) -> None: ...

    def abandon(self, row: int) -> None:
        self.abandoned.append(row)


@dataclass(frozen=True, kw_only=True)
class Refused:
    topic: str
    correlation: bytes | None
    form: Form
    document: dict[str, Any]


class Replies:
    """Keeps what goes back."""

    def __init__(self) -> None:
        self.counters: collections.Counter[str] = collections.Counter()
        self.rows: list[int] = []
        self.refused: list[Refused] = []

    def answered(self, row: int) -> None:
        self.rows.append(row)

    def refuse(
        self, *, topic: str, correlation: bytes | None, form: Form, answer: Answer, delivery: Delivery | None
    ) -> None:
        text = answer.payload.decode()
        document = json.loads(text) if form is Form.JSON else {"text": text}
        self.refused.append(Refused(topic=topic, correlation=correlation, form=form, document=document))


class Room:
    """Requests before a real intake and journal."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "journal.db", moment=NOW)
        self.model, self.replies = Model(), Replies()
        self.checks: list[bytes] = []
        self.desired: list[bytes] = []
        self.refusals: list[str] = []
        intake = Intake(
            self.journal,
            models={"assistant": self.model},
            workers={"assistant": self.model},
            queue_depth=4,
            deadline_s=60.0,
            max_deadline_s=3600.0,
            on_answer=lambda source, row: self.replies.answered(row),
        )
        self.requests = Requests(
            topics=Topics(prefix="edge", device_id="dev", reply_prefixes=("replies/",)),
            intake=intake,
            replies=self.replies,
            max_payload_bytes=1024,
            check_updates=self.checks.append,
            desire=self.desired.append,
            now=lambda: NOW,
            note_refusal=self.refusals.append,
        )

    def send(self, name: str, payload: bytes, **properties: Any) -> None:
        """A message to the topic `{root}/{name}`."""
        message = Inbound(
            topic=f"{ROOT}/{name}",
            payload=payload,
            **{
                "retained": False,
                "response_topic": None,
                "correlation": None,
                "expiry_s": None,
                "delivery": None,
                **properties,
            },
        )
        handlers = self.requests.handlers()
        filters = (message.topic, f"{message.topic.rpartition('/')[0]}/+")
        next(handlers[each] for each in filters if each in handlers)(message)

    def ask(self, payload: bytes | dict[str, Any], *, client: str = "", **properties: Any) -> None:
        """A prompt, from a client with a name if one is given."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send(f"req/chat/{client}" if client else "req/chat", body, **properties)

    def accepted(self) -> Prompt:
        """The newest prompt."""
        prompt = self.journal.prompt(self.journal.depth())
        assert prompt is not None and self.replies.refused == []
        return prompt

    def refusal(self) -> Refused:
        (refused,) = self.replies.refused
        assert self.journal.depth() == 0
        return refused


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    made = Room(tmp_path)
    yield made
    made.journal.close()


def test_an_answer_goes_to_the_response_topic(room: Room) -> None:
    room.ask({"prompt": "x", "reply_to": "replies/body"}, response_topic="replies/a", correlation=b"c")
    prompt = room.accepted()
    assert (prompt.answer_topic, prompt.correlation, prompt.id) == ("replies/a", b"c", "c")


def test_a_client_without_properties_names_topic_and_id_in_the_body(room: Room) -> None:
    room.ask({"prompt": "x", "reply_to": "replies/body", "id": "r-1"})
    prompt = room.accepted()
    assert (prompt.answer_topic, prompt.id) == ("replies/body", "r-1")


def test_a_client_that_names_no_topic_is_answered_under_its_id(room: Room) -> None:
    room.ask({"prompt": "x", "id": "r-1"})
    assert room.accepted().answer_topic == f"{ROOT}/rsp/r-1"


@pytest.mark.parametrize(
    ("body", "properties"),
    [
        ({"prompt": "x", "id": "r-1"}, {"response_topic": f"{ROOT}/req/chat"}),
        ({"prompt": "x", "id": "r-1", "reply_to": "elsewhere/a"}, {}),
        ({"prompt": "x", "id": "r-1", "reply_to": "replies/a"}, {"response_topic": "$SYS/x"}),
    ],
)
def test_a_topic_that_is_not_allowed_gets_no_answer_and_its_client_is_told_under_the_id(
    room: Room, body: dict[str, Any], properties: dict[str, Any]
) -> None:
    room.ask(body, **properties)
    refused = room.refusal()
    assert refused.topic == f"{ROOT}/rsp/r-1"
    assert "answer topic" in refused.document["error"]["message"]
    assert room.replies.counters["refused_400"] == 1


@pytest.mark.parametrize(
    ("payload", "status", "topic"),
    [
        (b'{"prompt": "x", "surprise": 1, "id": "r-1", "reply_to": "replies/a"}', 400, "replies/a"),
        (b'{"prompt": "x", "model": "other", "id": "r-1", "reply_to": "replies/a"}', 404, "replies/a"),
        (b'{"prompt": "x", "id": "r-1", "reply_to": 5}', 400, f"{ROOT}/rsp/r-1"),
    ],
    ids=["field", "model", "reply_to"],
)
def test_a_refusal_goes_where_the_answer_would_have_gone(
    room: Room, payload: bytes, status: int, topic: str
) -> None:
    room.ask(payload)
    refused = room.refusal()
    assert (refused.topic, refused.document["id"], refused.document["error"]["status"]) == (
        topic,
        "r-1",
        status,
    )


def test_a_body_that_is_too_long_is_refused_in_its_own_form(room: Room) -> None:
    room.ask(b"x" * 1025, response_topic="replies/a", correlation=b"c")
    refused = room.refusal()
    assert (refused.topic, refused.correlation, refused.form) == ("replies/a", b"c", Form.TEXT)
    assert refused.document["text"].startswith("error 413 prompt_too_long")


def test_correlation_data_that_is_too_long_is_refused_and_not_sent_back(room: Room) -> None:
    room.ask({"prompt": "x"}, response_topic="replies/a", correlation=b"c" * 65)
    refused = room.refusal()
    assert (refused.topic, refused.correlation) == ("replies/a", None)


def test_what_nobody_foresaw_is_500_for_its_client(room: Room) -> None:
    room.model.fault = ValueError("nobody foresaw this")
    room.ask({"prompt": "x"}, response_topic="replies/a")
    assert room.refusal().document["error"]["code"] == "model_failed"


def test_a_repeat_is_no_second_prompt_and_its_answer_is_sent_again(room: Room) -> None:
    for _ in range(2):
        room.ask({"prompt": "x"}, response_topic="replies/a", correlation=b"c")
    assert room.journal.depth() == 1
    assert room.replies.rows == [1]
    assert room.replies.counters["repeated"] == 1


def test_a_retained_prompt_is_dropped_and_counted(room: Room) -> None:
    room.ask({"prompt": "x"}, retained=True)
    assert (room.journal.depth(), room.replies.refused) == (0, [])
    assert room.replies.counters["retained_requests"] == 1


@pytest.mark.parametrize(
    ("payload", "properties"),
    [
        (b"", {"response_topic": "replies/a", "correlation": b"r-1"}),
        (b'{"id": "r-1", "reply_to": "replies/a"}', {}),
        (b'{"id": "r-1"}', {"response_topic": "replies/a"}),
    ],
    ids=["properties", "body", "both"],
)
def test_a_cancel_finds_its_prompt_by_topic_and_correlation_or_id(
    room: Room, payload: bytes, properties: dict[str, Any]
) -> None:
    room.ask({"prompt": "x"}, response_topic="replies/a", correlation=b"r-1")
    room.send("ctl/cancel", payload, **properties)
    outgoing = room.journal.deliveries.of(1)
    assert outgoing is not None and outgoing.answer.properties["status"] == "499"
    assert room.model.abandoned == [1]
    assert room.replies.rows == [1]


@pytest.mark.parametrize(
    "payload", [b"", b"not JSON", b'{"id": "other"}', b'{"surprise": 1}', b" " * 5000 + b'{"id": "r-1"}']
)
def test_a_cancel_of_nothing_is_counted(room: Room, payload: bytes) -> None:
    room.ask({"prompt": "x", "id": "r-1"})
    room.send("ctl/cancel", payload)
    assert room.replies.counters["cancels_unknown"] == 1
    assert room.journal.depth() == 1


def test_a_look_for_updates_and_a_desired_state_go_to_who_cares(room: Room) -> None:
    room.send("ctl/sync", b'{"within_s": 300}')
    room.send("ctl/sync", b"", retained=True)
    room.send("model/desired", b"{}", retained=True)
    assert (room.checks, room.desired) == ([b'{"within_s": 300}'], [b"{}"])


# --- Clients with a name -------------------------------------------------------------------------------


def test_a_client_with_a_name_is_answered_where_only_it_reads(room: Room) -> None:
    room.ask({"prompt": "x", "id": "r-1"}, client="shop")
    prompt = room.accepted()
    assert (prompt.client, prompt.answer_topic) == ("shop", f"{ROOT}/rsp/shop/r-1")


@pytest.mark.parametrize("topic", ["replies/shop/dev/1", f"{ROOT}/rsp/shop/1"])
def test_a_client_with_a_name_names_a_topic_of_its_own(room: Room, topic: str) -> None:
    room.ask({"prompt": "x"}, client="shop", response_topic=topic, correlation=b"c")
    assert room.accepted().answer_topic == topic


@pytest.mark.parametrize(
    "topic",
    [
        "replies/victim/dev",
        "replies/shop2/dev",
        "replies/shop",
        "replies/",
        "replies",
        f"{ROOT}/rsp/victim/1",
        f"{ROOT}/rsp/shop",
        f"{ROOT}/rsp/1",
        "replies/shop/../victim/+",
        "shop/1",
    ],
)
def test_a_topic_of_somebody_else_gets_no_answer_and_its_client_is_told_on_its_own(
    room: Room, topic: str
) -> None:
    room.ask({"prompt": "x", "id": "r-1"}, client="shop", response_topic=topic)
    refused = room.refusal()
    assert refused.topic == f"{ROOT}/rsp/shop/r-1"
    assert refused.document["error"]["status"] == 400


@pytest.mark.parametrize("prefixes", [("answers/",), ("re", "repl"), ()])
def test_other_reply_prefixes_are_a_clients_own_only_with_whole_levels(prefixes: tuple[str, ...]) -> None:
    topics = Topics(prefix="edge", device_id="dev", reply_prefixes=prefixes)
    for topic in ("replies/victim/1", "replies/x", "answers/victim/1"):
        with pytest.raises(BadRequest):
            topics.check_answer_topic(topic, "plies")
    assert topics.check_answer_topic(f"{ROOT}/rsp/plies/1", "plies")
    if "answers/" in prefixes:
        assert topics.check_answer_topic("answers/plies/1", "plies")


@pytest.mark.parametrize("name", ["@anonymous", "@local", "a b", "x" * 65, "", "ü"])
def test_a_name_that_is_no_id_is_dropped_and_counted(room: Room, name: str) -> None:
    room.send(f"req/chat/{name}", b"{}")
    room.send(f"ctl/cancel/{name}", b"")
    assert (room.journal.depth(), room.replies.refused) == (0, [])
    assert room.replies.counters["unknown_topic"] == 2


def test_two_clients_may_use_the_same_correlation(room: Room) -> None:
    for client in ("", "shop", "lab"):
        room.ask(
            {"prompt": "x"}, client=client, correlation=b"1", response_topic=f"replies/{client or 'x'}/1"
        )
    assert (room.journal.depth(), room.replies.refused) == (3, [])


def test_a_clients_correlation_is_one_for_all_its_answer_topics(room: Room) -> None:
    room.ask({"prompt": "x"}, client="shop", correlation=b"1", response_topic="replies/shop/a")
    room.ask({"prompt": "x"}, client="shop", correlation=b"1", response_topic="replies/shop/a")
    assert room.replies.rows == [1], "the same again"
    room.ask({"prompt": "x"}, client="shop", correlation=b"1", response_topic="replies/shop/b")
    (refused,) = room.replies.refused
    assert (refused.document["error"]["status"], refused.topic) == (409, "replies/shop/b")


def test_a_clients_redelivered_request_without_any_id_is_recognised(room: Room) -> None:
    for redelivered in (False, True):
        delivery = Delivery(session="s", mid=1, redelivered=redelivered)
        room.ask({"prompt": "x"}, client="shop", delivery=delivery)
    assert room.journal.depth() == 1


@pytest.mark.parametrize(
    ("payload", "properties"),
    [
        (b"", {"correlation": b"r-1"}),
        (b"", {"response_topic": "replies/elsewhere", "correlation": b"r-1"}),
        (b'{"id": "r-1"}', {}),
        (b'{"id": "r-1", "reply_to": "replies/shop/a"}', {}),
    ],
)
def test_a_client_cancels_by_its_name_and_correlation_or_id(
    room: Room, payload: bytes, properties: dict[str, Any]
) -> None:
    room.ask({"prompt": "x"}, client="shop", correlation=b"r-1", response_topic="replies/shop/a")
    room.send("ctl/cancel/shop", payload, **properties)
    assert room.model.abandoned == [1]


@pytest.mark.parametrize("canceller", ["ctl/cancel", "ctl/cancel/other", "ctl/cancel/Shop"])
@pytest.mark.parametrize(
    ("payload", "properties"),
    [
        (b"", {"response_topic": "replies/shop/a", "correlation": b"r-1"}),
        (b'{"id": "r-1", "reply_to": "replies/shop/a"}', {}),
        (b'{"id": "r-1", "reply_to": "\\u00ffshop"}', {}),
        (b'{"id": "r-1", "reply_to": "shop"}', {}),
    ],
)
def test_nobody_cancels_what_another_client_asked(
    room: Room, canceller: str, payload: bytes, properties: dict[str, Any]
) -> None:
    room.ask({"prompt": "x"}, client="shop", correlation=b"r-1", response_topic="replies/shop/a")
    room.send(canceller, payload, **properties)
    assert room.model.abandoned == []
    assert room.replies.counters["cancels_unknown"] == 1


def test_a_client_with_a_name_does_not_cancel_what_nobody_signed(room: Room) -> None:
    room.ask({"prompt": "x"}, correlation=b"r-1", response_topic="replies/shop/a")
    room.send("ctl/cancel/shop", b"", response_topic="replies/shop/a", correlation=b"r-1")
    assert room.model.abandoned == []


# --- Deadlines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "properties"),
    [({"deadline_ms": 604_800_000}, {}), ({}, {"expiry_s": 604_800.0})],
    ids=["deadline_ms", "expiry"],
)
def test_a_deadline_of_seven_days_is_refused_with_the_settings_name(
    room: Room, body: dict[str, Any], properties: dict[str, Any]
) -> None:
    room.ask({"prompt": "x", "reply_to": "replies/a", **body}, **properties)
    error = room.refusal().document["error"]
    assert error["status"] == 400
    assert "limits.max_deadline_s allows 3600 s" in error["message"]


def test_the_shorter_of_two_deadlines_counts(room: Room) -> None:
    room.ask({"prompt": "x", "reply_to": "replies/a", "deadline_ms": 3_600_000}, expiry_s=604_800.0)
    assert room.accepted().deadline_boot_s == NOW.boot_s + 3600


def test_each_refusal_is_noted_by_its_code(room: Room) -> None:
    room.ask(b"{")
    room.ask({"prompt": "x", "model": "another"})
    for number in range(5):
        room.ask({"prompt": "x", "id": f"r{number}"})
    assert room.refusals == ["bad_request", "unknown_model", "queue_full"]
