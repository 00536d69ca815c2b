"""A clock that a test moves: what waits for it has waited when it was told to."""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.host.clock import Clock


class ScriptedClock:
    """Time that passes only where somebody sleeps, or a test says so. One thread.

    Attributes:
        now_s: seconds since the clock was made.
        slept: how long each sleep was, in seconds.
        on_sleep: called in each sleep, after the time has passed.
    """

    def __init__(self, on_sleep: Callable[[], None] = lambda: None) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []
        self.on_sleep = on_sleep
        self.clock = Clock(now_s=lambda: self.now_s, sleep=self._sleep)

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.pass_by(seconds)
        self.on_sleep()
