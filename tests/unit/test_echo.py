"""What the self-test makes of what a broker does with its message."""

from __future__ import annotations

from pathlib import Path

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.topics import Topics
from edge_agent.transport.echo import AGAIN_DEAF_S, AGAIN_S, PATIENCE_S, Echo
from tests.support.scripted_broker import NOBODY_LISTENS, NOT_AUTHORIZED, TAKES, Room

TOPIC = Topics(prefix="edge", device_id="dev", reply_prefixes=()).echo
DOTTED = Topics(prefix="edge", device_id="press.3", reply_prefixes=()).echo


class Line:
    """A self-test and a broker of the test.

    Attributes:
        sent: how many messages it has published.
    """

    def __init__(
        self, folder: Path, *, version5: bool = True, topic: str = TOPIC, known: bool = False
    ) -> None:
        self.room = Room(folder)
        self.room.connection.version5 = version5
        self.echo = Echo(topic, known=known)
        self.echo.subscribed(self.room.now_s)

    @property
    def sent(self) -> int:
        return len([each for each in self.room.client.published if "@echo" in each.topic])

    def turn(self, seconds: float, *, puback: str | None = TAKES, comes_as: str | None = None) -> None:
        """A test that is due is sent; the broker acks it with this code, and brings it under this topic."""
        room = self.room
        room.now_s += seconds
        before = self.sent
        self.echo.send_due(room.connection, room.now_s)
        if self.sent == before:
            return
        message = room.client.published[-1]
        if puback is not None:
            code = ReasonCode(PacketTypes.PUBACK, puback)
            self.echo.published(message.mid, code, room.now_s)
            room.connection.in_flight.pop(message.mid)
        if comes_as is not None:
            assert self.echo.heard(comes_as, message.payload, room.now_s)

    @property
    def said(self) -> str:
        return str(self.echo.trouble or "")


@pytest.mark.parametrize("version5", [True, False])
def test_a_message_that_comes_back_says_nothing_and_is_sent_again_now_and_then(
    tmp_path: Path, version5: bool
) -> None:
    line = Line(tmp_path, version5=version5, topic=DOTTED)
    for times in range(1, 4):
        line.turn(AGAIN_S + 1, comes_as=DOTTED)
        line.turn(PATIENCE_S + 1)
        assert (line.sent, line.said) == (times, "")


@pytest.mark.parametrize("puback", [TAKES, NOBODY_LISTENS])
@pytest.mark.parametrize("version5", [True, False])
def test_a_message_that_does_not_come_back_is_trouble_until_one_does(
    tmp_path: Path, version5: bool, puback: str
) -> None:
    line = Line(tmp_path, version5=version5)
    line.turn(0, puback=puback)
    line.turn(PATIENCE_S - 1)
    assert line.said == ""
    line.turn(2)
    assert "does not come back" in line.said and "docs/broker.md" in line.said and TOPIC in line.said
    assert line.echo.trouble is not None and line.echo.trouble.code == "self_test_failed"
    assert ("3.1.1" in line.said) is not version5
    line.turn(AGAIN_DEAF_S + 1, comes_as=TOPIC)
    assert line.said == ""


def test_a_dot_that_the_broker_reads_as_a_separator_is_named(tmp_path: Path) -> None:
    line = Line(tmp_path, version5=False, topic=DOTTED)
    line.turn(0, comes_as=DOTTED.replace(".", "/"))
    assert "press.3" in line.said and "without dots" in line.said


def test_rules_that_forbid_the_test_are_no_trouble_where_the_broker_says_so(tmp_path: Path) -> None:
    line = Line(tmp_path)
    line.turn(0, puback=NOT_AUTHORIZED)
    line.turn(PATIENCE_S + 1)
    assert (line.sent, line.said) == (1, "")


def test_where_it_does_not_say_so_any_message_shows_that_the_device_hears(tmp_path: Path) -> None:
    line = Line(tmp_path, version5=False)
    line.turn(0)
    line.turn(PATIENCE_S + 1)
    assert "forbid" in line.said
    assert not line.echo.heard("edge/v1/dev/req/chat", b"hello", line.room.now_s)
    assert line.said == "", "at once"
    for _ in range(5):
        line.turn(AGAIN_DEAF_S + 1)
        line.turn(PATIENCE_S + 1)
        assert line.said == ""


def test_what_has_been_heard_before_a_restart_counts(tmp_path: Path) -> None:
    line = Line(tmp_path, version5=False, known=True)
    line.turn(0)
    line.turn(PATIENCE_S + 1)
    assert line.said == ""


def test_a_broker_whose_rules_once_allowed_the_test_is_not_excused(tmp_path: Path) -> None:
    line = Line(tmp_path, version5=False, known=True)
    line.turn(0, comes_as=TOPIC)
    line.turn(AGAIN_S + 1)
    line.turn(PATIENCE_S + 1)
    assert "does not come back" in line.said


def test_a_broker_that_hangs_up_at_it_sees_it_twice(tmp_path: Path) -> None:
    line = Line(tmp_path, version5=False)
    for times in (1, 2, 2, 2):
        line.turn(60, puback=None)
        assert line.sent == times
        line.echo.ended(hung_up=True)
        line.echo.subscribed(line.room.now_s)
    assert line.said == ""


def test_a_connection_that_is_lost_in_between_proves_nothing(tmp_path: Path) -> None:
    line = Line(tmp_path)
    for _ in range(5):
        line.turn(1, puback=None)
        line.echo.ended(hung_up=False)
        line.echo.subscribed(line.room.now_s)
    assert (line.sent, line.said) == (5, "")


def test_a_message_of_an_earlier_test_is_kept_from_the_handlers_and_proves_nothing(tmp_path: Path) -> None:
    line = Line(tmp_path, version5=False)
    assert line.echo.heard(TOPIC, b"of a twin, or from before the restart", 1.0)
    assert not line.echo.others_heard
    assert not line.echo.heard("edge/v1/dev/ctl/cancel/shop", b"", 1.0)


def test_an_answer_under_way_is_not_put_in_doubt_by_a_test(tmp_path: Path) -> None:
    line = Line(tmp_path)
    line.room.rule = lambda topic: ""
    line.room.answer("replies/shop/1")
    line.room.turn()
    line.turn(1)
    assert line.sent == 0


@pytest.mark.parametrize(("topic", "said"), [(TOPIC, ""), (DOTTED, "have a dot")])
def test_a_broker_that_hangs_up_at_once_may_dislike_the_dot(tmp_path: Path, topic: str, said: str) -> None:
    line = Line(tmp_path, topic=topic)
    line.echo.turned_away()
    assert said in line.said and bool(said) == bool(line.said)
