"""One configured model's life on this device: absent → loading → ready, and from one version to the next.

Owns the runner that answers, and which version of `state.json` it is. Flow of a change: a candidate version
is written to the state → its runner starts beside the active one → the gate (it loads) → between two prompts
the runners are exchanged and the state is switched with one rename → the old runner stops. A candidate that
fails leaves the active version alone.

Refuses to load what is not verified (digests are checked before each load).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

from edge_agent.errors import EdgeAgentError, RunnerError, StoreError
from edge_agent.models.record import VersionRecord
from edge_agent.models.state import ModelState
from edge_agent.models.store import Store, check_file
from edge_agent.runner.process import RunnerProcess, environment
from edge_agent.runner.protocol import Load, Loaded
from edge_agent.settings import ModelSettings, Settings

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
"""A large model from a slow card."""

RETRY_FIRST_S = 1.0
RETRY_LAST_S = 60.0


class Serving(StrEnum):
    """What a model does now, for status."""

    ABSENT = "absent"
    IDLE = "idle"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How versions are loaded: what lifecycles get from the settings."""

    settings: ModelSettings
    threads: int
    verify: bool


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to use a runner for one prompt; no exchange happens meanwhile."""

    runner: RunnerProcess
    record: VersionRecord
    flavor: str

    @property
    def version(self) -> int:
        return self.record.version


@dataclass(kw_only=True)
class _Seat:
    """A loaded version."""

    runner: RunnerProcess
    record: VersionRecord
    loaded: Loaded


class ModelLifecycle:
    """One model of the settings.

    Its dispatcher's thread loads and leases; the updates' thread brings candidates; status is read by any.
    All of them meet behind one condition.

    Args:
        name: the settings' name.
        start_runner: makes a runner process that has not loaded anything yet.
    """

    def __init__(
        self, name: str, *, loading: Loading, store: Store, start_runner: Callable[[], RunnerProcess]
    ) -> None:
        self.name = name
        self._loading = loading
        self._store = store
        self._start_runner = start_runner
        self._changed = threading.Condition()
        self._seat: _Seat | None = None
        self._leased = False
        self._exchanging = False
        self._closed = False
        self._serving = Serving.ABSENT
        self._reason = ""
        self._failures = 0
        self._retry_at_s = 0.0
        self._remember(store.state().model(name))
        if self._active is not None:
            self._serving = Serving.LOADING if loading.settings.preload else Serving.IDLE

    # --- The dispatcher's side -------------------------------------------------------------------------

    @contextmanager
    def lease(self) -> Iterator[Lease | None]:
        """A loaded runner for one prompt, or None when there is none now. Loads the active version if needed.

        A runner that died inside the block is taken away; the next lease starts another.
        """
        seat = self._take_seat()
        if seat is None:
            yield None
            return
        try:
            yield Lease(runner=seat.runner, record=seat.record, flavor=seat.loaded.flavor)
        finally:
            self._give_back(seat)

    def wait_for_change(self, timeout_s: float) -> None:
        """Returns when a version came or went, or after `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def settled(self) -> bool:
        """True when a `preload` model is loaded, or cannot be: READY does not wait for it any longer."""
        return self._serving is not Serving.LOADING

    # --- The updates' side -----------------------------------------------------------------------------

    def adopt(self, key: str) -> None:
        """Makes a committed version the active one, if it passes the gate.

        Raises:
            EdgeAgentError: it does not; the active version goes on.
        """
        record = self._store.record(self.name, key)
        if record is None:
            raise StoreError(f"version {key} of {self.name} is not in the cache")
        if self._state.active == key:
            return
        if key in self._state.quarantined:
            raise StoreError(f"version {key} of {self.name} is in quarantine: {self._state.quarantined[key]}")
        self._change(lambda state: replace(state, candidate=key))
        log.info("candidate starts model=%s version=%s", self.name, key)
        try:
            seat = self._load(record)
        except EdgeAgentError as error:
            reason = str(error)
            self._change(lambda state: _refused(state, key, reason))
            log.warning("candidate refused model=%s version=%s reason=%r", self.name, key, str(error))
            raise
        self._exchange(seat)

    def close(self) -> None:
        """Stops the runner; nothing is loaded any more."""
        with self._changed:
            self._closed = True
            seat, self._seat = self._seat, None
            self._changed.notify_all()
        if seat is not None:
            seat.runner.stop()

    # --- For everybody ---------------------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """True when prompts may be accepted: a version is here, and it has not failed for good."""
        return self._serving in (Serving.READY, Serving.LOADING, Serving.IDLE)

    @property
    def flavor(self) -> str | None:
        """What runs the loaded version, None while none is loaded."""
        seat = self._seat
        return seat.loaded.flavor if seat else None

    @property
    def serving(self) -> Serving:
        return self._serving

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Key → why that version is not tried again."""
        return self._state.quarantined

    @property
    def reason(self) -> str:
        """Why it is not available, or what is wrong, for people."""
        return self._reason

    def status(self) -> dict[str, object]:
        """This model's entry in the status document."""
        record, seat = self._active, self._seat
        return {
            "name": self.name,
            "uri": self._loading.settings.uri,
            "version": record.version if record else None,
            "digest": record.digest if record else None,
            "flavor": seat.loaded.flavor if seat else None,
            "state": str(self._serving),
            "reason": self._reason,
        }

    def versions(self) -> dict[str, object]:
        """The other versions that the state knows."""
        state = self._state
        return {
            "previous": state.previous,
            "candidate": state.candidate,
            "pinned": list(state.pinned),
            "quarantined": dict(state.quarantined),
        }

    # --- Inside ----------------------------------------------------------------------------------------

    def _change(self, change: Callable[[ModelState], ModelState]) -> None:
        self._remember(self._store.change_state(self.name, change))

    def _remember(self, state: ModelState) -> None:
        """Keeps what the disk says, so that status and every prompt need not read it."""
        self._state = state
        self._active = self._store.record(self.name, state.active) if state.active else None

    def _take_seat(self) -> _Seat | None:
        with self._changed:
            if self._closed or self._exchanging:
                return None
            if self._seat is not None:
                self._leased = True
                return self._seat
            if time.monotonic() < self._retry_at_s:
                return None
        seat = self._load_active()
        if seat is None or self._install(seat):
            return seat
        seat.runner.stop()
        return None

    def _install(self, seat: _Seat) -> bool:
        """Gives a freshly loaded version the seat, unless it was closed or taken meanwhile."""
        with self._changed:
            if self._closed or self._seat is not None:
                return False
            self._seat, self._leased = seat, True
            return True

    def _give_back(self, seat: _Seat) -> None:
        with self._changed:
            self._leased = False
            if not seat.runner.alive and self._seat is seat:
                log.warning(
                    "runner died model=%s version=%s output=%r",
                    self.name,
                    seat.record.key,
                    seat.runner.last_output(),
                )
                self._seat = None
                self._serving, self._reason = Serving.LOADING, "the runner died and is started again"
            self._changed.notify_all()

    def _load_active(self) -> _Seat | None:
        """Loads the active version, or notes why not and when to try again."""
        record = self._active
        if record is None:
            self._set(Serving.ABSENT, "no version is in the cache")
            return None
        self._set(Serving.LOADING, self._reason)
        try:
            seat = self._load(record)
        except EdgeAgentError as error:
            self._failures += 1
            self._retry_at_s = time.monotonic() + min(RETRY_LAST_S, RETRY_FIRST_S * 2 ** (self._failures - 1))
            log.warning("load failed model=%s version=%s reason=%r", self.name, record.key, str(error))
            self._set(Serving.FAILED, str(error))
            return None
        self._failures = 0
        self._set(Serving.READY, "")
        return seat

    def _load(self, record: VersionRecord) -> _Seat:
        """Checks a version's bytes and loads them in a new runner.

        Raises:
            EdgeAgentError: damaged, or it does not load; no runner is left.
        """
        with self._store.lease(record) as folder:
            if self._loading.verify:
                for file in record.files:
                    check_file(folder / file.path, file)
            started_s = time.monotonic()
            settings = self._loading.settings
            runner = self._start_runner()
            try:
                loaded = runner.load(
                    Load(
                        folder=str(folder),
                        context_tokens=settings.context_tokens,
                        max_tokens=settings.max_tokens,
                        threads=self._loading.threads,
                    ),
                    timeout_s=LOAD_TIMEOUT_S,
                )
            except RunnerError:
                log.warning("runner output model=%s output=%r", self.name, runner.last_output())
                runner.kill()
                raise
        log.info(
            "model loaded model=%s version=%s flavor=%r pid=%d load_ms=%.0f",
            self.name, record.key, loaded.flavor, runner.pid, (time.monotonic() - started_s) * 1000,
        )  # fmt: skip
        return _Seat(runner=runner, record=record, loaded=loaded)

    def _exchange(self, seat: _Seat) -> None:
        """Between two prompts: the new runner takes the seat, then the state says so, then the old one stops."""
        with self._changed:
            self._exchanging = True
            self._changed.wait_for(lambda: not self._leased)
        try:
            self._change(lambda state: _switched(state, seat.record.key))
            with self._changed:
                leaving, self._seat = (seat, None) if self._closed else (self._seat, seat)
                self._serving, self._reason = Serving.READY, ""
        except BaseException:
            seat.runner.kill()
            raise
        finally:
            with self._changed:
                self._exchanging = False
                self._changed.notify_all()
        log.info("version active model=%s version=%s", self.name, seat.record.key)
        if leaving is not None:
            leaving.runner.stop()

    def _set(self, serving: Serving, reason: str) -> None:
        with self._changed:
            self._serving, self._reason = serving, reason
            self._changed.notify_all()


def lifecycle_of(settings: Settings, name: str, store: Store) -> ModelLifecycle:
    """The lifecycle of one configured model, with runners as the settings want them."""
    return ModelLifecycle(
        name,
        loading=Loading(
            settings=settings.models[name],
            threads=settings.inference.threads,
            verify=settings.cache.verify_on_load,
        ),
        store=store,
        start_runner=lambda: RunnerProcess(
            model=name, environment=environment(settings.state_dir), scratch=settings.state_dir / "pycache"
        ),
    )


def _refused(state: ModelState, key: str, reason: str) -> ModelState:
    """A candidate that failed is not tried again, unless nothing else could ever answer."""
    quarantined = {**state.quarantined, key: reason} if state.active else state.quarantined
    return replace(state, candidate=None, quarantined=quarantined)


def _switched(state: ModelState, key: str) -> ModelState:
    previous = state.active if state.active != key else state.previous
    return replace(state, active=key, previous=previous, candidate=None)
