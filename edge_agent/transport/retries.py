"""When an answer that did not get through is tried again, and when no more.

Owns the waits, and the topics that nobody listens to at present. The answers, and how often each was tried, are in the
journal: a restart begins nothing anew.

    PUBACK → success: delivered, and with it what waits for the same topic
           → a refusal: a few more tries, then undelivered
           → nobody has subscribed (0x10): the client may be away for a moment; more tries, then undelivered
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_agent.chat.clock import Moment
from edge_agent.chat.journal import Journal
from edge_agent.transport.connection import Sent

if TYPE_CHECKING:
    from paho.mqtt.reasoncodes import ReasonCode

log = logging.getLogger(__name__)

RETRY_WAITS_S = (2.0, 10.0, 60.0, 240.0)
"""Between the tries of an answer that the broker refuses: an ACL may be mended, a quota freed, within five minutes."""
UNHEARD_WAITS_S = (1.0, 2.0, 4.0, 8.0, *[15.0] * 19)
"""Between the tries of an answer that nobody has subscribed to: five minutes in all."""
MAX_UNHEARD_TOPICS = 1024
_NO_SUBSCRIBERS = 0x10


class Retries:
    """The network thread's. Each method raises `JournalUnavailable`.

    Args:
        counters: of the transport.
        now: the clock.
    """

    def __init__(
        self, *, journal: Journal, counters: collections.Counter[str], now: Callable[[], Moment]
    ) -> None:
        self._deliveries = journal.deliveries
        self._counters = counters
        self._now = now
        self._unheard: collections.OrderedDict[str, None] = collections.OrderedDict()

    def published(self, sent: Sent, code: ReasonCode) -> bool:
        """The broker has said what it thinks of an answer. True if others can go now because of it.

        Source: MQTT 5.0 §3.4.2.1 (PUBACK Reason Code).
        """
        if code.is_failure:
            self.refused(sent, str(code))
        elif code.value == _NO_SUBSCRIBERS:
            self._not_heard(sent)
        else:
            return self._delivered(sent)
        return False

    def refused(self, sent: Sent, reason: str) -> None:
        """Tries an answer again later, or never: a broker that refuses it so often has a rule against it."""
        if sent.row is None:
            return
        self._counters["answers_refused"] += 1
        if sent.tries >= len(RETRY_WAITS_S):
            self.give_up(sent, reason)
            return
        wait_s = RETRY_WAITS_S[sent.tries]
        self._postpone(sent.row, wait_s, tries=sent.tries + 1, unheard=sent.unheard)
        log.info(
            "answer refused by the broker code=broker_refused request=%s row=%d retry_s=%.0f reason=%s",
            sent.id, sent.row, wait_s, reason,
        )  # fmt: skip

    def give_up(self, sent: Sent, reason: str) -> None:
        """The answer is undelivered."""
        assert sent.row is not None
        self._counters["answers_undelivered"] += 1
        self._deliveries.give_up(sent.row)
        log.warning(
            "answer undelivered code=answer_undelivered request=%s row=%d tries=%d reason=%s",
            sent.id, sent.row, sent.tries + sent.unheard + 1, reason,
        )  # fmt: skip

    def _not_heard(self, sent: Sent) -> None:
        if sent.row is None:  # a refusal: its client may ask again
            return
        if sent.unheard >= len(UNHEARD_WAITS_S):
            self._counters["answers_unheard"] += 1
            self.give_up(sent, "nobody has subscribed to its topic")
            return
        self._unheard[sent.topic] = None
        self._unheard.move_to_end(sent.topic)
        if len(self._unheard) > MAX_UNHEARD_TOPICS:
            self._unheard.popitem(last=False)
        wait_s = UNHEARD_WAITS_S[sent.unheard]
        self._postpone(sent.row, wait_s, tries=sent.tries, unheard=sent.unheard + 1)
        if not sent.unheard:
            log.info(
                "answer unheard code=answer_undelivered request=%s row=%d retry_s=%.0f",
                sent.id,
                sent.row,
                wait_s,
            )

    def _delivered(self, sent: Sent) -> bool:
        if sent.row is not None:
            log.info("answer delivered request=%s row=%d", sent.id, sent.row)
            self._deliveries.delivered(sent.row)
        if sent.topic not in self._unheard:
            return False
        del self._unheard[sent.topic]
        self._deliveries.heard(sent.topic)
        return True

    def _postpone(self, row: int, wait_s: float, *, tries: int, unheard: int) -> None:
        until_boot_s = self._now().boot_s + wait_s
        self._deliveries.postpone(row, tries=tries, unheard=unheard, until_boot_s=until_boot_s)
