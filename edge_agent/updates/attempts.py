"""How far a version gets on its way into the cache, as data: `fetch`, `verify`, and why it went no further.

Hears the events of a sync, and how it ended. From the gate on, the lifecycle knows (`serving/standing.py`). A running
step is in memory only; a failure is written down, so that a restart does not hide it. A version that waits for its
time has not failed: see `waiting.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from edge_agent.cache.attempt import Attempt, Step
from edge_agent.cache.record import version_of
from edge_agent.cache.state import ModelState
from edge_agent.errors import ContentError, EdgeAgentError, Quarantined, StoreError


class Noting(Protocol):
    """Where failures are written down; `serving.lifecycle` documents each method."""

    @property
    def state(self) -> ModelState: ...
    def note_attempt(self, attempt: Attempt) -> None: ...


class Attempts:
    """Of one configured model, without its fallback. Owned by whoever has the turn; any thread may read `now`.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, lifecycle: Noting, clock: Callable[[], float]) -> None:
        self._lifecycle = lifecycle
        self._clock = clock
        self._running: Attempt | None = None
        self._arrived: Attempt | None = None
        self._version = 0

    @property
    def now(self) -> Attempt | None:
        """The last one, or the one that runs; None where there was none."""
        running, arrived, last = self._running, self._arrived, self._lifecycle.state.attempt
        if running and not (last and last.at_s >= running.at_s):
            return running
        if last and arrived and (last.version, last.digest) == (arrived.version, arrived.digest):
            return replace(last, took_s={**arrived.took_s, **last.took_s})
        return last

    def hear(self, event: Mapping[str, Any]) -> None:
        """What a sync says."""
        kind = event.get("event")
        if kind == "resolved":
            self._version, self._running = int(event["version"]), None
        elif kind in ("fetching", "verifying"):
            step, digest = Step.FETCH if kind == "fetching" else Step.VERIFY, str(event["digest"])
            before = self._running or self._at(step, digest)
            self._running = replace(before, digest=digest)
            if step is not before.step:
                self._running = self._running.then(step, self._clock())

    def brought(self) -> None:
        """The sync ended well. What comes now is the lifecycle's; how long it took until here is remembered."""
        if self._running:
            self._arrived = self._running.after(self._clock())

    def failed(self, error: EdgeAgentError) -> None:
        """The sync brought nothing. Without a version, nothing was tried."""
        if not self._version:
            return
        if isinstance(error, Quarantined):
            self.refused(error)
            return
        running = self._running or self._at(Step.FETCH)
        step = Step.VERIFY if isinstance(error, ContentError) else running.step
        self._note(replace(running, step=step, code=error.code))

    def refused(self, error: EdgeAgentError) -> None:
        """A version is not tried again. What is known of it is how it failed before."""
        code, last = self._fault() or error.code, self._lifecycle.state.attempt
        if self._version and not (last and (last.version, last.code) == (self._version, code)):
            self._note(replace(self._at(Step.GATE), code=code))

    def ended(self) -> None:
        """Nothing runs any more."""
        if self._running is None or self._running.code is None:
            self._running = None
        self._version = 0

    def _fault(self) -> str:
        """The code for which the version is in quarantine; empty if it is not."""
        codes = [
            fault.code
            for key, fault in self._lifecycle.state.quarantined.items()
            if version_of(key) == self._version
        ]
        return codes[-1] if codes else ""

    def _at(self, step: Step, digest: str = "") -> Attempt:
        return Attempt(version=self._version, digest=digest, step=step, at_s=self._clock())

    def _note(self, attempt: Attempt) -> None:
        self._running = attempt
        with contextlib.suppress(StoreError):  # the disk may be what failed
            self._lifecycle.note_attempt(attempt)
            self._running = None
