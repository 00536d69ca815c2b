"""One connection to the broker: a paho client from CONNECT to its end. The only user of paho in the daemon.

Owns the client, its socket, and what this connection has told the broker and not heard back about. Nothing of it
outlives it: no mid and no unsent message of a dead connection can reach the next one.

    dial → select → paho reads and writes → events → … → close

Refuses to trust callbacks: an exception in one would end paho's reading without a sign.
Sources: MQTT 5.0 §3.1–3.14; paho-mqtt 2.2.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Delivery
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.transport.inbound import Inbound
from edge_agent.transport.paho_client import Client, disable_nagle, guarded, paho
from edge_agent.transport.reconnect import Ending

log = logging.getLogger(__name__)

RECEIVE_MAXIMUM = 16
MAX_IN_FLIGHT = 16
PACKET_OVERHEAD_BYTES = 128

_CONNECT_TIMEOUT_S = 10.0
TURN_S = 1.0
_CONNACK_S = 15.0
SUBACK_S = 60.0
"""A broker that has not acknowledged the subscriptions by then has probably lost them, and would bring nothing."""
PUBACK_S, LAST_PUBACK_S = 300.0, 3600.0
"""A broker that has not acknowledged a message by then never will. Where such messages fill its window nothing is sent
any more; where they do not, only their own places and answers wait for the next connection."""
_TAKEN_OVER = 0x8E
_NO_MESSAGES_FAULT = (0x00, 0x89, 0x8B, 0x8D, _TAKEN_OVER, 0x98, 0x9C, 0x9D, 0x9F, 0xA0)
"""Reasons of a DISCONNECT that no message can be the cause of: the broker is busy, stops, moves, heard nothing."""
_SOON_S = 10.0
_UNSUPPORTED_PROTOCOL = (0x84, 0x01)
_CONTENT_TYPES = {Form.JSON: "application/json", Form.TEXT: "text/plain"}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A message of QoS 1 whose PUBACK has not come.

    Attributes:
        topic: of an answer; empty for what is none.
        row: of the journal; None for a refusal, and for what is no answer.
        id: the request's.
        tries: how often the broker has refused it before.
        unheard: how often nobody had subscribed.
        from_behind: it was a suspect, or of a backlog.
        at_s: when, in seconds of the clock of whoever sent it.
    """

    topic: str = ""
    row: int | None = None
    id: str = ""
    tries: int = 0
    unheard: int = 0
    from_behind: bool = False
    at_s: float = 0.0


class Events(Protocol):
    """What a connection tells its owner, in the network thread."""

    def on_accepted(self, connection: Connection, *, session_present: bool) -> None: ...

    def on_subscribed(self, codes: list[ReasonCode]) -> None: ...

    def on_message(self, connection: Connection, message: paho.MQTTMessage) -> None: ...

    def on_published(self, connection: Connection, mid: int, code: ReasonCode) -> None: ...

    def on_unreadable(self, error: Exception) -> None: ...


@dataclass(kw_only=True)
class Connection:
    """Only the network thread touches it.

    Attributes:
        connected: the broker has accepted it.
        ended: why it is over; empty while it is not.
        session: name of the broker's session that mids belong to.
        worked: the broker has acked something on it.
        hung_up: the broker ended it, and may have done so over a message.
        over_an_answer: it did so over one answer.
        in_flight: by mid.
        ack_after: mid of a refusal → mid of the message that it refuses.
        chunked: answer topics of chunks, which are never acked → when the last one was sent.
        unacked: mid of what was published with QoS 1 → monotonic time.
        subscribing_s: monotonic time of subscriptions that the broker has not answered; None once it has.
    """

    client: Client
    version5: bool
    started_s: float
    connected: bool = False
    ended: str = ""
    taken_over: bool = False
    unsupported: bool = False
    refused: bool = False
    silent: bool = False
    session: str = ""
    max_packet_bytes: int = 268_435_455
    max_in_flight: int = MAX_IN_FLIGHT
    worked: bool = False
    hung_up: bool = False
    over_an_answer: bool = False
    in_flight: dict[int, Sent] = field(default_factory=dict)
    ack_after: dict[int, int] = field(default_factory=dict)
    chunked: dict[str, float] = field(default_factory=dict)
    unacked: dict[int, float] = field(default_factory=dict)
    subscribing_s: float | None = None

    def turn(
        self, wake: socket.socket, send_due: Callable[[Connection], None], *, timeout_s: float = TURN_S
    ) -> None:
        """Waits for the socket or for `wake`, reads, writes, and then sends what is due.

        Args:
            wake: readable when something is due.
            send_due: called while the broker listens.
        """
        try:
            if not self.client.turn(timeout_s, wake):
                self.ended = self.ended or "connection lost"
                return
            if self.connected and not self.ended:
                send_due(self)
        except Exception as error:  # noqa: BLE001 - paho raises on malformed packets; the connection is at fault
            log.warning("mqtt connection failed code=broker_unreachable error=%r", error)
            self.ended = f"protocol error: {error!r}"
        now_s = time.monotonic()
        if not self.connected and now_s - self.started_s > _CONNACK_S:
            self.silent = True
            self.ended = self.ended or "no CONNACK"
        if not self.client.reading and self.writable:  # else the line is slow, and its answer on the way
            since_s = self.subscribing_s
            if since_s is not None and now_s - since_s > SUBACK_S:
                self.ended = self.ended or "the broker does not acknowledge the subscriptions"
            patience_s = LAST_PUBACK_S if len(self.unacked) < self.max_in_flight else PUBACK_S
            if self.unacked and now_s - min(self.unacked.values()) > patience_s:
                self.ended = self.ended or "the broker does not acknowledge what it is sent"

    def subscribe(self, topics: Iterable[str], *, retained: str) -> None:
        """Subscribes with QoS 1.

        Args:
            retained: the one topic whose retained message is wanted.
        """
        self.subscribing_s = time.monotonic()
        if self.version5:
            # Retain Handling 2: a request that somebody retained is not sent on every connect.
            never = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
            wanted = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE)
            self.client.subscribe([(topic, wanted if topic == retained else never) for topic in topics])
        else:
            self.client.subscribe([(topic, 1) for topic in topics])

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int,
        retain: bool = False,
        form: Form | None = None,
        correlation: bytes | None = None,
        user_properties: Mapping[str, str] | None = None,
    ) -> int:
        """Hands a message to paho. Gives its mid.

        Args:
            form: of an answer or a chunk; without it no properties are sent, nor where the broker speaks MQTT 3.1.1.
        """
        properties = None
        if form is not None and self.version5:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.PayloadFormatIndicator = 1
            properties.ContentType = _CONTENT_TYPES[form]
            if user_properties:
                properties.UserProperty = list(user_properties.items())
            if correlation is not None:
                properties.CorrelationData = correlation
        mid = self.client.publish(topic, payload, qos=qos, retain=retain, properties=properties).mid
        if qos:
            self.unacked[mid] = time.monotonic()
        return mid

    def ack(self, mid: int) -> None:
        """Acks a message of QoS 1."""
        self.client.ack(mid, 1)

    @property
    def writable(self) -> bool:
        """paho has nothing left to write: what is published now does not pile up in its memory."""
        return not self.client.want_write()

    @property
    def may_publish(self) -> bool:
        """A message of QoS 1 finds room in the broker's window, and in the socket."""
        return len(self.in_flight) < self.max_in_flight and self.writable

    def fits(self, topic: str, payload: bytes) -> bool:
        """False for what the broker would end the connection over."""
        return len(payload) + len(topic.encode()) + PACKET_OVERHEAD_BYTES <= self.max_packet_bytes

    def answers(self) -> list[Sent]:
        """What is in flight of answers and refusals."""
        return [sent for sent in self.in_flight.values() if sent.topic]

    def recent(self, now_s: float) -> list[Sent]:
        """What of them the broker has got so lately that it may yet hang up over it."""
        return [sent for sent in self.answers() if now_s - sent.at_s < _SOON_S]

    def suspects(self, now_s: float) -> list[Sent]:
        """The answers and refusals over which the broker may have hung up."""
        return self.recent(now_s) if self.hung_up and self.worked else []

    def disconnect(self) -> None:
        """An orderly DISCONNECT: it keeps the will unsent and the session alive."""
        with contextlib.suppress(Exception):
            self.client.disconnect()

    def close(self) -> None:
        sock = self.client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()

    def ending(self, now_s: float) -> Ending:
        """What the next connection should know of this one."""
        return Ending(
            lasted_s=now_s - self.started_s,
            connected=self.connected,
            refused=self.refused,
            unsupported=self.unsupported,
            silent=self.silent,
            hung_up=self.hung_up and self.worked,
            taken_over=self.taken_over,
            over_an_answer=self.over_an_answer,
        )

    def attach(self, events: Events) -> None:
        """Binds paho's callbacks; none of them lets an exception out."""
        client = self.client
        client.on_socket_open = guarded(disable_nagle)
        client.on_connect = guarded(
            lambda _c, _u, flags, code, properties: self._on_connect(events, flags, code, properties)
        )
        client.on_disconnect = guarded(lambda _c, _u, _flags, code, _properties: self._on_disconnect(code))
        client.on_message = guarded(lambda _c, _u, message: events.on_message(self, message))
        client.on_publish = guarded(
            lambda _c, _u, mid, code, _properties: self._on_publish(events, mid, code)
        )
        client.on_subscribe = guarded(
            lambda _c, _u, _mid, codes, _properties: self._on_subscribe(events, codes)
        )
        client.on_unreadable = events.on_unreadable

    def _on_connect(self, events: Events, flags: Any, code: ReasonCode, properties: Any) -> None:
        if code.is_failure:
            self.refused = True
            self.unsupported = code.value in _UNSUPPORTED_PROTOCOL
            self.ended = f"refused by the broker: {code}"
            return
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", self.max_packet_bytes)
        self.max_in_flight = min(MAX_IN_FLIGHT, getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT))
        events.on_accepted(self, session_present=flags.session_present)

    def _on_subscribe(self, events: Events, codes: list[ReasonCode]) -> None:
        self.subscribing_s = None
        events.on_subscribed(codes)

    def _on_publish(self, events: Events, mid: int, code: ReasonCode) -> None:
        self.unacked.pop(mid, None)
        events.on_published(self, mid, code)

    def _on_disconnect(self, code: ReasonCode) -> None:
        self.taken_over = code.value == _TAKEN_OVER
        self.hung_up = not self.ended and code.value not in _NO_MESSAGES_FAULT
        self.ended = self.ended or f"disconnected: {code}"


@dataclass(frozen=True, kw_only=True)
class Dialling:
    """How to reach the broker, and as whom: the same for each connection.

    Attributes:
        max_packet_bytes: what the broker may send.
        password: reads the password, or gives None; asked at each connect, so that it can be rotated.
        will: gives the retained message that the broker publishes to `will_topic` when the agent is gone; asked at each
            connect.
    """

    settings: MqttSettings
    client_id: str
    tls: ssl.SSLContext | None
    max_packet_bytes: int
    password: Callable[[], str | None]
    will_topic: str
    will: Callable[[], bytes]

    def dial(self, events: Events, *, version5: bool) -> Connection:
        """A connection whose CONNECT is on its way.

        Raises:
            OSError, ValueError: the broker was not reached, or did not prove who it is.
            SettingsError: the password cannot be read.
        """
        settings = self.settings
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            protocol=paho.MQTTv5 if version5 else paho.MQTTv311,
            manual_ack=True,
            clean_session=None if version5 else False,
        )
        client.max_packet_bytes = self.max_packet_bytes
        connection = Connection(client=client, version5=version5, started_s=time.monotonic())
        connection.attach(events)
        if self.tls is not None:
            client.tls_set_context(self.tls)
        if settings.username:
            client.username_pw_set(settings.username, self.password())
        client.connect_timeout = _CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.will_set(self.will_topic, self.will(), qos=1, retain=True)
        if not version5:
            client.connect(settings.host, settings.port, settings.keepalive_s)
            return connection
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = settings.session_expiry_s
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        properties.MaximumPacketSize = self.max_packet_bytes
        client.connect(
            settings.host, settings.port, settings.keepalive_s, clean_start=False, properties=properties
        )
        return connection


def inbound(connection: Connection, message: paho.MQTTMessage) -> Inbound:
    """A message without paho."""
    properties = message.properties
    expiry_s = getattr(properties, "MessageExpiryInterval", None)
    delivery = None
    if message.qos > 0:
        delivery = Delivery(session=connection.session, mid=message.mid, redelivered=bool(message.dup))
    return Inbound(
        topic=message.topic,
        payload=bytes(message.payload),
        retained=bool(message.retain),
        response_topic=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
        expiry_s=float(expiry_s) if expiry_s is not None else None,
        delivery=delivery,
    )
