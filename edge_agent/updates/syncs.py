"""The syncs of one model: what they may take, what their events mean, and what is noted of how they ended.

    a job, by the settings, the link and the quarantine → `run_sync`, in a process of its own → its events: may this
    device take the version, is it too early to try again, how far is it → the registry, patience and the attempt are
    told how it ended

Decides nothing about what comes: `check.py` hands it to the lifecycle. Has no thread; whoever calls has the turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from edge_agent.cache import fsck
from edge_agent.cache.store import Store
from edge_agent.errors import (
    ContentError,
    EdgeAgentError,
    LinkHeld,
    RegistryRefused,
    SettingsError,
    StoreError,
    SyncStopped,
    TransportError,
    UnknownReference,
    VerificationError,
    VersionHeld,
)
from edge_agent.package.reference import ModelRef
from edge_agent.serving.seat import Serving
from edge_agent.settings import Settings
from edge_agent.sync import version_file
from edge_agent.sync.protocol import CacheJob, RegistryJob, SyncJob, SyncResult, TrustJob
from edge_agent.sync.tls import TlsFiles
from edge_agent.updates.activation import Activation, Adopting
from edge_agent.updates.attempts import Attempts
from edge_agent.updates.link import Link
from edge_agent.updates.patience import HeldBack, Patience
from edge_agent.updates.rollout import check_rollout
from edge_agent.updates.waiting import Found, Waits

log = logging.getLogger(__name__)

SYNC_TIMEOUT_S = 24 * 3600.0
"""A large model on a slow line; a stalled read ends much sooner."""

OVERDUE_S = 10.0
"""How long a sync may go on after the end of a window; by itself it stops with the first bytes that come then."""

OnEvent = Callable[[Mapping[str, Any]], None]
NoteRegistry = Callable[[EdgeAgentError | None], None]
"""Told that the registry answered, or the error that says what it was instead."""


class Served(Adopting, Protocol):
    """What serves the model, as far as syncs look at it; `serving.lifecycle` documents each method."""

    @property
    def instead(self) -> str: ...
    def status(self) -> Mapping[str, object]: ...


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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Who wants a version, and what he overrules.

    Attributes:
        by_operator: it is tried whether or not it failed before, and fetched even in quarantine.
        allow_older: see `SyncJob`.
        now: whatever `[link]` says, but for its file.
    """

    by_operator: bool = False
    allow_older: bool = False
    now: bool = False


A_POLL = Asked()


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


class Syncs:
    """Of one configured model.

    Args:
        name: the settings' name.
        waits, activation, attempts: of the model.
        gap_s: between two requests of a check that nobody waits for.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: Settings,
        store: Store,
        lifecycle: Served,
        run_sync: RunSync,
        note_registry: NoteRegistry,
        link: Link,
        waits: Waits,
        activation: Activation,
        attempts: Attempts,
        gap_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._event: Mapping[str, Any] | None = None
        self._asks = False
        self._name = name
        self._settings = settings
        self._store = store
        self._lifecycle = lifecycle
        self._run_sync = run_sync
        self._note_registry = note_registry
        self._link = link
        self._waits = waits
        self._activation = activation
        self._attempts = attempts
        self._gap_s = gap_s
        self._clock = clock
        self._patience = Patience(settings.registry.poll_interval_s, clock)

    @property
    def progress(self) -> dict[str, Any] | None:
        """`bytes, total_bytes, bytes_per_s, eta_s` of a running fetch, None where none runs."""
        event = self._event
        if event is None or event.get("event") != "progress":
            return None
        return {key: event.get(key) for key in ("bytes", "total_bytes", "bytes_per_s", "eta_s")}

    @property
    def asks(self) -> bool:
        """Whether the registry is being asked, and has not said yet that there is something to fetch."""
        return self._asks

    def from_registry(
        self,
        watch: Watch,
        ref: ModelRef,
        asked: Asked = A_POLL,
        *,
        fallback: bool = False,
        at_once: bool = False,
        in_rollout_only: bool | None = None,
    ) -> SyncResult:
        """From the registry into the cache; what the registry was is noted, and a download that failed.

        Args:
            at_once: whether or not the last downloads failed; what an operator asks for always is.
            in_rollout_only: a version that is rolled out to other devices only is left alone; by default what an
                alias means is.

        Raises:
            LinkHeld: the line may not be used now; `waits` has what is missing.
            NotInRollout: the version is not for this device yet.
            EdgeAgentError: it cannot be brought.
        """
        if not self._settings.registry.uri:
            raise SettingsError(
                "registry.uri: no registry is configured", remedy="set registry.uri in the settings"
            )
        job = self._job(ref, fallback=fallback)
        job = replace(job, allow_older=asked.allow_older, link=self._link.bounds(overruled=asked.now))
        if not asked.by_operator:
            job = replace(job, quarantined=tuple(self._lifecycle.state.quarantined))
        if not (asked.by_operator or at_once):
            job = replace(job, registry=replace(job.registry, gap_s=self._gap_s))
        held_to_rollout = ref.alias is not None if in_rollout_only is None else in_rollout_only
        tried = _Try()

        def look(event: Mapping[str, Any]) -> None:
            tried.note(event)
            if event.get("event") == "resolved":
                self._note_registry(None)
                if held_to_rollout:
                    self._check_rollout(event, fallback=fallback)
                if not (asked.by_operator or at_once):
                    self._patience.check(ref.name, tried.version)
                if not fallback:
                    self._activation.follow(tried.version)
            watch.on_event(event)

        try:
            result = self._bring(replace(watch, on_event=look), job)
        except LinkHeld as error:
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

    def from_file(
        self, watch: Watch, ref: ModelRef, file: int, *, fallback: bool, allow_older: bool
    ) -> SyncResult:
        """From an open version file into the cache.

        Args:
            ref: the version in it.

        Raises:
            EdgeAgentError: the file, the package in it or the cache says no.
        """
        job = replace(
            self._job(ref, fallback=fallback),
            registry=RegistryJob(uri=version_file.ORIGIN),
            version_file=file,
            allow_older=allow_older,
        )
        return self._bring(watch, job)

    def _job(self, ref: ModelRef, *, fallback: bool) -> SyncJob:
        loads = (
            self._lifecycle.serving is not Serving.FAILED
        )  # then nobody has to be asked whether this host can
        running = (self._lifecycle.state.active or "") if loads else ""
        return job_of(self._name, ref, settings=self._settings, fallback=fallback, running=running)

    def _fetch_waits(self, watch: Watch, tried: _Try, error: LinkHeld) -> LinkHeld:
        waiting, told = self._link.fetch_waits(error, tried.found)
        self._waits.note(waiting, watch.on_event)
        return told

    def _bring(self, watch: Watch, job: SyncJob) -> SyncResult:
        """One sync, from its start to a tidy cache. How it went is the model's attempt, where it is no fallback."""

        def look(event: Mapping[str, Any]) -> None:
            self._event, self._asks = event, self._asks and event.get("event") != "fetching"
            if event.get("event") == "quarantined":
                self._lifecycle.state.refuse_quarantined(str(event["key"]))
            elif event.get("event") == "progress":
                self._waits.clear()
            if not job.fallback:
                self._attempts.hear(event)
            watch.on_event(event)

        self._asks = job.version_file is None
        try:
            result = self._run(job, replace(watch, on_event=look))
        except (VersionHeld, SyncStopped, HeldBack):
            self._attempts.ended()
            raise
        except EdgeAgentError as error:
            if not job.fallback:
                self._attempts.failed(error)
            raise
        finally:
            self._event, self._asks = None, False
        if not job.fallback:
            self._attempts.brought()
        _tidy(self._store)
        if result.new:
            log.info(
                "version fetched model=%s version=%d bytes_fetched=%d bytes_mirrored=%d bytes_reused=%d",
                self._name, result.version, result.bytes_fetched, result.bytes_mirrored, result.bytes_reused,
            )  # fmt: skip
        return result

    def _run(self, job: SyncJob, watch: Watch) -> SyncResult:
        try:
            return self._run_sync(
                job,
                timeout_s=SYNC_TIMEOUT_S,
                on_event=watch.on_event,
                should_stop=lambda: watch.should_stop() or _is_overdue(job, self._clock()),
            )
        except SyncStopped as stop:
            if watch.should_stop() or not _is_overdue(job, self._clock()):
                raise
            raise LinkHeld("the window of link.windows is over") from stop
        except OSError as error:  # no memory, descriptors or space for a process: not the model's fault
            raise StoreError(f"no sync can be started: {error}") from error

    def _check_rollout(self, event: Mapping[str, Any], *, fallback: bool) -> None:
        """A share of the devices gets a version first; one that runs it already keeps it."""
        version = int(event["version"])
        runs_it = self._lifecycle.status()["version"] == version
        if runs_it and bool(self._lifecycle.instead) == fallback:
            return
        check_rollout(
            event.get("rollout"),
            device_id=self._settings.device_id,
            name=self._name,
            version=version,
            rollout_from=str(event.get("rollout_from", "")),
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
        log.warning("cache not tidied code=%s reason=%r", error.code, str(error))


def job_of(
    name: str, ref: ModelRef, *, settings: Settings, fallback: bool = False, running: str = ""
) -> SyncJob:
    """What the sync process has to know.

    Args:
        fallback, running: see `SyncJob`.
    """
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
        running=running,
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
