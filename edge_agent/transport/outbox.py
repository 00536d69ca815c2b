"""What waits to be sent to the broker: refusals, chunks, answers, the status, metrics.

Owns bounded queues, and the order in which they are emptied. Answers wait in the journal, not here. Refuses to block
on a slow broker: what does not fit is dropped if it is a chunk, and waits in the journal if it is an answer.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form, encode
from edge_agent.chat.prompt import Answer, Outgoing, Prompt, Source
from edge_agent.errors import AnswerTooLarge, JournalUnavailable
from edge_agent.topics import Topics, can_be_published
from edge_agent.transport.connection import PACKET_OVERHEAD_BYTES, Connection

if TYPE_CHECKING:
    from paho.mqtt.reasoncodes import ReasonCode

log = logging.getLogger(__name__)

MAX_REFUSALS = 256
MAX_CHUNKS = 256
_LOOK_S = 2.0
_REFUSED_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An answer that is not in the journal. Best effort.

    Attributes:
        refused_mid: the message that is refused: it stays with the broker until the refusal is there.
    """

    topic: str
    correlation: bytes | None
    form: Form
    answer: Answer
    refused_mid: int | None = None


class Outbox:
    """Filled from any thread, but for `refuse`; emptied by the network thread.

    Args:
        counters: of the transport.
    """

    def __init__(self, *, topics: Topics, journal: Journal, counters: collections.Counter[str]) -> None:
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
        self._answers_due = True
        self._looked_s = 0.0

    # --- From any thread -------------------------------------------------------------------------------

    def answered(self) -> None:
        """An answer waits in the journal."""
        self._answers_due = True

    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None:
        """Adds a part of an answer; the oldest parts go when the broker is slow."""
        if len(self._chunks) == MAX_CHUNKS:
            self._counters["chunks_dropped"] += 1
        self._chunks.append((self._topics.stream(prompt.answer_topic), prompt.correlation, encode(document)))

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
        self._answers_due = True
        self._retained_due.update(self._retained)

    def end(self) -> None:
        """The connection is over."""
        self._chunks.clear()
        self._refusals.clear()  # what they refuse was not acked: it comes again

    def unsaid(self, connection: Connection) -> bool:
        """True while the broker does not have the last status, or has not taken something that was sent."""
        return bool(self._retained_due or connection.in_flight)

    def send_due(self, connection: Connection) -> None:
        """Hands paho what waits, as far as the socket takes it: nothing piles up in its memory."""
        while self._refusals and connection.may_publish:
            refusal = self._refusals.popleft()
            if self._fits(connection, refusal.topic, refusal.answer.payload):
                self._send_refusal(connection, refusal)
            elif refusal.refused_mid is not None:
                connection.ack(refusal.refused_mid)
        while self._chunks and connection.writable:
            topic, correlation, payload = self._chunks.popleft()
            if self._fits(connection, topic, payload):
                connection.publish(topic, payload, qos=0, form=Form.JSON, correlation=correlation)
        while self._retained_due and connection.may_publish:
            topic = self._retained_due.pop()
            if self._fits(connection, topic, self._retained[topic]):
                mid = connection.publish(topic, self._retained[topic], qos=1, retain=True)
                connection.in_flight[mid] = None
        if self._metrics is not None and connection.writable:
            if self._fits(connection, self._topics.metrics, self._metrics):
                connection.publish(self._topics.metrics, self._metrics, qos=0)
            self._metrics = None
        self._send_answers(connection)

    def published(self, connection: Connection, mid: int, code: ReasonCode) -> None:
        """The broker has a message of QoS 1, or says why not."""
        row = connection.in_flight.pop(mid, None)
        if (refused_mid := connection.ack_after.pop(mid, None)) is not None:
            connection.ack(refused_mid)
        if row is None:
            return
        request_id = connection.delivering.pop(row, "")
        if code.is_failure:
            self._note_refused(connection, row, request_id, str(code))
            return
        log.info("answer delivered request=%s row=%d", request_id, row)
        with contextlib.suppress(JournalUnavailable):  # it will be sent again: a repeat, not a loss
            self._journal.delivered(row)
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
        mid = self._send_answer(
            connection, refusal.topic, refusal.answer, form=refusal.form, correlation=refusal.correlation
        )
        connection.in_flight[mid] = None
        if refusal.refused_mid is not None:
            connection.ack_after[mid] = refusal.refused_mid

    def _send_answers(self, connection: Connection) -> None:
        now_s = time.monotonic()
        due = self._answers_due or now_s - self._looked_s > _LOOK_S
        room = connection.max_in_flight - len(connection.in_flight)
        if not due or room <= 0 or not connection.writable:
            return
        self._answers_due, self._looked_s = False, now_s
        if now_s - connection.refused_at_s > _REFUSED_RETRY_S:
            connection.refused_rows.clear()  # an ACL may have been mended, a quota freed
        in_flight = frozenset(row for row in connection.in_flight.values() if row is not None)
        try:
            waiting = self._journal.outbox(Source.MQTT, limit=room, skip=in_flight | connection.refused_rows)
        except JournalUnavailable:
            return
        for outgoing in waiting:
            if not connection.may_publish:
                break
            self._send_row(connection, outgoing)
        self._answers_due = len(waiting) == room

    def _send_row(self, connection: Connection, outgoing: Outgoing) -> None:
        if not can_be_published(outgoing.topic):  # a flipped bit in the journal would end each connection
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
        connection.delivering[outgoing.row] = outgoing.id
        mid = self._send_answer(
            connection, outgoing.topic, answer, form=outgoing.form, correlation=outgoing.correlation
        )
        connection.in_flight[mid] = outgoing.row

    def _send_answer(
        self, connection: Connection, topic: str, answer: Answer, *, form: Form, correlation: bytes | None
    ) -> int:
        return connection.publish(
            topic,
            answer.payload,
            qos=1,
            form=form,
            correlation=correlation,
            user_properties=answer.properties,
        )

    def _note_refused(self, connection: Connection, row: int, request_id: str, reason: str) -> None:
        self._counters["answers_refused"] += 1
        connection.refused_rows.add(row)
        connection.refused_at_s = time.monotonic()
        log.warning("answer refused by the broker request=%s row=%d reason=%s", request_id, row, reason)


def _packet_bytes(topic: str, answer: Answer) -> int:
    """Upper bound of a PUBLISH packet: payload, topic, properties, headers."""
    properties = sum(len(key.encode()) + len(value.encode()) + 5 for key, value in answer.properties.items())
    return len(answer.payload) + len(topic.encode()) + properties + PACKET_OVERHEAD_BYTES
