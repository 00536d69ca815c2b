"""The MQTT side of the agent. The only importer of paho.

Owns one network thread and, in it, one paho client for each connection: nothing of a dead connection (its
mids, its unsent messages) can reach the next one. What must survive is in the journal.

    select → paho reads → on_message: handler commits, then ack → outgoing: refusals, chunks, answers, status

Refuses to trust callbacks (an exception in one would end paho's reading without a sign), to block on a slow
broker (what does not fit is dropped if it is a chunk, and waits in the journal if it is an answer), and to
fight for a client id. Contract: docs/mqtt.md. Sources: MQTT 5.0 §3.1–3.14; paho-mqtt 2.2.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import select
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form, encode
from edge_agent.chat.prompt import Answer, Delivery, Outgoing, Prompt, Source
from edge_agent.errors import AnswerTooLarge, JournalUnavailable, SettingsError
from edge_agent.settings import MqttSettings
from edge_agent.topics import Topics, can_be_published
from edge_agent.transport.credentials import tls_context
from edge_agent.transport.reconnect import TAKEN_OVER_S, Ending, Reconnect

log = logging.getLogger(__name__)

RECEIVE_MAXIMUM = 16
MAX_IN_FLIGHT = 16
MAX_REFUSALS = 256
MAX_CHUNKS = 256

_CONNECT_TIMEOUT_S = 10.0
_TURN_S = 1.0
_CONNACK_S = 15.0
_OUTBOX_LOOK_S = 2.0
_REFUSED_RETRY_S = 60.0
_MIN_PACKET_BYTES = 1 << 20
_PACKET_OVERHEAD_BYTES = 128
_TAKEN_OVER = 0x8E
_UNSUPPORTED_PROTOCOL = (0x84, 0x01)


@dataclass(frozen=True, kw_only=True)
class Inbound:
    """A message as it came, for the handlers.

    Attributes:
        expiry_s: what is left of its expiry interval, or None.
        delivery: how the broker would name it when it comes again; None for QoS 0.
    """

    topic: str
    payload: bytes
    retained: bool
    response_topic: str | None
    correlation: bytes | None
    expiry_s: float | None
    delivery: Delivery | None


class _Client(paho.Client):
    """paho, but for a message whose properties it cannot read: that one is acked and passed over.

    paho itself ends the connection, and the broker brings the message again, for ever. It takes U+FEFF for
    malformed, which MQTT 5.0 §1.5.4 allows and brokers pass on.

    Attributes:
        on_unreadable: told the error.
    """

    on_unreadable: Callable[[Exception], None]

    def _handle_publish(self) -> MQTTErrorCode:
        try:
            return super()._handle_publish()
        except Exception as error:  # noqa: BLE001 - only decoding is unguarded, and it raises whatever it likes
            packet = self._in_packet["packet"]
            topic_end = 2 + int.from_bytes(packet[:2], "big")
            mid = int.from_bytes(packet[topic_end : topic_end + 2], "big")
            self.on_unreadable(error)
            return self.ack(mid, (self._in_packet["command"] & 0x06) >> 1)


class Handler(Protocol):
    """What the daemon does with a message; called in the network thread.

    An ack follows when it returns, or, where it refuses the message, when the broker has the refusal.
    """

    def __call__(self, message: Inbound) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """A refusal: an answer that is not in the journal. Best effort."""

    topic: str
    correlation: bytes | None
    form: Form
    answer: Answer
    refused_mid: int | None = None
    """The message that is refused: it stays with the broker until the refusal is there."""


@dataclass(kw_only=True)
class _Connection:
    """One paho client from CONNECT to its end. Only the network thread touches it."""

    client: _Client
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
    in_flight: dict[int, int | None] = field(default_factory=dict)
    """mid → journal row, None for what is no answer of the journal."""
    ack_after: dict[int, int] = field(default_factory=dict)
    """mid of a refusal → mid of the message that it refuses."""
    delivering: dict[int, str] = field(default_factory=dict)
    """Journal row → the request's id, of an answer that is in flight."""
    refused_rows: set[int] = field(default_factory=set)
    refused_at_s: float = 0.0

    def ending(self, now_s: float) -> Ending:
        """What the next connection should know of this one."""
        return Ending(
            lasted_s=now_s - self.started_s,
            connected=self.connected,
            refused=self.refused,
            unsupported=self.unsupported,
            silent=self.silent,
            taken_over=self.taken_over,
        )


class MqttTransport:
    """The agent's connection to the broker; `run` is its thread.

    `answered`, `chunk`, `refuse`, `set_retained`, `stop_accepting` and `close` may come from any thread.

    Args:
        max_payload_bytes: of a request; what is much larger is not even read.
        password: reads the password, or gives None; asked at each connect, so that it can be rotated.
        handlers: by topic.
        will: the retained status that the broker publishes when this agent is gone.
    """

    def __init__(
        self,
        settings: MqttSettings,
        *,
        topics: Topics,
        journal: Journal,
        max_payload_bytes: int,
        password: Callable[[], str | None],
        handlers: dict[str, Handler],
        will: bytes,
    ) -> None:
        self._settings = settings
        self._topics = topics
        self._journal = journal
        self._password = password
        self._handlers = handlers
        self._will = will
        self._client_id = f"edge-agent-{topics.device_id}"
        self._place = f"{settings.host}:{settings.port}"
        speaks_5 = False
        with contextlib.suppress(JournalUnavailable):
            speaks_5 = journal.note("broker_speaks_5") == self._place
        self._reconnect = Reconnect(settings.protocol, speaks_5=speaks_5)
        # Room above the limit, so that ordinary excess is answered (413) and not just cut off.
        self._max_packet_bytes = max(_MIN_PACKET_BYTES, 4 * max_payload_bytes)
        self._connection: _Connection | None = None
        self._refusals: collections.deque[_Reply] = collections.deque()
        self._chunks: collections.deque[tuple[str, bytes | None, bytes]] = collections.deque(
            maxlen=MAX_CHUNKS
        )
        self._retained: dict[str, bytes] = {}
        self._retained_due: set[str] = set()
        self._metrics: bytes | None = None
        self._outbox_due = True
        self._outbox_looked_s = 0.0
        self._accepting = True
        self._ack_later = False
        self._closing = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._tls = tls_context(settings)
        self.counters: collections.Counter[str] = collections.Counter()
        self.turned_s = time.monotonic()
        self.problem = ""
        self.refused_topics: tuple[str, ...] = ()
        """Subscriptions that the broker refused on the present connection."""

    # --- From any thread -------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        connection = self._connection
        return connection is not None and connection.connected

    def answered(self, row: int) -> None:
        """An answer waits in the journal."""
        self._outbox_due = True
        self._wake()

    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None:
        """Sends a part of an answer, QoS 0; the oldest parts go when the broker is slow."""
        if len(self._chunks) == MAX_CHUNKS:
            self.counters["chunks_dropped"] += 1
        self._chunks.append((self._topics.stream(prompt.answer_topic), prompt.correlation, encode(document)))
        self._wake()

    def refuse(
        self, *, topic: str, correlation: bytes | None, form: Form, answer: Answer, delivery: Delivery | None
    ) -> None:
        """Sends an answer that the journal does not know. From a handler only.

        What is refused is acked when the broker has the refusal: a connection that is lost before brings the
        message again, and it is judged anew.
        """
        mid = delivery.mid if delivery is not None else None
        self._refusals.append(
            _Reply(topic=topic, correlation=correlation, form=form, answer=answer, refused_mid=mid)
        )
        self._ack_later = mid is not None
        if len(self._refusals) > MAX_REFUSALS:
            self._drop_refusal()
        self._wake()

    def set_retained(self, topic: str, document: bytes) -> None:
        """A retained document (status, reported models); published now and after each connect."""
        self._retained[topic] = document
        self._retained_due.add(topic)
        self._wake()

    def set_metrics(self, document: bytes) -> None:
        self._metrics = document
        self._wake()

    def stop_accepting(self) -> None:
        """From now on requests are neither handled nor acked: they stay with the broker."""
        self._accepting = False

    def close(self) -> None:
        """Ends `run` after what is due has been sent, within a few seconds."""
        self._closing.set()
        self._wake()

    # --- The network thread ----------------------------------------------------------------------------

    def run(self) -> None:
        """The thread: connects, turns, waits, until `close`."""
        while not self._closing.is_set():
            connection = self._connect()
            if connection is not None:
                self._connection = connection
                while not connection.ended and not self._closing.is_set():
                    self._turn(connection)
                if self._closing.is_set() and connection.connected:
                    self._say_goodbye(connection)
                self._end(connection)
            if not self._closing.is_set():
                self._wait_to_reconnect(connection)
        for end in (self._wake_read, self._wake_write):
            end.close()

    def _connect(self) -> _Connection | None:
        settings = self._settings
        self.turned_s = time.monotonic()
        client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=paho.MQTTv5 if self._reconnect.version5 else paho.MQTTv311,
            manual_ack=True,
            clean_session=None if self._reconnect.version5 else False,
        )
        connection = _Connection(client=client, version5=self._reconnect.version5, started_s=time.monotonic())
        self._attach(connection)
        try:
            if self._tls is not None:
                client.tls_set_context(self._tls)
            if settings.username:
                client.username_pw_set(settings.username, self._password())
            client.connect_timeout = _CONNECT_TIMEOUT_S
            client.max_inflight_messages_set(MAX_IN_FLIGHT)
            client.will_set(self._topics.status, self._will, qos=1, retain=True)
            if self._reconnect.version5:
                properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
                properties.SessionExpiryInterval = settings.session_expiry_s
                properties.ReceiveMaximum = RECEIVE_MAXIMUM
                properties.MaximumPacketSize = self._max_packet_bytes
                client.connect(
                    settings.host,
                    settings.port,
                    settings.keepalive_s,
                    clean_start=False,
                    properties=properties,
                )
            else:
                client.connect(settings.host, settings.port, settings.keepalive_s)
        except (OSError, ValueError, SettingsError) as error:
            self._note_failure(f"broker {settings.host}:{settings.port} not reached: {error}")
            return None
        return connection

    def _attach(self, connection: _Connection) -> None:
        """Binds paho's callbacks to this connection; none of them lets an exception out."""
        client = connection.client
        client.on_socket_open = _guarded(_disable_nagle)
        client.on_connect = _guarded(
            lambda _c, _u, flags, code, properties: self._on_connect(connection, flags, code, properties)
        )
        client.on_disconnect = _guarded(
            lambda _c, _u, _flags, code, _properties: self._on_disconnect(connection, code)
        )
        client.on_message = _guarded(lambda _c, _u, message: self._on_message(connection, message))
        client.on_publish = _guarded(
            lambda _c, _u, mid, code, _properties: self._on_publish(connection, mid, code)
        )
        client.on_subscribe = _guarded(lambda _c, _u, _mid, codes, _properties: self._on_subscribe(codes))
        client.on_unreadable = self._on_unreadable

    def _turn(self, connection: _Connection) -> None:
        """One turn: waits for the socket or a wake-up, reads, writes, sends what is due."""
        client = connection.client
        self.turned_s = time.monotonic()
        sock = client.socket()
        if sock is None:
            connection.ended = connection.ended or "connection lost"
            return
        pending = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
        writing = [sock] if client.want_write() else []
        try:
            readable, writable, _ = select.select(
                [sock, self._wake_read], writing, [], 0 if pending else _TURN_S
            )
        except (OSError, ValueError):
            connection.ended = "connection lost"
            return
        if self._wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                self._wake_read.recv(4096)
        try:
            if sock in readable or pending:
                client.loop_read()
            if sock in writable:
                client.loop_write()
            client.loop_misc()
            if connection.connected and not connection.ended:
                self._send_due(connection)
        except Exception as error:  # noqa: BLE001 - paho raises on malformed packets; the connection is at fault
            log.warning("mqtt connection failed error=%r", error)
            connection.ended = f"protocol error: {error!r}"
        if not connection.connected and time.monotonic() - connection.started_s > _CONNACK_S:
            connection.silent = True
            connection.ended = connection.ended or "no CONNACK"

    def _send_due(self, connection: _Connection) -> None:
        """Hands paho what waits, as far as the socket takes it: nothing piles up in its memory."""
        while self._refusals and self._may_publish(connection):
            reply = self._refusals.popleft()
            if self._fits(connection, reply.topic, reply.answer.payload):
                self._publish_answer(connection, reply, row=None)
            elif reply.refused_mid is not None:
                connection.client.ack(reply.refused_mid, 1)
        while self._chunks and not connection.client.want_write():
            topic, correlation, payload = self._chunks.popleft()
            if self._fits(connection, topic, payload):
                self._publish_chunk(connection, topic, correlation, payload)
        while self._retained_due and self._may_publish(connection):
            topic = self._retained_due.pop()
            if self._fits(connection, topic, self._retained[topic]):
                info = connection.client.publish(topic, self._retained[topic], qos=1, retain=True)
                connection.in_flight[info.mid] = None
        if self._metrics is not None and not connection.client.want_write():
            if self._fits(connection, self._topics.metrics, self._metrics):
                connection.client.publish(self._topics.metrics, self._metrics, qos=0)
            self._metrics = None
        self._send_outbox(connection)

    def _drop_refusal(self) -> None:
        """The oldest one of QoS 0; without any, the oldest, and its message is acked: un-acked messages up to the
        Receive Maximum, which no refusal will ever follow, would end all delivery."""
        of_qos_0 = (at for at, reply in enumerate(self._refusals) if reply.refused_mid is None)
        at = next(of_qos_0, 0)
        dropped = self._refusals[at]
        del self._refusals[at]
        self.counters["refusals_dropped"] += 1
        if dropped.refused_mid is not None and self._connection is not None:
            self._connection.client.ack(dropped.refused_mid, 1)

    def _fits(self, connection: _Connection, topic: str, payload: bytes) -> bool:
        """False for what the broker would end the connection over. It is left out, and counted."""
        if len(payload) + len(topic.encode()) + _PACKET_OVERHEAD_BYTES <= connection.max_packet_bytes:
            return True
        self.counters["too_large_dropped"] += 1
        return False

    def _send_outbox(self, connection: _Connection) -> None:
        now_s = time.monotonic()
        due = self._outbox_due or now_s - self._outbox_looked_s > _OUTBOX_LOOK_S
        room = connection.max_in_flight - len(connection.in_flight)
        if not due or room <= 0 or connection.client.want_write():
            return
        self._outbox_due, self._outbox_looked_s = False, now_s
        if now_s - connection.refused_at_s > _REFUSED_RETRY_S:
            connection.refused_rows.clear()  # an ACL may have been mended, a quota freed
        skip = (
            frozenset(row for row in connection.in_flight.values() if row is not None)
            | connection.refused_rows
        )
        try:
            waiting = self._journal.outbox(Source.MQTT, limit=room, skip=skip)
        except JournalUnavailable:
            return
        for outgoing in waiting:
            if not self._may_publish(connection):
                break
            self._publish_row(connection, outgoing)
        self._outbox_due = len(waiting) == room

    def _may_publish(self, connection: _Connection) -> bool:
        return len(connection.in_flight) < connection.max_in_flight and not connection.client.want_write()

    def _publish_row(self, connection: _Connection, outgoing: Outgoing) -> None:
        if not can_be_published(outgoing.topic):  # a flipped bit in the journal: it would end each connection
            self._note_refused(connection, outgoing.row, outgoing.id, "its topic is damaged")
            return
        answer = outgoing.answer
        size = _packet_bytes(outgoing.topic, answer)
        if size > connection.max_packet_bytes:
            error = AnswerTooLarge(
                f"the answer needs {size} bytes, the broker takes {connection.max_packet_bytes}"
            )
            answer = Answer.of_error(outgoing.id, outgoing.form, error)
            if _packet_bytes(outgoing.topic, answer) > connection.max_packet_bytes:
                connection.refused_rows.add(outgoing.row)
                return
            self._journal.replace_answer(outgoing.row, answer)
        reply = _Reply(
            topic=outgoing.topic, correlation=outgoing.correlation, form=outgoing.form, answer=answer
        )
        connection.delivering[outgoing.row] = outgoing.id
        self._publish_answer(connection, reply, row=outgoing.row)

    def _publish_answer(self, connection: _Connection, reply: _Reply, *, row: int | None) -> None:
        properties = None
        if connection.version5:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.PayloadFormatIndicator = 1
            properties.ContentType = "application/json" if reply.form is Form.JSON else "text/plain"
            properties.UserProperty = list(reply.answer.properties.items())
            if reply.correlation is not None:
                properties.CorrelationData = reply.correlation
        info = connection.client.publish(reply.topic, reply.answer.payload, qos=1, properties=properties)
        connection.in_flight[info.mid] = row
        if reply.refused_mid is not None:
            connection.ack_after[info.mid] = reply.refused_mid

    def _publish_chunk(
        self, connection: _Connection, topic: str, correlation: bytes | None, payload: bytes
    ) -> None:
        properties = None
        if connection.version5:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.PayloadFormatIndicator = 1
            properties.ContentType = "application/json"
            if correlation is not None:
                properties.CorrelationData = correlation
        connection.client.publish(topic, payload, qos=0, properties=properties)

    def _say_goodbye(self, connection: _Connection) -> None:
        """The last status, then an orderly DISCONNECT (which keeps the will unsent and the session alive)."""
        limit_s = time.monotonic() + 3.0
        while (
            (self._retained_due or connection.in_flight)
            and time.monotonic() < limit_s
            and not connection.ended
        ):
            self._turn(connection)
        with contextlib.suppress(Exception):
            connection.client.disconnect()

    def _end(self, connection: _Connection) -> None:
        self._connection = None
        self._chunks.clear()
        self._refusals.clear()  # what they refuse was not acked: it comes again
        sock = connection.client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()

    # --- paho's callbacks, all in the network thread ---------------------------------------------------

    def _on_connect(self, connection: _Connection, flags: Any, code: ReasonCode, properties: Any) -> None:
        if code.is_failure:
            connection.refused = True
            connection.unsupported = code.value in _UNSUPPORTED_PROTOCOL
            connection.ended = f"refused by the broker: {code}"
            return
        with contextlib.suppress(JournalUnavailable):  # requests get 503 then, but they get it
            if not flags.session_present:
                self._journal.begin_broker_session(uuid.uuid4().hex)
            connection.session = self._journal.broker_session()
            if connection.version5 and not self._reconnect.speaks_5:
                self._journal.set_note("broker_speaks_5", self._place)
                self._reconnect.speaks_5 = True
        connection.max_packet_bytes = getattr(properties, "MaximumPacketSize", connection.max_packet_bytes)
        connection.max_in_flight = min(MAX_IN_FLIGHT, getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT))
        self._subscribe(connection)
        connection.connected = True
        self.problem = ""
        self._outbox_due = True
        self._retained_due.update(self._retained)
        log.info(
            "broker connected host=%s port=%d protocol=%s session_present=%s",
            self._settings.host, self._settings.port, "5" if connection.version5 else "3.1.1", flags.session_present,
        )  # fmt: skip

    def _subscribe(self, connection: _Connection) -> None:
        if connection.version5:
            # Retain Handling 2: a request that somebody retained is not sent on every connect.
            never = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
            wanted = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE)
            connection.client.subscribe(
                [(topic, wanted if topic == self._topics.desired else never) for topic in self._handlers]
            )
        else:
            connection.client.subscribe([(topic, 1) for topic in self._handlers])

    def _on_subscribe(self, codes: list[ReasonCode]) -> None:
        answers = tuple(zip(self._handlers, codes, strict=False))
        self.refused_topics = tuple(topic for topic, code in answers if code.is_failure)
        for topic, code in answers:
            if code.is_failure:
                self.counters["subscribe_refused"] += 1
                log.error(
                    "subscription refused topic=%s reason=%s remedy='check the broker ACL'", topic, code
                )

    def _on_disconnect(self, connection: _Connection, code: ReasonCode) -> None:
        connection.taken_over = code.value == _TAKEN_OVER
        connection.ended = connection.ended or f"disconnected: {code}"

    def _on_publish(self, connection: _Connection, mid: int, code: ReasonCode) -> None:
        row = connection.in_flight.pop(mid, None)
        if (refused_mid := connection.ack_after.pop(mid, None)) is not None:
            connection.client.ack(refused_mid, 1)
        if row is None:
            return
        request_id = connection.delivering.pop(row, "")
        if code.is_failure:
            self._note_refused(connection, row, request_id, str(code))
            return
        log.info("answer delivered request=%s row=%d", request_id, row)
        with contextlib.suppress(JournalUnavailable):  # it will be sent again: a repeat, not a loss
            self._journal.delivered(row)
        self._outbox_due = True

    def _note_refused(self, connection: _Connection, row: int, request_id: str, reason: str) -> None:
        self.counters["answers_refused"] += 1
        connection.refused_rows.add(row)
        connection.refused_at_s = time.monotonic()
        log.warning("answer refused by the broker request=%s row=%d reason=%s", request_id, row, reason)

    def _on_message(self, connection: _Connection, message: paho.MQTTMessage) -> None:
        """Handles, then acks. A handler that fails in an unforeseen way does not get the message again."""
        if not self._accepting:
            return
        self._ack_later = False
        try:
            handler = self._handlers.get(message.topic)
            if handler is None:
                self.counters["unknown_topic"] += 1
            else:
                handler(_inbound(connection, message))
        except Exception:
            self.counters["handler_errors"] += 1
            log.exception("message handler failed topic=%s bytes=%d", message.topic, len(message.payload))
            self._ack_later = False
        if not self._ack_later:
            connection.client.ack(message.mid, message.qos)

    def _on_unreadable(self, error: Exception) -> None:
        self.counters["unreadable"] += 1
        log.warning("message unreadable error=%s", type(error).__name__)

    # --- Waiting ---------------------------------------------------------------------------------------

    def _wait_to_reconnect(self, connection: _Connection | None) -> None:
        now_s = time.monotonic()
        ending = None
        if connection is not None:
            self._note_failure(connection.ended)
            ending = connection.ending(now_s)
        if ending is not None and ending.taken_over:
            log.warning(
                "session taken over client_id=%s wait_s=%.0f remedy='has another device this device_id?'",
                self._client_id, TAKEN_OVER_S,
            )  # fmt: skip
        limit_s = now_s + self._reconnect.wait_after(ending)
        while not self._closing.is_set() and (left_s := limit_s - time.monotonic()) > 0:
            self.turned_s = time.monotonic()
            self._closing.wait(min(left_s, _TURN_S))

    def _note_failure(self, reason: str) -> None:
        self.counters["failed_connections"] += 1
        self.problem = reason
        log.warning("broker disconnected reason=%r retry_s=%.1f", reason, self._reconnect.retry_s)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_write.send(b"\0")


def _inbound(connection: _Connection, message: paho.MQTTMessage) -> Inbound:
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


def _packet_bytes(topic: str, answer: Answer) -> int:
    """Upper bound of a PUBLISH packet: payload, topic, properties, headers."""
    properties = sum(len(key.encode()) + len(value.encode()) + 5 for key, value in answer.properties.items())
    return len(answer.payload) + len(topic.encode()) + properties + _PACKET_OVERHEAD_BYTES


def _disable_nagle(_client: paho.Client, _userdata: object, sock: socket.socket) -> None:
    """Small messages one after the other would wait 40 to 86 ms for an acknowledgement of the first."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _guarded(callback: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            log.exception("mqtt callback failed")

    return call
