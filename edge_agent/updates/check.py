"""One check of one model: what it wants → a sync → the version is adopted, or one of its fallback is.

Has no thread and never waits for a turn: whoever calls has it (`updates.py`). Decides nothing about a version itself:
`choice.py` and `rollout.py` have the rules, and the lifecycle holds the gate. What a sync is stands in `syncs.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

from edge_agent.cache.attempt import Attempt
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import (
    ActivationHeld,
    CannotRun,
    ContentError,
    EdgeAgentError,
    LoadFailed,
    MemoryShort,
    Quarantined,
    RegistryRefused,
    SettingsError,
    StoreError,
    SyncStopped,
    TransportError,
    UnknownReference,
    VersionHeld,
)
from edge_agent.package.reference import ModelRef, ModelVersion
from edge_agent.settings import Settings
from edge_agent.sync.protocol import SyncResult
from edge_agent.updates import choice
from edge_agent.updates.activation import Activation
from edge_agent.updates.attempts import Attempts, Noting
from edge_agent.updates.choice import Wanted
from edge_agent.updates.heard import Heard
from edge_agent.updates.link import Link
from edge_agent.updates.rollout import NotInRollout, earlier_versions
from edge_agent.updates.syncs import A_POLL, Asked, RunSync, Served, Syncs, Watch
from edge_agent.updates.waiting import Found, Waiting, Waits


class Lifecycle(Served, Noting, Protocol):
    """What serves a model, as far as updates drive it; `serving.lifecycle` documents each method."""

    @property
    def runs_its_own(self) -> bool: ...
    def untried(self) -> str | None: ...
    def cached_fallback(self) -> VersionRecord | None: ...
    def set_aside(self, key: str, error: EdgeAgentError) -> None: ...
    def set_desired(self, uri: str) -> None: ...
    def note_resolved(self, ref: str, version: int) -> None: ...
    def reload(self) -> None: ...


_NOBODY = Watch(on_event=lambda event: None, should_stop=lambda: False)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A version that runs here now, or may.

    Attributes:
        problem, code: why it is one of the fallback; empty for one of the model's own.
    """

    result: SyncResult
    problem: str = ""
    code: str = ""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is to come of a model, for status.

    Attributes:
        attempt: the version that was tried last, is tried now, or waits; None where none was.
        waiting: why it waits; None where it does not.
        progress: `bytes, total_bytes, bytes_per_s, eta_s` of a running fetch, None where none runs.
        asks: the registry is being asked, and has not answered yet.
    """

    wanted: Wanted
    attempt: Attempt | None
    waiting: Waiting | None
    progress: dict[str, Any] | None
    asks: bool = False


class ModelCheck:
    """Brings versions of one configured model into the cache, and hands them to its lifecycle.

    Args:
        name: the settings' name.
        heard: told how the registry was, and what waits.
        link: when the line may be used, and when a version may take over.
        gap_s: between two requests of a check that nobody waits for.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: Settings,
        store: Store,
        lifecycle: Lifecycle,
        run_sync: RunSync,
        heard: Heard,
        link: Link,
        gap_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._name = name
        self._settings = settings
        self._model = settings.models[name]
        self._store = store
        self._lifecycle = lifecycle
        self._clock = clock
        self._waits = Waits(name, note=partial(heard.note_hold, name))
        self._activation = Activation(
            name, store=store, lifecycle=lifecycle, link=link, waits=self._waits, wanted=lambda: self.wanted
        )
        self._attempts = Attempts(lifecycle, clock)
        self._syncs = Syncs(
            name,
            settings=settings,
            store=store,
            lifecycle=lifecycle,
            run_sync=run_sync,
            note_registry=heard.note_registry,
            link=link,
            waits=self._waits,
            activation=self._activation,
            attempts=self._attempts,
            gap_s=gap_s,
            clock=clock,
        )

    @property
    def outlook(self) -> Outlook:
        """What is to come, for any thread."""
        waiting = self.waiting
        return Outlook(
            wanted=choice.wanted_version(self._model.ref, self._lifecycle.state),
            attempt=waiting.attempt if waiting else self._attempts.now,
            waiting=waiting,
            progress=self._syncs.progress,
            asks=self._syncs.asks,
        )

    @property
    def waiting(self) -> Waiting | None:
        """What must wait for its time; None for nothing. An operator's pin may have ended the wait."""
        waiting, is_pinned = self._waits.now, self._lifecycle.state.pinned
        return waiting if waiting and not is_pinned and self._activation.still(waiting) else None

    @property
    def wanted(self) -> ModelRef:
        """What to ask the registry for."""
        return choice.wanted_ref(self._model.ref, self._lifecycle.state)

    def follows(self, registered_name: str) -> bool:
        """True for the registered model that it wants, and for its fallback's."""
        refs = (self.wanted, self._model.fallback_ref)
        return registered_name in (ref.name for ref in refs if ref)

    def run(self, watch: Watch, asked: Asked = A_POLL) -> Checked:
        """Brings what the model wants, and makes it active unless another version is pinned.

        Raises:
            VersionHeld: it waits for its time, or is not for this device yet; `waiting` has it.
            EdgeAgentError: it does not run here, and no fallback does in its place.
            SyncStopped: `watch` ended it.
        """
        try:
            checked = self._run(watch, asked)
        except (VersionHeld, SyncStopped, SettingsError, StoreError):
            raise  # nothing is known of the version that was not known before
        except (TransportError, RegistryRefused):
            self._take_up_waiting(watch, now=asked.now)
            raise
        except EdgeAgentError:
            self._activation.forget()
            self._waits.clear()
            raise
        finally:
            self._attempts.ended()
        self._waits.clear()
        return checked

    def _run(self, watch: Watch, asked: Asked) -> Checked:
        key, outside = "", None
        try:
            try:
                result = self._syncs.from_registry(self._noting(watch), self.wanted, asked)
            except NotInRollout as error:
                outside = error
                self._lifecycle.note_resolved(str(self.wanted), error.version)
                result = self._stand_in(watch, error, asked)
            key = self._lifecycle.state.pinned or result.key
            self._adopt(key, watch, asked, result)
        except NotInRollout as error:
            self._activation.forget()
            self._note_not_yet(watch, error)
            raise
        except EdgeAgentError as error:
            result = self._fall_back(watch, error, failed=key, now=asked.now)
            return Checked(result=result, problem=str(error), code=error.code)
        if outside:
            told = NotInRollout(
                f"{outside}; version {result.version} runs meanwhile", version=outside.version
            )
            self._note_not_yet(watch, told, result)
            raise told
        return Checked(result=result)

    def _noting(self, watch: Watch) -> Watch:
        """Writes down what the reference means, as soon as that is known."""

        def look(event: Mapping[str, Any]) -> None:
            if event.get("event") == "resolved":
                self._lifecycle.note_resolved(str(self.wanted), int(event["version"]))
            watch.on_event(event)

        return replace(watch, on_event=look)

    def _adopt(self, key: str, watch: Watch, asked: Asked, result: SyncResult) -> None:
        try:
            self._activation.adopt(
                key, on_event=watch.on_event, result=result, asked_for=asked.by_operator, now=asked.now
            )
        except (Quarantined, CannotRun, MemoryShort) as error:
            if key == result.key:  # and not a pinned one
                self._attempts.refused(error)
            raise

    def _stand_in(self, watch: Watch, outside: NotInRollout, asked: Asked) -> SyncResult:
        """What a device runs that is outside of a rollout and has no version of its own: the one that the tag names,
        else the newest one before it that it may take.

        Raises:
            NotInRollout: there is none, or none is needed.
            EdgeAgentError: it cannot be brought.
        """
        if self._lifecycle.runs_its_own or self._lifecycle.state.pinned:
            raise outside
        once = replace(asked, by_operator=False)
        if outside.stand_in is not None:
            named = self.wanted.at_version(outside.stand_in)
            return self._syncs.from_registry(watch, named, once, at_once=asked.by_operator)
        for number in earlier_versions(outside.version):
            with contextlib.suppress(NotInRollout, Quarantined, UnknownReference):
                return self._syncs.from_registry(
                    watch,
                    self.wanted.at_version(number),
                    once,
                    at_once=asked.by_operator,
                    in_rollout_only=True,
                )
        raise outside

    def _note_not_yet(self, watch: Watch, outside: NotInRollout, stand_in: SyncResult | None = None) -> None:
        """What is not for this device yet waits; no time is known."""
        found = Found(version=outside.version, digest="", missing_bytes=None).after(stand_in)
        waiting = Waiting(
            **asdict(found), until_s=None, at_s=self._clock(), code=outside.code, reason=str(outside)
        )
        self._waits.note(waiting, watch.on_event)

    @property
    def has_put_off(self) -> bool:
        """Whether a version is here that waits for its time, and for what the registry says of it."""
        return self._activation.put_off is not None

    def catch_up(self) -> None:
        """Takes up what is on disk already, one of the fallback where nothing else runs. What only waits for its time
        is left to the registry's next word, where there is a registry.

        Raises:
            ActivationHeld: it waits for its time.
            EdgeAgentError: neither runs.
        """
        key = self._lifecycle.untried()
        if key is None or (key == self._activation.put_off and self._settings.registry.uri):
            return
        try:
            self._activation.adopt(key, on_event=_NOBODY.on_event)
        except EdgeAgentError as error:
            record = self._lifecycle.cached_fallback()
            if record is None or self._lifecycle.runs_its_own or not choice.needs_fallback(error):
                raise
            self._lifecycle.adopt(record.key, instead=str(error))

    def fetch_again(self, watch: Watch) -> None:
        """Brings what is missing of the version that the model follows; nothing is adopted.

        Raises:
            EdgeAgentError: it cannot be brought.
        """
        fallback = self._model.fallback_ref if self._lifecycle.state.instead else None
        try:
            self._syncs.from_registry(
                watch, fallback or self.wanted, fallback=fallback is not None, at_once=True
            )
        finally:
            self._attempts.ended()

    def take_in(
        self, watch: Watch, version: ModelVersion, file: int, *, allow_older: bool = False
    ) -> SyncResult:
        """Brings a version that comes as a file, and adopts it where it is the wanted one; see `Updates.take_in`.

        Raises:
            EdgeAgentError: the file, the package in it, the cache or the gate says no.
        """
        fallback = version.name != self.wanted.name
        ref = ((self._model.fallback_ref if fallback else None) or self.wanted).at_version(version.version)
        try:
            result = self._syncs.from_file(watch, ref, file, fallback=fallback, allow_older=allow_older)
            self._adopt_imported(watch, result, fallback=fallback)
        finally:
            self._attempts.ended()
        return result

    def _adopt_imported(self, watch: Watch, result: SyncResult, *, fallback: bool) -> None:
        lifecycle, wanted = self._lifecycle, self.wanted
        if fallback:
            if not (lifecycle.runs_its_own or lifecycle.state.pinned):
                lifecycle.adopt(result.key, instead="no version of its own runs here")
        elif lifecycle.state.pinned or wanted.version in (None, result.version):
            lifecycle.note_resolved(choice.IMPORTED, result.version)
            key = lifecycle.state.pinned or result.key
            self._adopt(key, watch, Asked(by_operator=True), result)

    def _take_up_waiting(self, watch: Watch, *, now: bool) -> None:
        """The registry says nothing: a version that is here, and was wanted when it last did, needs no line."""
        if key := self._activation.without_registry():
            with contextlib.suppress(ActivationHeld):
                self._activation.adopt(key, on_event=watch.on_event, now=now)

    def _fall_back(self, watch: Watch, error: EdgeAgentError, *, failed: str, now: bool) -> SyncResult:
        """Serves the fallback where no version of the model's own can run here, and none is pinned.

        Args:
            error: why its own version does not run.
            failed: key of that version, where it got as far as the gate.

        Raises:
            EdgeAgentError: `error`, where there is no fallback or it is not needed; or the fallback's own.
        """
        lifecycle, ref = self._lifecycle, self._model.fallback_ref
        if ref is None or not choice.needs_fallback(error):
            raise error
        if lifecycle.runs_its_own or lifecycle.state.pinned:
            raise error
        try:
            result = self._syncs.from_registry(watch, ref, Asked(now=now), fallback=True)
            lifecycle.adopt(result.key, instead=str(error))
        except EdgeAgentError as trouble:
            kind = type(error) if isinstance(trouble, NotInRollout) else type(trouble)
            raise kind(f"{error}; and its fallback: {trouble.message}", remedy=trouble.remedy) from error
        if isinstance(error, ContentError | LoadFailed) and failed:
            lifecycle.set_aside(failed, error)
        return result
