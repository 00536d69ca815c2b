"""When the active version fails: how often it has, and when another version takes its place.

Flow: a load fails, or a runner crashes → the rules (`verdicts.py`) judge it → the previous version, else one of the
fallback, becomes active with one rename of the state → the next prompt loads it. An operator's rollback is an
adoption; this one happens without an operator.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from edge_agent.cache import fsck
from edge_agent.cache.attempt import Fault
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError, RunnerCrashed
from edge_agent.serving import verdicts
from edge_agent.serving.seat import Seat, Serving
from edge_agent.serving.standing import VersionStates, fallback_reason
from edge_agent.serving.verdicts import Crashes, LoadFailures

log = logging.getLogger(__name__)


class Rollback:
    """One model's. The dispatcher's thread reports failures; whoever exchanges or repairs a version clears them.

    Args:
        name: of the model, in the settings.
        clock: monotonic seconds.
    """

    def __init__(
        self, name: str, *, store: Store, seat: Seat, states: VersionStates, clock: Callable[[], float]
    ) -> None:
        self._name = name
        self._store = store
        self._seat = seat
        self._states = states
        self._clock = clock
        self._failures = LoadFailures()
        self._left: tuple[str, float] = "", -math.inf
        """The version that gave way last, and when."""
        self._crashes = Crashes()
        self._idle_deaths = LoadFailures()
        self._idle_death_s = -math.inf

    @property
    def waiting(self) -> bool:
        """True while it is too early to load the active version again."""
        return self._clock() < max(self._failures.retry_at_s, self._idle_deaths.retry_at_s)

    def clear(self) -> None:
        """Another version is active: nothing counts against it yet."""
        self._failures.clear()
        self._crashes.clear()
        self._idle_deaths.clear()

    def clear_load_failures(self) -> None:
        """The active version was loaded, or its files were repaired."""
        if active := self._states.active:
            self._states.note_load(active, None)
        self._failures.clear()

    def on_load_failure(self, record: VersionRecord, error: EdgeAgentError) -> None:
        """The active version did not load: sets damaged files aside, steps back, or notes when to try again."""
        reason = str(error)
        if not self._seat.note(Serving.LOADING, reason, still=self._states.still_active(record)):
            return  # another version was seated or chosen meanwhile
        log.warning(
            "load failed code=%s model=%s version=%s reason=%r", error.code, self._name, record.key, reason
        )
        self._failures.add(self._clock())
        verdict = verdicts.on_load_failure(error, self._failures.count)
        if verdicts.caused_by_damage(error):
            self.set_damage_aside(record)
        stepped_back = False
        try:
            if verdict.step_back:
                stepped_back = self._step_back(record, Fault.of(error), quarantine=verdict.quarantine)
        except EdgeAgentError as trouble:
            log.error("step back failed code=%s model=%s reason=%r", trouble.code, self._name, str(trouble))
        if not stepped_back:
            self._states.note_load(record, error.code)
            serving = Serving.FAILED if verdict.final else self._seat.comes_back_as
            self._seat.note(serving, reason, still=self._states.still_active(record))

    def on_crash(self, record: VersionRecord, suspects: frozenset[bytes]) -> None:
        """A version's runner crashed. Several different prompts as its cause roll it back; one poison prompt does not.

        Args:
            suspects: digests of the prompts that may have been the cause.
        """
        distinct = self._crashes.add(suspects, self._clock())
        if distinct < verdicts.MAX_CRASHES:
            return
        minutes = verdicts.CRASH_WINDOW_S / 60
        reason = f"its runner failed on {distinct} different prompts within {minutes:.0f} minutes"
        try:
            self._step_back(record, Fault(code=RunnerCrashed.code, reason=reason), quarantine=True)
        except EdgeAgentError as error:
            log.error("step back failed code=%s model=%s reason=%r", error.code, self._name, str(error))

    def on_idle_death(self) -> None:
        """The active version's runner ended while nobody used it. Once is nothing; one that ends again and again, as
        where memory is short, is loaded with growing pauses: without `preload` the next prompt loads it, and nothing
        goes round."""
        if self._seat.comes_back_as is Serving.IDLE:
            return
        now_s = self._clock()
        if now_s - self._idle_death_s > verdicts.CRASH_WINDOW_S:
            self._idle_deaths.clear()
        else:
            self._idle_deaths.add(now_s)
        self._idle_death_s = now_s

    def _step_back(self, record: VersionRecord, fault: Fault, *, quarantine: bool) -> bool:
        """Makes the previous version active, or one of the fallback, if there is one that may run.

        The seat is empty.
        """
        successor = self._states.successor()
        if self._states.state.active != record.key or successor is None or successor.key == record.key:
            return False
        left, at_s = self._left
        if successor.key == left and self._clock() - at_s < verdicts.RETRY_LAST_S:
            return False  # two that both fail would take turns without a pause
        self._left = record.key, self._clock()
        to, because = successor.key, fault.reason
        held_against, instead = fault if quarantine else None, fallback_reason(successor, because)
        self._states.fail(
            record,
            fault.code,
            lambda current: current.stepped_back(held_against, to=to, instead=instead),
        )
        log.warning(
            "rolled back code=%s model=%s from=%s to=%s reason=%r",
            fault.code, self._name, record.key, to, because,
        )  # fmt: skip
        self.clear()
        self._seat.note(
            self._seat.comes_back_as,
            f"rolled back from version {record.version}: {because}",
            still=self._states.still_active(successor),
        )
        return True

    def set_damage_aside(self, record: VersionRecord) -> bool:
        """Moves damaged blobs away, so that the next sync fetches them, and nothing else. False on a disk that does not
        let go of them: they stay."""
        try:
            found = fsck.verify(self._store, [record])
            with self._store.lock():
                fsck.set_aside(self._store, found.damaged)
        except EdgeAgentError as error:
            log.error("damage not set aside code=%s model=%s reason=%r", error.code, self._name, str(error))
            return False
        return True
