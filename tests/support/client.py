"""An MQTT client as an application would write it: asks, waits with a bound, keeps what it saw."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import Client as Paho
from paho.mqtt.client import MQTTMessage, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.support.mosquitto import Broker

ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message that came."""

    topic: str
    payload: bytes
    retained: bool
    correlation: bytes | None
    properties: dict[str, str]
    at_s: float

    @property
    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.payload)
        return document

    @property
    def text(self) -> str:
        """The answer's text."""
        text: str = self.json["choices"][0]["message"]["content"]
        return text

    @property
    def status(self) -> int:
        """200 for a completion, the error's status otherwise."""
        error = self.json.get("error")
        return int(error["status"]) if error else 200


class Client:
    """One connected client. `messages` only grows; `wait` looks at it."""

    def __init__(self, broker: Broker, *, device: str = "dev", version5: bool = True) -> None:
        self.root = f"edge/v1/{device}"
        self.version5 = version5
        self.name = uuid.uuid4().hex[:12]
        self.replies = f"replies/{self.name}"
        self.messages: list[Message] = []
        self._changed = threading.Condition()
        self._subscribed = 0
        self._paho = Paho(CallbackAPIVersion.VERSION2, protocol=MQTTv5 if version5 else MQTTv311)
        self._paho.on_message = self._on_message
        self._paho.on_subscribe = self._on_subscribe
        self._paho.on_socket_open = _disable_nagle
        self._paho.connect(broker.host, broker.port)
        self._paho.loop_start()
        self.subscribe(f"{self.replies}/#")

    def close(self) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()

    def subscribe(self, topic: str) -> None:
        """Returns when the broker has the subscription."""
        before = self._subscribed
        self._paho.subscribe(topic, qos=1)
        with self._changed:
            assert self._changed.wait_for(lambda: self._subscribed > before, 60), f"no SUBACK for {topic}"

    def publish(
        self, topic: str, payload: bytes | str, *, qos: int = 1, retain: bool = False, **properties: Any
    ) -> None:
        """Returns when the broker has the message (QoS 1)."""
        given = None
        if properties:
            given = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            for key, value in properties.items():
                setattr(given, key, value)
        info = self._paho.publish(topic, payload, qos=qos, retain=retain, properties=given)
        info.wait_for_publish(60)

    def send(
        self, request: bytes | str | dict[str, Any], *, correlation: bytes | None = None, **properties: Any
    ) -> bytes:
        """Sends a request whose answer comes to `replies`; gives its Correlation Data."""
        correlation = correlation or uuid.uuid4().hex.encode()
        payload = json.dumps(request) if isinstance(request, dict) else request
        self.publish(
            f"{self.root}/req/chat",
            payload,
            ResponseTopic=self.replies,
            CorrelationData=correlation,
            **properties,
        )
        return correlation

    def ask(self, request: bytes | str | dict[str, Any], **options: Any) -> Message:
        """Sends a request and waits for its answer."""
        correlation = self.send(request, **options)
        return self.answer(correlation)

    def answer(self, correlation: bytes, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Message:
        """The first answer with this Correlation Data on the answer topic."""
        return self.wait(
            lambda m: m.topic == self.replies and m.correlation == correlation, timeout_s=timeout_s
        )

    def answers(self, correlation: bytes) -> list[Message]:
        return [m for m in list(self.messages) if m.topic == self.replies and m.correlation == correlation]

    def chunks(self, correlation: bytes) -> list[Message]:
        return [
            m
            for m in list(self.messages)
            if m.topic == f"{self.replies}/stream" and m.correlation == correlation
        ]

    def wait(self, wanted: Any, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Message:
        """The first message, past or to come, that `wanted` says yes to."""

        def find() -> Message | None:
            return next((message for message in self.messages if wanted(message)), None)

        with self._changed:
            assert self._changed.wait_for(lambda: find() is not None, timeout_s), (
                f"no such message in {timeout_s} s; came: {[(m.topic, m.payload[:200]) for m in self.messages[-5:]]}"
            )
            found = find()
        assert found is not None
        return found

    def wait_on(self, topic: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Message:
        return self.wait(lambda message: message.topic == topic, timeout_s=timeout_s)

    def _on_message(self, _client: Paho, _userdata: object, message: MQTTMessage) -> None:
        properties = message.properties
        came = Message(
            topic=message.topic,
            payload=bytes(message.payload),
            retained=message.retain,
            correlation=getattr(properties, "CorrelationData", None),
            properties=dict(getattr(properties, "UserProperty", [])),
            at_s=time.monotonic(),
        )
        with self._changed:
            self.messages.append(came)
            self._changed.notify_all()

    def _on_subscribe(self, *_: object) -> None:
        with self._changed:
            self._subscribed += 1
            self._changed.notify_all()


def _disable_nagle(_client: Paho, _userdata: object, sock: Any) -> None:
    """Small messages one after the other would wait 40 ms for an acknowledgement of the first."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@contextmanager
def connected(broker: Broker, *, device: str = "dev", version5: bool = True) -> Iterator[Client]:
    client = Client(broker, device=device, version5=version5)
    try:
        yield client
    finally:
        client.close()


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """A chat request with one user message."""
    return {"messages": [{"role": "user", "content": text}], **fields}
