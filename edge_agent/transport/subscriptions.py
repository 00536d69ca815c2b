"""What the agent listens to: its subscriptions, and the way of a message to its handler and to its ack.

Refuses to let a handler's failure end the reading, or bring its message back: a message that no handler foresees is
logged, counted and acked.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edge_agent.transport.connection import Connection, inbound
from edge_agent.transport.echo import Echo
from edge_agent.transport.inbound import Handler

if TYPE_CHECKING:
    from paho.mqtt.client import MQTTMessage
    from paho.mqtt.reasoncodes import ReasonCode

log = logging.getLogger(__name__)


class Subscriptions:
    """Used by the network thread, but for `accepting`.

    Args:
        handlers: by topic, or by a filter whose last level is `+`.
        retained: the one topic whose retained message is wanted.
        counters: of the transport.
        echo: takes the messages of the self-test; they reach no handler.

    Attributes:
        accepting: False leaves what comes with the broker: it is neither handled nor acked.
        ack_later: set by a handler whose message is acked once the broker has its refusal.
        refused: topics that the broker refused on the present connection.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        retained: str,
        counters: collections.Counter[str],
        echo: Echo,
    ) -> None:
        self.accepting = True
        self.ack_later = False
        self.refused: tuple[str, ...] = ()
        self._handlers = handlers
        self._retained = retained
        self._counters = counters
        self._echo = echo

    def begin(self, connection: Connection) -> None:
        """Subscribes to everything."""
        connection.subscribe(self._handlers, retained=self._retained)

    def answered(self, codes: list[ReasonCode]) -> None:
        """The broker has said what it thinks of the subscriptions."""
        answers = tuple(zip(self._handlers, codes, strict=False))
        self.refused = tuple(topic for topic, code in answers if code.is_failure)
        for topic, code in answers:
            if code.is_failure:
                self._counters["subscribe_refused"] += 1
                log.error(
                    "subscription refused code=broker_refused topic=%s reason=%s remedy='check the broker ACL'",
                    topic,
                    code,
                )

    def handle(self, connection: Connection, message: MQTTMessage) -> None:
        """Handles, then acks. A handler that fails in an unforeseen way does not get the message again."""
        if not self.accepting:
            return
        self.ack_later = False
        if self._echo.heard(message.topic, bytes(message.payload), time.monotonic()):
            connection.client.ack(message.mid, message.qos)
            return
        try:
            handler = self._handlers.get(message.topic) or self._handlers.get(_any_last_level(message.topic))
            if handler is None:
                self._counters["unknown_topic"] += 1
            else:
                handler(inbound(connection, message))
        except Exception:
            self._counters["handler_errors"] += 1
            log.exception(
                "message handler failed code=internal topic=%s bytes=%d", message.topic, len(message.payload)
            )
            self.ack_later = False
        if not self.ack_later:
            connection.client.ack(message.mid, message.qos)


def _any_last_level(topic: str) -> str:
    return f"{topic.rpartition('/')[0]}/+"
