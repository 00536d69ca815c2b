"""What must wait: a version that is not fetched yet, does not take over yet, or is not for this device yet.

A value that status shows. The check that found it is made again when the time has come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from edge_agent.cache.attempt import Attempt, Step
from edge_agent.errors import ActivationHeld, LinkHeld
from edge_agent.sync.protocol import SyncResult

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a check knows of a version that must wait.

    Attributes:
        digest: of its manifest; empty where it is not known yet.
        missing_bytes: to fetch; 0 where it is here, None where nobody has looked.
        fetched_bytes, mirrored_bytes, reused_bytes: of it, by this check.
    """

    version: int
    digest: str
    missing_bytes: int | None = 0
    fetched_bytes: int = 0
    mirrored_bytes: int = 0
    reused_bytes: int = 0

    def after(self, result: SyncResult | None) -> Self:
        """The same with the bytes of a sync, if there was one."""
        if result is None:
            return self
        return replace(
            self,
            fetched_bytes=result.bytes_fetched,
            mirrored_bytes=result.bytes_mirrored,
            reused_bytes=result.bytes_reused,
        )


@dataclass(frozen=True, kw_only=True)
class Waiting(Found):
    """A version that is not fetched, or does not take over, before its time.

    Attributes:
        until_s: seconds since 1970; None where nobody knows.
        at_s: since when it has been waiting.
        code: of the error that says so.
        reason: for people.
    """

    until_s: float | None
    at_s: float
    code: str
    reason: str

    def is_as(self, other: Waiting | None) -> bool:
        """Whether the other one is the same wait."""
        return other is not None and (self.version, self.code) == (other.version, other.code)

    def event(self, model: str) -> Mapping[str, Any]:
        """For whoever waits for the check.

        Args:
            model: the settings' name.
        """
        return {"event": "waits", "model": model, **asdict(self), "held_until": self.held_until}

    @property
    def attempt(self) -> Attempt:
        """The version, as one that is held."""
        return Attempt(
            version=self.version, digest=self.digest, step=Step.HELD, at_s=self.at_s, code=self.code
        )

    @property
    def of_link(self) -> bool:
        """Whether `[link]` holds it."""
        return self.code in (LinkHeld.code, ActivationHeld.code)

    @property
    def held_until(self) -> int | None:
        """Whole seconds since 1970; None where nobody knows."""
        return None if self.until_s is None else round(self.until_s)


class Waits:
    """What one model waits for, as the last check that could tell found it.

    Args:
        name: of the model, in the settings.
        note: told what waits, and None where nothing does any more.

    Attributes:
        now: None for nothing.
    """

    def __init__(self, name: str, *, note: Callable[[Waiting | None], None]) -> None:
        self.now: Waiting | None = None
        self._name = name
        self._note = note

    def note(self, waiting: Waiting, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        """
        Args:
            on_event: of whoever waits for the check.
        """
        if self.now and waiting.is_as(self.now):
            waiting = replace(waiting, at_s=self.now.at_s)
        else:
            log.info(
                "version held code=%s model=%s version=%d reason=%r",
                waiting.code, self._name, waiting.version, waiting.reason,
            )  # fmt: skip
        self.now = waiting
        self._note(waiting)
        on_event(waiting.event(self._name))

    def clear(self) -> None:
        self.now = None
        self._note(None)


class Alarm:
    """Rings once for each wait, when it is over. One model's; the updates' thread.

    Args:
        is_over: of a wait whose end nobody can tell: whether it has ended.
        clock: seconds since 1970.
        spread_s: drawn for each wait: how long after its end it rings.
    """

    def __init__(
        self,
        is_over: Callable[[Waiting], bool],
        clock: Callable[[], float],
        *,
        spread_s: Callable[[], float],
    ) -> None:
        self._is_over = is_over
        self._clock = clock
        self._spread_s = spread_s
        self._waiting: Waiting | None = None
        self._rings_at_s: float | None = None
        self._rang = False

    def rings(self, waiting: Waiting | None) -> bool:
        """
        Args:
            waiting: what waits now.
        """
        if waiting is not self._waiting:
            self._waiting, self._rang, self._rings_at_s = waiting, False, None
            if waiting and waiting.until_s is not None:
                self._rings_at_s = waiting.until_s + self._spread_s()
        if waiting is None or self._rang:
            return False
        is_late = self._rings_at_s is not None and self._clock() >= self._rings_at_s
        self._rang = is_late or self._is_over(waiting)
        return self._rang
