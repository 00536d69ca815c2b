"""What waits to be sent to the broker: refusals, chunks, answers, the status, metrics.

Owns bounded queues, and the order in which they are emptied. Answers wait in the journal, not here. Refuses to block
on a slow broker: what does not fit is dropped if it is a chunk, and waits in the journal if it is an answer.

    new answers → those that waited for a connection, oldest first → those that were tried in vain, a few a second

`retries.py` says how often they are tried, `suspicion.py` what counts as a refusal where the broker ends the connection
instead.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_agent.chat.clock import Moment
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form, encode
from edge_agent.chat.prompt import Answer, Outgoing, Prompt, Source
from edge_agent.errors import AnswerTooLarge, JournalUnavailable
from edge_agent.topics import Topics, can_be_published
from edge_agent.transport.connection import PACKET_OVERHEAD_BYTES, Connection, Sent
from edge_agent.transport.retries import Retries
from edge_agent.transport.suspicion import REFUSALS_LOST, Suspicion

if TYPE_CHECKING:
    from paho.mqtt.reasoncodes import ReasonCode

log = logging.getLogger(__name__)

MAX_REFUSALS = 256
MAX_CHUNKS = 256
MAX_NEW = 1024
MAX_BACKLOG = 4
"""Answers of a backlog under way at once: a new one does not wait behind many of them at the broker."""
MAX_RETRIES = 16
"""Postponed answers that are tried again at one look: thousands of them take little of the device's time."""
_LOOK_S, _REST_S = 1.0, 60.0
"""Between two looks at the answers in the journal: while some wait there, and while none does."""
_PATIENCE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An answer that is not in the journal. Best effort.

    Attributes:
        refused_mid: the message that is refused: it stays with the broker until the refusal is there.
        lasting: it outlives a connection, since nothing at the broker asks for it again.
    """

    topic: str
    correlation: bytes | None
    form: Form
    answer: Answer
    refused_mid: int | None = None
    lasting: bool = False


class Outbox:
    """Filled from any thread, but for `refuse`; emptied by the network thread.

    Args:
        counters: of the transport.
        now: the clock.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        journal: Journal,
        counters: collections.Counter[str],
        now: Callable[[], Moment],
    ) -> None:
        self._now = now
        self._topics = topics
        self._journal = journal
        self._counters = counters
        self._refusals: collections.deque[Refusal] = collections.deque()
        self._chunks: collections.deque[tuple[str, bytes | None, bytes]] = collections.deque(
            maxlen=MAX_CHUNKS
        )
        self._retained: dict[str, bytes] = {}
        self._retained_due: set[str] = set()
        self._metrics: bytes | None = None
        self._new: collections.deque[int] = collections.deque(maxlen=MAX_NEW)
        self._suspicion = Suspicion()
        self._retries = Retries(journal=journal, counters=counters, now=now)
        self._answers_due = True
        self._some_wait = True
        self._looked_s = self._began_s = 0.0

    # --- From any thread -------------------------------------------------------------------------------

    def answered(self, row: int) -> None:
        """An answer waits in the journal. With many of them, the oldest are found there."""
        self._some_wait = True
        self._new.append(row)

    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None:
        """Adds a part of an answer; the oldest parts go when the broker is slow."""
        if len(self._chunks) == MAX_CHUNKS:
            self._counters["chunks_dropped"] += 1
        self._chunks.append((prompt.answer_topic, prompt.correlation, encode(document)))

    def reply(self, refusal: Refusal) -> None:
        """Adds an answer that the journal does not know, and that nobody waits for at the broker. What finds no room is
        dropped: its question was acked, so nothing holds back whoever asks."""
        if len(self._refusals) >= MAX_REFUSALS:
            self._counters["refusals_dropped"] += 1
        else:
            self._refusals.append(refusal)

    def set_retained(self, topic: str, document: bytes) -> None:
        """A retained document; published now and after each connect."""
        self._retained[topic] = document
        self._retained_due.add(topic)

    def set_metrics(self, document: bytes) -> None:
        self._metrics = document

    # --- The network thread ----------------------------------------------------------------------------

    def refuse(self, refusal: Refusal, connection: Connection | None) -> None:
        """Adds a refusal.

        Args:
            connection: the one that the refused message came by.
        """
        self._refusals.append(refusal)
        if len(self._refusals) > MAX_REFUSALS:
            self._drop_refusal(connection)

    def begin(self) -> None:
        """A connection was accepted: answers and retained documents are due again."""
        self._answers_due = self._some_wait = True
        self._began_s = self._now().boot_s
        self._retained_due.update(self._retained)

    def end(self, connection: Connection) -> bool:
        """The connection is over. True if the broker probably ended it over one answer: the next one can do without
        a long wait."""
        self._chunks.clear()
        for _ in range(len(self._refusals)):  # others may add to it meanwhile
            refusal = self._refusals.popleft()
            if refusal.lasting:  # what the others refuse was not acked: it comes again
                self._refusals.append(refusal)
        now_s = self._now().boot_s
        if connection.hung_up and not connection.worked and (connection.answers() or connection.chunked):
            self._suspicion.ended_unheard(now_s)
        suspects = connection.suspects(now_s)
        topics = {sent.topic for sent in suspects}
        if connection.hung_up and connection.worked:
            topics |= {topic for topic, at_s in connection.chunked.items() if now_s - at_s < _PATIENCE_S}
        lone = suspects[0].topic if len(suspects) == 1 else ""
        suspected = self._suspicion.ended(topics, lone=lone, now_s=now_s)
        alone = suspected == {lone}
        with contextlib.suppress(JournalUnavailable):  # the next end tells as much
            self._journal.deliveries.suspect(suspected, moment=self._now())
            if alone:
                self._retries.refused(suspects[0], "the broker ended the connection at it")
        return alone

    def unsaid(self, connection: Connection) -> bool:
        """True while the broker does not have the last status, or has not taken something that was sent."""
        return bool(self._retained_due or connection.in_flight)

    @property
    def rests(self) -> bool:
        """True while nothing waits that becomes due by itself."""
        return not (self._some_wait or self._refusals or self._suspicion.active)

    def send_due(self, connection: Connection) -> None:
        """Hands paho what waits, as far as the socket takes it: nothing piles up in its memory."""
        while self._retained_due and connection.may_publish:
            topic = self._retained_due.pop()
            if self._fits(connection, topic, self._retained[topic]):
                mid = connection.publish(topic, self._retained[topic], qos=1, retain=True)
                connection.in_flight[mid] = Sent()
        while self._refusals and connection.may_publish and self._is_tried(connection):
            refusal = self._refusals.popleft()
            if self._suspicion.of(refusal.topic) >= REFUSALS_LOST:
                self._counters["refusals_dropped"] += 1
                if refusal.refused_mid is not None:
                    connection.ack(refusal.refused_mid)
            elif self._fits(connection, refusal.topic, refusal.answer.payload):
                self._send_refusal(connection, refusal)
            elif refusal.refused_mid is not None:
                connection.ack(refusal.refused_mid)
        while self._chunks and connection.writable:
            answer_topic, correlation, payload = self._chunks.popleft()
            topic = self._topics.stream(answer_topic)
            if not self._suspicion.of(answer_topic) and self._fits(connection, topic, payload):
                connection.publish(topic, payload, qos=0, form=Form.JSON, correlation=correlation)
                connection.chunked[answer_topic] = self._now().boot_s
        if self._metrics is not None and connection.writable:
            if self._fits(connection, self._topics.metrics, self._metrics):
                connection.publish(self._topics.metrics, self._metrics, qos=0)
            self._metrics = None
        self._send_answers(connection)

    def published(self, connection: Connection, mid: int, code: ReasonCode) -> None:
        """The broker has a message of QoS 1, or says why not."""
        sent = connection.in_flight.pop(mid, None)
        connection.worked = True
        self._some_wait = True
        if (refused_mid := connection.ack_after.pop(mid, None)) is not None:
            connection.ack(refused_mid)
        if sent is None or not sent.topic:
            return
        connection.chunked.pop(sent.topic, None)
        self._suspicion.taken(sent.topic, from_behind=sent.from_behind)
        more = False
        with contextlib.suppress(JournalUnavailable):  # it will be sent again: a repeat, not a loss
            more = self._retries.published(sent, code)
        if more or not (sent.tries or sent.unheard):
            self._answers_due = True

    def _drop_refusal(self, connection: Connection | None) -> None:
        """Drops the oldest refusal of QoS 0; without any, the oldest, and acks its message: un-acked messages up to
        the Receive Maximum, which no refusal will ever follow, would end all delivery."""
        of_qos_0 = (at for at, refusal in enumerate(self._refusals) if refusal.refused_mid is None)
        at = next(of_qos_0, 0)
        dropped = self._refusals[at]
        del self._refusals[at]
        self._counters["refusals_dropped"] += 1
        if dropped.refused_mid is not None and connection is not None:
            connection.ack(dropped.refused_mid)

    def _fits(self, connection: Connection, topic: str, payload: bytes) -> bool:
        """False for what the broker would end the connection over. It is left out, and counted."""
        if connection.fits(topic, payload):
            return True
        self._counters["too_large_dropped"] += 1
        return False

    def _send_refusal(self, connection: Connection, refusal: Refusal) -> None:
        mid = _publish(
            connection, refusal.topic, refusal.answer, form=refusal.form, correlation=refusal.correlation
        )
        connection.in_flight[mid] = Sent(topic=refusal.topic, at_s=self._now().boot_s)
        if refusal.refused_mid is not None:
            connection.ack_after[mid] = refusal.refused_mid

    # --- Answers ---------------------------------------------------------------------------------------

    def _send_answers(self, connection: Connection) -> None:
        try:
            self._send_new(connection)
            now_s = self._now().boot_s
            look = now_s - self._looked_s > (_REST_S if self.rests else _LOOK_S)
            if look:
                self._looked_s = now_s
            if (look or self._answers_due) and self._has_room(connection, now_s):
                self._answers_due = self._send_backlog(connection, now_s)
            if look and not self._answers_due and self._has_room(connection, now_s):
                self._send_postponed(connection, now_s)
                self._some_wait = False  # before the journal is asked: what comes later sets it again
                if self._journal.deliveries.pending():
                    self._some_wait = True
        except JournalUnavailable:
            self._some_wait = True  # they wait there

    def _send_new(self, connection: Connection) -> None:
        """Answers since the last look, in the order in which they were given."""
        while self._new and self._has_room(connection, self._now().boot_s):
            outgoing = self._journal.deliveries.unsent(self._new.popleft())
            if outgoing is None or outgoing.row in _rows_in_flight(connection):
                continue
            if self._suspicion.of(outgoing.topic):
                self._journal.deliveries.suspect([outgoing.topic], moment=self._now())
                continue
            self._send_row(connection, outgoing)

    def _send_backlog(self, connection: Connection, now_s: float) -> bool:
        """Answers that waited for a connection. True if more of them wait."""
        careful = self._suspicion.careful
        under_way = sum(sent.from_behind for sent in connection.in_flight.values())
        room = 1 if careful else MAX_BACKLOG - under_way
        if room <= 0 or (careful and not self._suspicion.may_try(now_s)):
            return False
        waiting = self._journal.deliveries.waiting(Source.MQTT, limit=room, skip=_rows_in_flight(connection))
        if not waiting:
            self._suspicion.no_backlog(now_s)
        for outgoing in waiting:
            if not connection.may_publish:
                break
            self._send_row(connection, outgoing, from_behind=True)
        return len(waiting) == room

    def _send_postponed(self, connection: Connection, now_s: float) -> None:
        """Answers that were refused or unheard, or may have ended a connection. The latter go alone."""
        active = self._suspicion.active
        if active and (connection.recent(now_s) or not self._suspicion.may_try(now_s)):
            return
        due = self._journal.deliveries.due(
            Source.MQTT,
            moment=self._now(),
            limit=1 if active else MAX_RETRIES,
            skip=_rows_in_flight(connection),
        )
        for outgoing in due:
            if not connection.may_publish:
                break
            self._send_row(connection, outgoing, from_behind=True)

    def _has_room(self, connection: Connection, now_s: float) -> bool:
        """True if an answer can go now. After a connection that was ended over one of them, they go one at a time,
        once the connection works; but nobody waits long for a PUBACK that does not come."""
        if not connection.may_publish:
            return False
        if not self._suspicion.careful:
            return True
        if any(now_s - sent.at_s < _PATIENCE_S for sent in connection.answers()):
            return False
        return self._is_tried(connection)

    def _is_tried(self, connection: Connection) -> bool:
        """False while an end of this connection would tell nothing of an answer."""
        if connection.worked or not self._suspicion.active:
            return True
        return self._now().boot_s - self._began_s > _PATIENCE_S

    def _send_row(self, connection: Connection, outgoing: Outgoing, *, from_behind: bool = False) -> None:
        sent = Sent(
            topic=outgoing.topic,
            row=outgoing.row,
            id=outgoing.id,
            tries=outgoing.tries,
            unheard=outgoing.unheard,
            from_behind=from_behind,
            at_s=self._now().boot_s,
        )
        if not can_be_published(outgoing.topic):  # a flipped bit in the journal would end each connection
            self._retries.give_up(sent, "its topic is damaged")
            return
        answer = _that_fits(outgoing, connection.max_packet_bytes)
        if answer is None:
            self._retries.refused(sent, "no answer fits into the broker's packets")
            return
        if answer is not outgoing.answer:
            self._journal.deliveries.replace(outgoing.row, answer)
        mid = _publish(
            connection, outgoing.topic, answer, form=outgoing.form, correlation=outgoing.correlation
        )
        connection.in_flight[mid] = sent


def _publish(
    connection: Connection, topic: str, answer: Answer, *, form: Form, correlation: bytes | None
) -> int:
    """Hands an answer to paho. Gives its mid."""
    return connection.publish(
        topic,
        answer.payload,
        qos=1,
        form=form,
        correlation=correlation,
        user_properties=answer.properties,
    )


def _rows_in_flight(connection: Connection) -> frozenset[int]:
    return frozenset(sent.row for sent in connection.in_flight.values() if sent.row is not None)


def _that_fits(outgoing: Outgoing, limit_bytes: int) -> Answer | None:
    """The answer, or an error in place of one that is too large for the broker, or None if even that is."""
    size = _packet_bytes(outgoing.topic, outgoing.answer)
    if size <= limit_bytes:
        return outgoing.answer
    error = AnswerTooLarge(f"the answer needs {size} bytes, the broker takes {limit_bytes}")
    answer = Answer.of_error(outgoing.id, outgoing.form, error)
    return answer if _packet_bytes(outgoing.topic, answer) <= limit_bytes else None


def _packet_bytes(topic: str, answer: Answer) -> int:
    """Upper bound of a PUBLISH packet: payload, topic, properties, headers."""
    properties = sum(len(key.encode()) + len(value.encode()) + 5 for key, value in answer.properties.items())
    return len(answer.payload) + len(topic.encode()) + properties + PACKET_OVERHEAD_BYTES
