"""From a candidate to the active version, and what else exchanges or stops the active runner on purpose.

Flow of `adopt`: quarantine and unmet requirements are checked → the candidate is written to the state → its runner
starts beside the active one (or in its place, if memory holds only one) → it answers its golden prompts → between
two prompts the state is switched with one rename and the runners are exchanged → the old runner stops. A candidate
that fails leaves the active version alone, and is quarantined if the failure was its own. A stop of the agent ends a
trial and is held against nobody.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from edge_agent.cache.attempt import Fault, Measured, Step
from edge_agent.cache.record import VersionRecord
from edge_agent.errors import (
    ActivationHeld,
    AgentStopping,
    EdgeAgentError,
    MemoryShort,
    StoreError,
    SyncStopped,
)
from edge_agent.serving import verdicts
from edge_agent.serving.loading import LoadedVersion, Loading, VersionLoader
from edge_agent.serving.rollback import Rollback
from edge_agent.serving.seat import Seat, Serving
from edge_agent.serving.standing import VersionStates, fallback_reason
from edge_agent.serving.verdicts import GateFailed, UnmetRequirement, UnmetRequirements

log = logging.getLogger(__name__)

_END_S = 10.0
_MOST_MEASURED = 1e9
"""A higher number was never measured: what a runner says of itself is input."""


class Adoption:
    """One model's. The updates' thread and operators' threads; one change at a time.

    Args:
        name: of the model, in the settings.
        rollback: counts the active version's failures, which an exchange clears.
        host: names this host as `host.identity.of_host` does.

    Attributes:
        gate_report: where the last candidate fell short without failing, empty when it did not.
    """

    def __init__(
        self,
        name: str,
        *,
        loading: Loading,
        loader: VersionLoader,
        seat: Seat,
        states: VersionStates,
        rollback: Rollback,
        host: Callable[[], str],
    ) -> None:
        self.gate_report = ""
        self._name = name
        self._loading = loading
        self._loader = loader
        self._seat = seat
        self._states = states
        self._rollback = rollback
        self._host = host
        self._operating = threading.Lock()
        self._unmet = UnmetRequirements()

    @property
    def running(self) -> bool:
        """True while a change is being made."""
        return self._operating.locked()

    def wait_for_end(self) -> None:
        """Returns when no change is being made: its runner is gone, and what becomes of it is on disk. The process may
        end after that, whichever thread made the change."""
        if self._operating.acquire(timeout=_END_S):
            self._operating.release()

    def adopt(
        self,
        key: str,
        *,
        force: bool,
        asked_for: bool,
        instead: str,
        before_exchange: Callable[[], None] = lambda: None,
    ) -> None:
        """See `ModelLifecycle.adopt`."""
        with self._operating:
            if not force:  # somebody may have pinned another one while this waited
                key = self._states.state.pinned or key
            self._adopt(
                key, force=force, asked_for=asked_for, instead=instead, before_exchange=before_exchange
            )

    def activate(self, key: str) -> None:
        """See `ModelLifecycle.activate`."""
        with self._operating:
            self._adopt(key, force=True)
            self._states.pin(key)

    def go_back(self) -> str:
        """See `ModelLifecycle.go_back`."""
        key = self._states.state.previous
        if key is None:
            raise StoreError(f"model {self._name} has no previous version to go back to")
        self.activate(key)
        return key

    def _adopt(
        self,
        key: str,
        *,
        force: bool,
        asked_for: bool = False,
        instead: str = "",
        before_exchange: Callable[[], None] = lambda: None,
    ) -> None:
        record = self._states.record(key)
        instead = fallback_reason(record, instead or self._states.state.instead)
        if self._states.state.active == key and self._seat.serving is not Serving.FAILED:
            if instead != self._states.state.instead:
                self._states.change(lambda state: replace(state, instead=instead))
            self._states.settle(record)
            self._states.note_served()
            return
        if not force:
            self._states.state.refuse_quarantined(key)
        attainable_bytes = self._loading.budget.attainable_bytes()
        if not (force or asked_for):
            self._refuse_unmet(key, attainable_bytes)
        self._states.begin(record, Step.GATE, lambda state: state.trying(key))
        if self._states.state.candidate_tries > verdicts.MAX_TRIES and not force:
            error = GateFailed(f"it was tried {verdicts.MAX_TRIES} times and never came through the gate")
            self._note_refusal(record, error)
            raise error
        log.info("candidate starts model=%s version=%s", self._name, key)
        try:
            self._try(record, instead, attainable_bytes, before_exchange)
        except (SyncStopped, KeyboardInterrupt, SystemExit):
            self._note_stop(record, goes_on=not (force or record.fallback))
            raise
        self._states.note_served()

    def reload(self) -> None:
        """Stops the runner between two prompts. The next prompt loads the files that are there then."""
        with self._operating:
            try:
                self._stop_active()
            finally:
                self._rollback.clear_load_failures()
                self._seat.open()

    def _try(
        self,
        record: VersionRecord,
        instead: str,
        attainable_bytes: int,
        before_exchange: Callable[[], None],
    ) -> None:
        """Loads the candidate and, if it passes the gate, exchanges the runners.

        Args:
            attainable_bytes: of memory, before the attempt.

        Raises:
            SyncStopped: the agent stops.
            EdgeAgentError: it does not load or pass; the active version goes on.
        """
        if (
            self._states.active is None
        ):  # prompts wait for it; otherwise they would be answered that there is no model
            self._note_no_active(Serving.LOADING, f"version {record.version} is being loaded")
        try:
            answers_meanwhile = self._make_room(record)
            version = self._loader.load(record)
            measured = self._pass_gate(version)
            if answers_meanwhile:
                self._check_time(version, before_exchange)
            self._exchange(version, measured, instead)
        except ActivationHeld:
            log.info(
                "candidate put off code=%s model=%s version=%s", ActivationHeld.code, self._name, record.key
            )
            raise
        except SyncStopped:
            raise
        except EdgeAgentError as error:
            if self._seat.closed:
                raise AgentStopping from error
            self._seat.open()
            if self._states.active is None:
                self._note_no_active(Serving.ABSENT, f"version {record.version} failed: {error}")
            elif verdicts.caused_by_host(error):
                self._note_unmet(record, error, attainable_bytes)
            is_fetched = verdicts.caused_by_damage(error) and self._rollback.set_damage_aside(record)
            self._note_refusal(record, error, says_nothing=is_fetched or verdicts.caused_by_host(error))
            raise
        finally:
            self._seat.open()

    def _make_room(self, record: VersionRecord) -> bool:
        """Stops the active version first if memory does not hold both. Says whether one goes on meanwhile."""
        if self._states.state.active in (None, record.key):
            return False
        if self._loader.fits_beside(record):
            return True
        self._loading.budget.check_weights(record)
        log.info("memory holds one model only: the active one stops first model=%s", self._name)
        self._stop_active()
        return False

    def _check_time(self, version: LoadedVersion, before_exchange: Callable[[], None]) -> None:
        """
        Raises:
            ActivationHeld: it may not take over now; its runner is gone.
        """
        try:
            before_exchange()
        except BaseException:
            version.runner.stop()
            raise

    def _pass_gate(self, version: LoadedVersion) -> Measured:
        """It must take the settings' system prompt and answer golden prompts right; speed and memory are reported.

        Raises:
            EdgeAgentError: it does not, or died or took too long; its runner is gone.
        """
        with self._loader.tracked(version.runner):
            too_long_here = version.reported.system_too_long and self._loader.memory_report
            if version.reported.signature == "chat" and not too_long_here:
                verdicts.check_system(version.system_refused, model=self._name)
            tried = version.runner.try_out(
                timeout_s=verdicts.GATE_TIMEOUT_S,
                on_prompt=lambda prompt, of: self._states.note_golden(version.record, prompt, of),
            )
            verdicts.check_golden(tried)
        self._loader.note_peak(version)
        self.gate_report = verdicts.shortfalls(
            tried,
            min_tokens_per_s=self._loading.settings.min_tokens_per_s,
            memory_limit_bytes=self._loading.memory_limit_bytes,
        )
        if self.gate_report:
            log.warning(
                "gate code=below_settings model=%s version=%s %s",
                self._name,
                version.record.key,
                self.gate_report,
            )
        return Measured(
            load_ms=round(min(version.reported.load_ms, _MOST_MEASURED)),
            tokens_per_s=round(min(tried.tokens_per_s, _MOST_MEASURED), 2),
            passed=tried.asked,
            of=tried.asked,
        )

    def _exchange(self, version: LoadedVersion, measured: Measured, instead: str) -> None:
        """Between two prompts, switches the state to the new version, seats its runner and stops the old one.

        The caller opens the seat again.
        """
        record = version.record
        self._states.begin(record, Step.ACTIVATE)
        try:
            self._seat.drain()
            self._states.begin(
                record,
                Step.ACTIVE,
                lambda state: state.switched(record.key, measured=measured, instead=instead),
            )
            former = self._seat.swap(version)
            self._rollback.clear()
        except BaseException:
            version.runner.kill()
            raise
        log.info("version active model=%s version=%s", self._name, record.key)
        if former is not None:
            former.runner.stop()

    def _stop_active(self) -> None:
        """Between two prompts, stops the runner. The seat stays drained until it is opened."""
        self._seat.drain()
        former = self._seat.empty(comes_back=self._states.active is not None)
        if former is not None:
            former.runner.stop()

    def _refuse_unmet(self, key: str, attainable_bytes: int) -> None:
        """Raises the error of the last attempt if this host still lacks what it lacked then."""
        error = self._unmet.error_expected(key, host=self._host(), attainable_bytes=attainable_bytes)
        if error is not None and self._states.state.active not in (None, key):
            raise error

    def _note_unmet(self, record: VersionRecord, error: EdgeAgentError, before_bytes: int) -> None:
        """Remembers what this host lacks, so that the active version does not stop at each poll for nothing."""
        wanted_bytes = 0
        if isinstance(error, MemoryShort):
            wanted_bytes = verdicts.memory_for_another_attempt(
                record.total_bytes,
                before_bytes=before_bytes,
                after_bytes=self._loading.budget.attainable_bytes(),
            )
        self._unmet.add(
            record.key, UnmetRequirement(error=error, host=self._host(), wanted_bytes=wanted_bytes)
        )

    def _note_no_active(self, serving: Serving, reason: str) -> None:
        self._seat.note(serving, reason, still=self._states.still_active(None))

    def _note_stop(self, record: VersionRecord, *, goes_on: bool) -> None:
        """Writes down that a trial was ended by a stop.

        Args:
            goes_on: the next start tries the version again: not the fallback, nor what an operator asked for by its
                number.
        """
        key = record.key
        self._states.change(lambda state: state.interrupted(key) if goes_on else state.given_up())
        log.info("trial stopped code=%s model=%s version=%s", SyncStopped.code, self._name, key)

    def _note_refusal(
        self, record: VersionRecord, error: EdgeAgentError, *, says_nothing: bool = False
    ) -> None:
        """Writes down that a candidate failed, and why if that was its own doing.

        Args:
            says_nothing: of the candidate: the host lacked something, or the damaged files are fetched again.
        """
        fault = Fault.of(error)
        if says_nothing:
            self._states.fail(record, fault.code, lambda state: state.given_up())
        elif verdicts.caused_by_candidate(error):
            self._states.fail(record, fault.code, lambda state: state.refused(record.key, fault))
        else:
            self._states.fail(record, fault.code)
        log.warning(
            "candidate refused code=%s model=%s version=%s reason=%r",
            fault.code,
            self._name,
            record.key,
            fault.reason,
        )
