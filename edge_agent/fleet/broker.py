"""The broker as a console uses it: what is retained, what is published now, and what is published to it.

    collect: subscribe with QoS 0 → retained messages, until it is quiet → unsubscribe
    publish: QoS 1 → PUBACK, or an error that says what the broker's rules lack
    watch:   subscribe with QoS 0 → each topic's newest message, over lost connections too

QoS 0, because a broker bounds what it queues for QoS 1 and drops the rest without a word; retained state loses nothing
by it. Sources: MQTT 5.0 §3.3.1.3 (RETAIN), §3.4.2.1 (PUBACK).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

QUIET_S = 1.0
LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Message:
    """What came.

    Attributes:
        retained: the broker had kept it; False for what is published now.
    """

    topic: str
    body: bytes
    retained: bool = False


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """What is to be published, with QoS 1. An empty body with `retain` removes what is retained."""

    topic: str
    body: bytes
    retain: bool = False


class Watch(Protocol):
    """What comes on some filters: of each topic the newest message, so nothing piles up behind a slow reader.

    Attributes:
        renewed: the connection was lost since the watch began, and made again: what was removed meanwhile, or what the
            broker itself has lost, was not heard.
    """

    @property
    def renewed(self) -> bool: ...

    def next(self, timeout_s: float) -> Message | None:
        """The next message, or None if none has come within `timeout_s`.

        A connection that was lost is made again meanwhile (a try may take some seconds longer than `timeout_s`), and
        then what is retained comes once more.
        """


class FleetBroker(Protocol):
    """One connection to the broker. One thread's; it works only while one of its methods does.

    Attributes:
        name: this console's, by which the broker's rules know it: it may read below `replies/{name}/`.
    """

    @property
    def name(self) -> str: ...

    def collect(
        self, filters: Sequence[str], *, quiet_s: float = QUIET_S, limit_s: float = LIMIT_S
    ) -> Mapping[str, bytes]:
        """What is retained on these filters, body by topic: until none has come for `quiet_s`, `limit_s` at most.

        Raises:
            BrokerUnreachable: there is no connection, or it was lost meanwhile.
            BrokerRefused: the broker refuses a filter.
        """

    def publish(self, topic: str, body: bytes, *, retain: bool = False) -> None:
        """Publishes one message, as `publish_all` does."""

    def publish_all(self, messages: Sequence[Outgoing], *, limit_s: float = LIMIT_S) -> None:
        """Publishes all of them, and returns once the broker has each.

        Args:
            limit_s: how long it may take from one PUBACK to the next.

        Raises:
            BrokerUnreachable: there is no connection, or it was lost; messages may or may not have arrived.
            BrokerRefused: the broker refused one; the others have arrived. Over MQTT 3.1.1 no broker says so.
        """

    def watch(self, filters: Sequence[str]) -> AbstractContextManager[Watch]:
        """What comes on these filters until the block ends, what is retained first.

        Raises:
            BrokerUnreachable, BrokerRefused: as `collect`; once it has begun, neither is raised.
        """
