"""From a version that is here to the active one, when it is time for that: `activate_windows` and `inhibit_file`.

What must wait is written down as the model's candidate, so that a restart forgets it no more than a fetch would be
begun again. The way out of trouble is never held: see `is_free`. Nobody else in this room lets a lifecycle adopt one of
the model's own versions, but for a pin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from edge_agent.cache.record import version_of
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import ActivationHeld
from edge_agent.package.reference import ModelRef
from edge_agent.serving.seat import Serving
from edge_agent.sync.protocol import SyncResult
from edge_agent.updates.link import Link
from edge_agent.updates.link_budget import Held
from edge_agent.updates.waiting import Found, Waiting, Waits

OnEvent = Callable[[Mapping[str, Any]], None]


class Adopting(Protocol):
    """What serves a model, as far as this needs it; `serving.lifecycle` documents each method."""

    @property
    def state(self) -> ModelState: ...
    @property
    def serving(self) -> Serving: ...
    def adopt(
        self,
        key: str,
        *,
        asked_for: bool = False,
        instead: str = "",
        before_exchange: Callable[[], None] = ...,
    ) -> None: ...
    def put_off(self, key: str | None) -> None: ...


class Activation:
    """Of one configured model. Owned by whoever has the turn.

    Args:
        waits: what the model waits for.
        wanted: what it follows now.
    """

    def __init__(
        self,
        name: str,
        *,
        store: Store,
        lifecycle: Adopting,
        link: Link,
        waits: Waits,
        wanted: Callable[[], ModelRef],
    ) -> None:
        self._name = name
        self._store = store
        self._lifecycle = lifecycle
        self._link = link
        self._waits = waits
        self._wanted = wanted

    @property
    def put_off(self) -> str | None:
        """Key of a version that is here and waits for its time."""
        state = self._lifecycle.state
        return state.candidate if state.candidate_tries == 0 else None

    def adopt(
        self,
        key: str,
        *,
        on_event: OnEvent,
        result: SyncResult | None = None,
        asked_for: bool = False,
        now: bool = False,
    ) -> None:
        """Makes a version active, if it is time for that.

        Args:
            result: of the sync that brought it, where one has.
            asked_for: by an operator, who wants to know.
            now: by an operator, whatever the windows say.

        Raises:
            ActivationHeld: it is not time.
            EdgeAgentError: it does not pass the gate.
        """
        try:
            if self.is_free(key):
                self._lifecycle.adopt(key, asked_for=asked_for)
            else:
                self._adopt_in_time(key, asked_for=asked_for, now=now)
        except _TooEarly as early:
            raise self._put_off(key, early.held, result, on_event) from early
        self._waits.clear()

    def _adopt_in_time(self, key: str, *, asked_for: bool, now: bool) -> None:
        if held := self._link.activation_held(overruled=now):
            raise _TooEarly(held)
        try:
            self._lifecycle.adopt(key, asked_for=asked_for, before_exchange=self._link.check_inhibited)
        except ActivationHeld as error:
            raise _TooEarly(Held(by=error.message, until_s=None)) from error

    def is_free(self, key: str) -> bool:
        """True for what is never held: it changes nothing, it is the way out of a version that has failed, or the way
        back to one that has served here and is named by its number."""
        lifecycle, state = self._lifecycle, self._lifecycle.state
        if (
            key in (state.active, state.pinned)
            or key in state.quarantined
            or lifecycle.serving is Serving.FAILED
        ):
            return True
        record = self._store.record(self._name, key)
        has_served = record is not None and record.served
        return has_served and (self._wanted().version is not None or state.active is None)

    def without_registry(self) -> str | None:
        """Key of what waits and is still wanted, as far as that is known where the registry does not answer."""
        key, wanted = self.put_off, self._wanted()
        record = self._store.record(self._name, key) if key else None
        if record and record.registered_name == wanted.name and wanted.version in (None, record.version):
            return record.key
        return None

    def follow(self, version: int) -> None:
        """What the model wants is known: another version waits for nothing any more."""
        if self.put_off and version_of(self.put_off) != version:
            self._lifecycle.put_off(None)

    def forget(self) -> None:
        """What waits is not to be taken without a further look."""
        if self.put_off:
            self._lifecycle.put_off(None)

    def still(self, waiting: Waiting) -> bool:
        """Whether what was found to wait does so still: an operator may have ended that."""
        if waiting.code != ActivationHeld.code:
            return True
        return self.put_off is not None and version_of(self.put_off) == waiting.version

    def _put_off(self, key: str, held: Held, result: SyncResult | None, on_event: OnEvent) -> ActivationHeld:
        self._lifecycle.put_off(key)
        record = self._store.record(self._name, key)
        found = Found(version=version_of(key), digest=record.digest if record else "").after(result)
        waiting, error = self._link.activation_waits(held, found)
        self._waits.note(waiting, on_event)
        return error


class _TooEarly(Exception):
    def __init__(self, held: Held) -> None:
        super().__init__(held.by)
        self.held = held
