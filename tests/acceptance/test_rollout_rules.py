"""A rollout under the rules of docs/broker.md, word for word: what an operator's identity may, a device's may not."""

from __future__ import annotations

import contextlib
import time

from edge_agent.fleet.connection import connected
from edge_agent.fleet.rollout import desired
from edge_agent.fleet.rollout.console import Clocks, Console, Progress
from edge_agent.fleet.rollout.plan import Limits
from edge_agent.fleet.rollout.request import Request, Verb
from edge_agent.fleet.rollout.state import OVER, Phase
from edge_agent.fleet.rollout.view import View, names_of
from edge_agent.settings.mqtt import MqttSettings
from tests.support.certificates import Authority
from tests.support.documented_broker import Application, tls_settings
from tests.support.mosquitto import Broker
from tests.support.scripted_fleet import TOPICS
from tests.support.scripted_rollout import NAME, NEW, OLD, ScriptedDevice, ScriptedRegistry, plan_of

REFUSED = "Not authorized"
CLOCKS = Clocks(wall_s=time.time, mono_s=time.monotonic, sleep=time.sleep)


class Obeying:
    """A device with a certificate of its own, which runs what it is told, or what the alias names."""

    def __init__(self, application: Application, registry: ScriptedRegistry) -> None:
        self.application = application
        self._registry = registry
        self._device = ScriptedDevice(id=application.name)
        application.subscribe(TOPICS.of(application.name).desired)
        self.say()

    @property
    def runs(self) -> int:
        return self._device.runs

    def live(self) -> None:
        before = self._device.documents()
        bodies = [message.payload for message in self.application.came]
        self._device.told = desired.version_in(bodies[-1], NAME) if bodies else None
        self._device.obey(self._device.told or self._registry.named)
        if self._device.documents() != before:
            self.say()

    def say(self) -> None:
        for topic, body in self._device.documents().items():
            assert self.application.publish(topic, body, retain=True) != REFUSED


def test_an_operator_rolls_out_and_a_device_can_neither_begin_nor_end_nor_move_another(
    documented: tuple[Broker, Authority],
) -> None:
    broker, authority = documented
    registry = ScriptedRegistry()
    tls = tls_settings(authority, authority.client("console"))
    settings = MqttSettings(host=broker.host, port=broker.port, protocol="5", **tls)
    with contextlib.ExitStack() as stack:
        names = ("press-1", "press-2", "press-3")
        devices = [
            Obeying(stack.enter_context(Application(broker, authority, name)), registry) for name in names
        ]

        def live(_: Progress) -> None:
            for device in devices:
                device.live()

        view = View(TOPICS, NAME)
        console = Console(
            view,
            broker=stack.enter_context(connected(settings)),
            registry=registry,
            clocks=CLOCKS,
            tell=live,
        )
        console.collect()
        assert names_of(view.devices(), NAME) == list(names)
        console.begin(
            plan_of(names, percents=(30, 100), limits=Limits(soak_s=0.5, max_failed=0, min_speed=0.5))
        )
        state = console.run(lambda state: state.phase in OVER or state.phase is Phase.HALTED)
        assert (state.phase, registry.named, [device.runs for device in devices]) == (
            Phase.DONE,
            NEW,
            [NEW] * 3,
        )

        thief = devices[0].application
        request = Request(id="ab" * 8, rollout=state.id, verb=Verb.ABORT)
        told = desired.with_version(b"", NAME, OLD)
        for topic, body in (
            (view.state_topic, state.encode()),
            (view.request_topic, request.encode()),
            (view.page_topic(0), b"{}"),
            (TOPICS.of("press-2").desired, told),
            (TOPICS.of("press-1").desired, told),
        ):
            assert thief.publish(topic, body, retain=True) == REFUSED
