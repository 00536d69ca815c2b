"""The clock for waits, as a value: code that waits takes one, so that a test can pass its own. And from when on a wall
clock is believed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

SET_AFTER_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
"""A wall clock that shows less, in seconds since 1970, is not set: this agent is younger."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds on a clock that nobody sets, and a way to sleep.

    Attributes:
        now_s: seconds since an arbitrary moment; they never go back.
        sleep: returns after that many seconds.
    """

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


CLOCK = Clock()
