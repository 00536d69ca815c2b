"""Keeps every model at the version that this device wants: asks the registry, brings, hands over.

Owns the one thread that syncs: one model after the other, so that one fetch and one candidate at a time is
all that the device has to carry. Flow of a check: what is wanted → sync process → committed version →
lifecycle.adopt. A registry that is out of reach is a normal day: it is noted, and asked again. Operators' threads
come in between: `turn.py` says who waits for whom.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from edge_agent.cache import fsck
from edge_agent.cache.fsck import Damage
from edge_agent.cache.store import Store
from edge_agent.errors import (
    ContentError,
    EdgeAgentError,
    LoadFailed,
    RegistryRefused,
    SettingsError,
    StoreError,
    SyncStopped,
    TransportError,
    UnknownModel,
    UnknownReference,
)
from edge_agent.package.reference import ModelRef, ModelVersion
from edge_agent.serving.lifecycle import ModelLifecycle
from edge_agent.serving.seat import Serving
from edge_agent.settings import Settings
from edge_agent.sync import version_file
from edge_agent.sync.process import CacheJob, RegistryJob, SyncJob, SyncResult, TrustJob, run_sync
from edge_agent.updates import choice
from edge_agent.updates.turn import Turn

log = logging.getLogger(__name__)

SYNC_TIMEOUT_S = 24 * 3600.0
"""A large model on a slow line; a stalled read ends much sooner."""

_JITTER = (0.9, 1.1)
_WAIT_S = 0.5

OnEvent = Callable[[Mapping[str, Any]], None]


class Updates:
    """`run` is the thread; `check`, `take_in` and `repair` may be called from any, and wait for their turn.

    Attributes:
        reachable: whether the registry answered the last check; None before the first one.
        registry_problem: code of what the registry did wrong then: out of reach, or it refused; empty for nothing.
        checked_at: when that was, in seconds since 1970; None before the first one.
        problems: by model, why its last check brought nothing, empty when it was fine.
        progress: by model, the last event of a running fetch.
    """

    def __init__(self, settings: Settings, store: Store, lifecycles: Mapping[str, ModelLifecycle]) -> None:
        self._settings = settings
        self._store = store
        self._lifecycles = lifecycles
        self._turn = Turn()
        self._due = threading.Event()
        self._closing = threading.Event()
        self._changed = threading.Event()  # what MQTT asks for: the running poll is for something else
        self.reachable: bool | None = None
        self.registry_problem = ""
        self.checked_at: float | None = None
        self.problems: dict[str, str] = {}
        self.progress: dict[str, Mapping[str, Any]] = {}
        self._desired: Mapping[str, str] | None = None

    def run(self) -> None:
        """The thread: looks the cache over, checks all models, then again every `registry.poll_interval_s`, or when
        told to.
        """
        try:
            fsck.look_over(self._store)
        except EdgeAgentError as error:
            log.warning("cache not looked over reason=%r", str(error))
        while not self._closing.is_set():
            self._due.clear()
            self._note_desired()
            for name in self._lifecycles:
                if not self._closing.is_set():
                    self._try(name)
            limit_s = time.monotonic() + self._settings.registry.poll_interval_s * random.uniform(*_JITTER)
            while not self._closing.is_set() and not self._due.is_set() and time.monotonic() < limit_s:
                self._due.wait(_WAIT_S)

    def desire(self, uris: Mapping[str, str]) -> None:
        """What MQTT asks for: by model `models:/…`, or empty. The thread writes it down, and then checks.

        It comes again with each connection to the broker: only what is new to a model ends the running poll.
        """
        self._desired = dict(uris)
        if any(self._lifecycles[name].state.desired != uri for name, uri in uris.items()):
            self._changed.set()
        self._due.set()

    def check_now(self) -> None:
        """Tells the thread to check all models."""
        self._due.set()

    def progress_of(self, name: str) -> dict[str, Any] | None:
        """`bytes, total_bytes, bytes_per_s, eta_s` of a running fetch, None where none runs."""
        event = self.progress.get(name)
        if event is None or event.get("event") != "progress":
            return None
        return {key: event.get(key) for key in ("bytes", "total_bytes", "bytes_per_s", "eta_s")}

    def close(self) -> None:
        """Ends `run`; a running sync is killed (the next one goes on from what it has)."""
        self._closing.set()
        self._due.set()

    def check(
        self, name: str, on_event: OnEvent = lambda event: None, *, asked_for: bool = False
    ) -> SyncResult:
        """Brings what one model wants from the registry, and makes it active unless another version is pinned.

        Args:
            asked_for: by an operator: a running poll gives way to it, and a version in quarantine is fetched, too, for
                `activate` to take.

        Raises:
            EdgeAgentError: the registry, the package, the cache or the gate says no, or it is not for this
                device yet.
            SyncStopped: it is a poll, and something more urgent came.
        """
        with self._operators_turn("`models pull`", on_event) if asked_for else self._polls_turn(name):
            lifecycle = self._lifecycles[name]
            key = ""
            try:
                result = self._sync(name, on_event, asked_for=asked_for)
                key = lifecycle.state.pinned or result.key
                lifecycle.adopt(key, asked_for=asked_for)
            except EdgeAgentError as error:
                return self._fall_back(name, error, failed=key, on_event=on_event)
            self.problems[name] = ""
            return result

    def repair(self, damaged: Sequence[Damage], on_event: OnEvent = lambda event: None) -> Mapping[str, str]:
        """Sets damaged blobs aside, and fetches them again where there is a registry.

        A model goes on meanwhile with what it has loaded, which was whole then: no prompt waits for a download.
        At the end it loads again, what is there now; an active version that is still damaged gives way.

        Args:
            damaged: what a check found; it is looked at again, as an update may have changed it since.

        Returns:
            By model, why its files were not fetched again.
        """
        with self._operators_turn("`models verify`", on_event):
            keys = sorted({(damage.name, damage.key) for damage in damaged})
            records = [record for name, key in keys if (record := self._store.record(name, key))]
            found = fsck.verify(self._store, records)
            with self._store.lock():
                fsck.set_aside(self._store, found.damaged)
            names = {record.name for record in records if found.of(record)} & set(self._lifecycles)
            problems = self._fetch_again(sorted(names)) if self._settings.registry.uri else {}
            for record in records:
                lifecycle = self._lifecycles.get(record.name)
                if lifecycle and lifecycle.state.active == record.key and found.of(record):
                    lifecycle.reload()
        self.check_now()  # a version that gave way meanwhile may be whole again
        return problems

    def _fetch_again(self, names: Sequence[str]) -> dict[str, str]:
        problems = {}
        for name in names:
            try:
                self._sync(name, lambda event: None, fallback=bool(self._lifecycles[name].state.instead))
            except EdgeAgentError as error:
                problems[name] = str(error)
        return problems

    def _operators_turn(self, what: str, on_event: OnEvent) -> AbstractContextManager[None]:
        return self._turn.of_operator(
            what, on_wait=lambda before: on_event({"event": "waiting", "for": before})
        )

    def _polls_turn(self, name: str) -> AbstractContextManager[None]:
        return self._turn.of_poll(f"the check of {name}", should_stop=self._gives_way)

    def _gives_way(self) -> bool:
        """Whether a poll ends now: for an operator, or for what MQTT asks for instead."""
        return self._closing.is_set() or self._turn.wanted or self._changed.is_set()

    def _fall_back(self, name: str, error: EdgeAgentError, *, failed: str, on_event: OnEvent) -> SyncResult:
        """Serves the fallback where no version of the model's own can run here, and none is pinned.

        Args:
            error: why its own version does not run.
            failed: key of that version, where it got as far as the gate.

        Raises:
            EdgeAgentError: `error`, where there is no fallback or it is not needed; or the fallback's own.
        """
        lifecycle = self._lifecycles[name]
        if not self._settings.models[name].fallback or not choice.needs_fallback(error):
            raise error
        if lifecycle.runs_its_own or lifecycle.state.pinned:
            raise error
        try:
            result = self._sync(name, on_event, fallback=True)
            lifecycle.adopt(result.key, instead=str(error))
        except EdgeAgentError as trouble:
            raise type(trouble)(
                f"{error}; and its fallback: {trouble.message}", remedy=trouble.remedy
            ) from error
        if isinstance(error, ContentError | LoadFailed) and failed:
            lifecycle.set_aside(failed, str(error))
        self.problems[name] = str(error)
        return result

    def take_in(
        self, file: int, *, name: str | None = None, on_event: OnEvent = lambda event: None
    ) -> SyncResult:
        """Brings the version that a bundle has, and makes it active as one from the registry would be.

        A version is only kept in the cache where another one is pinned or asked for by its number.

        Args:
            file: descriptor of the bundle, open for reading.
            name: which model takes it; needed where several follow the same registered model.

        Raises:
            EdgeAgentError: the file, the package in it, the cache or the gate says no.
        """
        version = version_file.read_version(file)
        name = self._taker(version, name)
        with self._operators_turn("`models import`", on_event):
            lifecycle, wanted = self._lifecycles[name], self._wanted(name)
            fallback = version.name != wanted.name
            if fallback:
                wanted = ModelRef.parse(self._settings.models[name].fallback)
            job = replace(
                self._job(name, fallback=fallback),
                registry=RegistryJob(uri=version_file.ORIGIN),
                ref=str(wanted.at_version(version.version)),
                bundle=file,
            )
            result = self._bring(job, on_event)
            if fallback:
                if not (lifecycle.runs_its_own or lifecycle.state.pinned):
                    lifecycle.adopt(result.key, instead="no version of its own runs here")
            elif lifecycle.state.pinned or wanted.version in (None, result.version):
                lifecycle.adopt(lifecycle.state.pinned or result.key, asked_for=True)
            return result

    def _taker(self, version: ModelVersion, name: str | None) -> str:
        """The configured model that a version from a file is for."""
        takers = [one for one in self._lifecycles if version.name in self._registered_names(one)]
        if name is None and len(takers) == 1:
            return takers[0]
        if name in takers:
            return str(name)
        there = ", ".join(f"{one} ({self._wanted(one)})" for one in self._lifecycles) or "none"
        raise UnknownModel(
            f"the file has version {version.version} of {version.name!r}, and "
            + (f"{name!r} follows another model" if name else f"{len(takers)} models here follow that")
            + f"; there are: {there}",
            remedy="choose with --model" if takers else "add a [models.NAME] table with that model's uri",
        )

    def _registered_names(self, name: str) -> set[str]:
        """Of what a model follows, and of its fallback."""
        fallback = self._settings.models[name].fallback
        return {self._wanted(name).name, *([ModelRef.parse(fallback).name] if fallback else [])}

    def _note_desired(self) -> None:
        self._changed.clear()
        desired, self._desired = self._desired, None
        try:
            for name, uri in (desired or {}).items():
                self._lifecycles[name].set_desired(uri)
        except EdgeAgentError as error:
            log.warning("desired state not written down reason=%r", str(error))
            self._desired = self._desired or desired  # the next turn tries again

    def _try(self, name: str) -> None:
        """One model's turn in a poll. A pinned model asks nobody."""
        lifecycle = self._lifecycles[name]
        try:
            if lifecycle.state.pinned:
                lifecycle.adopt(lifecycle.state.pinned)
                self.problems[name] = ""
                return
            try:
                self._catch_up(lifecycle)
            except EdgeAgentError as error:  # the registry may have a version that does run
                if not self._settings.registry.uri or self._closing.is_set():
                    raise
                log.warning("cached version refused model=%s reason=%r", name, str(error))
            if self._settings.registry.uri:
                self.check(name)
        except SyncStopped as stop:
            log.info("check put off model=%s reason=%r", name, str(stop))
            self._due.set()
        except EdgeAgentError as error:
            if self._closing.is_set():
                return
            text = str(error)
            if self.problems.get(name) != text:
                log.warning("update failed model=%s code=%s reason=%r", name, error.code, text)
            self.problems[name] = text

    def _catch_up(self, lifecycle: ModelLifecycle) -> None:
        """Takes up what is on disk already, one of the fallback where nothing else runs."""
        try:
            lifecycle.catch_up()
        except EdgeAgentError as error:
            record = lifecycle.cached_fallback()
            if record is None or lifecycle.runs_its_own or not choice.needs_fallback(error):
                raise
            lifecycle.adopt(record.key, instead=str(error))

    def _sync(
        self, name: str, on_event: OnEvent, *, fallback: bool = False, asked_for: bool = False
    ) -> SyncResult:
        if not self._settings.registry.uri:
            raise SettingsError(
                "registry.uri: no registry is configured", remedy="set registry.uri in the settings"
            )

        job = self._job(name, fallback=fallback)
        if not asked_for:
            job = replace(job, quarantined=tuple(self._lifecycles[name].state.quarantined))
        try:
            result = self._bring(job, on_event)
        except (TransportError, RegistryRefused, UnknownReference, ContentError) as error:
            self._note(error)
            raise
        self._note(None)
        return result

    def _bring(self, job: SyncJob, on_event: OnEvent) -> SyncResult:
        """One sync process, from its start to a tidy cache."""
        name = job.name

        def look(event: Mapping[str, Any]) -> None:
            if event.get("event") == "resolved":
                self._check_rollout(job, event)
            elif event.get("event") == "quarantined":
                self._lifecycles[name].refuse_quarantined(str(event["key"]))
            self.progress[name] = event
            on_event(event)

        should_stop = self._gives_way if self._turn.is_polls else self._closing.is_set
        try:
            result = run_sync(job, timeout_s=SYNC_TIMEOUT_S, on_event=look, should_stop=should_stop)
        except (
            OSError
        ) as error:  # no memory, no descriptors, no space to start a process: not the model's fault
            raise StoreError(f"no sync can be started: {error}") from error
        finally:
            self.progress.pop(name, None)
        self._tidy()
        if result.new:
            log.info(
                "version fetched model=%s version=%d bytes_fetched=%d bytes_reused=%d",
                name, result.version, result.bytes_fetched, result.bytes_reused,
            )  # fmt: skip
        return result

    def _tidy(self) -> None:
        """What crashes and superseded fetches left must not count in the quota for ever."""
        try:
            with self._store.lock():
                fsck.prune(self._store)
        except EdgeAgentError as error:
            log.warning("cache not tidied reason=%r", str(error))

    def _check_rollout(self, job: SyncJob, event: Mapping[str, Any]) -> None:
        """A share of the devices follows an alias first; who asks for a version by number gets it."""
        lifecycle = self._lifecycles[job.name]
        runs_it = lifecycle.status()["version"] == event["version"]
        if ModelRef.parse(job.ref).alias is None or (runs_it and bool(lifecycle.instead) == job.fallback):
            return
        choice.check_rollout(
            event.get("rollout"),
            device_id=self._settings.device_id,
            name=job.name,
            version=int(event["version"]),
        )

    def _running(self, name: str) -> str:
        """Key of a version that loaded here: nobody has to be asked whether it can."""
        lifecycle = self._lifecycles[name]
        return lifecycle.state.active or "" if lifecycle.serving is not Serving.FAILED else ""

    def _wanted(self, name: str) -> ModelRef:
        return choice.wanted_ref(self._settings.models[name].uri, self._lifecycles[name].state)

    def _job(self, name: str, *, fallback: bool = False) -> SyncJob:
        """What the sync process has to know."""
        settings = self._settings
        wanted = ModelRef.parse(settings.models[name].fallback) if fallback else self._wanted(name)
        return SyncJob(
            state_dir=str(settings.state_dir),
            registry=RegistryJob(uri=settings.registry.uri, timeout_s=settings.registry.timeout_s),
            name=name,
            ref=str(wanted),
            fallback=fallback,
            check_host=True,
            running=self._running(name),
            trust=TrustJob(
                public_keys=settings.trust.public_keys, allow_unsigned_code=settings.trust.allow_unsigned_code
            ),
            cache=CacheJob(
                quota_bytes=settings.cache.quota_bytes,
                min_free_bytes=settings.cache.min_free_bytes,
                max_bytes_per_s=settings.cache.max_bytes_per_s,
            ),
        )

    def _note(self, error: EdgeAgentError | None) -> None:
        """What the registry was, by how a sync ended. One that refuses was reached."""
        reachable = not isinstance(error, TransportError)
        if self.reachable is not None and self.reachable != reachable:
            log.info(
                "registry %s uri=%s", "reachable" if reachable else "unreachable", self._settings.registry.uri
            )
        self.registry_problem = error.code if isinstance(error, TransportError | RegistryRefused) else ""
        self.reachable, self.checked_at = reachable, time.time()
