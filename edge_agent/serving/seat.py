"""The seat: which loaded version answers, and who may use its runner now.

It holds one version at most. Prompts take it and give it back; a change drains it (waits until nobody has it, and
lets nobody in), then swaps the version in it or empties it, and opens it again. It decides nothing about versions
and stops no runner: the lifecycle does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.cache.record import VersionRecord
from edge_agent.serving.loading import LoadedVersion
from edge_agent.serving.runner import Runner


class Serving(StrEnum):
    """What a model does now, for status."""

    ABSENT = "absent"
    IDLE = "idle"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to use a runner for one prompt; no exchange happens meanwhile.

    Attributes:
        parallel: how many prompts the runner answers at once.
        system_refused: what prompts without a system prompt of their own are told; empty where they are answered.
        report_crash: call it once when the runner failed, with the digests of the prompts that may have been the cause.
    """

    runner: Runner
    record: VersionRecord
    flavor: str
    parallel: int
    system_refused: str
    report_crash: Callable[[frozenset[bytes]], None]

    @property
    def version(self) -> int:
        return self.record.version


@dataclass(frozen=True, kw_only=True)
class EmptySeat:
    """Nothing is seated, and a version may be loaded.

    Attributes:
        dead: the version that was seated until its runner died while nobody used it.
    """

    dead: LoadedVersion | None


DIED = "the runner died and is started again"


class Seat:
    """One model's. Any thread: all of them meet at its condition. Status reads its attributes without it.

    Args:
        comes_back_as: what an empty seat is whose version may be loaded again: LOADING where somebody does so at once,
            IDLE where the next prompt does.
        clock: monotonic seconds.

    Attributes:
        serving, reason: what the model does now, and why it is not available or what is wrong, for people.
        used_at_s: when the last prompt ended, in monotonic seconds.
        loaded: the version that is seated.
        unload_requested: another model waits for the memory; whoever gives the version back has to unload it.
        closed: no version is seated any more.
        deaths: how often a seated version's runner ended by itself.
    """

    def __init__(self, serving: Serving, *, comes_back_as: Serving, clock: Callable[[], float]) -> None:
        self.serving = serving
        self.comes_back_as = comes_back_as
        self.reason = ""
        self.loaded: LoadedVersion | None = None
        self.unload_requested = False
        self.closed = False
        self.deaths = 0
        self._clock = clock
        self.used_at_s = clock()
        self._changed = threading.Condition()
        self._leases = 0
        self._drained = False

    # --- Prompts ---------------------------------------------------------------------------------------

    def take(self) -> LoadedVersion | EmptySeat | None:
        """The version, for one prompt; None when no prompt gets one now, and none may be loaded either."""
        with self._changed:
            if self.closed or self._drained or self.unload_requested:
                return None
            if self.loaded is not None and self.loaded.runner.alive:
                self._leases += 1
                return self.loaded
            if self._leases:  # it died under the prompts that run: they have to be given back first
                return None
            dead, self.loaded = self.loaded, None
            self.deaths += dead is not None
            return EmptySeat(dead=dead)

    def fill(self, version: LoadedVersion) -> bool:
        """Seats a freshly loaded version and takes it for a prompt, unless the seat was closed or filled meanwhile."""
        with self._changed:
            if self.closed or self._drained or self.loaded is not None:
                return False
            self.loaded, self._leases = version, 1
            self.serving, self.reason = Serving.READY, ""
            self._changed.notify_all()
            return True

    def give_back(self, version: LoadedVersion) -> bool:
        """A prompt has ended. True when its runner turns out to be dead: the seat is empty then."""
        with self._changed:
            self._leases -= 1
            self.used_at_s = self._clock()
            died = not version.runner.alive and self.loaded is version
            if died:
                self.loaded = None
                self.deaths += 1
                self.serving, self.reason = self.comes_back_as, DIED
            self._changed.notify_all()
            return died

    def wait_for_change(self, timeout_s: float) -> None:
        """Returns when a version came or went, or after `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def idle_s(self) -> float:
        """For how long nobody has used the version."""
        return 0.0 if self._leases else self._clock() - self.used_at_s

    def unload(self) -> LoadedVersion | None:
        """Empties the seat if nobody uses the version; otherwise asks whoever uses it to unload it afterwards.

        Returns:
            The version that was seated; the next prompt loads it again.
        """
        with self._changed:
            if self.loaded is None or self._leases or self._drained:
                self.unload_requested = self._leases > 0
                return None
            unloaded, self.loaded, self.unload_requested = self.loaded, None, False
            self.serving = Serving.IDLE
            return unloaded

    # --- Changes ---------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Lets no prompt in until `open`, and waits until those that run have ended."""
        with self._changed:
            self._drained = True
            self._changed.wait_for(lambda: not self._leases)

    def empty(self, *, comes_back: bool) -> LoadedVersion | None:
        """Takes the version out of a drained seat.

        Args:
            comes_back: another one will be loaded, so prompts may wait for it.
        """
        with self._changed:
            former, self.loaded = self.loaded, None
            if comes_back:
                self.serving = Serving.LOADING
            return former

    def swap(self, version: LoadedVersion) -> LoadedVersion | None:
        """Puts another version into a drained seat.

        Returns:
            The one that has to go: the former one or, if the seat is closed, `version` itself.
        """
        with self._changed:
            former, self.loaded = (version, None) if self.closed else (self.loaded, version)
            self.serving, self.reason = Serving.READY, ""
            return former

    def open(self) -> None:
        """Lets prompts in again."""
        with self._changed:
            if self._drained and self.loaded is None and self.serving is Serving.LOADING:
                self.serving = self.comes_back_as
            self._drained = False
            self._changed.notify_all()

    def note(self, serving: Serving, reason: str, *, still: Callable[[], bool]) -> bool:
        """Says what an empty seat waits for, unless it has been filled, drained or closed meanwhile.

        Args:
            still: whether this is still true; asked while nobody can change the seat.

        Returns:
            True when it was noted.
        """
        with self._changed:
            if self.closed or self._drained or self.loaded is not None or not still():
                return False
            self.serving, self.reason = serving, reason
            self._changed.notify_all()
            return True

    def close(self) -> LoadedVersion | None:
        """Seats no version any more. Gives the one that was seated."""
        with self._changed:
            self.closed = True
            former, self.loaded = self.loaded, None
            self._changed.notify_all()
            return former
