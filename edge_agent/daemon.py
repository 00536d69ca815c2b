"""The daemon: builds the parts, starts them in order, supervises them, stops them.

Owns the main thread and the list of all others. Refuses to go on half alive: when a thread ends that should not, the
daemon ends with 1 and systemd starts a whole one.

    cache and journal → runners load → READY → broker and registry → step, step, … → drain → journal closed

A step comes often while something goes on, and seldom while nothing does: a device may live from a battery.

READY waits for no connection to anything: a device boots without a network. Where the models load for long, the broker
comes before READY: the status is `starting` then, and prompts that come wait in the queue.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from edge_agent import environment
from edge_agent.cache.locks import Lock
from edge_agent.cache.store import Store
from edge_agent.chat import clock, messages
from edge_agent.chat.dispatcher import Dispatcher, Outlet
from edge_agent.chat.fairness import owner_names
from edge_agent.chat.intake import Intake
from edge_agent.chat.journal import Journal
from edge_agent.chat.prompt import Source
from edge_agent.chat.wake import Wake
from edge_agent.device_metrics import DeviceMetrics
from edge_agent.device_status import DeviceStatus, StatusPublisher
from edge_agent.errors import DaemonRunning, JournalUnavailable, ModelFailed, StoreError, disk_remedy
from edge_agent.host.confinement import hide_memory
from edge_agent.host.memory import ReportedMemory, share_one_heap
from edge_agent.host.thread_name import name_this_thread
from edge_agent.metrics.measurements import Measurements
from edge_agent.runner import protocol
from edge_agent.sd_notify import Notifier
from edge_agent.serving.lifecycle import budget_of, lifecycles_of
from edge_agent.settings import Settings
from edge_agent.topics import Topics
from edge_agent.transport.control import ControlServer, request_bytes
from edge_agent.transport.control_prompts import ControlPrompts
from edge_agent.transport.control_requests import control_operations
from edge_agent.transport.credentials import read_password
from edge_agent.transport.inbound import Handler
from edge_agent.transport.mqtt import MqttTransport
from edge_agent.transport.plan_requests import PlanRequests
from edge_agent.transport.requests import Requests
from edge_agent.updates.desired import DesiredState, SyncRequests
from edge_agent.updates.operations import Operations, run_operation
from edge_agent.updates.plans import Plans
from edge_agent.updates.updates import Updates

log = logging.getLogger(__name__)

STEP_S, REST_S = 0.2, 3.0
"""From one step to the next, while something goes on, and while nothing does. A prompt that comes ends a rest, so that
its deadline is not missed by one, and so does a check of the registry, so that its steps are seen."""
PRUNE_INTERVAL_S = 60.0
SLOW_START_S = 10.0
"""Whoever loads longer than this says so to the broker. Others call nobody before they are ready."""
NETWORK_THREAD_STALE_S = 300.0
"""A dead name server and a broker with several addresses may take minutes to fail."""


class Daemon:
    """Everything that runs on one device. Built and run by the main thread.

    Args:
        settings: checked.
        notifier: the service manager, or nobody.

    Raises:
        EdgeAgentError: a part cannot be built (settings, cache folder, journal, control socket).
    """

    def __init__(self, settings: Settings, notifier: Notifier) -> None:
        self._settings = settings
        self._notifier = notifier
        self._stopping = self._rests = False
        self._wake = Wake()
        self._threads: list[threading.Thread] = []
        self._topics = Topics(
            prefix=settings.mqtt.prefix,
            device_id=settings.device_id,
            reply_prefixes=settings.mqtt.reply_prefixes,
        )
        self._store = Store(settings.state_dir)
        self._store.create()
        self._lock = _only_daemon(settings.state_dir)
        rebuilt = self._store.state().rebuilt
        self._journal = Journal(settings.state_dir / "journal.db", moment=clock.now())
        budget = budget_of(settings, self._store)
        self._lifecycles = lifecycles_of(settings, self._store, budget)
        self._measurements = Measurements(settings.models)
        self._gateway_memory = ReportedMemory()
        self._updates = Updates(
            settings,
            self._store,
            self._lifecycles,
            unattended=environment.is_a_service(),
            on_turn=self._end_rest,
            measurements=self._measurements,
        )
        self._plans = Plans(
            settings,
            self._store,
            self._lifecycles,
            link=self._updates.link,
            attainable_bytes=budget.attainable_bytes,
            note_registry=self._updates.heard.note_registry,
        )
        operations = Operations(settings, self._store, self._lifecycles, self._updates)
        self._desired = DesiredState(
            {name: model.ref for name, model in settings.models.items()}, self._updates.desire
        )
        self._status = DeviceStatus(
            settings,
            store=self._store,
            journal=self._journal,
            lifecycles=self._lifecycles,
            updates=self._updates,
            desired=self._desired,
            rebuilt=rebuilt,
            tokens_per_s=lambda name: self._dispatchers[name].tokens_per_s,
            broker_troubles=lambda: self._mqtt.troubles(),
        )
        self._prompts = ControlPrompts(
            self._journal,
            flavor_of=lambda name: self._lifecycles[name].flavor,
            max_payload_bytes=settings.limits.payload_bytes,
        )
        handlers: dict[str, Handler] = {}
        self._mqtt = self._make_mqtt(handlers)
        self._outlets: dict[Source, Outlet] = {Source.MQTT: self._mqtt, Source.CONTROL: self._prompts}
        self._dispatchers = {name: self._make_dispatcher(name) for name in settings.models}
        self._intake = self._make_intake()
        self._requests = self._make_requests()
        plan_requests = PlanRequests(topics=self._topics, replies=self._mqtt, ask=self._plans.ask)
        # They need the transport, which brings them the messages.
        handlers.update({**self._requests.handlers(), self._topics.plan: plan_requests.on_plan})
        measured = self._make_metrics()
        self._control = ControlServer(
            settings.control_socket,
            control_operations(
                prompts=self._prompts,
                intake=self._intake,
                status=lambda: self._status.full(broker=self._mqtt.status()),
                headline=self._status.document,
                metrics=measured.document,
                recent=measured.recent,
                run_operation=partial(run_operation, operations),
                note_refusal=self._measurements.note_refusal,
                note_gateway=self._gateway_memory.note,
            ),
            max_request_bytes=request_bytes(settings.limits.payload_bytes),
        )
        self._publisher = StatusPublisher(
            self._status,
            topics=self._topics,
            outlet=self._mqtt,
            notifier=notifier,
            metrics=measured.document,
            discovery_prefix=settings.homeassistant.prefix if settings.homeassistant.discovery else None,
        )
        self._prune_at_s = 0.0

    def run(self) -> int:
        """Runs until SIGTERM or SIGINT. Returns the process's exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._start("control", self._control.run)
        for name, dispatcher in self._dispatchers.items():
            self._start(f"dispatcher-{name}", dispatcher.run)
        self._await_models()
        code = 0
        if (dead := self._dead_thread(time.monotonic())) is not None:
            log.critical("thread ended code=internal name=%s", dead)
            code = 1
        elif not self._stopping:
            self._status.ready = True
            self._notifier.ready(self._status.headline())
            log.info("started device=%s models=%d", self._settings.device_id, len(self._lifecycles))
            self._connect()
            self._start("updates", self._updates.run)
            self._start("plans", self._plans.run)
            code = self._supervise()
        self._shut_down()
        return code

    def step(self, now_s: float) -> bool:
        """One turn of the main thread. True while something goes on: the next one should come soon.

        Args:
            now_s: monotonic seconds.
        """
        with contextlib.suppress(JournalUnavailable):  # it is in the status
            self._journal.mend()
            self._intake.expire(clock.now())
            if now_s >= self._prune_at_s:
                self._prune_at_s = now_s + PRUNE_INTERVAL_S
                self._journal.prune(moment=clock.now(), ttl_s=self._settings.mqtt.answer_ttl_s)
        return self._publisher.step(now_s) or self._updates.works

    # --- Start, watch, stop ----------------------------------------------------------------------------

    def _start(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=_logged(name, target), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _connect(self) -> None:
        """Starts the way to the broker, once."""
        if "mqtt" not in (thread.name for thread in self._threads):
            self._start("mqtt", self._mqtt.run)

    def _await_models(self) -> None:
        """READY waits until each preloaded model is loaded, or has failed to."""
        slow_s = time.monotonic() + SLOW_START_S
        while not self._stopping and not all(life.settled() for life in self._lifecycles.values()):
            self._notifier.extend_timeout(30)
            self._notifier.watchdog(time.monotonic())
            if self._dead_thread(time.monotonic()) is not None:
                return
            self.step(time.monotonic())
            if time.monotonic() > slow_s:
                self._connect()
            self._wake.wait(STEP_S)

    def _supervise(self) -> int:
        while not self._stopping:
            now_s = time.monotonic()
            self._rests = True  # what comes from here on is not lost
            self._rests = not self.step(now_s)
            dead = self._dead_thread(now_s)
            if dead is not None:
                log.critical("thread ended code=internal name=%s", dead)
                return 1
            self._notifier.watchdog(now_s)
            self._wake.wait(REST_S if self._rests else STEP_S)
        return 0

    def _on_signal(self, *_: object) -> None:
        self._stopping = True
        self._wake.set()

    def _end_rest(self) -> None:
        """From any thread: something begins that the main thread has to look after."""
        if self._rests:
            self._wake.set()

    def _dead_thread(self, now_s: float) -> str | None:
        for thread in self._threads:
            if not thread.is_alive():
                return thread.name
        stalled = self._status.ready and now_s - self._mqtt.turned_s > NETWORK_THREAD_STALE_S
        return "mqtt (stalled)" if stalled else None

    def _shut_down(self) -> None:
        drain_s = self._settings.inference.drain_s
        self._notifier.stopping("draining")
        self._notifier.extend_timeout(drain_s + 15)
        log.info("stopping drain_s=%.0f", drain_s)
        self._mqtt.stop_accepting()
        self._updates.close()
        self._plans.close()
        self._control.close()
        limit_s = time.monotonic() + drain_s
        for dispatcher in self._dispatchers.values():
            dispatcher.stop_claiming()
        for dispatcher in self._dispatchers.values():
            dispatcher.drain(max(0.0, limit_s - time.monotonic()))
        self._publisher.say_offline()
        self._mqtt.close()
        for lifecycle in self._lifecycles.values():
            lifecycle.close()
        for thread in self._threads:
            thread.join(5)
        self._journal.close()
        log.info("stopped")

    # --- Parts -----------------------------------------------------------------------------------------

    def _make_mqtt(self, handlers: dict[str, Handler]) -> MqttTransport:
        settings = self._settings.mqtt

        def password() -> str | None:
            return read_password(settings, environment.credential_path("mqtt-password"))

        password()  # a missing file is known at the start
        return MqttTransport(
            settings,
            topics=self._topics,
            journal=self._journal,
            max_payload_bytes=self._settings.limits.payload_bytes,
            password=password,
            handlers=handlers,
            will=lambda: messages.encode(self._status.offline()),
        )

    def _make_dispatcher(self, name: str) -> Dispatcher:
        return Dispatcher(
            name,
            host=self._lifecycles[name],
            journal=self._journal,
            outlets=self._outlets,
            defaults=lambda document: protocol.with_system(document, self._settings.models[name].system),
            owner_of=(lambda _: "") if self._settings.inference.share_prefixes else owner_names(),
            now=clock.now,
            measurements=self._measurements,
        )

    def _make_intake(self) -> Intake:
        return Intake(
            self._journal,
            models=dict(self._lifecycles),
            workers=dict(self._dispatchers),
            queue_depth=self._settings.limits.queue_depth,
            deadline_s=self._settings.limits.deadline_s,
            max_deadline_s=self._settings.limits.max_deadline_s,
            on_answer=lambda source, row: self._outlets[source].answered(row),
            on_accepted=self._end_rest,
            measurements=self._measurements,
        )

    def _make_requests(self) -> Requests:
        return Requests(
            topics=self._topics,
            intake=self._intake,
            replies=self._mqtt,
            max_payload_bytes=self._settings.limits.payload_bytes,
            check_updates=SyncRequests(self._updates.check_now).take,
            desire=self._desired.take,
            now=clock.now,
            note_refusal=self._measurements.note_refusal,
        )

    def _make_metrics(self) -> DeviceMetrics:
        for model in self._journal.given_up:
            self._measurements.note_answer(model, ModelFailed.code)
        return DeviceMetrics(
            self._settings,
            self._measurements,
            store=self._store,
            journal=self._journal,
            lifecycles=self._lifecycles,
            updates=self._updates,
            status=self._status.document,
            connected=lambda: self._mqtt.connected,
            gateway_bytes=self._gateway_memory.resident_bytes,
            counters=self._mqtt.counters,
        )


def _only_daemon(state_dir: Path) -> Lock:
    """Takes the state directory for this process; the kernel lets go when it ends.

    Raises:
        DaemonRunning: another daemon has it. It must be known before the journal is opened: opening takes up
            again what a dead daemon left, and that one is not dead.
        StoreError: the lock cannot be opened.
    """
    path = state_dir / "daemon.lock"
    try:
        lock = Lock(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreError(
            f"lock {path} cannot be opened: {error.strerror}",
            remedy=disk_remedy(error) or "give the user that runs the daemon its files back with chown",
        ) from error
    if not lock.try_exclusive():
        lock.close()
        raise DaemonRunning(
            f"another daemon works in {state_dir}", remedy="stop it first, or give this one another state_dir"
        )
    return lock


def _logged(name: str, target: Callable[[], None]) -> Callable[[], None]:
    """A thread's top: what ends it is logged; the main thread sees that it ended."""

    def run() -> None:
        name_this_thread(name)
        try:
            target()
        except Exception:
            log.exception("thread failed code=internal name=%s", name)

    return run


def run(settings: Settings) -> int:
    """Builds and runs the daemon of these settings. Returns the process's exit code."""
    hide_memory()  # it has credentials, and everybody's prompts
    share_one_heap()
    address, watchdog_interval_s = environment.service_manager()
    return Daemon(settings, Notifier(address, watchdog_interval_s)).run()
