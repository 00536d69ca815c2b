"""When a device asks its registry, so that a fleet does not ask in one moment. Times are passed in.

The first one comes at once where a model has nothing of its own that runs or a version waits for its time, and else in
the course of one interval, at a place that the device's id gives. Then one comes every interval, jittered; after a
failure early, and each time in a row after twice as long, up to the interval. One that is asked for comes at once, or
in the course of so many seconds, at the same place; an earlier one does as well.

Devices that start in one moment, because power is back or a tool has installed them all, and have nothing yet, fetch in
one moment: twenty requests each, most of them for small files. So a device that nobody watches leaves `GAP_S` between
them, and a fleet asks at most as often as it has devices. No place in time would do that: it would be minutes wide, and
two devices would still meet. A daemon that somebody has started by hand, and an operator's command, do not wait.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

JITTER = (0.9, 1.1)
"""Between these times the interval comes the next poll, so that a fleet does not ask in step."""
FIRST_RETRY_S = 5.0
GAP_S = 1.0
"""From one request of a check that nobody waits for to its next. A download that takes longer is followed at once."""
RETRY_JITTER = (0.5, 1.5)
"""Wider: those that were asked to look in one moment have failed in one moment, too."""


def place_of(device_id: str) -> float:
    """This device's place in a fleet, the same each time: from 0 to 1, 1 excluded."""
    return int(hashlib.sha256(device_id.encode()).hexdigest()[:8], 16) / 2**32


class Polls:
    """Owned by the thread of the updates; only `ask_for` is for any.

    Args:
        interval_s: between two polls.
        place: see `place_of`.
        jitter: a number between two, drawn for each interval.
    """

    def __init__(self, interval_s: float, *, place: float, jitter: Callable[[float, float], float]) -> None:
        self._interval_s = interval_s
        self._place = place
        self._jitter = jitter
        self._failures = 0
        self._next_s: float | None = 0.0
        self._lock = threading.Lock()
        self._asked_within_s: float | None = None

    def begin(self, now_s: float, *, at_once: bool) -> None:
        """The first poll's time.

        Args:
            now_s: monotonic seconds.
            at_once: a model has nothing of its own that runs, or has put a version off.
        """
        self._next_s = now_s + (0.0 if at_once else self._place * self._interval_s)

    def ask_for(self, within_s: float) -> None:
        """Somebody wants one within this time, which begins with the next `is_due`."""
        with self._lock:
            asked = self._asked_within_s
            self._asked_within_s = within_s if asked is None else min(asked, within_s)

    def is_due(self, now_s: float) -> bool:
        """
        Args:
            now_s: monotonic seconds.
        """
        if self._next_s is None:
            self._next_s = now_s + self._wait_s()
        with self._lock:
            within_s, self._asked_within_s = self._asked_within_s, None
        if within_s is not None:
            self._next_s = min(self._next_s, now_s + self._place * within_s)
        return now_s >= self._next_s

    def ended(self, *, failed: bool) -> None:
        """The interval begins with the next `is_due`: a poll may take longer than the interval does.

        Args:
            failed: the registry did not answer, or the line to it broke.
        """
        self._failures = self._failures + 1 if failed else 0
        self._next_s = None

    def _wait_s(self) -> float:
        retry_s = FIRST_RETRY_S * 2.0 ** min(self._failures - 1, 32)
        if self._failures and retry_s < self._interval_s:
            return retry_s * self._jitter(*RETRY_JITTER)
        return self._interval_s * self._jitter(*JITTER)
