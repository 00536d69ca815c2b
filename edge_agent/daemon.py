"""The daemon: builds the parts, starts them in order, watches them, stops them.

Owns the main thread and the list of all others. Refuses to go on half alive: when a thread ends that should
not, the daemon ends with 1 and systemd starts a whole one.

    cache and journal → runners load → READY → broker and registry → step, step, … → drain → journal closed

No connection to anything is tried before READY: a device boots without a network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent import environment
from edge_agent.cache.locks import Lock
from edge_agent.cache.store import Store
from edge_agent.chat import clock, messages
from edge_agent.chat.dispatcher import Dispatcher, Outlet
from edge_agent.chat.fields import ID_PATTERN
from edge_agent.chat.intake import Intake, identity, make_id
from edge_agent.chat.journal import Journal
from edge_agent.chat.prompt import Answer, Source
from edge_agent.device_status import DeviceStatus
from edge_agent.errors import (
    BadRequest,
    DaemonRunning,
    JournalUnavailable,
    ModelFailed,
    PromptError,
    StoreError,
    UnknownModel,
)
from edge_agent.sd_notify import Notifier
from edge_agent.serving.lifecycle import lifecycles_of
from edge_agent.settings import Settings
from edge_agent.topics import Topics
from edge_agent.transport.control import Call, ControlServer
from edge_agent.transport.control_prompts import Probes
from edge_agent.transport.credentials import read_password
from edge_agent.transport.inbound import Inbound
from edge_agent.transport.mqtt import MqttTransport
from edge_agent.updates import choice
from edge_agent.updates.operations import Operations, run_operation
from edge_agent.updates.updates import Updates

log = logging.getLogger(__name__)

STEP_S = 0.2
STATUS_INTERVAL_S = 30.0
PROGRESS_INTERVAL_S = 2.0
METRICS_INTERVAL_S = 60.0
PRUNE_INTERVAL_S = 60.0
NETWORK_THREAD_STALE_S = 300.0
"""A name server that is dead and a broker with several addresses may take minutes to fail."""
MAX_CORRELATION_BYTES = 64
MAX_CANCEL_BYTES = 4096


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
        self._stop = threading.Event()
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
        self._lifecycles = lifecycles_of(settings, self._store)
        self._updates = Updates(settings, self._store, self._lifecycles)
        self._operations = Operations(settings, self._store, self._lifecycles, self._updates)
        self._status = DeviceStatus(
            settings,
            store=self._store,
            journal=self._journal,
            lifecycles=self._lifecycles,
            updates=self._updates,
            rebuilt=rebuilt,
            tokens_per_s=lambda name: self._dispatchers[name].tokens_per_s,
        )
        self._probes = Probes(self._journal, flavor_of=lambda name: self._lifecycles[name].flavor)
        self._mqtt = self._make_mqtt()
        self._dispatchers = {name: self._make_dispatcher(name) for name in settings.models}
        self._intake = Intake(
            self._journal,
            models=dict(self._lifecycles),
            workers=dict(self._dispatchers),
            queue_depth=settings.limits.queue_depth,
            deadline_s=settings.limits.deadline_s,
            on_answer=lambda source, row: self._outlets[source].answered(row),
        )
        self._control = ControlServer(
            settings.control_socket,
            {"probe": self._on_probe, "status": self._on_status, "models": self._on_models},
        )
        self._published = self._published_reported = ""
        self._status_at_s = self._reported_at_s = self._metrics_at_s = self._prune_at_s = 0.0

    def run(self) -> int:
        """Runs until SIGTERM or SIGINT. Returns the process's exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        self._start("control", self._control.run)
        for name, dispatcher in self._dispatchers.items():
            self._start(f"dispatcher-{name}", dispatcher.run)
        self._await_models()
        code = 0
        if (dead := self._dead_thread(time.monotonic())) is not None:
            log.critical("thread ended name=%s", dead)
            code = 1
        elif not self._stop.is_set():
            self._status.ready = True
            self._notifier.ready(self._status.headline())
            log.info("started device=%s models=%d", self._settings.device_id, len(self._lifecycles))
            self._start("mqtt", self._mqtt.run)
            self._start("updates", self._updates.run)
            code = self._supervise()
        self._shut_down()
        return code

    def step(self, now_s: float) -> None:
        """One turn of the main thread.

        Args:
            now_s: monotonic seconds.
        """
        with contextlib.suppress(JournalUnavailable):  # it is in the status
            self._journal.mend()
            self._intake.expire(clock.now())
            if now_s >= self._prune_at_s:
                self._prune_at_s = now_s + PRUNE_INTERVAL_S
                self._journal.prune(moment=clock.now(), ttl_s=self._settings.mqtt.answer_ttl_s)
        self._publish_status(now_s)
        if now_s >= self._metrics_at_s:
            self._metrics_at_s = now_s + METRICS_INTERVAL_S
            self._mqtt.set_metrics(messages.encode(self._metrics()))

    # --- Start, watch, stop ----------------------------------------------------------------------------

    def _start(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=_logged(name, target), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _await_models(self) -> None:
        """READY waits until each preloaded model is loaded, or has failed to."""
        while not self._stop.is_set() and not all(life.settled() for life in self._lifecycles.values()):
            self._notifier.extend_timeout(30)
            self._notifier.watchdog(time.monotonic())
            if self._dead_thread(time.monotonic()) is not None:
                return
            with contextlib.suppress(JournalUnavailable):
                self._intake.expire(clock.now())
            self._stop.wait(STEP_S)

    def _supervise(self) -> int:
        while not self._stop.wait(STEP_S):
            now_s = time.monotonic()
            self.step(now_s)
            dead = self._dead_thread(now_s)
            if dead is not None:
                log.critical("thread ended name=%s", dead)
                return 1
            self._notifier.watchdog(now_s)
        return 0

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
        self._control.close()
        limit_s = time.monotonic() + drain_s
        for dispatcher in self._dispatchers.values():
            dispatcher.stop_claiming()
        for dispatcher in self._dispatchers.values():
            dispatcher.drain(max(0.0, limit_s - time.monotonic()))
        self._mqtt.set_retained(self._topics.status, messages.encode(self._status.document("offline")))
        self._mqtt.close()
        for lifecycle in self._lifecycles.values():
            lifecycle.close()
        for thread in self._threads:
            thread.join(5)
        self._journal.close()
        log.info("stopped")

    # --- Parts -----------------------------------------------------------------------------------------

    def _make_mqtt(self) -> MqttTransport:
        settings, topics = self._settings.mqtt, self._topics
        read_password(
            settings, environment.credential_path("mqtt-password")
        )  # a missing file is known at start
        return MqttTransport(
            settings,
            topics=topics,
            journal=self._journal,
            max_payload_bytes=self._settings.limits.payload_bytes,
            password=lambda: read_password(settings, environment.credential_path("mqtt-password")),
            handlers={
                topics.chat: self._on_chat,
                topics.cancel: self._on_cancel,
                topics.sync: self._on_sync,
                topics.desired: self._on_desired,
            },
            will=messages.encode(self._status.document("offline")),
        )

    def _make_dispatcher(self, name: str) -> Dispatcher:
        return Dispatcher(
            name,
            host=self._lifecycles[name],
            journal=self._journal,
            outlets=self._outlets,
            defaults=lambda document: messages.with_system(document, self._settings.models[name].system),
            now=clock.now,
        )

    @property
    def _outlets(self) -> dict[Source, Outlet]:
        return {Source.MQTT: self._mqtt, Source.CONTROL: self._probes}

    # --- MQTT messages, in the network thread ----------------------------------------------------------

    def _on_chat(self, message: Inbound) -> None:
        """A prompt: committed, repeated, or refused with an answer that says why."""
        if message.retained:
            self._mqtt.counters["retained_requests"] += 1
            log.warning("retained request dropped topic=%s", message.topic)
            return
        limit_bytes = self._settings.limits.payload_bytes
        body = messages.read(message.payload, limit_bytes=limit_bytes)
        given_id, reply_to = body.id, body.reply_to
        request_id = given_id or _id_from(message.correlation) or make_id()
        topic = self._topics.response(request_id)
        try:
            request, topic = self._read(message, body, topic)
            acceptance = self._intake.take(
                request,
                request_id=request_id,
                body=message.payload,
                source=Source.MQTT,
                answer_topic=topic,
                correlation=message.correlation,
                expiry_s=message.expiry_s,
                topic_made=topic == self._topics.response(request_id) and given_id is None,
                delivery=message.delivery,
                moment=clock.now(),
            )
        except PromptError as error:
            self._mqtt.counters[f"refused_{error.status}"] += 1
            # What a client got wrong is named to the client: its words may be a prompt's.
            reason = "" if isinstance(error, BadRequest | UnknownModel) else error.message
            log.info("prompt refused request=%s code=%s reason=%r", request_id, error.code, reason)
            self._refuse(message, body, request_id, reply_to, error)
            return
        except Exception:
            log.exception("prompt failed request=%s bytes=%d", request_id, len(message.payload))
            self._refuse(message, body, request_id, reply_to, ModelFailed("the agent failed on this request"))
            return
        if acceptance.new:
            log.info("prompt accepted request=%s row=%d", request_id, acceptance.row)
        else:
            log.info("prompt repeated request=%s row=%d", request_id, acceptance.row)
            self._mqtt.counters["repeated"] += 1
            self._mqtt.answered(acceptance.row)

    def _read(self, message: Inbound, body: messages.Body, topic: str) -> tuple[messages.Request, str]:
        """The request and its answer topic.

        Raises:
            PromptError: one of them breaks a rule; the error then goes to `{root}/rsp/{id}`.
        """
        named = message.response_topic
        if named is not None:
            named = self._topics.check_answer_topic(named)
        if message.correlation is not None and len(message.correlation) > MAX_CORRELATION_BYTES:
            raise BadRequest(f"Correlation Data has more than {MAX_CORRELATION_BYTES} bytes")
        request = body.request()
        if named is None and request.reply_to is not None:
            named = self._topics.check_answer_topic(request.reply_to)
        return request, named or topic

    def _refuse(
        self, message: Inbound, body: messages.Body, request_id: str, reply_to: str | None, error: PromptError
    ) -> None:
        """Says why, where the client waits for it if that is allowed."""
        form = body.form
        topic = self._topics.response(request_id)
        with contextlib.suppress(BadRequest):
            topic = self._topics.check_answer_topic(message.response_topic or reply_to or topic)
        correlation = message.correlation
        if correlation is not None and len(correlation) > MAX_CORRELATION_BYTES:
            correlation = None
        self._mqtt.refuse(
            topic=topic,
            correlation=correlation,
            form=form,
            answer=Answer.of_error(request_id, form, error),
            delivery=message.delivery,
        )

    def _on_cancel(self, message: Inbound) -> None:
        """Cancels by (answer topic, Correlation Data or id). What it does not find, it counts."""
        if message.retained:
            return
        wanted = self._cancel_identity(message)
        if wanted is None or not self._intake.cancel(wanted, moment=clock.now()):
            self._mqtt.counters["cancels_unknown"] += 1

    def _cancel_identity(self, message: Inbound) -> bytes | None:
        topic, correlation, request_id = message.response_topic, message.correlation, None
        if message.payload.strip() and len(message.payload) <= MAX_CANCEL_BYTES:
            try:
                request_id, reply_to = messages.parse_cancel(message.payload)
            except BadRequest as error:
                log.info("cancel not understood reason=%r", str(error))
                return None
            topic = topic or reply_to or (self._topics.response(request_id) if request_id else None)
        return identity(topic, correlation, request_id) if topic else None

    def _on_sync(self, message: Inbound) -> None:
        if not message.retained:
            self._updates.check_now()

    def _on_desired(self, message: Inbound) -> None:
        """What a fleet's operator wants here; retained, so it comes again with each connection."""
        refs = {name: model.ref for name, model in self._settings.models.items()}
        try:
            desired = choice.parse_desired(message.payload, refs=refs)
        except choice.BadDesired as error:
            self._status.desired_problem = str(error)
            log.warning("desired state refused reason=%r", str(error))
            return
        self._status.desired_problem = ""
        self._updates.desire(desired)

    # --- The control socket ----------------------------------------------------------------------------

    def _on_status(self, call: Call) -> None:
        call.send("done", status=self._status.full(broker=self._mqtt.status()))

    def _on_probe(self, call: Call) -> None:
        fields = call.request
        body = messages.encode(
            {
                "messages": [{"role": "user", "content": fields.get("text")}],
                "model": fields.get("model"),
                "deadline_ms": fields.get("deadline_ms"),
                "stream": True,
            }
        )
        request = messages.parse(body, limit_bytes=self._settings.limits.payload_bytes)
        self._probes.serve(call, request, self._intake)

    def _on_models(self, call: Call) -> None:
        """An operation on the cache; progress goes to the client."""
        fields = call.request
        result = run_operation(
            self._operations,
            str(fields.get("do")),
            name=fields.get("name"),
            version=fields.get("version"),
            file=call.file,
            on_event=lambda event: call.send("progress", progress=dict(event)),
        )
        call.send("done", result=result)

    # --- Status and metrics ----------------------------------------------------------------------------

    def _publish_status(self, now_s: float) -> None:
        """At each change of what people act on; numbers that always change come along at intervals."""
        document = self._status.document()
        self._publish_reported(now_s, document)
        lasting = {**document, "time": 0, "seq": 0, "queue_depth": 0}
        lasting["models"] = [{**model, "tokens_per_s": 0} for model in document["models"]]
        text = repr(lasting)
        if text == self._published and now_s < self._status_at_s:
            return
        if text != self._published:
            log.info("status %s %s", document["state"], self._status.headline())
            self._notifier.status(self._status.headline())
        self._published, self._status_at_s = text, now_s + STATUS_INTERVAL_S
        self._mqtt.set_retained(self._topics.status, messages.encode(document))

    def _publish_reported(self, now_s: float, document: dict[str, Any]) -> None:
        """At each change; the progress of a fetch comes along at intervals, and once more when it has ended."""
        reported = self._status.reported(document)
        fetching = any(model["progress"] for model in reported["models"].values())
        text = repr([{**model, "progress": fetching} for model in reported["models"].values()])
        if text != self._published_reported or (fetching and now_s >= self._reported_at_s):
            self._published_reported, self._reported_at_s = text, now_s + PROGRESS_INTERVAL_S
            self._mqtt.set_retained(self._topics.reported, messages.encode(reported))

    def _metrics(self) -> dict[str, Any]:
        return {
            **self._status.stamp(),
            "answered": {name: dispatcher.answered for name, dispatcher in self._dispatchers.items()},
            "answers_dropped": self._journal.dropped_answers,
            "prompts_damaged": self._journal.damaged_rows,
            "counters": dict(self._mqtt.counters),
        }


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
            remedy="run as the user that owns state_dir, or give it its files back with chown",
        ) from error
    if not lock.try_exclusive():
        lock.close()
        raise DaemonRunning(
            f"another daemon works in {state_dir}", remedy="stop it first, or give this one another state_dir"
        )
    return lock


def _id_from(correlation: bytes | None) -> str | None:
    """Correlation Data that reads as an id is a better name in answers and logs than one made up."""
    try:
        text = correlation.decode("ascii") if correlation else ""
    except UnicodeDecodeError:
        return None
    return text if ID_PATTERN.fullmatch(text) else None


def _logged(name: str, target: Callable[[], None]) -> Callable[[], None]:
    """A thread's top: what ends it is logged; the main thread sees that it ended."""

    def run() -> None:
        try:
            target()
        except Exception:
            log.exception("thread failed name=%s", name)

    return run


def run(settings: Settings) -> int:
    """Builds and runs the daemon of these settings. Returns the process's exit code."""
    address, watchdog_interval_s = environment.service_manager()
    return Daemon(settings, Notifier(address, watchdog_interval_s)).run()
