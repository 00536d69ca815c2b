"""Keeps every model at the version that this device wants: which model is checked when, and for whom.

Owns the one thread that syncs: one model after the other, so that one fetch and one candidate at a time is all that
the device has to carry. Flow of a step: a new desired state is written down → each model is checked (`check.py`) → what
went wrong is noted. A registry that is out of reach is a normal day: it is asked again. Operators' threads come in
between: `turn.py` says who waits for whom.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from edge_agent.cache import fsck
from edge_agent.cache.fsck import Damage
from edge_agent.cache.store import Store
from edge_agent.errors import (
    ActivationHeld,
    EdgeAgentError,
    SyncStopped,
    TransportError,
    UnknownModel,
    VersionHeld,
)
from edge_agent.metrics.measurements import Measurements
from edge_agent.package.reference import ModelVersion
from edge_agent.settings import Settings
from edge_agent.sync import version_file
from edge_agent.sync.process import run_sync
from edge_agent.sync.protocol import SyncResult
from edge_agent.sync.tls import TlsFiles
from edge_agent.updates.arrivals import counting
from edge_agent.updates.check import Lifecycle, ModelCheck, Outlook
from edge_agent.updates.heard import Heard
from edge_agent.updates.link import Link
from edge_agent.updates.polls import GAP_S, Polls, place_of
from edge_agent.updates.repair import repair
from edge_agent.updates.syncs import Asked, OnEvent, RunSync, Watch
from edge_agent.updates.turn import Turn
from edge_agent.updates.waiting import Alarm

log = logging.getLogger(__name__)

SPREAD_S = 60.0
"""A fleet that waits for the same minute comes in the course of this."""
_WAIT_S = 1.0
_NOTE_AGAIN_S = 60.0


class Updates:
    """`run` is the thread; `check`, `take_in` and `repair` may be called from any, and wait for their turn.

    Args:
        lifecycles: by configured name.
        on_turn: called when `works` has changed.
        unattended: one of many devices, maybe, that have started in this moment, and nobody watches: see `polls.py`.
        clock: seconds since 1970.
        jitter: a number between two, drawn for each interval.
        measurements: where checks are counted; one of its own where nobody looks.

    Raises:
        SettingsError: a file of `[registry]` cannot be loaded.

    Attributes:
        heard: when the registry was asked last and what it was, and which versions wait.
        works: the thread asks the registry, or takes up what is here.
        problems: by model, why its last check brought nothing, empty when it was fine.
        link: when the line may be used, and when a version may take over.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        lifecycles: Mapping[str, Lifecycle],
        *,
        on_turn: Callable[[], None] = lambda: None,
        unattended: bool = False,
        run_sync: RunSync = run_sync,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[float, float], float] = random.uniform,
        measurements: Measurements | None = None,
    ) -> None:
        self.problems: dict[str, str] = {}
        self.works = False
        self._registry = settings.registry
        TlsFiles.of(settings.registry).check()
        TlsFiles(ca_file=settings.cache.mirror_ca_file).check(section="cache.mirror_")
        self.link = Link(settings.link, store, clock)
        self.heard = Heard(settings.registry.uri, store, clock)
        self._store = store
        self._lifecycles = lifecycles
        self._measurements = measurements or Measurements(lifecycles)
        self._checks = {
            name: ModelCheck(
                name,
                settings=settings,
                store=store,
                lifecycle=lifecycle,
                run_sync=counting(run_sync, self._measurements),
                heard=self.heard,
                link=self.link,
                gap_s=GAP_S if unattended else 0.0,
                clock=clock,
            )
            for name, lifecycle in lifecycles.items()
        }
        self._on_turn = on_turn
        self._clock = clock
        self._polls = Polls(
            settings.registry.poll_interval_s, place=place_of(settings.device_id), jitter=jitter
        )
        self._turn = Turn()
        self._due = threading.Event()
        self._closing = threading.Event()
        self._changed = threading.Event()  # what MQTT asks for: the running poll is for something else
        self._desired: Mapping[str, str] | None = None
        self._note_at_s = 0.0
        most_s = min(SPREAD_S, settings.registry.poll_interval_s)
        alarm = partial(Alarm, self.link.is_over, clock, spread_s=lambda: jitter(0.0, most_s))
        self._alarms = {name: alarm() for name in lifecycles}
        self._begun = False

    def run(self) -> None:
        """The thread: looks the cache over, then steps until it is closed."""
        try:
            if fsck.look_over(self._store):
                self._due.set()  # to be fetched again
        except EdgeAgentError as error:
            log.warning("cache not looked over code=%s reason=%r", error.code, str(error))
        while not self._closing.is_set():
            self.step(time.monotonic())
            self._due.wait(_WAIT_S)

    def step(self, now_s: float) -> None:
        """Checks all models when it is time for that, by `polls.py`, whenever it is told to, and when the time has come
        that one waits for.

        What is on disk already is taken up in the first step, and a desired state is written down in the next one: only
        the question to the registry may have to wait.

        Args:
            now_s: monotonic seconds.
        """
        for name, alarm in self._alarms.items():
            if alarm.rings(self._checks[name].waiting):
                self._due.set()
        self._note_desired(now_s)
        first, self._begun = not self._begun, True
        if first:
            served = all(life.runs_its_own for life in self._lifecycles.values())
            waits = any(check.has_put_off for check in self._checks.values())
            self._polls.begin(now_s, at_once=waits or not served)
        asks = self._polls.is_due(now_s) or self._due.is_set()
        if not (asks or first):
            return
        if asks:
            self._due.clear()
        self.works = True
        self._on_turn()
        try:
            failures = [
                self._poll(name, asks=asks) for name in self._lifecycles if not self._closing.is_set()
            ]
        finally:
            self.works = False
            self._on_turn()
        if asks:
            self._polls.ended(failed=any(failures))

    def desire(self, uris: Mapping[str, str], within_s: float = 0.0) -> None:
        """What MQTT asks for: by model `models:/…`, or empty. The thread writes it down, and then checks.

        It comes again with each connection to the broker: only what is new to a model is a reason to check, and ends
        the running poll.

        Args:
            within_s: in the course of how many seconds to check.
        """
        self._desired = dict(uris)
        if any(self._lifecycles[name].state.desired != uri for name, uri in uris.items()):
            self._changed.set()
            self.check_now(within_s)

    def check_now(self, within_s: float = 0.0) -> None:
        """Tells the thread to check all models.

        Args:
            within_s: in the course of how many seconds, by this device's id; 0 for at once.
        """
        if within_s:
            self._polls.ask_for(within_s)
        else:
            self._due.set()

    def outlook(self, name: str) -> Outlook:
        """What is to come of a model, for any thread."""
        return self._checks[name].outlook

    def close(self) -> None:
        """Ends `run`; a running sync is killed (the next one goes on from what it has)."""
        self._closing.set()
        self._due.set()

    def check(
        self,
        name: str,
        on_event: OnEvent = lambda event: None,
        *,
        asked_for: bool = False,
        allow_older: bool = False,
        now: bool = False,
    ) -> SyncResult:
        """Brings what one model wants from the registry, and makes it active unless another version is pinned.

        Args:
            asked_for: by an operator: a running poll gives way to it, and a version in quarantine is fetched, too, for
                `activate` to take.
            allow_older: he takes a signed package that is older than what was active, under a higher number.
            now: he does not wait for a window, nor for the next day's bytes.

        Raises:
            VersionHeld: it must wait; what exactly came as the event `waits`.
            EdgeAgentError: the registry, the package, the cache or the gate says no.
            SyncStopped: it is a poll, and something more urgent came.
        """
        with self._operators_turn("`models pull`", on_event) if asked_for else self._polls_turn(name):
            asked = Asked(by_operator=asked_for, allow_older=allow_older, now=now)
            with self._measurements.check(name) as failed:
                checked = self._checks[name].run(self._watch(on_event), asked)
                failed.code = checked.code
            self.problems[name] = checked.problem
            return checked.result

    def repair(self, damaged: Sequence[Damage], on_event: OnEvent = lambda event: None) -> Mapping[str, str]:
        """Sets damaged blobs aside, and fetches them again where there is a registry; see `repair.py`."""

        def fetch_again(name: str) -> None:
            self._checks[name].fetch_again(self._watch(lambda event: None))

        with self._operators_turn("`models verify`", on_event):
            problems = repair(
                self._store,
                damaged,
                self._lifecycles,
                fetch_again=fetch_again if self._registry.uri else None,
            )
        self.check_now()  # a version that gave way meanwhile may be whole again
        return problems

    def take_in(
        self,
        file: int,
        *,
        name: str | None = None,
        on_event: OnEvent = lambda event: None,
        allow_older: bool = False,
    ) -> SyncResult:
        """Brings the version that a version file has, and makes it active as one from the registry would be.

        A version is only kept in the cache where another one is pinned or asked for by its number.

        Args:
            file: descriptor of the version file, open for reading.
            name: which model takes it; needed where several follow the same registered model.
            allow_older: as for `check`.

        Raises:
            EdgeAgentError: the file, the package in it, the cache or the gate says no.
        """
        version = version_file.read_version(file)
        name = self._taker(version, name)
        with self._operators_turn("`models import`", on_event):
            return self._checks[name].take_in(self._watch(on_event), version, file, allow_older=allow_older)

    def _taker(self, version: ModelVersion, name: str | None) -> str:
        """The configured model that a version from a file is for."""
        takers = [one for one, check in self._checks.items() if check.follows(version.name)]
        if name is None and len(takers) == 1:
            return takers[0]
        if name in takers:
            return str(name)
        there = ", ".join(f"{one} ({check.wanted})" for one, check in self._checks.items()) or "none"
        raise UnknownModel(
            f"the file has version {version.version} of {version.name!r}, and "
            + (f"{name!r} follows another model" if name else f"{len(takers)} models here follow that")
            + f"; there are: {there}",
            remedy="choose with --model" if takers else "add a [models.NAME] table with that model's uri",
        )

    def _operators_turn(self, what: str, on_event: OnEvent) -> AbstractContextManager[None]:
        return self._turn.of_operator(
            what, on_wait=lambda before: on_event({"event": "waiting", "for": before})
        )

    def _polls_turn(self, name: str) -> AbstractContextManager[None]:
        return self._turn.of_poll(f"the check of {name}", should_stop=self._gives_way)

    def _watch(self, on_event: OnEvent) -> Watch:
        """For the one who has the turn: an operator's work is ended by nobody but the daemon's end."""
        should_stop = self._gives_way if self._turn.is_polls else self._closing.is_set
        return Watch(on_event=on_event, should_stop=should_stop)

    def _gives_way(self) -> bool:
        """Whether a poll ends now: for an operator, or for what MQTT asks for instead."""
        return self._closing.is_set() or self._turn.wanted or self._changed.is_set()

    def _note_desired(self, now_s: float) -> None:
        """Writes down what MQTT asks for. What the disk does not take is tried again, though not at each step."""
        if now_s < self._note_at_s and not (self._changed.is_set() or self._due.is_set()):
            return
        self._changed.clear()
        desired, self._desired = self._desired, None
        try:
            for name, uri in (desired or {}).items():
                self._lifecycles[name].set_desired(uri)
        except EdgeAgentError as error:
            log.warning("desired state not written down code=%s reason=%r", error.code, str(error))
            self._desired = self._desired or desired
            self._note_at_s = now_s + _NOTE_AGAIN_S

    def _poll(self, name: str, *, asks: bool) -> bool:
        """One model's part of a step. A pinned model asks nobody.

        Args:
            asks: the registry; else only what is here is taken up.

        Returns:
            True where the registry did not answer, or the line to it broke.
        """
        lifecycle = self._lifecycles[name]
        try:
            if pinned := lifecycle.state.pinned:
                lifecycle.adopt(pinned)
                self.problems[name] = ""
                return False
            try:
                self._checks[name].catch_up()
            except ActivationHeld:
                if not self._registry.uri:
                    raise
            except EdgeAgentError as error:  # the registry may have a version that does run
                if not self._registry.uri or self._closing.is_set():
                    raise
                log.warning("cached version refused code=%s model=%s reason=%r", error.code, name, str(error))
            if asks and self._registry.uri:
                self.check(name)
        except SyncStopped as stop:
            log.info("check put off code=%s model=%s reason=%r", stop.code, name, str(stop))
            if not self._changed.is_set():  # else it was said when to check
                self._due.set()
        except VersionHeld as error:  # `outlook` has it, but for why a fallback is fetched
            waiting, text = self._checks[name].waiting, str(error)
            self.problems[name] = "" if waiting and waiting.reason == text else text
        except EdgeAgentError as error:
            if self._closing.is_set():
                return False
            text = str(error)
            if self.problems.get(name) != text:
                log.warning("update failed model=%s code=%s reason=%r", name, error.code, text)
            self.problems[name] = text
            return isinstance(error, TransportError)
        return False
