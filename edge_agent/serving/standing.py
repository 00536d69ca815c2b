"""What `state.json` says of one model's versions, and which of them may come next."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from edge_agent.cache import marks
from edge_agent.cache.attempt import Attempt, Step
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import StoreError

log = logging.getLogger(__name__)


class VersionStates:
    """A copy in memory of what the disk says, so that status and every prompt need not read it.

    Only its model's lifecycle changes it, and each change is on disk before it is seen here; but for the steps of an
    attempt that nobody needs after a restart.

    Args:
        now: seconds since 1970.

    Attributes:
        state: what `state.json` says of this model.
        active: the version that answers, None while there is none.
    """

    state: ModelState
    active: VersionRecord | None

    def __init__(self, store: Store, name: str, *, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._name = name
        self._now = now
        self._changing = threading.Lock()
        self._remember(_left_behind(store.state().model(name)))

    def begin(
        self,
        record: VersionRecord,
        step: Step,
        change: Callable[[ModelState], ModelState] | None = None,
    ) -> None:
        """An attempt is at its next step. One of the fallback is none: its numbers are those of another model.

        Args:
            change: what is written with it; None where nobody needs to know after a restart.
        """
        attempt, now_s = self.state.attempt, self._now()
        if not record.fallback:
            goes_on = attempt is not None and attempt.is_open and attempt.is_of(record.key)
            fresh = Attempt(version=record.version, digest=record.digest, step=step, at_s=now_s)
            attempt = attempt.then(step, now_s) if attempt and goes_on else fresh
        if change is not None:
            self._note(attempt, change)
            return
        with self._changing:
            self.state = self.state.noting(attempt)

    def note_golden(self, record: VersionRecord, prompt: int, of: int) -> None:
        """A version is asked one of its golden prompts, which begin at 1."""
        with self._changing:
            tried = self.state.attempt
            if tried and tried.is_open and tried.is_of(record.key):
                self.state = self.state.noting(replace(tried, golden=(prompt, of)))

    def fail(
        self,
        record: VersionRecord,
        code: str,
        change: Callable[[ModelState], ModelState] = lambda state: state,
    ) -> None:
        """A version failed at the step that it is at. One that was not tried just now has failed while it was active.

        Args:
            code: of the error.
            change: what is written with it.
        """
        attempt = self.state.attempt
        if not record.fallback:
            if attempt is None or not attempt.is_of(record.key):
                attempt = Attempt(
                    version=record.version, digest=record.digest, step=Step.ACTIVE, at_s=self._now()
                )
            attempt = replace(attempt, code=code)
        self._note(attempt, change)

    def note_load(self, record: VersionRecord, code: str | None) -> None:
        """The active version does not load now, or does again: the attempt that made it active says so meanwhile.

        Args:
            code: of the error; None where it loads.
        """
        with self._changing:
            tried = self.state.attempt
            if tried and tried.step is Step.ACTIVE and tried.is_of(record.key):
                self.state = self.state.noting(replace(tried, code=code))

    def settle(self, record: VersionRecord) -> None:
        """The active version is the one that is wanted: whatever else was tried before is over."""
        tried = self.state.attempt
        if not record.fallback and not (tried and tried.step is Step.ACTIVE and tried.is_of(record.key)):
            self.begin(record, Step.ACTIVE, lambda state: state)

    def note(self, attempt: Attempt) -> None:
        """An attempt ended before there was anything to try here."""
        if not attempt.is_as(self.state.attempt):
            self._note(attempt, lambda state: state)

    def _note(self, attempt: Attempt | None, change: Callable[[ModelState], ModelState]) -> None:
        self.change(lambda state: change(state).noting(attempt))

    def change(self, change: Callable[[ModelState], ModelState]) -> None:
        """Writes a change with one rename, then remembers it."""
        with self._changing:
            before, attempt = self.state.quarantined, self.state.attempt
            self._remember(self._store.change_state(self._name, lambda state: change(state.noting(attempt))))
        for key in self.state.quarantined.keys() - before.keys():
            self._note_served(key, served=False)

    def adjust(self, change: Callable[[ModelState], ModelState]) -> None:
        """As `change`, for what comes again and again and is mostly known already: then nothing is written."""
        if change(self.state) != self.state:
            self.change(change)

    def note_served(self) -> None:
        """Writes into the active version's record that it passed the gate, in case `state.json` is lost, and raises the
        mark of its key: no older package may come after it under a higher number."""
        if self.active is None:
            return
        try:
            marks.note_active(self._store, self.active)
        except StoreError as error:  # the next look at the registry tries again
            log.warning(
                "mark not raised code=%s model=%s version=%s reason=%r",
                error.code,
                self._name,
                self.active.key,
                str(error),
            )
        if not self.active.served:
            self._note_served(self.active.key, served=True)
            with self._changing:
                self._remember(self.state)

    def pin(self, key: str | None) -> None:
        """Fixes the version that runs; None lets it follow the registry again.

        Raises:
            StoreError: it is not in the cache.
        """
        if key is not None:
            self.record(key)
        self.change(lambda state: replace(state, pinned=key))

    def record(self, key: str) -> VersionRecord:
        """A committed version.

        Raises:
            StoreError: it is not in the cache.
        """
        record = self._store.record(self._name, key)
        if record is None:
            raise StoreError(
                f"version {key} of {self._name} is not in the cache", remedy="see `edge-agent models list`"
            )
        return record

    def untried(self) -> str | None:
        """Key of what an earlier daemon did not get to try: its candidate or, if nothing is active, the newest of the
        model's own versions. None when there is none."""
        candidate = self.state.candidate
        if candidate and self._store.record(self._name, candidate):
            return candidate
        if self.state.active is not None:
            return None
        usable = [record for record in self._usable() if not record.fallback]
        return usable[-1].key if usable else None

    @property
    def fallback_in_use(self) -> str:
        """Which version of the fallback runs and why, for people; empty while the model's own does."""
        if self.active is None or not self.state.instead:
            return ""
        return (
            f"fallback {self.active.registered_name} version {self.active.version} runs: {self.state.instead}"
        )

    def still_active(self, record: VersionRecord | None) -> Callable[[], bool]:
        """Asks, when called, whether this is still the active version."""
        return lambda: self.active == record

    def fallback(self) -> VersionRecord | None:
        """The newest version of the fallback that is here and may be tried."""
        records = [record for record in self._usable() if record.fallback]
        return max(records, key=lambda record: record.created_at, default=None)

    def successor(self) -> VersionRecord | None:
        """What takes the active version's place when it fails: the previous one, else one of the fallback."""
        key = self.state.previous
        previous = self._store.record(self._name, key) if key else None
        if previous is None or previous.key in self.state.quarantined:
            return self.fallback()
        return previous

    def _note_served(self, key: str, *, served: bool) -> None:
        try:
            self._store.note_served(self._name, key, served=served)
        except StoreError as error:  # the state itself is written
            log.warning(
                "record not changed code=%s model=%s version=%s reason=%r",
                error.code, self._name, key, str(error),
            )  # fmt: skip

    def _usable(self) -> list[VersionRecord]:
        return [
            record for record in self._store.versions(self._name) if record.key not in self.state.quarantined
        ]

    def _remember(self, state: ModelState) -> None:
        self.state = state
        self.active = self._store.record(self._name, state.active) if state.active else None


def _left_behind(state: ModelState) -> ModelState:
    """A state as a daemon left it that has ended: an attempt that nobody goes on with is none."""
    tried = state.attempt
    return state.noting(None) if tried and tried.is_open and not tried.is_of(state.candidate) else state


def fallback_reason(record: VersionRecord, reason: str) -> str:
    """What the state says beside an active version: why it is one of the fallback, and nothing for the model's own."""
    return (reason or "it was chosen on this device") if record.fallback else ""
