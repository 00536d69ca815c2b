"""A fleet, a registry and consoles in memory: what a rollout does, in milliseconds. One thread.

A device obeys what is published for it with the next wait, as its kind says.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_agent.errors import TransportError
from edge_agent.fleet.broker import Outgoing, Watch
from edge_agent.fleet.rollout import desired
from edge_agent.fleet.rollout.console import Clocks, Console, Progress, check_nothing_active
from edge_agent.fleet.rollout.plan import Limits, Plan, RolloutRefused, check_devices, make_plan
from edge_agent.fleet.rollout.state import State, parse
from edge_agent.fleet.rollout.view import View, names_of
from tests.support.scripted_fleet import TOPICS, ScriptedFleetBroker, reported, status

NAME = "assistant"
URI = "models:/phi3-mini@prod"
OLD, NEW = 6, 7
EPOCH_S = 1_790_000_000.0
LIMITS = Limits(soak_s=100.0, max_failed=0, min_speed=0.8)


def plan_of(
    devices: Iterable[str],
    *,
    canaries: Iterable[str] = (),
    percents: Iterable[float] = (5, 25, 100),
    limits: Limits = LIMITS,
) -> Plan:
    from edge_agent.package.reference import ModelRef

    return make_plan(
        name=NAME,
        version=NEW,
        ref=ModelRef.parse(URI),
        instead_of=OLD,
        devices=devices,
        canaries=tuple(canaries),
        percents=tuple(percents),
        limits=limits,
    )


@dataclass
class ScriptedRegistry:
    """Implements `AliasRegistry`."""

    named: int = OLD
    reachable: bool = True
    moves: int = 0

    def move_alias(self, plan: Plan) -> None:
        if not self.reachable:
            raise TransportError("registry http://registry cannot be reached")
        if self.named not in (plan.version, plan.instead_of):
            raise RolloutRefused(f"somebody has moved the alias to version {self.named}")
        self.moves += self.named != plan.version
        self.named = plan.version


@dataclass
class ScriptedDevice:
    """
    Attributes:
        fails: the code with which it refuses the new version; empty for one that takes it.
        away: it hears nothing, and its status is `offline`.
        then: what becomes of it once it runs the new version: `degraded`, `offline`, `runner_crashed`, `slow`.
    """

    id: str
    fails: str = ""
    away: bool = False
    then: str = ""
    runs: int = OLD
    told: int | None = None
    speed: float = 20.0
    state: str = "ready"
    attempt: dict[str, Any] | None = None
    quarantined: list[dict[str, Any]] = field(default_factory=list)

    def documents(self) -> dict[str, bytes]:
        topics = TOPICS.of(self.id)
        state = "offline" if self.away else self.state
        model = {"name": NAME, "uri": URI, "version": self.runs, "tokens_per_s": self.speed}
        via = "desired" if self.told else "alias"
        uri = f"models:/phi3-mini/{self.told}" if self.told else URI
        report = reported(
            NAME,
            self.runs,
            uri=uri,
            attempt=self.attempt,
            quarantined=self.quarantined,
            wanted={"version": self.told or self.runs, "via": via},
        )
        whole = status(state, models=[] if self.away else [model])
        return {topics.status: json.dumps(whole).encode(), topics.reported: json.dumps(report).encode()}

    def obey(self, wanted: int) -> None:
        """It is to run this version, and tries to."""
        if wanted == self.runs:
            return
        if wanted != NEW:
            self.runs, self.speed = wanted, 20.0
        elif self.fails:
            self.attempt = {"version": NEW, "digest": "", "step": "gate", "code": self.fails, "at": 1}
            if self.fails == "gate_failed":
                self.quarantined, self.state = [{"version": NEW, "code": self.fails}], "degraded"
        elif not self.quarantined:
            self.runs = NEW
            self._suffer()

    def _suffer(self) -> None:
        if self.then == "runner_crashed":
            self.runs, self.state = OLD, "degraded"
            self.quarantined = [{"version": NEW, "code": self.then}]
        elif self.then == "offline":
            self.away = True
        elif self.then == "degraded":
            self.state = "degraded"
        elif self.then == "slow":
            self.speed = 5.0


class World:
    """
    Attributes:
        offered: ids that were told the new version, in order.
    """

    def __init__(self, devices: Iterable[ScriptedDevice | str]) -> None:
        made = [ScriptedDevice(id=each) if isinstance(each, str) else each for each in devices]
        self.devices = {device.id: device for device in made}
        self.broker = ScriptedFleetBroker()
        self.registry = ScriptedRegistry()
        self.offered: list[str] = []
        self.notes: list[str] = []
        self.broker.on_publish = self._published
        self.broker.on_wait = lambda now_s: self.live()
        for device in made:
            self.say(device.id)

    @property
    def state(self) -> State:
        """What the broker retains."""
        return parse(self.broker.retained[TOPICS.rollout(NAME)])

    @property
    def now(self) -> float:
        return EPOCH_S + self.broker.clock.now_s

    def say(self, device_id: str) -> None:
        """A device publishes what is new."""
        for topic, body in self.devices[device_id].documents().items():
            if self.broker.retained.get(topic) != body:
                self.broker.say(topic, body)

    def live(self) -> None:
        """Every device that hears does what it is told, and follows the alias otherwise."""
        for device in self.devices.values():
            if not device.away:
                body = self.broker.retained.get(TOPICS.of(device.id).desired, b"")
                device.told = desired.version_in(body, NAME)
                device.obey(device.told or self.registry.named)
            self.say(device.id)

    def console(self, *, skew_s: float = 0.0, broker: Any = None) -> Console:
        """Another console, whose clock is wrong by `skew_s`."""
        clock = self.broker.clock
        return Console(
            View(TOPICS, NAME),
            broker=broker or self.broker,
            registry=self.registry,
            clocks=Clocks(
                wall_s=lambda: self.now + skew_s, mono_s=lambda: clock.now_s, sleep=clock.clock.sleep
            ),
            tell=self._told,
        )

    def begun(self, *, skew_s: float = 0.0, **planning: Any) -> Console:
        """A console that has begun a rollout to all devices."""
        console = self.console(skew_s=skew_s)
        console.collect()
        check_nothing_active(console.view)
        assert str(check_devices(console.view.devices(), NAME)) == URI
        console.begin(plan_of(names_of(console.view.devices(), NAME), **planning))
        return console

    def run(self, console: Console, until: Callable[[State], bool], *, limit_s: float = 3_000) -> State:
        """Turns until the retained state is as wanted.

        Raises:
            AssertionError: it is not in time.
        """
        end_s = self.broker.clock.now_s + limit_s
        with watching(console) as watch:
            while not until(self.state if TOPICS.rollout(NAME) in self.broker.retained else _NO_STATE):
                assert self.broker.clock.now_s < end_s, f"{console.state}"
                console.turn(watch)
        return self.state

    def _published(self, message: Outgoing) -> None:
        device_id, what = TOPICS.speaker(message.topic) or ("", "")
        if what == "model/desired" and desired.version_in(message.body, NAME) == NEW:
            self.offered.append(device_id)

    def _told(self, progress: Progress) -> None:
        if progress.note and progress.note not in self.notes[-1:]:
            self.notes.append(progress.note)


_NO_STATE: Any = type("_NoState", (), {"phase": None, "wave": -1})()


@contextlib.contextmanager
def watching(console: Console) -> Iterator[Watch]:
    with console.broker.watch(console.view.filters) as watch:
        console.look(watch)
        yield watch


def retained(world: World, what: str) -> Mapping[str, bytes]:
    """The retained documents of all devices."""
    return {topic: body for topic, body in world.broker.retained.items() if topic.endswith(what)}
