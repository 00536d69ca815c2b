"""The self-test: does this device hear what is published for it? It publishes a message to itself and listens.

Owns what is known of that. The message goes to one of the topics that `ctl/cancel/+` matches, so it comes back by a
subscription that the device needs anyway. What its absence means depends on what the broker tells (ADR 16):

    comes back under its own topic                      → heard
    comes back under another topic                      → deaf: the broker reads the dot in `device_id` as a separator
    MQTT 5: refused (PUBACK ≥ 0x80)                     → not known: the broker's rules do not allow the test
    MQTT 5: accepted, and does not come                 → deaf
    MQTT 3.1.1: acked, and does not come                → deaf, unless a message of somebody else has come before
    the broker hangs up at it, twice                    → not known, and not tried again

Pure but for what it publishes; the network thread's, except for `trouble`.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from edge_agent.documents import page
from edge_agent.errors import EdgeAgentError
from edge_agent.transport.connection import Connection, Sent

if TYPE_CHECKING:
    from paho.mqtt.reasoncodes import ReasonCode

PATIENCE_S = 10.0
AGAIN_S, AGAIN_DEAF_S = 300.0, 30.0
_HANG_UPS = 2
_DOT_REMEDY = (
    "it takes the dot in device_id for a separator: give the device an id without dots, or use mosquitto"
)


class SelfTestFailed(EdgeAgentError):
    """What this device publishes to itself does not come back: it would not hear requests either."""

    code = "self_test_failed"


class Echo:
    """What is known of one broker.

    Args:
        topic: where the message goes.
        known: a message of somebody else has come from this broker before.

    Attributes:
        trouble: why the device hears nothing; None while it hears, or nothing is known.
        others_heard: see `known`.
    """

    def __init__(self, topic: str, *, known: bool = False) -> None:
        self.trouble: SelfTestFailed | None = None
        self.others_heard = known
        self._topic = topic
        self._own_heard = self._inconclusive = False
        self._nonce = b""
        self._mid: int | None = None
        self._allowed = True
        self._due_s: float | None = None
        self._sent_s = 0.0
        self._hang_ups = 0

    def subscribed(self, now_s: float) -> None:
        """The broker has answered the subscriptions of a new connection: the test is due."""
        self._due_s, self._nonce, self._mid = now_s, b"", None

    def send_due(self, connection: Connection, now_s: float) -> None:
        """Publishes when it is time, and judges what did not come."""
        if self._nonce and now_s - self._sent_s > PATIENCE_S:
            self._missed(connection)
            self._nonce, self._due_s = b"", now_s + AGAIN_DEAF_S
        due = self._due_s is not None and now_s >= self._due_s and self._hang_ups < _HANG_UPS
        # Not beside an answer: if the broker hangs up at one of the two, it must be clear at which.
        if not due or not connection.may_publish or connection.answers():
            return
        self._nonce, self._allowed = uuid.uuid4().hex.encode(), True
        self._mid = connection.publish(self._topic, self._nonce, qos=1)
        connection.in_flight[self._mid] = Sent()
        self._sent_s, self._due_s = now_s, None

    def published(self, mid: int, code: ReasonCode, now_s: float) -> None:
        """A message has its PUBACK; it may be this one."""
        if mid != self._mid:
            return
        self._mid, self._hang_ups = None, 0
        if code.is_failure:
            self._allowed, self._nonce, self.trouble = False, b"", None
            self._due_s = now_s + AGAIN_S

    def heard(self, topic: str, payload: bytes, now_s: float) -> bool:
        """A message has come. True if it was this one, or one of an earlier test."""
        if not payload or payload != self._nonce:
            if topic != self._topic:
                self.others_heard = True
                if not self._own_heard and self._inconclusive:
                    self.trouble = None
            return topic == self._topic
        self._nonce, self._due_s, self._hang_ups = b"", now_s + AGAIN_S, 0
        if topic == self._topic:
            self._own_heard, self.trouble = True, None
        else:
            self.trouble = other_topic(self._topic, topic)
        return True

    def ended(self, *, hung_up: bool) -> None:
        """The connection is over."""
        if hung_up and self._mid is not None:
            self._hang_ups += 1
        self._due_s, self._nonce, self._mid = None, b"", None

    def turned_away(self) -> None:
        """The broker hangs up before it accepts a connection, again and again."""
        if "." in self._topic:
            self.trouble = SelfTestFailed(
                "the broker hangs up on each connection before it accepts it, and this device's topics have a dot",
                remedy="NATS does that: give the device an id without dots, or use mosquitto",
            )

    def _missed(self, connection: Connection) -> None:
        self._inconclusive = not connection.version5
        if self._mid is not None or (self._inconclusive and self.others_heard and not self._own_heard):
            return
        self.trouble = not_back(self._topic, version5=connection.version5)


def not_back(topic: str, *, version5: bool) -> SelfTestFailed:
    """The message that was sent to this topic has not come."""
    place = page("broker.md", "The self-test")
    either = "" if version5 else ", or its rules forbid the test (MQTT 3.1.1 does not tell)"
    return SelfTestFailed(
        f"what this device sends to itself ({topic}) does not come back: the broker would not bring it requests"
        f" either{either}",
        remedy=f"see {place}; some brokers take a dot in device_id for a separator"
        if "." in topic
        else f"see {place}",
    )


def other_topic(sent_to: str, came_as: str) -> SelfTestFailed:
    """The message has come under another topic."""
    return SelfTestFailed(
        f"the broker delivers what is sent to {sent_to} as {came_as}, so requests are not heard",
        remedy=_DOT_REMEDY,
    )
