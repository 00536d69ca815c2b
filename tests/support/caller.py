"""A client with an MQTT session of its own that outlives its connections, and the broker."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paho.mqtt.client import Client as Paho
from paho.mqtt.client import MQTTMessage, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.support.brokers import ContractBroker
from tests.support.processes import wait_until

_SESSION_S = 3600


class Caller:
    """Asks with `id` and `reply_to`, which every version of MQTT carries, and keeps what comes.

    Attributes:
        came: topic and payload, in the order in which they came.
    """

    def __init__(self, broker: ContractBroker, device: str, *, version5: bool, clean: bool = False) -> None:
        self.root = f"edge/v1/{device}"
        self.name = uuid.uuid4().hex[:12]
        self.replies = f"replies/{self.name}"
        self.came: list[tuple[str, bytes]] = []
        self._broker = broker
        self._version5, self._clean = version5, clean
        self._subscribed = 0
        self._bodies: dict[str, dict[str, Any]] = {}
        self.connect()

    def connect(self) -> None:
        """Connects, and stays connected; returns when it is subscribed."""
        before = self._subscribed
        self._paho = self._make_client()
        if self._version5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 0 if self._clean else _SESSION_S
            self._paho.connect(
                self._broker.host, self._broker.port, clean_start=self._clean, properties=properties
            )
        else:
            self._paho.connect(self._broker.host, self._broker.port)
        self._paho.loop_start()
        wait_until(lambda: self._subscribed > before, 60, "SUBACK")

    def leave(self) -> None:
        """Disconnects; its session stays unless it is a clean one."""
        self._paho.disconnect()
        self._paho.loop_stop()

    def vanish(self) -> None:
        """Its connection breaks, without a word to the broker."""
        if isinstance(end := self._paho.socket(), socket.socket):
            with contextlib.suppress(OSError):  # the broker was quicker
                end.shutdown(socket.SHUT_RDWR)
        self._paho.loop_stop()

    def send(self, question: str, **fields: Any) -> str:
        """A chat; gives its id once the broker has it."""
        request_id = uuid.uuid4().hex[:16]
        self._bodies[request_id] = {
            "messages": [{"role": "user", "content": question}],
            "id": request_id,
            "reply_to": self.replies,
            **fields,
        }
        self.send_again(request_id)
        return request_id

    def send_again(self, request_id: str) -> None:
        """The same chat with the same id."""
        self.publish("req/chat", self._bodies[request_id])

    def publish(self, branch: str, body: dict[str, Any] | str) -> None:
        """Returns when the broker has it."""
        payload = body if isinstance(body, str) else json.dumps(body)
        wait_until(lambda: self._has_published(f"{self.root}/{branch}", payload), 60, "the PUBACK")

    def _has_published(self, topic: str, payload: str) -> bool:
        """False where the broker was gone by then: it is to be published again, and is a repeat by its id."""
        wait_until(self._paho.is_connected, 60, "the client's connection")
        info = self._paho.publish(topic, payload, qos=1)
        try:
            info.wait_for_publish(60)
        except RuntimeError:
            return False
        return info.is_published()

    def subscribe(self, topic: str) -> None:
        before = self._subscribed
        self._paho.subscribe(topic, qos=1)
        wait_until(lambda: self._subscribed > before, 60, f"SUBACK for {topic}")

    def answers(self, request_id: str) -> list[dict[str, Any]]:
        """All answers to this request, in the order in which they came."""
        documents = [json.loads(payload) for topic, payload in list(self.came) if topic == self.replies]
        return [document for document in documents if document["id"] == request_id]

    def answer(self, request_id: str, timeout_s: float = 120) -> dict[str, Any]:
        return wait_until(lambda: self.answers(request_id), timeout_s, "an answer")[0]

    def wait_answers(self, ids: list[str], timeout_s: float = 240) -> float:
        """Waits until each of them has an answer. Gives the seconds that it took."""
        begun_s = time.monotonic()
        try:
            wait_until(lambda: all(self.answers(each) for each in ids), timeout_s, f"{len(ids)} answers")
        except TimeoutError as error:
            missing = [each for each in ids if not self.answers(each)]
            raise TimeoutError(f"{error}; none came to {missing}") from error
        return time.monotonic() - begun_s

    def _make_client(self) -> Paho:
        client = Paho(
            CallbackAPIVersion.VERSION2,
            client_id=f"caller-{self.name}",
            protocol=MQTTv5 if self._version5 else MQTTv311,
            clean_session=None if self._version5 else self._clean,
        )
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        client.reconnect_delay_set(1, 2)
        return client

    def _on_connect(self, client: Paho, *_: object) -> None:
        client.subscribe([(self.replies, 1), (f"{self.replies}/stream", 0)])

    def _on_message(self, _client: Paho, _userdata: object, message: MQTTMessage) -> None:
        self.came.append((message.topic, bytes(message.payload)))

    def _on_subscribe(self, *_: object) -> None:
        self._subscribed += 1


@contextmanager
def calling(
    broker: ContractBroker, device: str, *, version5: bool = False, clean: bool = False
) -> Iterator[Caller]:
    caller = Caller(broker, device, version5=version5, clean=clean)
    try:
        yield caller
    finally:
        caller.leave()
