"""A broker in memory, as a console sees it: what is retained, who answers what, and what the rules refuse. One thread.

No time passes but where a watch waits for nothing: then the clock moves on by the whole wait.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edge_agent.errors import BrokerRefused, BrokerUnreachable
from edge_agent.fleet.broker import LIMIT_S, QUIET_S, Message, Outgoing, Watch
from edge_agent.topics import FleetTopics
from tests.support.clock import ScriptedClock

TOPICS = FleetTopics(prefix="edge")


class ScriptedFleetBroker:
    """Implements `FleetBroker`.

    Attributes:
        retained: body by topic.
        published: all that the console has published, in order.
        refused: topics that the rules do not let it write.
        reachable: False raises `BrokerUnreachable` everywhere, and watches get nothing.
        on_publish: called with each message that the broker takes; a test's devices answer here, with `say`.
        on_wait: called with the clock's new time whenever a watch has waited for nothing.
    """

    name = "console"

    def __init__(
        self, retained: Mapping[str, bytes] | None = None, clock: ScriptedClock | None = None
    ) -> None:
        self.retained = dict(retained or {})
        self.published: list[Outgoing] = []
        self.refused: set[str] = set()
        self.reachable = True
        self.clock = clock or ScriptedClock()
        self.on_publish: Callable[[Outgoing], None] = lambda message: None
        self.on_wait: Callable[[float], None] = lambda now_s: None
        self._watches: list[_Watch] = []

    def collect(
        self, filters: Sequence[str], *, quiet_s: float = QUIET_S, limit_s: float = LIMIT_S
    ) -> Mapping[str, bytes]:
        self._need()
        self.clock.pass_by(min(quiet_s, limit_s))
        return {topic: body for topic, body in self.retained.items() if matches(filters, topic)}

    def publish(self, topic: str, body: bytes, *, retain: bool = False) -> None:
        self.publish_all([Outgoing(topic=topic, body=body, retain=retain)])

    def publish_all(self, messages: Sequence[Outgoing], *, limit_s: float = LIMIT_S) -> None:
        self._need()
        for message in messages:
            if message.topic not in self.refused:
                self.published.append(message)
                self.say(message.topic, message.body, retain=message.retain)
                self.on_publish(message)
        for message in messages:
            if message.topic in self.refused:
                raise BrokerRefused(f"the broker refuses {message.topic}")

    @contextlib.contextmanager
    def watch(self, filters: Sequence[str]) -> Iterator[Watch]:
        self._need()
        watch = _Watch(self, filters)
        for topic, body in self.retained.items():
            watch.take(Message(topic=topic, body=body, retained=True))
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    def say(self, topic: str, body: bytes | Mapping[str, Any], *, retain: bool = True) -> None:
        """A message of somebody, such as a device's new status."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if retain and data:
            self.retained[topic] = data
        elif retain:
            self.retained.pop(topic, None)
        if self.reachable:
            for watch in self._watches:
                watch.take(Message(topic=topic, body=data))

    def restart(self) -> None:
        """It forgets what it retained, and every watch is connected again before it notices anything."""
        self.retained.clear()
        for watch in self._watches:
            watch.renewed = True

    def _need(self) -> None:
        if not self.reachable:
            raise BrokerUnreachable("the broker cannot be reached")


class _Watch:
    def __init__(self, broker: ScriptedFleetBroker, filters: Sequence[str]) -> None:
        self._broker = broker
        self._filters = filters
        self._waiting: dict[str, Message] = {}
        self.renewed = False

    def take(self, message: Message) -> None:
        if matches(self._filters, message.topic):
            self._waiting.pop(message.topic, None)
            self._waiting[message.topic] = message

    def next(self, timeout_s: float) -> Message | None:
        if not self._waiting and timeout_s > 0:
            self._broker.clock.pass_by(timeout_s)
            self._broker.on_wait(self._broker.clock.now_s)
        first = next(iter(self._waiting), None)
        return None if first is None else self._waiting.pop(first)


def matches(filters: Sequence[str], topic: str) -> bool:
    """MQTT 5.0 §4.7."""
    return any(_matches(each.split("/"), topic.split("/")) for each in filters)


def _matches(levels: list[str], topic: list[str]) -> bool:
    if levels[:1] == ["#"]:
        return True
    if not levels or not topic:
        return not levels and not topic
    return levels[0] in ("+", topic[0]) and _matches(levels[1:], topic[1:])


def status(state: str = "ready", **fields: Any) -> dict[str, Any]:
    """A device's status."""
    whole = {"state": state, "time": 1_790_000_000, "boot_id": "b1", "seq": 1, "agent_version": "0.2.0"}
    return {**whole, "queue_depth": 0, "models": [], "troubles": [], **fields}


def model(version: int | None = 7, **fields: Any) -> dict[str, Any]:
    """A model as `model/reported` has it."""
    known = {"uri": "models:/phi3-mini@prod", "version": version, "digest": "d" * 64, "flavor": "onnx"}
    state = {"state": "ready", "reason": "", "progress": None, "wanted": None, "attempt": None}
    return {**known, **state, "previous": None, "quarantined": [], "gate": None, "link": None, **fields}


def reported(name: str = "assistant", version: int | None = 7, **fields: Any) -> dict[str, Any]:
    """A report of one model."""
    return {"models": {name: model(version, **fields)}}


def device(device_id: str, state: str = "ready", /, **fields: Any) -> dict[str, bytes]:
    """The two retained documents of a device that runs one model.

    Args:
        fields: of its model.
    """
    topics = TOPICS.of(device_id)
    documents = {topics.status: status(state), topics.reported: reported(**fields)}
    return {topic: json.dumps(document).encode() for topic, document in documents.items()}
