"""Where one model's versions stand: what `state.json` says of it, and which of them may come next."""

from __future__ import annotations

import logging
from collections.abc import Callable

from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import StoreError

log = logging.getLogger(__name__)


class Standing:
    """Keeps what the disk says, so that status and every prompt need not read it.

    Its model's lifecycle owns it: only there is it changed, and each change is on disk before it is seen here.

    Attributes:
        state: what `state.json` says of this model.
        active: the version that answers, None while there is none.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._remember(store.state().model(name))

    def change(self, change: Callable[[ModelState], ModelState]) -> None:
        """Writes a change down with one rename, then remembers it."""
        before = self.state.quarantined
        self._remember(self._store.change_state(self._name, change))
        for key in self.state.quarantined.keys() - before.keys():
            self._note_served(key, served=False)

    def note_served(self) -> None:
        """The active version came through the gate: its record says so, for the case that `state.json` is lost."""
        if self.active is not None and not self.active.served:
            self._note_served(self.active.key, served=True)
            self._remember(self.state)

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
        """Key of what an earlier daemon did not get to try: its candidate, or, where nothing is active, the newest
        version of the model's own; None where there is nothing to catch up on."""
        candidate = self.state.candidate
        if candidate and self._store.record(self._name, candidate):
            return candidate
        if self.state.active is not None:
            return None
        usable = [record for record in self._usable() if not record.fallback]
        return usable[-1].key if usable else None

    def fallback(self) -> VersionRecord | None:
        """The newest version of the fallback that is here and may be tried."""
        records = [record for record in self._usable() if record.fallback]
        return max(records, key=lambda record: record.created_at, default=None)

    def successor(self) -> VersionRecord | None:
        """What takes the active version's place when it cannot go on: the previous one, else one of the fallback."""
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
