"""This host's clock for waits, as a value: who waits takes one, so that a test can pass one of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds that nobody sets, and a way to let them pass.

    Attributes:
        now_s: seconds since any moment; they never go back.
        sleep: returns when so many seconds have passed.
    """

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


CLOCK = Clock()
