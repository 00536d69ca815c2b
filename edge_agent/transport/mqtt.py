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
from edge_agent.errors import BrokerUnreachable, EdgeAgentError, JournalUnavailable, SettingsError
from edge_agent.settings.mqtt import MqttSettings
from edge_agent.topics import Topics
from edge_agent.transport.connection import TURN_S, Connection, Dialling
from edge_agent.transport.credentials import tls_context
from edge_agent.transport.echo import Echo
from edge_agent.transport.inbound import Handler
from edge_agent.transport.namesake import Namesake
from edge_agent.transport.outbox import Outbox, Refusal
from edge_agent.transport.paho_client import PacketTooLarge
from edge_agent.transport.protocol_choice import Attempt, ProtocolChoice
from edge_agent.transport.reconnect import Ending, Reconnect
from edge_agent.transport.subscriptions import Subscriptions

if TYPE_CHECKING:
    from paho.mqtt.client import MQTTMessage
    from paho.mqtt.reasoncodes import ReasonCode

log = logging.getLogger(__name__)

_MIN_PACKET_BYTES = 1 << 20
_GOODBYE_S = 3.0
_LOOK_S = 1.0
REST_S = 5.0
"""A turn while nothing is due: the self-test and paho's pings are less than so much late."""
_SPEAKS_5, _SPEAKS_OLDER = "broker_speaks_5", "broker_speaks_older"
"""The journal's notes of what a broker speaks."""
_HEARD = "broker_heard"
"""The journal's note that a message has come from this broker."""
_TURNED_AWAY = 3


class MqttTransport:
    """The agent's connection to the broker; `run` is its thread.

    Any thread may call `answered`, `chunk`, `set_retained`, `set_metrics`, `stop_accepting` and `close`.

    Args:
        max_payload_bytes: of a request; what is much larger is not even read.
        password: reads the password, or gives None; asked at each connect, so that it can be rotated.
        handlers: by topic.
        will: gives the retained status that the broker publishes when this agent is gone.

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
        will: Callable[[], bytes],
    ) -> None:
        self.counters: collections.Counter[str] = collections.Counter()
        self.turned_s = time.monotonic()
        self.problem = ""
        self._settings = settings
        self._journal = journal
        self._place = f"{settings.host}:{settings.port}"
        self._choice = self._remembered_choice()
        self._reconnect = Reconnect()
        self._namesake = Namesake()
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
        self._topics, self._handlers = topics, handlers
        self._echo = Echo(topics.echo, known=self._remembered(_HEARD))
        self._subscriptions = Subscriptions(
            handlers, retained=topics.desired, counters=self.counters, echo=self._echo
        )
        self._turned_away = 0
        self._heard_noted = self._echo.others_heard
        self._connection: Connection | None = None
        self._begun = False
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
            "troubles": [
                {"code": each.code, "text": each.message, "remedy": each.remedy} for each in self.troubles()
            ],
        }

    def troubles(self) -> list[EdgeAgentError]:
        """What somebody should look at, though the broker may be connected."""
        found = (self._echo.trouble, self._namesake.trouble(time.monotonic()))
        return [trouble for trouble in found if trouble is not None]

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

    def reply(self, *, topic: str, correlation: bytes | None, answer: Answer) -> None:
        """Sends an answer that the journal does not know, to a request that was acked. Best effort."""
        self._outbox.reply(
            Refusal(topic=topic, correlation=correlation, form=Form.JSON, answer=answer, lasting=True)
        )
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
        if not self._begun:  # nobody else closes them
            _close(self._wake_read, self._wake_write)

    # --- The network thread ----------------------------------------------------------------------------

    def run(self) -> None:
        """The thread: connects, turns, waits, until `close`."""
        self._begun = True
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
                self._echo.ended(hung_up=connection.hung_up)
                connection.close()
            if not self._closing.is_set():
                self._wait_to_reconnect(connection)
        _close(self._wake_read, self._wake_write)

    def _connect(self) -> Connection | None:
        self.turned_s = time.monotonic()
        self._choice.begin(time.time())
        try:
            return self._dialling.dial(self, version5=self._choice.version5)
        except (OSError, ValueError, SettingsError) as error:
            code = error.code if isinstance(error, SettingsError) else BrokerUnreachable.code
            self._note_failure(f"broker {self._place} not reached: {error}", code)
            return None

    def _turn(self, connection: Connection) -> None:
        self.turned_s = time.monotonic()
        rests = connection.connected and self._outbox.rests and not self._closing.is_set()
        timeout_s = min(REST_S, self._settings.keepalive_s / 4) if rests else TURN_S
        connection.turn(self._wake_read, self._send_due, timeout_s=timeout_s)

    def _send_due(self, connection: Connection) -> None:
        self._outbox.send_due(connection)
        self._echo.send_due(connection, time.monotonic())
        if self._echo.others_heard and not self._heard_noted:
            self._heard_noted = True
            with contextlib.suppress(JournalUnavailable):  # it is found out again
                self._journal.set_note(_HEARD, self._place)

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
            ending = connection.ending(now_s)
            self._note_failure(connection.ended, ending.code)
        offered_5 = self._choice.version5
        if ending is not None:
            self._note_protocol(ending)
        fights = self._namesake.takeovers
        self._note_namesake(ending, now_s)
        limit_s = now_s + self._reconnect.wait_after(
            ending,
            takeovers=self._namesake.takeovers if self._namesake.takeovers > fights else 0,
            other_protocol=offered_5 and not self._choice.version5,
        )
        while not self._closing.is_set() and (left_s := limit_s - time.monotonic()) > 0:
            self.turned_s = time.monotonic()
            self._closing.wait(min(left_s, _LOOK_S))

    def _note_protocol(self, ending: Ending) -> None:
        if ending.connected:
            self._turned_away = 0
            self._choice.ended()
            return
        hung_up = not (ending.refused or ending.silent)
        self._turned_away += hung_up
        if self._turned_away >= _TURNED_AWAY:
            self._echo.turned_away()
        attempt = Attempt(unsupported=ending.unsupported, hung_up=hung_up, silent=ending.silent)
        self._choice.note(attempt, time.time())

    def _note_namesake(self, ending: Ending | None, now_s: float) -> None:
        before = self._namesake.takeovers
        self._namesake.ended(ending, now_s=now_s)
        if self._namesake.takeovers > before:
            log.warning(
                "session taken over code=device_id_taken client_id=%s remedy='has another device this device_id?'",
                self._dialling.client_id,
            )

    def _note_failure(self, reason: str, code: str) -> None:
        self.counters["failed_connections"] += 1
        self.problem = reason
        log.warning(
            "broker disconnected code=%s reason=%r retry_s=%.1f", code, reason, self._reconnect.retry_s
        )

    def _remembered_choice(self) -> ProtocolChoice:
        older_until_s = 0.0
        with contextlib.suppress(JournalUnavailable, ValueError):
            place, _, until = self._journal.note(_SPEAKS_OLDER).rpartition(" ")
            older_until_s = float(until) if place == self._place else 0.0
        return ProtocolChoice(
            self._settings.protocol, speaks_5=self._remembered(_SPEAKS_5), older_until_s=older_until_s
        )

    def _remembered(self, key: str) -> bool:
        """True if this was noted of the present broker."""
        with contextlib.suppress(JournalUnavailable):
            return self._journal.note(key) == self._place
        return False

    def _remember_choice(self) -> None:
        speaks_5 = self._place if self._choice.speaks_5 else ""
        older = f"{self._place} {self._choice.older_until_s:.0f}" if self._choice.older_until_s else ""
        with contextlib.suppress(JournalUnavailable):  # it is found out again
            for key, value in ((_SPEAKS_5, speaks_5), (_SPEAKS_OLDER, older)):
                if self._journal.note(key) != value:
                    self._journal.set_note(key, value)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_write.send(b"\0")

    # --- The connection's events, in the network thread ------------------------------------------------

    def on_accepted(self, connection: Connection, *, session_present: bool) -> None:
        with contextlib.suppress(JournalUnavailable):  # requests get 503 then, but they get it
            if not session_present:
                self._journal.begin_broker_session(uuid.uuid4().hex)
            connection.session = self._journal.broker_session()
        self._choice.note(Attempt(accepted=True), time.time())
        self._remember_choice()
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
        if self._topics.cancel_of_clients in self._handlers:
            self._echo.subscribed(time.monotonic())

    def on_message(self, connection: Connection, message: MQTTMessage) -> None:
        self._subscriptions.handle(connection, message)

    def on_published(self, connection: Connection, mid: int, code: ReasonCode) -> None:
        self._outbox.published(connection, mid, code)
        self._echo.published(mid, code, time.monotonic())

    def on_unreadable(self, error: Exception) -> None:
        self.counters["unreadable"] += 1
        # Others quote what the message says.
        reason = str(error) if isinstance(error, PacketTooLarge) else type(error).__name__
        log.warning("message unreadable code=message_unreadable reason=%r", reason)


def _close(*ends: socket.socket) -> None:
    for end in ends:
        end.close()
