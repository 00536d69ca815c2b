"""The seat: which loaded version answers, and who may use its runner now.

It holds one version at most. Prompts take it and give it back; a change drains it (waits until nobody has it, and
lets nobody in), then swaps the version in it or empties it, and opens it again. It decides nothing about versions
and stops no runner: that is the lifecycle's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.cache.record import VersionRecord
from edge_agent.runner.process import RunnerProcess
from edge_agent.serving.loading import LoadedVersion


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
        blame: called once for a runner that failed, with the digests of the prompts that may have been the cause.
    """

    runner: RunnerProcess
    record: VersionRecord
    flavor: str
    parallel: int
    blame: Callable[[frozenset[bytes]], None]

    @property
    def version(self) -> int:
        return self.record.version


@dataclass(frozen=True, kw_only=True)
class Vacancy:
    """The seat is empty, and a version may be loaded for it.

    Attributes:
        dead: what sat there until its runner died while nobody used it.
    """

    dead: LoadedVersion | None


class Seat:
    """One model's. Any thread: all of them meet behind its condition. Status reads its attributes without it.

    Attributes:
        serving, reason: what the model does now, and why it is not available or what is wrong, for people.
        used_at_s: monotonic seconds of the last prompt's end.
        loaded: the version in it.
        leaving: whoever gives the version back has to make the seat free: another model waits for the memory.
        closed: nothing is seated any more.
    """

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.reason = ""
        self.used_at_s = time.monotonic()
        self.loaded: LoadedVersion | None = None
        self.leaving = False
        self.closed = False
        self._changed = threading.Condition()
        self._leases = 0
        self._drained = False

    # --- Prompts ---------------------------------------------------------------------------------------

    def take(self) -> LoadedVersion | Vacancy | None:
        """The version, for one prompt; None where nobody gets it now, nor may fill the seat."""
        with self._changed:
            if self.closed or self._drained or self.leaving:
                return None
            if self.loaded is not None and self.loaded.runner.alive:
                self._leases += 1
                return self.loaded
            if self._leases:  # it died under the prompts that run: they have to be given back first
                return None
            dead, self.loaded = self.loaded, None
            return Vacancy(dead=dead)

    def fill(self, version: LoadedVersion) -> bool:
        """Gives a freshly loaded version the seat and takes it for a prompt, unless it was closed or taken
        meanwhile."""
        with self._changed:
            if self.closed or self._drained or self.loaded is not None:
                return False
            self.loaded, self._leases = version, 1
            self.serving, self.reason = Serving.READY, ""
            self._changed.notify_all()
            return True

    def give_back(self, version: LoadedVersion) -> bool:
        """A prompt has ended. True when the runner was found dead: then the seat is empty now."""
        with self._changed:
            self._leases -= 1
            self.used_at_s = time.monotonic()
            died = not version.runner.alive and self.loaded is version
            if died:
                self.loaded = None
                self.serving, self.reason = Serving.LOADING, "the runner died and is started again"
            self._changed.notify_all()
            return died

    def wait_for_change(self, timeout_s: float) -> None:
        """Returns when a version came or went, or after `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def idle_s(self, now_s: float) -> float:
        """For how long nobody has used the version.

        Args:
            now_s: monotonic seconds.
        """
        return 0.0 if self._leases else now_s - self.used_at_s

    def give_up(self) -> LoadedVersion | None:
        """Frees the seat, where nobody uses the version; else it is marked as leaving.

        Returns:
            What sat there; the next prompt loads it again.
        """
        with self._changed:
            if self.loaded is None or self._leases or self._drained:
                self.leaving = self._leases > 0
                return None
            gone, self.loaded, self.leaving = self.loaded, None, False
            self.serving = Serving.IDLE
            return gone

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
            gone, self.loaded = self.loaded, None
            if comes_back:
                self.serving = Serving.LOADING
            return gone

    def swap(self, version: LoadedVersion) -> LoadedVersion | None:
        """Puts another version into a drained seat.

        Returns:
            The one that has to go: the former one, or, where the seat is closed, `version` itself.
        """
        with self._changed:
            gone, self.loaded = (version, None) if self.closed else (self.loaded, version)
            self.serving, self.reason = Serving.READY, ""
            return gone

    def open(self) -> None:
        """Lets prompts in again."""
        with self._changed:
            self._drained = False
            self._changed.notify_all()

    def note(self, serving: Serving, reason: str, *, still: Callable[[], bool]) -> bool:
        """Says what an empty seat waits for, unless it has been filled, drained or closed meanwhile.

        Args:
            still: whether what is said still holds; asked behind the condition.

        Returns:
            True where it was noted.
        """
        with self._changed:
            if self.closed or self._drained or self.loaded is not None or not still():
                return False
            self.serving, self.reason = serving, reason
            self._changed.notify_all()
            return True

    def close(self) -> LoadedVersion | None:
        """Nothing is seated any more. Gives what sat there."""
        with self._changed:
            self.closed = True
            gone, self.loaded = self.loaded, None
            self._changed.notify_all()
            return gone
