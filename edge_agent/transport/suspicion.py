"""Which answers a broker may have ended connections over. Pure rules, no I/O; the network thread's.

Some brokers do not refuse a message (PUBACK with a reason) but end the connection, over a topic that their rules forbid
or over a size. Nothing says then which message it was. What was under way at such an end is suspected, topic by topic,
until something for that topic gets its PUBACK.

- A topic for which the broker has taken something before is not suspected beside one for which it has not.
- While a broker has just done so, answers go one at a time: what is alone under way at the next end was the cause.
- An end before the broker had acked anything tells nothing of what was under way, for the PUBACKs may have been lost
  with the connection. The next connection has to work before an answer goes, and then they go one at a time.
- What is suspected goes behind everything else, alone, and after each end that it causes there is a longer wait before
  the next suspect: thousands of them cost the others a reconnection now and then.

A broker that was merely away costs nobody anything: an end counts against an answer only if the answer was alone under
way on a connection that had worked, and several of them have to come together.
"""

from __future__ import annotations

import collections
from collections.abc import Collection
from typing import Any

TRUST_AFTER, TRUST_S = 16, 600.0
"""Several answers go at a time again when so many of a backlog got through one after the other, or there is no backlog
and the last such end was so many seconds ago."""
MAX_TOPICS = 1024
FIRST_WAIT_S, LAST_WAIT_S = 2.0, 60.0
REFUSALS_LOST = 5
"""A refusal whose topic was under way at this many ends, with no PUBACK for it in between, is not sent: its message
would come again for ever. Fewer may be a line's that breaks: the client would never hear that it was refused."""


class Suspicion:
    """What is known of one broker.

    Attributes:
        careful: answers go one at a time.
    """

    def __init__(self) -> None:
        self.careful = False
        self._ends: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._known: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._taken = 0
        self._ended_s = 0.0
        self._wait_s = 0.0
        self._next_s = 0.0

    def of(self, topic: str) -> int:
        """At how many ends something for this topic was under way, since the last PUBACK for it."""
        return self._ends.get(topic, 0)

    def may_try(self, now_s: float) -> bool:
        """True if it is time for the next suspect, or for the next answer of a backlog while `careful`."""
        return now_s >= self._next_s

    @property
    def active(self) -> bool:
        """True while the broker has a reason to end the connection over something that waits."""
        return self.careful or bool(self._ends)

    def ended(self, topics: Collection[str], *, lone: str, now_s: float) -> frozenset[str]:
        """The broker has ended the connection with messages for these topics under way.

        Args:
            lone: the topic of the only answer among them; empty if there was none, or several.

        Returns:
            Those of them that are suspected. If that is `lone` alone, it was the cause.
        """
        suspected = frozenset(topics) - self._known.keys() or frozenset(topics)
        if not suspected:
            return suspected
        self.careful, self._taken, self._ended_s = True, 0, now_s
        for topic in suspected:
            self._ends[topic] = self._ends.pop(topic, 0) + 1
            self._known.pop(topic, None)
        _bound(self._ends)
        if suspected == {lone}:  # else the next connections find out which it was
            self._wait_s = min(LAST_WAIT_S, max(FIRST_WAIT_S, self._wait_s * 2))
            self._next_s = now_s + self._wait_s
        return suspected

    def ended_unheard(self, now_s: float) -> None:
        """The broker has ended the connection with answers under way, before it had acked anything."""
        self.careful, self._taken, self._ended_s = True, 0, now_s

    def taken(self, topic: str, *, from_behind: bool) -> None:
        """The broker has something for this topic, or said why not, and kept the connection.

        Args:
            from_behind: it was a suspect, or of a backlog.
        """
        self._ends.pop(topic, None)
        self._known[topic] = None
        self._known.move_to_end(topic)
        _bound(self._known)
        if from_behind:
            self._wait_s = self._next_s = 0.0
            self._taken += 1
            if self._taken >= TRUST_AFTER:
                self.careful = False

    def no_backlog(self, now_s: float) -> None:
        """Nothing waits that could be the next cause."""
        if now_s - self._ended_s > TRUST_S:
            self.careful = False


def _bound(topics: collections.OrderedDict[str, Any]) -> None:
    while len(topics) > MAX_TOPICS:
        topics.popitem(last=False)
