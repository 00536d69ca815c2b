"""One configured model's life on this device: absent → loading → ready, and from one version to the next.

Decides which version answers. Flow of a change: the candidate is written to the state → its runner starts beside
the active one (or in its place, where memory holds one only) → the gate → between two prompts the runners are
exchanged and the state is switched with one rename → the old runner stops. A candidate that fails leaves the
active version alone and is quarantined. An active version that does not load, or whose runner crashes on several
prompts, gives way to the previous one, or to the fallback.

Its parts: `standing.py` (what the disk says), `loading.py` (from bytes to a runner), `verdicts.py` (the rules:
what a candidate must show, and what counts against a version), `seat.py` (whose runner answers now).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from edge_agent.cache import fsck
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError, MemoryShort, Quarantined, StoreError, VerificationError
from edge_agent.host import identity
from edge_agent.host.memory import resident_bytes
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.serving import verdicts
from edge_agent.serving.learned import Learned
from edge_agent.serving.loading import LoadedVersion, Loading, VersionLoader
from edge_agent.serving.memory_budget import MemoryBudget
from edge_agent.serving.seat import Lease, Seat, Serving, Vacancy
from edge_agent.serving.standing import Standing
from edge_agent.serving.threads import ThreadChoice
from edge_agent.serving.verdicts import (
    Crashes,
    GateFailed,
    LoadFailures,
    UnmetRequirement,
    UnmetRequirements,
)
from edge_agent.settings import Settings

log = logging.getLogger(__name__)


class ModelLifecycle:
    """One model of the settings.

    Its dispatcher's thread loads and leases; the updates' thread brings candidates; operators act from
    control threads, one at a time; status is read by any. All of them meet at the seat.

    Args:
        name: the settings' name.
        start_runner: makes a runner process that has not loaded anything yet.

    Attributes:
        gate_report: what the last gate measured that fell short without being an error, empty when nothing did.
    """

    def __init__(
        self, name: str, *, loading: Loading, store: Store, start_runner: Callable[[], RunnerProcess]
    ) -> None:
        self.name = name
        self.gate_report = ""
        self._loading = loading
        self._store = store
        self._standing = Standing(store, name)
        self._loader = VersionLoader(self, loading=loading, store=store, start_runner=start_runner)
        self._seat = Seat(Serving.ABSENT)
        if self._standing.active is not None:
            self._seat.serving = Serving.LOADING if loading.settings.preload else Serving.IDLE
        self._operating = threading.Lock()
        self._unmet = UnmetRequirements()
        self._failures = LoadFailures()
        self._crashes = Crashes()
        loading.budget.join(self)

    # --- Prompts: the dispatcher's thread --------------------------------------------------------------

    @contextmanager
    def lease(self) -> Iterator[Lease | None]:
        """A loaded runner for one prompt, or None when there is none now. Loads the active version if needed.

        A runner that died inside the block is taken away; the next lease starts another.
        """
        version = self._take()
        if version is None:
            yield None
            return
        blamed: list[frozenset[bytes]] = []
        try:
            yield Lease(
                runner=version.runner,
                record=version.record,
                flavor=version.told.flavor,
                parallel=version.told.parallel,
                blame=blamed.append,
            )
        finally:
            self._give_back(version)
            for digests in blamed:
                self._note_crash(version, digests)

    def _take(self) -> LoadedVersion | None:
        taken = self._seat.take()
        if not isinstance(taken, Vacancy):
            return taken
        if taken.dead is not None:  # it died while nobody used it: no prompt is to blame
            log.warning("idle runner died model=%s version=%s", self.name, taken.dead.record.key)
            taken.dead.runner.kill()
        elif time.monotonic() < self._failures.retry_at_s:
            return None
        version = self._load_active()
        if version is None or self._seat.fill(version):
            return version
        version.runner.stop()
        return None

    def _give_back(self, version: LoadedVersion) -> None:
        self._loader.note_peak(version)
        if self._seat.give_back(version):
            how = version.runner.epitaph()
            log.warning("runner died model=%s version=%s how=%r", self.name, version.record.key, how)
        if self._seat.leaving:  # another model waits for the memory
            self.give_up_memory()

    def wait_for_change(self, timeout_s: float) -> None:
        """Returns when a version came or went, or after `timeout_s`."""
        self._seat.wait_for_change(timeout_s)

    def settled(self) -> bool:
        """True when a `preload` model is loaded, or cannot be: READY does not wait for it any longer."""
        return self.serving is not Serving.LOADING

    def wanted_now(self) -> bool:
        """True when the active version should be loaded, and is not, though no prompt waits."""
        version = self._seat.loaded
        loaded = version is not None and version.runner.alive
        return self._loading.settings.preload and self.serving is not Serving.IDLE and not loaded

    # --- Candidate → gate → active: the updates' thread and operators ----------------------------------

    def adopt(self, key: str, *, force: bool = False, asked_for: bool = False, instead: str = "") -> None:
        """Makes a committed version the active one, if it passes the gate.

        Args:
            force: an operator wants it: quarantine does not hold it back.
            asked_for: an operator wants to know: what this host lacked is looked for again.
            instead: why it is one of the fallback, where it is.

        Raises:
            EdgeAgentError: it does not pass; the active version goes on.
        """
        with self._operating:
            record = self._standing.record(key)
            instead = _reason_of(record, instead or self.state.instead)
            if self.state.active == key and self.serving is not Serving.FAILED:
                if instead != self.state.instead:
                    self._standing.change(lambda state: replace(state, instead=instead))
                self._standing.note_served()
                return
            if not force:
                self.refuse_quarantined(key)
            attainable_bytes = self._loading.budget.attainable_bytes()
            if not (force or asked_for):
                self._hold_off(key, attainable_bytes)
            self._standing.change(lambda state: state.trying(key))
            if self.state.candidate_tries > verdicts.MAX_TRIES and not force:
                self._refuse(
                    key,
                    GateFailed(f"it was tried {verdicts.MAX_TRIES} times and never came through the gate"),
                )
            log.info("candidate starts model=%s version=%s", self.name, key)
            if (
                self._standing.active is None
            ):  # prompts wait for it instead of being told that there is nothing
                self._note(None, Serving.LOADING, f"version {record.version} is being loaded")
            try:
                self._make_way(record)
                version = self._loader.load(record)
                self._gate(version)
                self._exchange(version, instead)
            except EdgeAgentError as error:
                if self._standing.active is None:
                    self._seat.open()
                    self._note(None, Serving.ABSENT, f"version {record.version} failed: {error}")
                elif verdicts.caused_by_host(error):
                    self._note_unmet(record, error, attainable_bytes)
                self._refuse(key, error)
            finally:
                self._seat.open()
            self._standing.note_served()

    def _hold_off(self, key: str, attainable_bytes: int) -> None:
        """Raises what the last attempt ended with, where this host is still what it was then."""
        error = self._unmet.error_expected(key, host=identity.of_host(), attainable_bytes=attainable_bytes)
        if error is not None and self.state.active not in (None, key):
            raise error

    def _note_unmet(self, record: VersionRecord, error: EdgeAgentError, before_bytes: int) -> None:
        """So that the active version does not stop for the same candidate at each poll."""
        wanted_bytes = 0
        if isinstance(error, MemoryShort):
            wanted_bytes = verdicts.memory_for_another_attempt(
                record.total_bytes,
                before_bytes=before_bytes,
                after_bytes=self._loading.budget.attainable_bytes(),
            )
        self._unmet.add(
            record.key, UnmetRequirement(error=error, host=identity.of_host(), wanted_bytes=wanted_bytes)
        )

    def _make_way(self, record: VersionRecord) -> None:
        """Stops the active version first where memory cannot hold both."""
        if self.state.active in (None, record.key) or self._loader.fits_beside(record):
            return
        self._loading.budget.check_weights(record)
        log.info("memory holds one model only: the active one stops first model=%s", self.name)
        self._vacate()

    def _gate(self, version: LoadedVersion) -> None:
        """Golden prompts must be right; speed and memory are reported.

        Raises:
            EdgeAgentError: a golden prompt failed, or the candidate died or took too long; its runner is gone.
        """
        with self._loader.in_reach(version.runner):
            tried = version.runner.try_out(timeout_s=verdicts.GATE_TIMEOUT_S)
            verdicts.check_golden(tried)
        self._loader.note_peak(version)
        self.gate_report = verdicts.shortfalls(
            tried,
            min_tokens_per_s=self._loading.settings.min_tokens_per_s,
            memory_limit_bytes=self._loading.memory_limit_bytes,
        )
        if self.gate_report:
            log.warning("gate model=%s version=%s %s", self.name, version.record.key, self.gate_report)

    def _exchange(self, version: LoadedVersion, instead: str) -> None:
        """Between two prompts: the state says the new version, its runner takes the seat, the old one stops.

        The caller opens the seat again.
        """
        self._seat.drain()
        try:
            self._standing.change(lambda state: state.switched(version.record.key, instead=instead))
            leaving = self._seat.swap(version)
            self._failures.clear()
            self._crashes.clear()
        except BaseException:
            version.runner.kill()
            raise
        log.info("version active model=%s version=%s", self.name, version.record.key)
        if leaving is not None:
            leaving.runner.stop()

    def _refuse(self, key: str, error: EdgeAgentError) -> None:
        """Notes why a candidate failed, and raises it."""
        reason = str(error)
        if self._seat.closed or verdicts.caused_by_host(error):
            self._standing.change(lambda state: state.given_up())
        elif verdicts.caused_by_candidate(error):
            self._standing.change(lambda state: state.refused(key, reason))
        log.warning("candidate refused model=%s version=%s reason=%r", self.name, key, reason)
        raise error

    def _vacate(self) -> None:
        """Between two prompts, stops the runner and keeps the seat empty until it is opened."""
        self._seat.drain()
        leaving = self._seat.empty(comes_back=self._standing.active is not None)
        if leaving is not None:
            leaving.runner.stop()

    def refuse_quarantined(self, key: str) -> None:
        """
        Raises:
            Quarantined: the version failed before, and why.
        """
        if key in self.state.quarantined:
            raise Quarantined(f"version {key} is in quarantine: {self.state.quarantined[key]}")

    def catch_up(self) -> None:
        """Takes up what is on disk already: a candidate that an earlier daemon did not get to try, or, where
        nothing is active, the newest version. Needs no registry.

        Raises:
            EdgeAgentError: it does not pass the gate.
        """
        if key := self._standing.untried():
            self.adopt(key)

    # --- Active → rollback, quarantine -----------------------------------------------------------------

    def _load_active(self) -> LoadedVersion | None:
        """Loads the active version; notes why not and when to try again, or steps back to the previous one."""
        record = self._standing.active
        if record is None:
            if self.serving is not Serving.LOADING or not self._operating.locked():
                self._note(None, Serving.ABSENT, self.reason or "no version is in the cache")
            return None
        self._note(record, Serving.LOADING, self.reason)
        try:
            version = self._loader.load(record)
        except EdgeAgentError as error:
            if self._note(record, Serving.LOADING, str(error)):
                self._on_load_failure(record, error)
            return None
        self._failures.clear()
        return version

    def _on_load_failure(self, record: VersionRecord, error: EdgeAgentError) -> None:
        reason = str(error)
        log.warning("load failed model=%s version=%s reason=%r", self.name, record.key, reason)
        self._failures.add(time.monotonic())
        verdict = verdicts.on_load_failure(error, self._failures.count)
        stepped = False
        try:
            if isinstance(error, VerificationError):
                self._set_damage_aside(record)
            if verdict.step_back:
                stepped = self._step_back(record, reason if verdict.quarantine else None, because=reason)
        except EdgeAgentError as trouble:
            log.error("step back failed model=%s reason=%r", self.name, str(trouble))
        if not stepped:
            self._note(record, Serving.FAILED if verdict.final else Serving.LOADING, reason)

    def _set_damage_aside(self, record: VersionRecord) -> None:
        """So that the next sync fetches the damaged blobs, and only them."""
        found = fsck.verify(self._store, [record])
        with self._store.lock():
            fsck.set_aside(self._store, found.damaged)

    def _note_crash(self, version: LoadedVersion, suspects: frozenset[bytes]) -> None:
        """Several distinct prompts that a version's runner failed on roll it back; one poison prompt does not."""
        distinct = self._crashes.add(suspects, time.monotonic())
        if distinct < verdicts.MAX_CRASHES:
            return
        minutes = verdicts.CRASH_WINDOW_S / 60
        reason = f"its runner failed on {distinct} different prompts within {minutes:.0f} minutes"
        try:
            self._step_back(version.record, reason, because=reason)
        except EdgeAgentError as error:
            log.error("step back failed model=%s reason=%r", self.name, str(error))

    def _step_back(self, record: VersionRecord, quarantine: str | None, *, because: str) -> bool:
        """Makes the previous version active, or one of the fallback, if there is one that may run.

        The seat is empty.
        """
        previous = self._standing.successor()
        if self.state.active != record.key or previous is None or previous.key == record.key:
            return False
        to, instead = previous.key, _reason_of(previous, because)
        self._standing.change(lambda current: current.stepped_back(quarantine, to=to, instead=instead))
        log.warning(
            "rolled back model=%s from=%s to=%s reason=%r", self.name, record.key, previous.key, because
        )
        self._failures.clear()
        self._crashes.clear()
        self._note(previous, Serving.LOADING, f"rolled back from version {record.version}: {because}")
        return True

    def _note(self, record: VersionRecord | None, serving: Serving, reason: str) -> bool:
        """Notes what became of loading `record`, unless another version has been seated or chosen meanwhile."""
        return self._seat.note(serving, reason, still=lambda: self._standing.active == record)

    def go_back(self) -> str:
        """An operator's rollback: the previous version becomes active again, and is pinned. Gives its key.

        Raises:
            EdgeAgentError: there is none, or it does not pass the gate.
        """
        key = self.state.previous
        if key is None:
            raise StoreError(f"model {self.name} has no previous version to go back to")
        self.adopt(key, force=True)
        self.pin(key)
        return key

    def set_aside(self, key: str, reason: str) -> None:
        """A version of the model's own failed while the fallback answers: it is not tried again."""
        if key not in self.state.quarantined:
            self._standing.change(lambda state: state.refused(key, reason))

    # --- What else is written down of versions ---------------------------------------------------------

    def cached_fallback(self) -> VersionRecord | None:
        """The newest version of the fallback that is here and may be tried."""
        return self._standing.fallback()

    def pin(self, key: str | None) -> None:
        """Fixes the version that runs, whatever the registry says; None lets it follow again."""
        if key is not None:
            self._standing.record(key)
        self._standing.change(lambda state: replace(state, pinned=key))

    def set_desired(self, uri: str) -> None:
        """Notes what MQTT asks for; empty for nothing."""
        if uri != self.state.desired:
            self._standing.change(lambda state: replace(state, desired=uri))

    def forget(self, key: str) -> None:
        """A version was removed from the cache."""
        self._standing.change(lambda state: state.without(key))

    # --- Stopping the runner ---------------------------------------------------------------------------

    def unload_when_idle(self) -> None:
        """Stops a runner that nobody has used for `idle_unload_s`; the dispatcher asks between prompts."""
        limit_s = self._loading.settings.idle_unload_s
        if limit_s and self._seat.idle_s(time.monotonic()) >= limit_s and self.give_up_memory():
            log.info("unloaded when idle model=%s", self.name)

    def give_up_memory(self) -> bool:
        """Stops the runner: now, when nobody uses it, else after the running prompt. The next one loads it again.

        Returns:
            True when it was stopped.
        """
        leaving = self._seat.give_up()
        if leaving is None:
            return False
        self._loader.note_peak(leaving)
        leaving.runner.stop()
        return True

    def last_used_s(self) -> float:
        """Monotonic seconds."""
        return self._seat.used_at_s

    def resident_bytes(self) -> int:
        """What this model's runners have in memory now."""
        runners = set(self._loader.starting())  # before the seat: a runner goes from there to here
        if (version := self._seat.loaded) is not None:
            runners.add(version.runner)
        return sum(resident_bytes(runner.pid) for runner in runners)

    def reload(self) -> None:
        """Stops the runner between two prompts; the next one loads the files that are there now."""
        with self._operating:
            try:
                self._vacate()
            finally:
                self._failures.clear()
                self._seat.open()

    def close(self) -> None:
        """Stops the runners; nothing is loaded any more."""
        leaving = self._seat.close()
        self._loading.budget.leave(self)
        self._loader.close()
        if leaving is not None:
            leaving.runner.stop()

    # --- For everybody ---------------------------------------------------------------------------------

    @property
    def state(self) -> ModelState:
        """What `state.json` says of this model."""
        return self._standing.state

    @property
    def serving(self) -> Serving:
        return self._seat.serving

    @property
    def reason(self) -> str:
        """Why it is not available, or what is wrong, for people."""
        return self._seat.reason

    @property
    def available(self) -> bool:
        """True when prompts may be accepted: a version is here, and it has not failed for good."""
        return self.serving in (Serving.READY, Serving.LOADING, Serving.IDLE)

    @property
    def flavor(self) -> str | None:
        """What runs the loaded version, None while none is loaded."""
        version = self._seat.loaded
        return version.told.flavor if version else None

    @property
    def runs_its_own(self) -> bool:
        """True while a version of the model's own reference is active, and has not failed for good."""
        active = self._standing.active
        return active is not None and not active.fallback and self.serving is not Serving.FAILED

    @property
    def instead(self) -> str:
        """Which fallback runs and why, for people; empty where the model's own version does."""
        record, state = self._standing.active, self.state
        if record is None or not state.instead:
            return ""
        return f"fallback {record.registered_name} version {record.version} runs: {state.instead}"

    def status(self) -> dict[str, object]:
        """This model's entry in the status document."""
        record = self._standing.active
        return {
            "name": self.name,
            "uri": self.state.desired or self._loading.settings.uri,
            "version": record.version if record else None,
            "digest": record.digest if record else None,
            "flavor": self.flavor,
            "state": str(self.serving),
            "reason": self.reason
            or "; ".join(filter(None, (self.instead, self.gate_report, self._loader.memory_report))),
        }

    def versions(self) -> dict[str, object]:
        """The other versions that the state knows."""
        state = self.state
        return {
            "previous": state.previous,
            "candidate": state.candidate,
            "pinned": state.pinned,
            "quarantined": dict(state.quarantined),
        }


def lifecycles_of(settings: Settings, store: Store) -> dict[str, ModelLifecycle]:
    """The lifecycles of all configured models; they share one memory budget."""
    budget = budget_of(settings, store)
    return {name: lifecycle_of(settings, name, store, budget) for name in settings.models}


def budget_of(settings: Settings, store: Store) -> MemoryBudget:
    """What the runners of this process may take together."""
    return MemoryBudget(settings.inference.memory_limit_bytes, learned=Learned(store.learned_file))


def lifecycle_of(settings: Settings, name: str, store: Store, budget: MemoryBudget) -> ModelLifecycle:
    """The lifecycle of one configured model, with runners as the settings want them.

    Args:
        budget: shared with the other models.
    """
    return ModelLifecycle(
        name,
        loading=Loading(
            settings=settings.models[name],
            threads=ThreadChoice(settings.inference.threads, learned=Learned(store.learned_file)),
            budget=budget,
            parallel=settings.inference.parallel,
            kv_bytes=settings.inference.kv_bytes,
            verify=settings.cache.verify_on_load,
            public_keys=settings.trust.public_keys,
            allow_unsigned_code=settings.trust.allow_unsigned_code,
            memory_limit_bytes=settings.inference.memory_limit_bytes,
        ),
        store=store,
        start_runner=lambda: RunnerProcess(model=name, environment=child_environment(settings.state_dir)),
    )


def _reason_of(record: VersionRecord, reason: str) -> str:
    """What the state says beside an active version: why it is one of the fallback; nothing for its own."""
    return (reason or "it was chosen on this device") if record.fallback else ""
