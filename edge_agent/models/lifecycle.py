"""One configured model's life on this device: absent → loading → ready, and from one version to the next.

Owns the runner that answers, and which version of `state.json` it is. Flow of a change: the candidate is
written to the state → its runner starts beside the active one (or in its place, where memory holds one only)
→ the gate → between two prompts the runners are exchanged and the state is switched with one rename → the old
runner stops. A candidate that fails leaves the active version alone and is quarantined. An active version
that does not load, or whose runner crashes on several prompts, gives way to the previous one, or to the fallback.

Refuses to load what is not verified: digests are checked before each load.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from edge_agent.errors import (
    CannotRun,
    ContentError,
    EdgeAgentError,
    LoadFailed,
    MemoryShort,
    PolicyError,
    PromptError,
    RunnerCrashed,
    RunnerError,
    StoreError,
    VerificationError,
)
from edge_agent.models import fsck, trust
from edge_agent.models.learned import Learned
from edge_agent.models.memory_budget import Admission, MemoryBudget
from edge_agent.models.record import VersionRecord
from edge_agent.models.state import ModelState
from edge_agent.models.store import Store, check_file
from edge_agent.models.thread_choice import ThreadChoice
from edge_agent.runner.memory import peak_bytes, resident_bytes
from edge_agent.runner.process import RunnerProcess, environment
from edge_agent.runner.protocol import Load, Loaded
from edge_agent.runner.threads import measure
from edge_agent.settings import ModelSettings, Settings

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
"""A large model from a slow card."""
GATE_TIMEOUT_S = 300.0
THREADED_FLAVOR = "onnxruntime-genai"
"""The flavor whose number of threads is measured."""
MAX_TRIES = 3
"""A candidate that this many agents died trying is not tried again."""
MAX_LOAD_FAILURES = 2
MAX_CRASHES = 3
CRASH_WINDOW_S = 600.0
RETRY_FIRST_S, RETRY_LAST_S = 1.0, 60.0

_PEAK_GROWTH = 1.05
"""A peak is written down again when it has grown by this much: a write is not free on a flash card."""


class GateFailed(ContentError):
    """A candidate loaded, and did not answer its golden prompts as its package says it must."""

    code = "gate_failed"


class Serving(StrEnum):
    """What a model does now, for status."""

    ABSENT = "absent"
    IDLE = "idle"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How versions are loaded: what lifecycles get from the settings.

    Attributes:
        threads: how many threads a version runs on.
        budget: memory, shared by all models of this process.
        verify: check every digest before a load.
        public_keys, allow_unsigned_code: `[trust]`, held against each version before each load.
        memory_limit_bytes: for all runners; 0 for none.
        parallel: prompts that one runner answers at once.
        kv_bytes: for what one runner keeps in mind of running and earlier prompts.
    """

    settings: ModelSettings
    threads: ThreadChoice
    budget: MemoryBudget
    parallel: int = 1
    kv_bytes: int = 0
    verify: bool
    public_keys: tuple[str, ...]
    allow_unsigned_code: bool
    memory_limit_bytes: int


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to use a runner for one prompt; no exchange happens meanwhile.

    Attributes:
        parallel: how many prompts the runner answers at once.
        blame: called once for a runner that failed, with the digests of the prompts that may have been the cause.
    """

    runner: RunnerProcess
    record: VersionRecord
    flavor: str
    parallel: int
    blame: Callable[[frozenset[bytes]], None]

    @property
    def version(self) -> int:
        return self.record.version


@dataclass(kw_only=True)
class _Seat:
    """A loaded version; `peak_bytes` is the most memory that is written down of its runner."""

    runner: RunnerProcess
    record: VersionRecord
    loaded: Loaded
    context_tokens: int
    peak_bytes: int = 0


class ModelLifecycle:
    """One model of the settings.

    Its dispatcher's thread loads and leases; the updates' thread brings candidates; operators act from
    control threads, one at a time; status is read by any. All of them meet behind one condition.

    Args:
        name: the settings' name.
        start_runner: makes a runner process that has not loaded anything yet.

    Attributes:
        gate_report: what the last gate measured that fell short without being an error, empty when nothing did.
        memory_report: what the last load had to do without, empty when it had all that it wanted.
    """

    def __init__(
        self, name: str, *, loading: Loading, store: Store, start_runner: Callable[[], RunnerProcess]
    ) -> None:
        self.name = name
        self.gate_report = ""
        self.memory_report = ""
        self._loading = loading
        self._store = store
        self._start_runner = start_runner
        self._changed = threading.Condition()
        self._operating = threading.Lock()
        self._seat: _Seat | None = None
        self._starting: set[RunnerProcess] = set()
        self._leases = 0
        self._giving_up = False
        self._exchanging = False
        self._closed = False
        self._serving = Serving.ABSENT
        self._reason = ""
        self._failures = 0
        self._retry_at_s = 0.0
        self._used_at_s = time.monotonic()
        self._crashes: collections.deque[tuple[float, frozenset[bytes]]] = collections.deque(maxlen=64)
        self._remember(store.state().model(name))
        if self._active is not None:
            self._serving = Serving.LOADING if loading.settings.preload else Serving.IDLE
        loading.budget.join(self)

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
        blamed: list[frozenset[bytes]] = []
        try:
            yield Lease(
                runner=seat.runner,
                record=seat.record,
                flavor=seat.loaded.flavor,
                parallel=seat.loaded.parallel,
                blame=blamed.append,
            )
        finally:
            self._give_back(seat)
            for digests in blamed:
                self._note_crash(seat, digests)

    def wait_for_change(self, timeout_s: float) -> None:
        """Returns when a version came or went, or after `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def settled(self) -> bool:
        """True when a `preload` model is loaded, or cannot be: READY does not wait for it any longer."""
        return self._serving is not Serving.LOADING

    # --- Changes: the updates' thread and operators ----------------------------------------------------

    def adopt(self, key: str, *, force: bool = False, instead: str = "") -> None:
        """Makes a committed version the active one, if it passes the gate.

        Args:
            force: an operator wants it: quarantine does not hold it back.
            instead: why it is one of the fallback, where it is.

        Raises:
            EdgeAgentError: it does not pass; the active version goes on.
        """
        with self._operating:
            record = self._record(key)
            instead = _reason_of(record, instead or self._state.instead)
            if self._state.active == key and self._serving is not Serving.FAILED:
                if instead != self._state.instead:
                    self._change(lambda state: replace(state, instead=instead))
                return
            if key in self._state.quarantined and not force:
                raise GateFailed(f"version {key} is in quarantine: {self._state.quarantined[key]}")
            self._change(lambda state: state.trying(key))
            if self._state.candidate_tries > MAX_TRIES and not force:
                self._refuse(
                    key, GateFailed(f"it was tried {MAX_TRIES} times and never came through the gate")
                )
            log.info("candidate starts model=%s version=%s", self.name, key)
            if self._active is None:  # prompts wait for it instead of being told that there is nothing
                self._set_unseated(None, Serving.LOADING, f"version {record.version} is being loaded")
            try:
                if self._state.active not in (None, key) and not self._fits_beside(record):
                    self._loading.budget.check_weights(record)
                    log.info("memory holds one model only: the active one stops first model=%s", self.name)
                    self._vacate()
                seat = self._load(record)
                self._gate(seat)
                self._exchange(seat, instead)
            except EdgeAgentError as error:
                if self._active is None:
                    self._resume()
                    self._set_unseated(None, Serving.ABSENT, f"version {record.version} failed: {error}")
                self._refuse(key, error)
            finally:
                self._resume()

    def catch_up(self) -> None:
        """Takes up what is on disk already: a candidate that an earlier daemon did not get to try, or, where
        nothing is active, the newest version. Needs no registry.

        Raises:
            EdgeAgentError: it does not pass the gate.
        """
        state = self._state
        if state.candidate and self._store.record(self.name, state.candidate):
            self.adopt(state.candidate)
        elif state.active is None:
            usable = [
                record
                for record in self._store.versions(self.name)
                if record.key not in state.quarantined and not record.fallback
            ]
            if usable:
                self.adopt(usable[-1].key)

    def go_back(self) -> str:
        """An operator's rollback: the previous version becomes active again, and is pinned. Gives its key.

        Raises:
            EdgeAgentError: there is none, or it does not pass the gate.
        """
        key = self._state.previous
        if key is None:
            raise StoreError(f"model {self.name} has no previous version to go back to")
        self.adopt(key, force=True)
        self.pin(key)
        return key

    def set_aside(self, key: str, reason: str) -> None:
        """A version of the model's own failed while the fallback answers: it is not tried again."""
        if key not in self._state.quarantined:
            self._change(lambda state: state.refused(key, reason))

    def cached_fallback(self) -> VersionRecord | None:
        """The newest version of the fallback that is here and may be tried."""
        records = [
            record
            for record in self._store.versions(self.name)
            if record.fallback and record.key not in self._state.quarantined
        ]
        return max(records, key=lambda record: record.created_at, default=None)

    def pin(self, key: str | None) -> None:
        """Fixes the version that runs, whatever the registry says; None lets it follow again."""
        if key is not None:
            self._record(key)
        self._change(lambda state: replace(state, pinned=key))

    def set_desired(self, uri: str) -> None:
        """Notes what MQTT asks for; empty for nothing."""
        if uri != self._state.desired:
            self._change(lambda state: replace(state, desired=uri))

    def forget(self, key: str) -> None:
        """A version was removed from the cache."""
        self._change(lambda state: state.without(key))

    def unload_when_idle(self) -> None:
        """Stops a runner that nobody has used for `idle_unload_s`; the dispatcher asks between prompts."""
        idle_s = self._loading.settings.idle_unload_s
        idle = idle_s and not self._leases and time.monotonic() - self._used_at_s >= idle_s
        if idle and self.give_up_memory():
            log.info("unloaded when idle model=%s", self.name)

    def give_up_memory(self) -> bool:
        """Stops the runner: now, when nobody uses it, else after the running prompt. The next one loads it again.

        Returns:
            True when it was stopped.
        """
        with self._changed:
            if self._seat is None or self._leases or self._exchanging:
                self._giving_up = self._leases > 0
                return False
            seat, self._seat, self._giving_up = self._seat, None, False
            self._serving = Serving.IDLE
        self._note_peak(seat)
        seat.runner.stop()
        return True

    def last_used_s(self) -> float:
        """Monotonic seconds."""
        return self._used_at_s

    def resident_bytes(self) -> int:
        """What this model's runners have in memory now."""
        with self._changed:
            runners = {*self._starting, *([self._seat.runner] if self._seat else [])}
        return sum(resident_bytes(runner.pid) for runner in runners)

    def wanted_now(self) -> bool:
        """True when the active version should be loaded, and is not, though no prompt waits."""
        seat = self._seat
        loaded = seat is not None and seat.runner.alive
        return self._loading.settings.preload and self._serving is not Serving.IDLE and not loaded

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the model unloaded for the block, so that its files can be mended; prompts wait meanwhile."""
        with self._operating:
            self._vacate()
            try:
                yield
            finally:
                with self._changed:
                    self._failures, self._retry_at_s = 0, 0.0
                self._resume()

    def close(self) -> None:
        """Stops the runners; nothing is loaded any more."""
        with self._changed:
            self._closed = True
            seat, self._seat = self._seat, None
            starting = list(self._starting)
            self._changed.notify_all()
        self._loading.budget.leave(self)
        for runner in starting:
            runner.kill()
        if seat is not None:
            seat.runner.stop()

    # --- For everybody ---------------------------------------------------------------------------------

    @property
    def state(self) -> ModelState:
        """What `state.json` says of this model."""
        return self._state

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
    def runs_its_own(self) -> bool:
        """True while a version of the model's own reference is active, and has not failed for good."""
        return self._active is not None and not self._active.fallback and self._serving is not Serving.FAILED

    @property
    def instead(self) -> str:
        """Which fallback runs and why, for people; empty where the model's own version does."""
        record, state = self._active, self._state
        if record is None or not state.instead:
            return ""
        return f"fallback {record.registered_name} version {record.version} runs: {state.instead}"

    @property
    def reason(self) -> str:
        """Why it is not available, or what is wrong, for people."""
        return self._reason

    def status(self) -> dict[str, object]:
        """This model's entry in the status document."""
        record, seat = self._active, self._seat
        return {
            "name": self.name,
            "uri": self._state.desired or self._loading.settings.uri,
            "version": record.version if record else None,
            "digest": record.digest if record else None,
            "flavor": seat.loaded.flavor if seat else None,
            "state": str(self._serving),
            "reason": self._reason
            or "; ".join(filter(None, (self.instead, self.gate_report, self.memory_report))),
        }

    def versions(self) -> dict[str, object]:
        """The other versions that the state knows."""
        state = self._state
        return {
            "previous": state.previous,
            "candidate": state.candidate,
            "pinned": state.pinned,
            "quarantined": dict(state.quarantined),
        }

    # --- What the state says ---------------------------------------------------------------------------

    def _change(self, change: Callable[[ModelState], ModelState]) -> None:
        self._remember(self._store.change_state(self.name, change))

    def _remember(self, state: ModelState) -> None:
        """Keeps what the disk says, so that status and every prompt need not read it."""
        self._state = state
        self._active = self._store.record(self.name, state.active) if state.active else None

    def _record(self, key: str) -> VersionRecord:
        record = self._store.record(self.name, key)
        if record is None:
            raise StoreError(
                f"version {key} of {self.name} is not in the cache", remedy="see `edge-agent models list`"
            )
        return record

    def _refuse(self, key: str, error: EdgeAgentError) -> None:
        """Notes why a candidate failed, and raises it.

        Only what the candidate itself did is held against it. A kill, a full disk or a busy lock may have had
        another cause: then it is tried again, a bounded number of times. What this host lacks may come.
        """
        reason = str(error)
        if self._closed or isinstance(error, MemoryShort | CannotRun):
            self._change(lambda state: state.given_up())
        elif isinstance(error, GateFailed | LoadFailed | RunnerCrashed | PolicyError):
            self._change(lambda state: state.refused(key, reason))
        log.warning("candidate refused model=%s version=%s reason=%r", self.name, key, reason)
        raise error

    # --- Seats -----------------------------------------------------------------------------------------

    def _take_seat(self) -> _Seat | None:
        with self._changed:
            if self._closed or self._exchanging or self._giving_up:
                return None
            if self._seat is not None and self._seat.runner.alive:
                self._leases += 1
                return self._seat
            if self._leases:  # it died under the prompts that run: they have to be given back first
                return None
            dead, self._seat = self._seat, None
            if dead is None and time.monotonic() < self._retry_at_s:
                return None
        if dead is not None:  # it died while nobody used it: no prompt is to blame
            log.warning("idle runner died model=%s version=%s", self.name, dead.record.key)
            dead.runner.kill()
        seat = self._load_active()
        if seat is None or self._install(seat):
            return seat
        seat.runner.stop()
        return None

    def _install(self, seat: _Seat) -> bool:
        """Gives a freshly loaded version the seat, unless it was closed or taken meanwhile."""
        with self._changed:
            if self._closed or self._exchanging or self._seat is not None:
                return False
            self._seat, self._leases = seat, 1
            self._serving, self._reason = Serving.READY, ""
            self._changed.notify_all()
            return True

    def _give_back(self, seat: _Seat) -> None:
        self._note_peak(seat)
        with self._changed:
            self._leases -= 1
            self._used_at_s = time.monotonic()
            if not seat.runner.alive and self._seat is seat:
                log.warning(
                    "runner died model=%s version=%s output=%r",
                    self.name, seat.record.key, seat.runner.last_output(),
                )  # fmt: skip
                self._seat = None
                self._serving, self._reason = Serving.LOADING, "the runner died and is started again"
            self._changed.notify_all()
        if self._giving_up:  # another model waits for the memory
            self.give_up_memory()

    def _vacate(self) -> None:
        """Between two prompts, stops the runner and keeps the seat empty until `_resume`."""
        with self._changed:
            self._exchanging = True
            self._changed.wait_for(lambda: not self._leases)
            seat, self._seat = self._seat, None
            if self._active is not None:
                self._serving = Serving.LOADING
        if seat is not None:
            seat.runner.stop()

    def _resume(self) -> None:
        with self._changed:
            self._exchanging = False
            self._changed.notify_all()

    def _exchange(self, seat: _Seat, instead: str) -> None:
        """Between two prompts: the state says the new version, its runner takes the seat, the old one stops.

        The caller lets prompts in again with `_resume`.
        """
        with self._changed:
            self._exchanging = True
            self._changed.wait_for(lambda: not self._leases)
        try:
            self._change(lambda state: state.switched(seat.record.key, instead=instead))
            with self._changed:
                leaving, self._seat = (seat, None) if self._closed else (self._seat, seat)
                self._serving, self._reason = Serving.READY, ""
                self._failures, self._retry_at_s = 0, 0.0
                self._crashes.clear()
        except BaseException:
            seat.runner.kill()
            raise
        log.info("version active model=%s version=%s", self.name, seat.record.key)
        if leaving is not None:
            leaving.runner.stop()

    # --- Loading and the gate --------------------------------------------------------------------------

    def _load_active(self) -> _Seat | None:
        """Loads the active version; notes why not and when to try again, or steps back to the previous one."""
        record = self._active
        if record is None:
            if self._serving is not Serving.LOADING or not self._operating.locked():
                self._set_unseated(None, Serving.ABSENT, self._reason or "no version is in the cache")
            return None
        self._set_unseated(record, Serving.LOADING, self._reason)
        try:
            seat = self._load(record)
        except EdgeAgentError as error:
            if self._set_unseated(record, Serving.LOADING, str(error)):
                self._on_load_failure(record, error)
            return None
        self._failures = 0
        return seat

    def _on_load_failure(self, record: VersionRecord, error: EdgeAgentError) -> None:
        reason = str(error)
        log.warning("load failed model=%s version=%s reason=%r", self.name, record.key, reason)
        self._failures += 1
        self._retry_at_s = time.monotonic() + min(RETRY_LAST_S, RETRY_FIRST_S * 2 ** (self._failures - 1))
        try:
            if isinstance(error, VerificationError):
                self._set_damage_aside(record)
            if isinstance(error, MemoryShort):
                stepped = False  # another version would not help, or it would be the wrong one to keep
            elif isinstance(error, VerificationError | PolicyError | CannotRun):
                stepped = self._step_back(record, None, because=reason)
            else:
                stepped = self._failures >= MAX_LOAD_FAILURES and self._step_back(
                    record, reason, because=reason
                )
        except EdgeAgentError as trouble:
            log.error("step back failed model=%s reason=%r", self.name, str(trouble))
            stepped = False
        if not stepped:
            for_good = VerificationError | PolicyError | CannotRun
            last = self._failures >= MAX_LOAD_FAILURES or isinstance(error, for_good)
            self._set_unseated(record, Serving.FAILED if last else Serving.LOADING, reason)

    def _set_damage_aside(self, record: VersionRecord) -> None:
        """So that the next sync fetches the damaged blobs, and only them."""
        found = fsck.verify(self._store, [record])
        with self._store.lock():
            fsck.set_aside(self._store, found.damaged)

    def _step_back(self, record: VersionRecord, quarantine: str | None, *, because: str) -> bool:
        """Makes the previous version active, or one of the fallback, if there is one that may run.

        The seat is empty.
        """
        state = self._state
        previous = self._store.record(self.name, state.previous) if state.previous else None
        if previous is None or previous.key in state.quarantined:
            previous = self.cached_fallback()
        if state.active != record.key or previous is None or previous.key == record.key:
            return False
        to, instead = previous.key, _reason_of(previous, because)
        self._change(lambda current: current.stepped_back(quarantine, to=to, instead=instead))
        log.warning(
            "rolled back model=%s from=%s to=%s reason=%r", self.name, record.key, previous.key, because
        )
        self._failures, self._retry_at_s = 0, 0.0
        self._crashes.clear()
        self._set_unseated(previous, Serving.LOADING, f"rolled back from version {record.version}: {because}")
        return True

    def _note_crash(self, seat: _Seat, suspects: frozenset[bytes]) -> None:
        """Several distinct prompts that a version's runner failed on roll it back; one poison prompt does not."""
        now_s = time.monotonic()
        self._crashes.append((now_s, suspects))
        distinct = _distinct(known for at_s, known in self._crashes if now_s - at_s <= CRASH_WINDOW_S)
        if distinct < MAX_CRASHES:
            return
        reason = f"its runner failed on {distinct} different prompts within {CRASH_WINDOW_S / 60:.0f} minutes"
        try:
            self._step_back(seat.record, reason, because=reason)
        except EdgeAgentError as error:
            log.error("step back failed model=%s reason=%r", self.name, str(error))

    def _load(self, record: VersionRecord) -> _Seat:
        """Checks a version's bytes and loads them in a new runner.

        Raises:
            EdgeAgentError: damaged, or it does not load; no runner is left.
        """
        self._hold_to_policy(record)
        wanted_tokens = self._loading.settings.context_tokens
        with (
            self._store.lease(record) as folder,
            self._loading.budget.admit(self, record, folder, wanted_tokens) as admission,
        ):
            candidates = self._loading.threads.candidates(record.digest)
            seat = self._start(record, folder, admission, candidates[0])
            if len(candidates) > 1 and seat.loaded.flavor.startswith(THREADED_FLAVOR):
                seat = self._choose_threads(seat, folder, admission, candidates)
            self.memory_report = admission.warning
        return seat

    def _choose_threads(
        self, seat: _Seat, folder: Path, admission: Admission, candidates: Sequence[int]
    ) -> _Seat:
        """Measures a version that is new on this host with each number of threads, one after the other, so
        that memory holds it once; the fastest stays."""
        rates: dict[int, float] = {}
        record = seat.record
        for threads in candidates:
            if rates:
                seat.runner.stop()
                seat = self._start(record, folder, admission, threads)
            rates[threads] = self._measure(seat)
        best = self._loading.threads.choose(record.digest, rates)
        if best != threads:
            seat.runner.stop()
            seat = self._start(record, folder, admission, best)
        return seat

    def _measure(self, seat: _Seat) -> float:
        with self._kept_while_starting(seat.runner):
            try:
                return measure(seat.runner, signature=seat.loaded.signature)
            except PromptError as error:  # too slow, or no room for a prompt: then nothing is learned
                log.warning("speed not measured model=%s reason=%r", self.name, str(error))
                return 0.0

    def _start(self, record: VersionRecord, folder: Path, admission: Admission, threads: int) -> _Seat:
        """One runner with the version loaded. Its bytes are checked while it imports its libraries.

        Raises:
            EdgeAgentError: damaged, or it does not load; no runner is left.
        """
        started_s = time.monotonic()
        runner = self._start_runner()
        with self._kept_while_starting(runner):
            try:
                for file in record.files:
                    check_file(folder / file.path, file, read=self._loading.verify)
                loaded = runner.load(
                    Load(
                        folder=str(folder),
                        context_tokens=admission.context_tokens,
                        max_tokens=self._loading.settings.max_tokens,
                        threads=threads,
                        parallel=self._loading.parallel,
                        kv_bytes=min(self._loading.kv_bytes, admission.spare_bytes),
                    ),
                    timeout_s=LOAD_TIMEOUT_S,
                )
            except RunnerError:
                if not self._closed:
                    log.warning("runner output model=%s output=%r", self.name, runner.last_output())
                raise
        log.info(
            "model loaded model=%s version=%s flavor=%r pid=%d threads=%d load_ms=%.0f",
            self.name, record.key, loaded.flavor, runner.pid, threads, (time.monotonic() - started_s) * 1000,
        )  # fmt: skip
        return _Seat(runner=runner, record=record, loaded=loaded, context_tokens=admission.context_tokens)

    @contextmanager
    def _kept_while_starting(self, runner: RunnerProcess) -> Iterator[None]:
        """`close` finds the runner though no seat has it yet; it is dead when the block fails."""
        with self._changed:
            self._starting.add(runner)
            closed = self._closed
        try:
            if closed:
                raise RunnerError("the agent is stopping")
            yield
        except BaseException:
            runner.kill()
            raise
        finally:
            with self._changed:
                self._starting.discard(runner)

    def _hold_to_policy(self, record: VersionRecord) -> None:
        """Settings may have become stricter since the version was let in.

        Raises:
            PolicyError: it may not run any more.
        """
        loading = self._loading
        if not trust.still_holds(
            record.trust, public_keys=loading.public_keys, allow_unsigned_code=loading.allow_unsigned_code
        ):
            raise PolicyError(
                f"version {record.version} was let in as {record.trust.reason!r}, which [trust] no longer allows",
                remedy="publish it signed, or change [trust] in the settings",
            )

    def _gate(self, seat: _Seat) -> None:
        """Golden prompts must be right; speed and memory are reported.

        Raises:
            EdgeAgentError: a golden prompt failed, or the candidate died or took too long; its runner is gone.
        """
        with self._kept_while_starting(seat.runner):
            tried = seat.runner.try_out(timeout_s=GATE_TIMEOUT_S)
            if tried.failures:
                raise GateFailed("; ".join(tried.failures[:3]))
        self._note_peak(seat)
        shortfalls = []
        least, limit_bytes = self._loading.settings.min_tokens_per_s, self._loading.memory_limit_bytes
        if least and tried.tokens_per_s < least:
            shortfalls.append(f"{tried.tokens_per_s:.1f} tokens/s, {least:g} are wanted")
        if limit_bytes and tried.memory_bytes > limit_bytes:
            shortfalls.append(f"{tried.memory_bytes} bytes of memory, {limit_bytes} are allowed")
        self.gate_report = "; ".join(shortfalls)
        if shortfalls:
            log.warning("gate model=%s version=%s %s", self.name, seat.record.key, self.gate_report)

    def _fits_beside(self, record: VersionRecord) -> bool:
        """Whether memory is likely to hold a second model while the first goes on answering."""
        folder, tokens = self._store.folder(record), self._loading.settings.context_tokens
        return self._loading.budget.fits_beside(record, folder, tokens)

    def _note_peak(self, seat: _Seat) -> None:
        """What the next load of this version should expect; of the runner's whole life so far."""
        peak = peak_bytes(seat.runner.pid) if seat.runner.alive else 0
        if peak > seat.peak_bytes * _PEAK_GROWTH:
            seat.peak_bytes = peak
            self._loading.budget.note_peak(seat.record, context_tokens=seat.context_tokens, peak_bytes=peak)

    def _set_unseated(self, record: VersionRecord | None, serving: Serving, reason: str) -> bool:
        """Notes what became of loading `record`, unless another version has been seated or chosen meanwhile."""
        with self._changed:
            if self._closed or self._exchanging or self._seat is not None or self._active != record:
                return False
            self._serving, self._reason = serving, reason
            self._changed.notify_all()
            return True


def lifecycles_of(settings: Settings, store: Store) -> dict[str, ModelLifecycle]:
    """The lifecycles of all configured models; they share one memory budget."""
    budget = MemoryBudget(settings.inference.memory_limit_bytes, learned=Learned(store.learned_file))
    return {name: lifecycle_of(settings, name, store, budget) for name in settings.models}


def _reason_of(record: VersionRecord, reason: str) -> str:
    """What the state says beside an active version: why it is one of the fallback; nothing for its own."""
    return (reason or "it was chosen on this device") if record.fallback else ""


def _distinct(crashes: Iterable[frozenset[bytes]]) -> int:
    """How many different prompts are to blame at least, where each crash names those that may be its cause."""
    explained: set[bytes] = set()
    count = 0
    for suspects in sorted(crashes, key=len):
        if explained.isdisjoint(suspects):
            explained |= suspects
            count += 1
    return count


def lifecycle_of(
    settings: Settings, name: str, store: Store, budget: MemoryBudget | None = None
) -> ModelLifecycle:
    """The lifecycle of one configured model, with runners as the settings want them.

    Args:
        budget: shared with other models; None for one of its own.
    """
    learned = Learned(store.learned_file)
    return ModelLifecycle(
        name,
        loading=Loading(
            settings=settings.models[name],
            threads=ThreadChoice(settings.inference.threads, learned=learned),
            budget=budget or MemoryBudget(settings.inference.memory_limit_bytes, learned=learned),
            parallel=settings.inference.parallel,
            kv_bytes=settings.inference.kv_bytes,
            verify=settings.cache.verify_on_load,
            public_keys=settings.trust.public_keys,
            allow_unsigned_code=settings.trust.allow_unsigned_code,
            memory_limit_bytes=settings.inference.memory_limit_bytes,
        ),
        store=store,
        start_runner=lambda: RunnerProcess(model=name, environment=environment(settings.state_dir)),
    )


def quarantined(lifecycles: Mapping[str, ModelLifecycle]) -> Iterator[tuple[str, str, str]]:
    """(model, key, reason) of everything in quarantine."""
    for name, lifecycle in lifecycles.items():
        for key, reason in lifecycle.state.quarantined.items():
            yield name, key, reason
