"""Consoles that drive a rollout over a broker in memory: they are killed, meet each other, and lose their partners."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import pytest

from edge_agent.errors import BrokerUnreachable
from edge_agent.fleet.broker import Message, Outgoing, Watch
from edge_agent.fleet.rollout.console import Console
from edge_agent.fleet.rollout.lease import SETTLE_S
from edge_agent.fleet.rollout.plan import Limits, RolloutRefused
from edge_agent.fleet.rollout.request import Verb
from edge_agent.fleet.rollout.state import OVER, Lease, Phase, State
from tests.support.scripted_fleet import TOPICS, ScriptedFleetBroker
from tests.support.scripted_rollout import (
    LIMITS,
    NAME,
    NEW,
    OLD,
    ScriptedDevice,
    World,
    plan_of,
    retained,
    watching,
)

TWELVE = [f"device-{number}" for number in range(12)]
FIRST = sorted(TWELVE, key=lambda each: plan_of(TWELVE).wave_of(each))
"""In the order of the waves: one, two more, and nine more."""


def ended(state: State) -> bool:
    return state.phase in OVER or state.phase is Phase.HALTED


def runs(world: World) -> set[int]:
    return {device.runs for device in world.devices.values()}


def test_a_good_version_reaches_all_in_waves_and_leaves_nothing_behind() -> None:
    world = World(TWELVE)
    state = world.begun(canaries=["device-3"]).run(ended)
    assert (state.phase, world.registry.named, runs(world)) == (Phase.DONE, NEW, {NEW})
    assert world.offered[0] == "device-3"
    assert sorted(world.offered) == sorted(TWELVE)
    told = {json.loads(body)["models"][NAME] for body in retained(world, "model/desired").values()}
    assert told == {None}
    assert not retained(world, "before/0")
    assert world.state.lease is None


def test_each_wave_is_offered_only_after_the_one_before_has_soaked() -> None:
    world = World(TWELVE)
    console = world.begun()
    world.run(console, lambda state: state.phase is Phase.SOAKING)
    assert world.offered == FIRST[:1]
    world.run(console, lambda state: state.wave == 1 and state.phase is Phase.SOAKING)
    assert world.broker.clock.now_s >= LIMITS.soak_s
    assert set(world.offered) == set(FIRST[:3])


def test_a_version_that_fails_in_the_second_wave_halts_and_is_brought_back() -> None:
    bad = FIRST[2]
    world = World([ScriptedDevice(id=each, fails="gate_failed" if each == bad else "") for each in TWELVE])
    state = world.begun().run(ended)
    assert state.phase is Phase.HALTED
    assert bad in state.reason
    assert set(world.offered) == set(FIRST[:3])
    console = world.console()
    console.collect()
    console.ask(Verb.ABORT)
    assert console.run(lambda state: state.phase is Phase.ABORTED).phase is Phase.ABORTED
    world.live()
    assert (runs(world), world.registry.named, world.registry.moves) == ({OLD}, OLD, 0)


@pytest.mark.parametrize("then", ["runner_crashed", "offline", "degraded", "slow"])
def test_what_befalls_a_device_after_it_took_the_version_halts(then: str) -> None:
    world = World([ScriptedDevice(id=each, then=then if each == FIRST[1] else "") for each in TWELVE])
    state = world.begun().run(ended)
    assert (state.phase, state.wave) == (Phase.HALTED, 1)
    assert FIRST[1] in state.reason
    assert set(world.offered) == set(FIRST[:3])


def test_a_device_that_was_away_takes_it_when_it_is_back() -> None:
    world = World([ScriptedDevice(id=each, away=each == FIRST[1]) for each in TWELVE])
    console = world.begun()
    world.run(console, lambda state: state.wave == 2)
    assert world.devices[FIRST[1]].runs == OLD
    world.devices[FIRST[1]].away = False
    assert console.run(ended).phase is Phase.DONE
    assert runs(world) == {NEW}


def test_a_killed_console_is_continued_by_another_with_the_same_waves() -> None:
    world = World(TWELVE)
    world.run(world.begun(), lambda state: state.wave == 1 and state.phase is Phase.SOAKING)
    before = list(world.offered)
    another = world.console(skew_s=-7_200)
    another.collect()
    state = another.run(ended)
    assert (state.phase, runs(world), world.registry.moves) == (Phase.DONE, {NEW}, 1)
    assert world.offered[: len(before)] == before
    assert world.broker.clock.now_s < 500, "the other console's clock counts for nothing"
    assert sorted(world.offered) == sorted(TWELVE), "somebody was told twice"


@pytest.mark.parametrize("publishes", range(1, 40))
def test_a_console_may_be_killed_before_any_of_its_publishes(publishes: int) -> None:
    world = World(FIRST[:3])
    broker = Killing(world, publishes)
    console = world.console(broker=broker)
    console.collect()
    console.begin(plan_of(FIRST[:3], percents=(50, 100), limits=Limits(soak_s=20, max_failed=0, min_speed=0)))
    try:
        console.run(ended)
    except Killed:
        if TOPICS.rollout(NAME) not in world.broker.retained:
            return
        another = world.console()
        another.collect()
        another.run(ended)
    assert (world.state.phase, runs(world), world.registry.moves) == (Phase.DONE, {NEW}, 1)


class Killed(Exception):
    """SIGKILL."""


class Killing:
    """A broker over which one console publishes so many messages, and is then killed."""

    def __init__(self, world: World, publishes: int) -> None:
        self._broker, self._left = world.broker, publishes
        self.name = "console"
        self.collect, self.watch = world.broker.collect, world.broker.watch

    def publish(self, topic: str, body: bytes, *, retain: bool = False) -> None:
        self.publish_all([Outgoing(topic=topic, body=body, retain=retain)])

    def publish_all(self, messages: Sequence[Outgoing], *, limit_s: float = 10) -> None:
        for message in messages:
            self._left -= 1
            if self._left < 0:
                raise Killed
            self._broker.publish_all([message])


def test_nothing_is_done_before_a_claim_has_settled() -> None:
    world = World(TWELVE)
    console = world.begun()
    with watching(console) as watch:
        while TOPICS.rollout(NAME) not in world.broker.retained:
            console.turn(watch)
        claimed_s = world.broker.clock.now_s
        while world.broker.clock.now_s < claimed_s + SETTLE_S:
            assert world.state.phase is Phase.PLANNED
            assert not world.offered
            console.turn(watch)


def test_nothing_is_done_before_its_state_has_come_back() -> None:
    world = World(TWELVE)
    broker = MayNotRead(world.broker, "")
    console = world.console(broker=broker)
    console.collect()
    console.begin(plan_of(TWELVE))
    world.run(console, lambda state: state.phase is Phase.SOAKING)
    offered = list(world.offered)
    broker.drops = lambda topic: topic == TOPICS.rollout(NAME) and world.state.wave > 0
    world.run(console, lambda state: state.wave == 1)
    with watching(console) as watch:
        for _ in range(20):
            console.turn(watch)
    assert world.offered == offered


def test_a_console_that_is_stopped_in_the_middle_of_telling_tells_nobody_more() -> None:
    many = [f"device-{number}" for number in range(400)]
    world = World(many)
    console = world.begun(percents=(1, 100))
    world.run(console, lambda state: state.wave == 1)
    taken_over = world.console()
    published = world.broker.on_publish

    def stopped(message: Outgoing) -> None:
        published(message)
        if len(world.offered) == 10:
            world.broker.on_publish = published
            world.broker.clock.pass_by(60)
            taken_over.collect()
            with watching(taken_over) as watch:
                for _ in range(40):
                    taken_over.turn(watch)
            told.extend(world.offered)

    told: list[str] = []
    world.broker.on_publish = stopped
    with watching(console) as watch:
        for _ in range(3):
            console.turn(watch)
    assert len(told) == len(many), "the other console has told all of them"
    assert len(world.offered) - len(told) < 50, "no more than what was under way"


class MayNotRead:
    """A broker whose rules let a console read everything but some topics, and that does not say so.

    Attributes:
        drops: topics of which nothing comes any more.
    """

    def __init__(self, broker: ScriptedFleetBroker, topics: str) -> None:
        self._broker, self._topics = broker, topics
        self.drops: Callable[[str], bool] = lambda topic: False
        self.name = "console"
        self.publish, self.publish_all = broker.publish, broker.publish_all

    def collect(self, filters: Sequence[str], **limits: float) -> Mapping[str, bytes]:
        return self._broker.collect(self._allowed(filters), **limits)

    @contextlib.contextmanager
    def watch(self, filters: Sequence[str]) -> Iterator[Watch]:
        with self._broker.watch(self._allowed(filters)) as watch:
            yield Dropping(watch, self)

    def _allowed(self, filters: Sequence[str]) -> list[str]:
        return [each for each in filters if not self._topics or not each.endswith(self._topics)]


class Dropping:
    """A watch of such a broker."""

    def __init__(self, watch: Watch, broker: MayNotRead) -> None:
        self._watch, self._broker = watch, broker

    @property
    def renewed(self) -> bool:
        return self._watch.renewed

    def next(self, timeout_s: float) -> Message | None:
        message = self._watch.next(timeout_s)
        return None if message is not None and self._broker.drops(message.topic) else message


def test_a_second_console_waits_for_the_first_and_says_whom_it_waits_for() -> None:
    world = World(TWELVE)
    first, second = world.begun(), world.console(skew_s=60)
    with watching(first) as one:
        for _ in range(10):
            first.turn(one)
        second.collect()
        holder = world.state.lease
        with watching(second) as two:
            for _ in range(100):
                first.turn(one)
                second.turn(two)
                assert world.state.lease is not None and holder is not None
                assert world.state.lease.console == holder.console
    assert holder is not None
    assert any(holder.console in note for note in world.notes)


def test_a_state_that_a_stopped_console_writes_over_a_newer_one_does_not_stay() -> None:
    """Its message was under way when it was stopped, and comes after that of the console that took over."""
    world = World(TWELVE)
    first = world.begun()
    world.run(first, lambda state: state.phase is Phase.SOAKING)
    late = world.broker.retained[TOPICS.rollout(NAME)]
    world.broker.clock.pass_by(60)
    second = world.console()
    second.collect()
    second.ask(Verb.ABORT)
    with watching(second) as watch:
        while world.state.phase is not Phase.ABORTED:
            second.turn(watch)
        world.broker.say(TOPICS.rollout(NAME), late)
        second.turn(watch)
    assert world.state.phase is Phase.ABORTED


def test_a_console_whose_own_late_state_covers_a_newer_one_writes_the_newer_one_again() -> None:
    world = World(TWELVE)
    first = world.begun()
    world.run(first, lambda state: state.phase is Phase.SOAKING)
    own = world.state
    newer = replace(
        own, phase=Phase.ABORTING, seq=own.seq + 3, lease=Lease(console="ee" * 8, expires_at=world.now + 30)
    )
    with watching(first) as watch:
        world.broker.say(TOPICS.rollout(NAME), newer.encode())
        first.turn(watch)
        world.broker.say(TOPICS.rollout(NAME), own.encode())
        first.turn(watch)
    assert world.state.phase is Phase.ABORTING


def test_of_two_that_begin_at_once_one_is_refused() -> None:
    world = World(TWELVE)
    first, second = world.begun(), world.begun()
    with (
        watching(first) as one,
        watching(second) as two,
        pytest.raises(RolloutRefused, match=r"planned|offering"),
    ):
        for _ in range(20):
            first.turn(one)
            second.turn(two)


def test_while_one_is_active_no_other_begins() -> None:
    world = World(TWELVE)
    world.run(world.begun(), lambda state: state.phase is Phase.SOAKING)
    with pytest.raises(RolloutRefused, match=r"rollout of 'assistant' to version 7 is soaking.*resume"):
        world.begun()


def test_after_one_is_over_another_begins_and_nothing_old_counts() -> None:
    world = World(TWELVE)
    world.begun().run(ended)
    for device in world.devices.values():
        device.runs = OLD
    world.registry.named = OLD
    world.live()
    old = world.state
    state = world.begun().run(ended)
    assert state.phase is Phase.DONE
    assert (state.id != old.id, state.seq > old.seq) == (True, True)


@pytest.mark.parametrize("drives", [True, False])
def test_another_console_pauses_and_resumes_with_and_without_one_that_drives(drives: bool) -> None:
    world = World(TWELVE)
    first = world.begun()
    world.run(first, lambda state: state.phase is Phase.SOAKING)
    ask(world, first if drives else None, Verb.PAUSE, Phase.PAUSED)
    offered = list(world.offered)
    world.broker.clock.pass_by(10_000)
    world.live()
    assert world.offered == offered
    ask(world, first if drives else None, Verb.RESUME, Phase.SOAKING)


def ask(world: World, driver: Console | None, verb: Verb, phase: Phase) -> None:
    """One console asks; a driver, if there is one, turns beside it."""
    asking = world.console()
    asking.collect()
    request = asking.ask(verb)
    assert request is not None
    with contextlib.ExitStack() as stack:
        consoles = [asking, *([driver] if driver else [])]
        turning = [(console, stack.enter_context(watching(console))) for console in consoles]
        turn_until_answered(world, turning, request.id)
    if driver is None:
        asking.leave()
    assert world.state.phase is phase
    assert world.state.answered is not None
    assert (world.state.answered.request, world.state.answered.problem) == (request.id, "")


def turn_until_answered(world: World, turning: Sequence[tuple[Console, Watch]], request: str) -> None:
    for _ in range(200):
        for console, watch in turning:
            console.turn(watch)
        if world.state.answered is not None and world.state.answered.request == request:
            return
    raise AssertionError("nobody has answered")


def test_a_console_that_has_resumed_ends_although_others_ask_for_something_else() -> None:
    world = World(TWELVE)
    first = world.begun()
    world.run(first, lambda state: state.phase is Phase.SOAKING)
    ask(world, first, Verb.PAUSE, Phase.PAUSED)
    first.leave()
    resuming, aborting = world.console(), world.console()
    resuming.collect()
    resuming.ask(Verb.RESUME)

    def aborts(state: State) -> bool:
        if state.phase is Phase.SOAKING and aborting.state is None:
            aborting.collect()
            aborting.ask(Verb.ABORT)
        return ended(state)

    within(world, 300)
    assert resuming.run(aborts).phase is Phase.ABORTED
    assert world.state.lease is None


@pytest.mark.parametrize("lost", ["covered", "removed"])
def test_what_was_asked_is_asked_again_where_nobody_can_find_it(lost: str) -> None:
    world = World(TWELVE)
    world.run(world.begun(), lambda state: state.phase is Phase.SOAKING)
    aborting, pausing = world.console(), world.console()
    aborting.collect()
    aborting.ask(Verb.ABORT)
    if lost == "covered":
        pausing.collect()
        pausing.ask(Verb.PAUSE)
    else:
        world.broker.say(aborting.view.request_topic, b"")
    within(world, 300)
    assert aborting.run(lambda state: state.phase is Phase.ABORTED).phase is Phase.ABORTED


def test_who_goes_before_the_answer_takes_back_what_was_asked() -> None:
    """Nobody has the lease, or another console is busy; then somebody presses Ctrl-C."""
    world = World(TWELVE)
    leading = world.begun()
    world.run(leading, lambda state: state.phase is Phase.SOAKING)
    pausing, aborting = world.console(), world.console()
    pausing.collect()
    pausing.ask(Verb.PAUSE)
    assert retained(world, "/request")
    assert pausing.leave() is True
    assert not retained(world, "/request")
    assert pausing.leave() is False, "nothing is left"
    pausing.ask(Verb.PAUSE)
    aborting.collect()
    aborting.ask(Verb.ABORT)
    with watching(pausing) as watch:
        pausing.look(watch)
    assert pausing.leave() is True
    assert retained(world, "/request"), "it is another console's now"
    within(world, 300)
    assert world.run(leading, ended).phase is Phase.ABORTED


def test_a_console_whose_rollout_is_gone_does_not_go_on_with_the_next_one() -> None:
    world = World(TWELVE)
    console = world.begun()
    world.run(console, lambda state: state.phase is Phase.SOAKING)
    late, aborting = world.console(), world.console()
    late.collect()
    late.ask(Verb.PAUSE)
    world.broker.say(late.view.request_topic, b"")
    aborting.collect()
    aborting.ask(Verb.ABORT)
    aborting.run(ended)
    world.run(world.begun(), lambda state: state.phase is Phase.OFFERING)
    within(world, 300)
    with pytest.raises(RolloutRefused, match="is offering"):
        late.run(ended)


def within(world: World, limit_s: float) -> None:
    """From now on, a test that takes longer fails."""
    live, end_s = world.broker.on_wait, world.broker.clock.now_s + limit_s

    def on_wait(now_s: float) -> None:
        assert now_s < end_s, "it does not end"
        live(now_s)

    world.broker.on_wait = on_wait


def test_what_makes_no_sense_is_refused_before_anybody_is_asked() -> None:
    world = World(TWELVE)
    world.begun().run(ended)
    console = world.console()
    console.collect()
    with pytest.raises(RolloutRefused, match="done"):
        console.ask(Verb.ABORT)
    assert not retained(world, "/request")
    nothing = World(TWELVE).console()
    nothing.collect()
    with pytest.raises(RolloutRefused, match="no rollout"):
        nothing.ask(Verb.PAUSE)


def test_a_registry_that_is_away_at_the_end_is_asked_again_and_nobody_is_released_before() -> None:
    world = World(TWELVE)
    world.registry.reachable = False
    console = world.begun()
    world.run(console, lambda state: state.phase is Phase.FINISHING and "cannot be reached" in state.reason)
    assert NEW in {
        json.loads(body)["models"][NAME]["version"] for body in retained(world, "model/desired").values()
    }
    assert any("again in" in note for note in world.notes)
    world.registry.reachable = True
    assert console.run(ended).phase is Phase.DONE
    assert world.registry.moves == 1


def test_an_alias_that_somebody_else_has_moved_halts_the_end() -> None:
    world = World(TWELVE)
    console = world.begun()
    world.run(console, lambda state: state.wave == 2 and state.phase is Phase.SOAKING)
    world.registry.named = 99
    assert console.run(ended).phase is Phase.HALTED
    assert "version 99" in world.state.reason
    assert world.registry.named == 99


def test_a_broker_that_is_away_is_tried_again_and_the_rollout_goes_on() -> None:
    world = World(TWELVE)
    console = world.begun()
    world.run(console, lambda state: state.wave == 1)
    world.broker.reachable = False
    world.broker.clock.on_sleep = lambda: setattr(
        world.broker, "reachable", world.broker.clock.now_s > back_s
    )
    back_s = world.broker.clock.now_s + 100
    assert console.run(ended).phase is Phase.DONE
    assert runs(world) == {NEW}
    assert any("cannot be reached" in note for note in world.notes)


def test_a_broker_that_has_lost_everything_gets_the_state_again_and_no_wave_is_passed_meanwhile() -> None:
    world = World(TWELVE)
    console = world.begun()
    world.run(console, lambda state: state.wave == 1 and state.phase is Phase.SOAKING)
    world.broker.retained.clear()
    for device in world.devices.values():
        device.away = True
    silent, world.broker.on_wait = world.broker.on_wait, lambda now_s: None
    console.view.forget()
    with watching(console) as watch:
        for _ in range(400):
            console.turn(watch)
        assert (world.state.wave, world.state.phase) == (1, Phase.SOAKING)
        world.broker.on_wait = silent
        for device in world.devices.values():
            device.away = False
        world.live()
    assert console.run(ended).phase is Phase.DONE


def test_a_broker_that_is_back_at_once_and_has_lost_everything_is_told_all_of_it_again() -> None:
    away = FIRST[1]
    world = World([ScriptedDevice(id=each, away=each == away) for each in TWELVE])
    console = world.begun()
    world.run(console, lambda state: state.wave == 1)
    live = world.broker.on_wait

    def restarts(now_s: float) -> None:
        if away in world.offered and world.devices[away].away:
            world.broker.restart()
            for device in world.devices.values():
                device.away = False
        live(now_s)

    world.broker.on_wait = restarts
    within(world, 3_000)
    assert console.run(ended).phase is Phase.DONE
    assert world.offered.count(away) > 1, "it never heard that it was to take the version"
    assert any("lost" in note for note in world.notes)


def test_a_console_that_may_not_read_desired_states_releases_all_that_may_have_been_told() -> None:
    world = World(TWELVE)
    world.run(world.begun(), lambda state: state.wave == 1 and state.phase is Phase.SOAKING)
    console = world.console(broker=MayNotRead(world.broker, "model/desired"))
    console.collect()
    console.ask(Verb.ABORT)
    assert console.run(lambda state: state.phase is Phase.ABORTED).phase is Phase.ABORTED
    told = {topic: json.loads(body)["models"] for topic, body in retained(world, "model/desired").items()}
    assert told == {TOPICS.of(each).desired: {NAME: None} for each in FIRST[:3]}


def test_a_large_wave_is_spread_and_each_device_is_told_once() -> None:
    many = [f"device-{number}" for number in range(400)]
    world = World(many)
    assert world.begun(percents=(1, 100)).run(ended).phase is Phase.DONE
    assert sorted(world.offered) == sorted(many)
    spreads = [
        json.loads(message.body).get("within_s", 0)
        for message in world.broker.published
        if message.topic.endswith("model/desired")
    ]
    assert (max(spreads[:400]), spreads[0]) == (39, 0)


def test_what_other_models_are_told_stays() -> None:
    world = World(TWELVE)
    topic = TOPICS.of(FIRST[0]).desired
    world.broker.retained[topic] = b'{"models": {"other": {"version": 3}}}'
    world.begun().run(ended)
    assert json.loads(world.broker.retained[topic])["models"] == {"other": {"version": 3}, NAME: None}


def test_a_state_that_cannot_be_read_is_no_place_to_begin() -> None:
    world = World(TWELVE)
    world.broker.retained[TOPICS.rollout(NAME)] = b'{"schema": 2}'
    with pytest.raises(Exception, match="schema"):
        world.begun()


def test_a_broker_that_is_away_before_anything_began_is_an_error() -> None:
    world = World(TWELVE)
    world.broker.reachable = False
    with pytest.raises(BrokerUnreachable):
        world.console().collect()


def test_what_devices_say_makes_no_state_too_long_to_be_read() -> None:
    world = World([ScriptedDevice(id=f"{number:064}", away=True) for number in range(150)])
    within(world, 300)
    console = world.begun(percents=(100,))
    world.run(console, lambda state: state.phase is Phase.OFFERING)
    for each in world.devices.values():
        each.attempt = {"version": NEW, "digest": "", "step": "gate", "code": "\N{DUCK}" * 80, "at": 1}
    world.live()
    with watching(console) as watch:
        for _ in range(10):
            console.turn(watch)
    assert len(world.state.listed) == 100
    assert {entry.code for entry in world.state.listed} == {""}
