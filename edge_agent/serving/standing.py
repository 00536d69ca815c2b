"""What `state.json` says of one model's versions, and which of them may come next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from edge_agent.cache import marks
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import StoreError

log = logging.getLogger(__name__)


class VersionStates:
    """A copy in memory of what the disk says, so that status and every prompt need not read it.

    Only its model's lifecycle changes it, and each change is on disk before it is seen here.

    Attributes:
        state: what `state.json` says of this model.
        active: the version that answers, None while there is none.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._remember(store.state().model(name))

    def change(self, change: Callable[[ModelState], ModelState]) -> None:
        """Writes a change with one rename, then remembers it."""
        before = self.state.quarantined
        self._remember(self._store.change_state(self._name, change))
        for key in self.state.quarantined.keys() - before.keys():
            self._note_served(key, served=False)

    def note_served(self) -> None:
        """Writes into the active version's record that it passed the gate, in case `state.json` is lost, and raises the
        mark of its key: no older package may come after it under a higher number."""
        if self.active is None:
            return
        try:
            marks.note_active(self._store, self.active)
        except StoreError as error:  # the next look at the registry tries again
            log.warning(
                "mark not raised model=%s version=%s reason=%r", self._name, self.active.key, str(error)
            )
        if not self.active.served:
            self._note_served(self.active.key, served=True)
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
            log.warning("record not changed model=%s version=%s reason=%r", self._name, key, str(error))

    def _usable(self) -> list[VersionRecord]:
        return [
            record for record in self._store.versions(self._name) if record.key not in self.state.quarantined
        ]

    def _remember(self, state: ModelState) -> None:
        self.state = state
        self.active = self._store.record(self._name, state.active) if state.active else None


def fallback_reason(record: VersionRecord, reason: str) -> str:
    """What the state says beside an active version: why it is one of the fallback, and nothing for the model's own."""
    return (reason or "it was chosen on this device") if record.fallback else ""
