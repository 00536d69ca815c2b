"""One check of one model: what it wants → a sync → the version is adopted, or one of its fallback is.

Has no thread and never waits for a turn: whoever calls has it (`updates.py`). Decides nothing about a version itself:
`choice.py` has the rules, and the lifecycle holds the gate. A sync runs in a process of its own, and is passed in.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from edge_agent.cache import fsck
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import (
    ActivationHeld,
    ContentError,
    EdgeAgentError,
    LinkHeld,
    LoadFailed,
    RegistryRefused,
    SettingsError,
    StoreError,
    SyncStopped,
    TransportError,
    UnknownReference,
    VerificationError,
)
from edge_agent.package.reference import ModelRef, ModelVersion
from edge_agent.serving.seat import Serving
from edge_agent.settings import Settings
from edge_agent.sync import version_file
from edge_agent.sync.protocol import CacheJob, RegistryJob, SyncJob, SyncResult, TrustJob
from edge_agent.sync.tls import TlsFiles
from edge_agent.updates import choice
from edge_agent.updates.activation import Activation, Adopting
from edge_agent.updates.link import Link
from edge_agent.updates.patience import Patience
from edge_agent.updates.waiting import Found, Waiting, Waits

log = logging.getLogger(__name__)

SYNC_TIMEOUT_S = 24 * 3600.0
"""A large model on a slow line; a stalled read ends much sooner."""

OVERDUE_S = 10.0
"""How long a sync may go on after the end of a window; by itself it stops with the first bytes that come then."""

OnEvent = Callable[[Mapping[str, Any]], None]
NoteRegistry = Callable[[EdgeAgentError | None], None]
"""Told how a sync with the registry ended: with an error that says what the registry was, or well."""


class Lifecycle(Adopting, Protocol):
    """What serves a model, as far as updates drive it; `serving.lifecycle` documents each method."""

    @property
    def runs_its_own(self) -> bool: ...
    @property
    def instead(self) -> str: ...
    def status(self) -> Mapping[str, object]: ...
    def untried(self) -> str | None: ...
    def cached_fallback(self) -> VersionRecord | None: ...
    def refuse_quarantined(self, key: str) -> None: ...
    def set_aside(self, key: str, reason: str) -> None: ...
    def set_desired(self, uri: str) -> None: ...
    def reload(self) -> None: ...


class RunSync(Protocol):
    """Runs one sync to its end, as `sync.process.run_sync` does."""

    def __call__(
        self, job: SyncJob, *, timeout_s: float, on_event: OnEvent, should_stop: Callable[[], bool]
    ) -> SyncResult: ...


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who waits for a check: hears what its sync does, and may end it."""

    on_event: OnEvent
    should_stop: Callable[[], bool]


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


@dataclass
class _Try:
    """What a sync has said of itself: which version, and how many bytes of it are here. 0 for nothing yet.

    Attributes:
        held: its last word, where the line was held.
    """

    version: int = 0
    have_bytes: int = 0
    total_bytes: int = 0
    held: Mapping[str, Any] = field(default_factory=dict)

    def note(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "resolved":
            self.version = int(event["version"])
        elif event.get("event") == "progress":
            self.have_bytes, self.total_bytes = int(event["bytes"]), int(event["total_bytes"])
        elif event.get("event") == "held":
            self.held = event

    @property
    def found(self) -> Found:
        """What is known of a version that is held; without a last word, what its progress says."""
        return Found(
            version=self.version,
            digest=str(self.held.get("digest", "")),
            missing_bytes=int(self.held.get("missing_bytes", self.total_bytes - self.have_bytes)),
            fetched_bytes=int(self.held.get("fetched_bytes", 0)),
            mirrored_bytes=int(self.held.get("mirrored_bytes", 0)),
        )


class ModelCheck:
    """Brings versions of one configured model into the cache, and hands them to its lifecycle.

    Args:
        name: the settings' name.
        link: when the line may be used, and when a version may take over.
        clock: seconds since 1970.

    Attributes:
        progress: the last event of the sync that runs, None while none does.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: Settings,
        store: Store,
        lifecycle: Lifecycle,
        run_sync: RunSync,
        note_registry: NoteRegistry,
        link: Link,
        clock: Callable[[], float],
    ) -> None:
        self.progress: Mapping[str, Any] | None = None
        self._name = name
        self._settings = settings
        self._model = settings.models[name]
        self._store = store
        self._lifecycle = lifecycle
        self._run_sync = run_sync
        self._note_registry = note_registry
        self._link = link
        self._waits = Waits(name)
        self._activation = Activation(
            name, store=store, lifecycle=lifecycle, link=link, waits=self._waits, wanted=lambda: self.wanted
        )
        self._clock = clock
        self._job = partial(_job_of, name, settings=settings, lifecycle=lifecycle)
        self._patience = Patience(settings.registry.poll_interval_s, clock)

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

    def run(self, watch: Watch, *, asked_for: bool, allow_older: bool = False, now: bool = False) -> Checked:
        """Brings what the model wants, and makes it active unless another version is pinned.

        Args:
            asked_for: by an operator; see `Updates.check`.
            allow_older: see `SyncJob`.
            now: whatever `[link]` says, but for its file.

        Raises:
            LinkHeld, ActivationHeld: it waits for its time; `waiting` has it.
            EdgeAgentError: it does not run here, and no fallback does in its place.
            SyncStopped: `watch` ended it.
        """
        try:
            checked = self._run(watch, asked_for=asked_for, allow_older=allow_older, now=now)
        except (LinkHeld, ActivationHeld, SyncStopped, SettingsError, StoreError):
            raise  # nothing is known of the version that was not known before
        except (TransportError, RegistryRefused):
            self._take_up_waiting(watch, now=now)
            raise
        except EdgeAgentError:
            self._activation.forget()
            self._waits.clear()
            raise
        self._waits.clear()
        return checked

    def _run(self, watch: Watch, *, asked_for: bool, allow_older: bool, now: bool) -> Checked:
        key = ""
        try:
            result = self._sync(watch, self.wanted, asked_for=asked_for, allow_older=allow_older, now=now)
            key = self._lifecycle.state.pinned or result.key
            self._activation.adopt(key, on_event=watch.on_event, result=result, asked_for=asked_for, now=now)
        except EdgeAgentError as error:
            result = self._fall_back(watch, error, failed=key, now=now)
            return Checked(result=result, problem=str(error), code=error.code)
        return Checked(result=result)

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
        self._sync(watch, fallback or self.wanted, fallback=fallback is not None, at_once=True)

    def take_in(
        self, watch: Watch, version: ModelVersion, file: int, *, allow_older: bool = False
    ) -> SyncResult:
        """Brings a version that comes as a file, and adopts it where it is the wanted one; see `Updates.take_in`.

        Raises:
            EdgeAgentError: the file, the package in it, the cache or the gate says no.
        """
        lifecycle, wanted = self._lifecycle, self.wanted
        fallback = version.name != wanted.name
        ref = ((self._model.fallback_ref if fallback else None) or wanted).at_version(version.version)
        job = replace(
            self._job(ref, fallback=fallback),
            registry=RegistryJob(uri=version_file.ORIGIN),
            version_file=file,
            allow_older=allow_older,
        )
        result = self._bring(watch, job, ref)
        if fallback:
            if not (lifecycle.runs_its_own or lifecycle.state.pinned):
                lifecycle.adopt(result.key, instead="no version of its own runs here")
        elif lifecycle.state.pinned or wanted.version in (None, result.version):
            key = lifecycle.state.pinned or result.key
            self._activation.adopt(key, on_event=watch.on_event, result=result, asked_for=True)
        return result

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
            result = self._sync(watch, ref, fallback=True, now=now)
            lifecycle.adopt(result.key, instead=str(error))
        except EdgeAgentError as trouble:
            raise type(trouble)(
                f"{error}; and its fallback: {trouble.message}", remedy=trouble.remedy
            ) from error
        if isinstance(error, ContentError | LoadFailed) and failed:
            lifecycle.set_aside(failed, str(error))
        return result

    def _sync(
        self,
        watch: Watch,
        ref: ModelRef,
        *,
        fallback: bool = False,
        asked_for: bool = False,
        at_once: bool = False,
        allow_older: bool = False,
        now: bool = False,
    ) -> SyncResult:
        """From the registry into the cache; what the registry was is noted, and a download that failed.

        Args:
            at_once: whether or not the last downloads failed; what an operator asks for always is.
            now: whether or not the line may be used.

        Raises:
            LinkHeld: it may not; `waiting` has what is missing.
        """
        if not self._settings.registry.uri:
            raise SettingsError(
                "registry.uri: no registry is configured", remedy="set registry.uri in the settings"
            )
        job = self._job(ref, fallback=fallback)
        job = replace(job, allow_older=allow_older, link=self._link.bounds(overruled=now))
        if not asked_for:
            job = replace(job, quarantined=tuple(self._lifecycle.state.quarantined))
        tried = _Try()

        def look(event: Mapping[str, Any]) -> None:
            tried.note(event)
            if event.get("event") == "resolved":
                if not (asked_for or at_once):
                    self._patience.check(ref.name, tried.version)
                if not fallback:
                    self._activation.follow(tried.version)
            watch.on_event(event)

        try:
            result = self._bring(replace(watch, on_event=look), job, ref)
        except LinkHeld as error:
            self._note_registry(None)
            raise self._fetch_waits(watch, tried, error) from error
        except (TransportError, RegistryRefused, UnknownReference, ContentError, StoreError) as error:
            if tried.version and isinstance(error, TransportError | VerificationError | StoreError):
                self._patience.failed(
                    ref.name, tried.version, have_bytes=tried.have_bytes, reason=error.message
                )
            if not isinstance(error, StoreError):
                self._note_registry(error)
            raise
        self._patience.succeeded(ref.name)
        self._note_registry(None)
        return result

    def _fetch_waits(self, watch: Watch, tried: _Try, error: LinkHeld) -> LinkHeld:
        waiting, told = self._link.fetch_waits(error, tried.found)
        self._waits.note(waiting, watch.on_event)
        return told

    def _bring(self, watch: Watch, job: SyncJob, ref: ModelRef) -> SyncResult:
        """One sync process, from its start to a tidy cache."""

        def look(event: Mapping[str, Any]) -> None:
            if event.get("event") == "resolved":
                self._check_rollout(ref, event, fallback=job.fallback)
            elif event.get("event") == "quarantined":
                self._lifecycle.refuse_quarantined(str(event["key"]))
            elif event.get("event") == "progress":
                self._waits.clear()
            self.progress = event
            watch.on_event(event)

        try:
            result = self._run_sync(
                job,
                timeout_s=SYNC_TIMEOUT_S,
                on_event=look,
                should_stop=lambda: watch.should_stop() or _is_overdue(job, self._clock()),
            )
        except SyncStopped as stop:
            if watch.should_stop() or not _is_overdue(job, self._clock()):
                raise
            raise LinkHeld("the window of link.windows is over") from stop
        except OSError as error:  # no memory, descriptors or space for a process: not the model's fault
            raise StoreError(f"no sync can be started: {error}") from error
        finally:
            self.progress = None
        _tidy(self._store)
        if result.new:
            log.info(
                "version fetched model=%s version=%d bytes_fetched=%d bytes_mirrored=%d bytes_reused=%d",
                self._name, result.version, result.bytes_fetched, result.bytes_mirrored, result.bytes_reused,
            )  # fmt: skip
        return result

    def _check_rollout(self, ref: ModelRef, event: Mapping[str, Any], *, fallback: bool) -> None:
        """A share of the devices follows an alias first; who asks for a version by number gets it."""
        runs_it = self._lifecycle.status()["version"] == event["version"]
        if ref.alias is None or (runs_it and bool(self._lifecycle.instead) == fallback):
            return
        choice.check_rollout(
            event.get("rollout"),
            device_id=self._settings.device_id,
            name=self._name,
            version=int(event["version"]),
        )


def _is_overdue(job: SyncJob, now_s: float) -> bool:
    """A client that gives whole files does not stop by itself, nor does one that waits for bytes. With mirrors, it may
    be right to go on."""
    until_s = job.link.until_s
    return until_s is not None and now_s >= until_s + OVERDUE_S and not job.cache.mirrors


def _tidy(store: Store) -> None:
    """What crashes and superseded fetches left must not count in the quota for ever."""
    try:
        with store.lock():
            fsck.prune(store)
    except EdgeAgentError as error:
        log.warning("cache not tidied reason=%r", str(error))


def _job_of(name: str, ref: ModelRef, *, settings: Settings, lifecycle: Lifecycle, fallback: bool) -> SyncJob:
    """What the sync process has to know."""
    loads = lifecycle.serving is not Serving.FAILED  # then nobody has to be asked whether this host can
    return SyncJob(
        state_dir=str(settings.state_dir),
        registry=RegistryJob(
            uri=settings.registry.uri,
            timeout_s=settings.registry.timeout_s,
            tls=TlsFiles.of(settings.registry),
        ),
        name=name,
        ref=str(ref),
        fallback=fallback,
        check_host=True,
        running=(lifecycle.state.active or "") if loads else "",
        trust=TrustJob(
            public_keys=settings.trust.public_keys, allow_unsigned_code=settings.trust.allow_unsigned_code
        ),
        cache=CacheJob(
            quota_bytes=settings.cache.quota_bytes,
            min_free_bytes=settings.cache.min_free_bytes,
            max_bytes_per_s=settings.cache.max_bytes_per_s,
            mirrors=settings.cache.mirrors,
            mirror_patience_s=settings.cache.mirror_patience_s,
            mirror_ca_file=settings.cache.mirror_ca_file,
        ),
    )
