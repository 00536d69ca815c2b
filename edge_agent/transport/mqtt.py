"""The MQTT side of the agent: one network thread that keeps a connection to the broker.

Owns the thread, the state of the connection that others look at, and the wait before the next one. What a connection
is stands in `connection.py`, what is sent in `outbox.py`, what is heard in `subscriptions.py`. What must survive is
in the journal.

    select → paho reads → a message: its handler commits, then ack → outgoing: refusals, chunks, answers, status

Refuses to fight for a client id. Contract: docs/mqtt.md.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edge_agent.chat import clock
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Answer, Delivery, Prompt
from edge_agent.errors import JournalUnavailable, SettingsError
from edge_agent.settings import MqttSettings
from edge_agent.topics import Topics
from edge_agent.transport.connection import Connection, Dialling
from edge_agent.transport.credentials import tls_context
from edge_agent.transport.inbound import Handler
from edge_agent.transport.outbox import Outbox, Refusal
from edge_agent.transport.reconnect import TAKEN_OVER_S, Reconnect
from edge_agent.transport.subscriptions import Subscriptions

if TYPE_CHECKING:
    from paho.mqtt.client import MQTTMessage
    from paho.mqtt.reasoncodes import ReasonCode

log = logging.getLogger(__name__)

_MIN_PACKET_BYTES = 1 << 20
_GOODBYE_S = 3.0
_LOOK_S = 1.0


class MqttTransport:
    """The agent's connection to the broker; `run` is its thread.

    Any thread may call `answered`, `chunk`, `set_retained`, `set_metrics`, `stop_accepting` and `close`.

    Args:
        max_payload_bytes: of a request; what is much larger is not even read.
        password: reads the password, or gives None; asked at each connect, so that it can be rotated.
        handlers: by topic.
        will: the retained status that the broker publishes when this agent is gone.

    Attributes:
        counters: what happened how often, since the start.
        turned_s: monotonic time at which the network thread last showed a sign of life.
        problem: why there is no connection; empty while there is one.
    """

    def __init__(
        self,
        settings: MqttSettings,
        *,
        topics: Topics,
        journal: Journal,
        max_payload_bytes: int,
        password: Callable[[], str | None],
        handlers: Mapping[str, Handler],
        will: bytes,
    ) -> None:
        self.counters: collections.Counter[str] = collections.Counter()
        self.turned_s = time.monotonic()
        self.problem = ""
        self._settings = settings
        self._journal = journal
        self._place = f"{settings.host}:{settings.port}"
        speaks_5 = False
        with contextlib.suppress(JournalUnavailable):
            speaks_5 = journal.note("broker_speaks_5") == self._place
        self._reconnect = Reconnect(settings.protocol, speaks_5=speaks_5)
        self._dialling = Dialling(
            settings=settings,
            client_id=f"edge-agent-{topics.device_id}",
            tls=tls_context(settings),
            # Room above the limit, so that ordinary excess is answered (413) and not just cut off.
            max_packet_bytes=max(_MIN_PACKET_BYTES, 4 * max_payload_bytes),
            password=password,
            will_topic=topics.status,
            will=will,
        )
        self._outbox = Outbox(topics=topics, journal=journal, counters=self.counters, now=clock.now)
        self._subscriptions = Subscriptions(handlers, retained=topics.desired, counters=self.counters)
        self._connection: Connection | None = None
        self._closing = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)

    # --- From any thread -------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        connection = self._connection
        return connection is not None and connection.connected

    def status(self) -> dict[str, Any]:
        """What the status says of the broker."""
        return {
            "host": self._settings.host,
            "port": self._settings.port,
            "connected": self.connected,
            "problem": self.problem,
            "refused_topics": list(self._subscriptions.refused),
            "answers_refused": self.counters["answers_refused"],
            "answers_undelivered": self.counters["answers_undelivered"],
            "answers_unheard": self.counters["answers_unheard"],
        }

    def answered(self, row: int) -> None:
        """An answer waits in the journal."""
        self._outbox.answered(row)
        self._wake()

    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None:
        """Sends a part of an answer, QoS 0; the oldest parts are dropped when the broker is slow."""
        self._outbox.chunk(prompt, document)
        self._wake()

    def refuse(
        self, *, topic: str, correlation: bytes | None, form: Form, answer: Answer, delivery: Delivery | None
    ) -> None:
        """Sends an answer that the journal does not know. From a handler only.

        The refused message is acked once the broker has the refusal: if the connection is lost before, the broker
        delivers the message again, and it is judged anew.
        """
        mid = delivery.mid if delivery is not None else None
        refusal = Refusal(topic=topic, correlation=correlation, form=form, answer=answer, refused_mid=mid)
        self._subscriptions.ack_later = mid is not None
        self._outbox.refuse(refusal, self._connection)
        self._wake()

    def set_retained(self, topic: str, document: bytes) -> None:
        """A retained document (status, reported models); published now and after each connect."""
        self._outbox.set_retained(topic, document)
        self._wake()

    def set_metrics(self, document: bytes) -> None:
        self._outbox.set_metrics(document)
        self._wake()

    def stop_accepting(self) -> None:
        """From now on requests are neither handled nor acked: they stay with the broker."""
        self._subscriptions.accepting = False

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
                self._connection = None
                connection.over_an_answer = self._outbox.end(connection)
                connection.close()
            if not self._closing.is_set():
                self._wait_to_reconnect(connection)
        for end in (self._wake_read, self._wake_write):
            end.close()

    def _connect(self) -> Connection | None:
        self.turned_s = time.monotonic()
        try:
            return self._dialling.dial(self, version5=self._reconnect.version5)
        except (OSError, ValueError, SettingsError) as error:
            self._note_failure(f"broker {self._place} not reached: {error}")
            return None

    def _turn(self, connection: Connection) -> None:
        self.turned_s = time.monotonic()
        connection.turn(self._wake_read, self._outbox.send_due)

    def _say_goodbye(self, connection: Connection) -> None:
        """The last status, then an orderly end."""
        limit_s = time.monotonic() + _GOODBYE_S
        while self._outbox.unsaid(connection) and time.monotonic() < limit_s and not connection.ended:
            self._turn(connection)
        connection.disconnect()

    def _wait_to_reconnect(self, connection: Connection | None) -> None:
        now_s = time.monotonic()
        ending = None
        if connection is not None:
            self._note_failure(connection.ended)
            ending = connection.ending(now_s)
        if ending is not None and ending.taken_over:
            log.warning(
                "session taken over client_id=%s wait_s=%.0f remedy='has another device this device_id?'",
                self._dialling.client_id, TAKEN_OVER_S,
            )  # fmt: skip
        limit_s = now_s + self._reconnect.wait_after(ending)
        while not self._closing.is_set() and (left_s := limit_s - time.monotonic()) > 0:
            self.turned_s = time.monotonic()
            self._closing.wait(min(left_s, _LOOK_S))

    def _note_failure(self, reason: str) -> None:
        self.counters["failed_connections"] += 1
        self.problem = reason
        log.warning("broker disconnected reason=%r retry_s=%.1f", reason, self._reconnect.retry_s)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_write.send(b"\0")

    # --- The connection's events, in the network thread ------------------------------------------------

    def on_accepted(self, connection: Connection, *, session_present: bool) -> None:
        with contextlib.suppress(JournalUnavailable):  # requests get 503 then, but they get it
            if not session_present:
                self._journal.begin_broker_session(uuid.uuid4().hex)
            connection.session = self._journal.broker_session()
            if connection.version5 and not self._reconnect.speaks_5:
                self._journal.set_note("broker_speaks_5", self._place)
                self._reconnect.speaks_5 = True
        self._subscriptions.begin(connection)
        connection.connected = True
        self.problem = ""
        self._outbox.begin()
        log.info(
            "broker connected host=%s port=%d protocol=%s session_present=%s",
            self._settings.host, self._settings.port, "5" if connection.version5 else "3.1.1", session_present,
        )  # fmt: skip

    def on_subscribed(self, codes: list[ReasonCode]) -> None:
        self._subscriptions.answered(codes)

    def on_message(self, connection: Connection, message: MQTTMessage) -> None:
        self._subscriptions.handle(connection, message)

    def on_published(self, connection: Connection, mid: int, code: ReasonCode) -> None:
        self._outbox.published(connection, mid, code)

    def on_unreadable(self, error: Exception) -> None:
        self.counters["unreadable"] += 1
        log.warning("message unreadable error=%s", type(error).__name__)
