"""One configured model's life on this device: absent → loading → ready, and from one version to the next.

Gives prompts the runner that answers now, loads the active version when it is needed, and unloads it when memory is.
Which version is active changes in two ways: a candidate passes the gate (`adoption.py`), or the active version fails
and another takes its place (`rollback.py`).

The other parts: `standing.py` (what the disk says), `loading.py` (from bytes to a runner), `verdicts.py` (what a
version must show, and what counts against it), `seat.py` (whose runner answers now), `runner.py` (what a runner is).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from edge_agent.cache.attempt import Attempt, Fault
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError
from edge_agent.host import identity
from edge_agent.runner.process import RunnerProcess, child_environment
from edge_agent.serving.adoption import Adoption
from edge_agent.serving.learned import Learned
from edge_agent.serving.loading import LoadedVersion, Loading, VersionLoader
from edge_agent.serving.memory_budget import MemoryBudget
from edge_agent.serving.rollback import Rollback
from edge_agent.serving.runner import StartRunner
from edge_agent.serving.seat import DIED, EmptySeat, Lease, Seat, Serving
from edge_agent.serving.standing import VersionStates
from edge_agent.serving.threads import ThreadChoice
from edge_agent.settings import Settings

log = logging.getLogger(__name__)


class ModelLifecycle:
    """One model of the settings.

    Its dispatcher's thread loads and leases; the updates' thread brings candidates; operators act from control
    threads, one at a time; any thread reads the status. All of them meet at the seat.

    Args:
        name: the settings' name.
        clock: monotonic seconds.
        host: names this host as `host.identity.of_host` does.
    """

    def __init__(
        self,
        name: str,
        *,
        loading: Loading,
        store: Store,
        start_runner: StartRunner,
        clock: Callable[[], float] = time.monotonic,
        host: Callable[[], str] = identity.of_host,
    ) -> None:
        self.name = name
        self._loading = loading
        self._states = states = VersionStates(store, name)
        comes_back_as = Serving.LOADING if loading.settings.preload else Serving.IDLE
        initially = Serving.ABSENT if states.active is None else comes_back_as
        self._seat = seat = Seat(initially, comes_back_as=comes_back_as, clock=clock)
        self._loader = VersionLoader(
            self, loading=loading, store=store, start_runner=start_runner, clock=clock
        )
        self._rollback = Rollback(name, store=store, seat=seat, states=states, clock=clock)
        self._adoption = Adoption(
            name,
            loading=loading,
            loader=self._loader,
            seat=seat,
            states=states,
            rollback=self._rollback,
            host=host,
        )
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
        crashes: list[frozenset[bytes]] = []
        try:
            yield Lease(
                runner=version.runner,
                record=version.record,
                flavor=version.reported.flavor,
                parallel=version.reported.parallel,
                system_refused=version.system_refused,
                report_crash=crashes.append,
            )
        finally:
            self._give_back(version)
            for suspects in crashes:
                self._rollback.on_crash(version.record, suspects)

    def _take(self) -> LoadedVersion | None:
        taken = self._seat.take()
        if not isinstance(taken, EmptySeat):
            return taken
        if taken.dead is not None:  # it died while nobody used it, so no prompt can be the cause
            key = taken.dead.record.key
            log.warning("idle runner died model=%s version=%s code=runner_failed", self.name, key)
            taken.dead.runner.kill()
            self._seat.note(self._seat.comes_back_as, DIED, still=lambda: True)
            self._rollback.on_idle_death()
        if self._rollback.waiting:
            return None
        version = self._load_active()
        if version is None or self._seat.fill(version):
            return version
        version.runner.stop()
        return None

    def _load_active(self) -> LoadedVersion | None:
        """Loads the active version. If there is none, or it does not load, says why."""
        record = self._states.active
        still_active = self._states.still_active(record)
        if record is None:
            # An adoption of the first version says itself what prompts wait for.
            if self.serving is not Serving.LOADING or not self._adoption.running:
                reason = self.reason or "no version is in the cache"
                self._seat.note(Serving.ABSENT, reason, still=still_active)
            return None
        self._seat.note(Serving.LOADING, self.reason, still=still_active)
        try:
            version = self._loader.load(record)
        except EdgeAgentError as error:
            self._rollback.on_load_failure(record, error)
            return None
        self._rollback.clear_load_failures()
        return version

    def _give_back(self, version: LoadedVersion) -> None:
        self._loader.note_peak(version)
        if self._seat.give_back(version):
            log.warning(
                "runner died model=%s version=%s code=runner_failed how=%r",
                self.name, version.record.key, version.runner.exit_text(),
            )  # fmt: skip
        if self._seat.unload_requested:  # another model waits for the memory
            self.give_up_memory()

    def wait_for_change(self, timeout_s: float) -> None:
        """Returns when a version came or went, or after `timeout_s`."""
        self._seat.wait_for_change(timeout_s)

    def settled(self) -> bool:
        """True when a `preload` model is loaded, or cannot be: READY does not wait for it any longer."""
        return self.serving is not Serving.LOADING

    def wanted_now(self) -> bool:
        """True when the active version should be loaded, and is not, although no prompt waits."""
        version = self._seat.loaded
        loaded = version is not None and version.runner.alive
        return self._loading.settings.preload and self.serving is not Serving.IDLE and not loaded

    # --- Changes: the updates' thread and operators ----------------------------------------------------
    def adopt(
        self,
        key: str,
        *,
        force: bool = False,
        asked_for: bool = False,
        instead: str = "",
        before_exchange: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes a committed version the active one, if it passes the gate; or the one that is pinned by then.

        Args:
            force: an operator wants it: neither quarantine nor a pin prevents it.
            asked_for: an operator wants to know: it is tried even if this host lacked something the last time.
            instead: why a version of the fallback is wanted, if it is one.
            before_exchange: asked once the gate is passed, where another version answers meanwhile; it may raise.

        Raises:
            ActivationHeld: `before_exchange` did.
            EdgeAgentError: it does not pass; the active version goes on.
        """
        self._adoption.adopt(
            key, force=force, asked_for=asked_for, instead=instead, before_exchange=before_exchange
        )

    def untried(self) -> str | None:
        """Key of what is on disk, and was not tried to the end, or waits for its time; see `VersionStates`."""
        return self._states.untried()

    def put_off(self, key: str | None) -> None:
        """A version may not take over yet; None: there is none any more. It is kept for the time when it may."""
        self._states.adjust(lambda state: state.waiting_for(key))

    def activate(self, key: str) -> None:
        """An operator's choice: a committed version becomes the active one, whatever is held against it, and is pinned.
        No other change comes between the two. Raises where it does not pass the gate."""
        self._adoption.activate(key)

    def go_back(self) -> str:
        """An operator's rollback: the previous version becomes active again, and is pinned. Gives its key. Raises where
        there is none, or where it does not pass the gate."""
        return self._adoption.go_back()

    def reload(self) -> None:
        """Stops the runner between two prompts. The next prompt loads the files that are there then."""
        self._adoption.reload()

    # --- What else is written about versions -----------------------------------------------------------

    def cached_fallback(self) -> VersionRecord | None:
        """The newest version of the fallback that is here and may be tried."""
        return self._states.fallback()

    def set_aside(self, key: str, error: EdgeAgentError) -> None:
        """A version of the model's own failed while the fallback answers: it is not tried again."""
        if key not in self.state.quarantined:
            self._states.change(lambda state: state.refused(key, Fault.of(error)))

    def note_attempt(self, attempt: Attempt) -> None:
        """A version was not brought here, and why."""
        self._states.note(attempt)

    def note_resolved(self, ref: str, version: int) -> None:
        """Writes down which version a reference means now."""
        self._states.adjust(lambda state: replace(state, resolved=(ref, version)))

    def pin(self, key: str | None) -> None:
        """Fixes the version that runs, whatever the registry says; None lets it follow again."""
        self._states.pin(key)

    def set_desired(self, uri: str) -> None:
        """Writes down what MQTT asks for; empty for nothing."""
        self._states.adjust(lambda state: replace(state, desired=uri))

    def forget(self, key: str) -> None:
        """A version was removed from the cache."""
        self._states.change(lambda state: state.without(key))

    def unload_when_idle(self) -> None:
        """Stops a runner that nobody has used for `idle_unload_s`; the dispatcher calls this between prompts."""
        limit_s = self._loading.settings.idle_unload_s
        if limit_s and self._seat.idle_s() >= limit_s and self.give_up_memory():
            log.info("unloaded when idle model=%s", self.name)

    def give_up_memory(self) -> bool:
        """Stops the runner now if nobody uses it (then True), else after the running prompts. The next prompt loads it
        again."""
        version = self._seat.unload()
        if version is None:
            return False
        self._loader.note_peak(version)
        version.runner.stop()
        return True

    def last_used_s(self) -> float:
        """Monotonic seconds."""
        return self._seat.used_at_s

    def resident_bytes(self) -> int:
        """What this model's runners have in memory now."""
        runners = set(self._loader.starting())  # before the seat: a runner moves from there to here
        if (version := self._seat.loaded) is not None:
            runners.add(version.runner)
        return sum(runner.resident_bytes() for runner in runners)

    def close(self) -> None:
        """Stops the runners, and loads nothing any more. A trial that this ends is written down."""
        version = self._seat.close()
        self._loading.budget.leave(self)
        self._loader.close()
        if version is not None:
            version.runner.stop()
        self._adoption.wait_for_end()

    # --- For everybody ---------------------------------------------------------------------------------

    @property
    def state(self) -> ModelState:
        """What `state.json` says of this model."""
        return self._states.state

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
        return version.reported.flavor if (version := self._seat.loaded) else None

    @property
    def runner_deaths(self) -> int:
        """How often its runner ended by itself, since the start."""
        return self._seat.deaths

    @property
    def system_refused(self) -> str:
        """Why prompts without a system prompt of their own get no answer, for people; empty while they do."""
        return self._loader.system_refused(record.key) if (record := self._states.active) else ""

    @property
    def unconfined(self) -> str:
        """Which wall is missing around a package's own code, for people; empty if none is."""
        return version.unconfined if (version := self._seat.loaded) else ""

    @property
    def runs_its_own(self) -> bool:
        """True while a version of the model's own reference is active, and has not failed for good."""
        active = self._states.active
        return active is not None and not active.fallback and self.serving is not Serving.FAILED

    @property
    def instead(self) -> str:
        """Which version of the fallback runs and why, for people; empty while the model's own does."""
        return self._states.fallback_in_use

    def status(self) -> dict[str, object]:
        """This model's entry in the status document."""
        record, version = self._states.active, self._seat.loaded
        reports = (self.instead, self._adoption.gate_report, self._loader.memory_report)
        return {
            "name": self.name,
            "uri": self.state.desired or self._loading.settings.uri,
            "version": record.version if record else None,
            "digest": record.digest if record else None,
            "flavor": self.flavor,
            "state": str(self.serving),
            "reason": self.reason or "; ".join(filter(None, reports)),
            "walls": version.walls if version else None,
        }


def lifecycles_of(settings: Settings, store: Store, budget: MemoryBudget) -> dict[str, ModelLifecycle]:
    """The lifecycles of all configured models.

    Args:
        budget: of memory, which they share.
    """
    return {name: lifecycle_of(settings, name, store, budget) for name in settings.models}


def budget_of(settings: Settings, store: Store) -> MemoryBudget:
    """What the runners of this process may take together."""
    return MemoryBudget(settings.inference.memory_limit_bytes, learned=Learned(store.learned_file))


def lifecycle_of(settings: Settings, name: str, store: Store, budget: MemoryBudget) -> ModelLifecycle:
    """The lifecycle of one configured model, with runners as the settings describe them.

    Args:
        budget: shared by all models.
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
            unconfined_code=settings.trust.unconfined_code,
            memory_limit_bytes=settings.inference.memory_limit_bytes,
        ),
        store=store,
        start_runner=lambda: RunnerProcess(model=name, environment=child_environment(settings.state_dir)),
    )
