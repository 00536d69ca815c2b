"""One console that drives a rollout over a broker and a registry. One thread's; its loop's body is `turn`.

Owns the order that lets any console be killed at any time: the state is published, comes back from the broker, and only
then is it acted on; every action may be done again. Refuses to act without the lease (`lease.py`). What the broker or
the registry does not take now is tried again, later and later, and said.

    watch → a whole picture → [read → hear → claim → obey → step → publish → act] → … → release
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from edge_agent.errors import BrokerUnreachable, EdgeAgentError
from edge_agent.fleet.broker import FleetBroker, Outgoing, Watch
from edge_agent.fleet.devices import Device
from edge_agent.fleet.rollout import desired, rules
from edge_agent.fleet.rollout.before import pages_of
from edge_agent.fleet.rollout.lease import RENEW_S, Claim, taken_over
from edge_agent.fleet.rollout.plan import Plan, RolloutRefused
from edge_agent.fleet.rollout.request import Request, Verb
from edge_agent.fleet.rollout.standing import Before
from edge_agent.fleet.rollout.state import OVER, Answered, Phase, State
from edge_agent.fleet.rollout.view import View

TURN_S = 1.0
_QUIET_S = 0.05
_READING_S = 0.5
PICTURE_QUIET_S = 1.0
_PICTURE_S = 15.0
_COUNTS_S = 2.0
_CHUNK = 50
_OFFERS_PER_S = 10
"""Devices that are told in the course of a second: each fetches a package, and one MLflow server answers 25 such."""
_RELEASES_PER_S = 50
"""They have the version that they go to, and ask one question."""
_LONGEST_WAIT_S = 60.0


class AliasRegistry(Protocol):
    """The registry, as far as the end of a rollout needs it."""

    def move_alias(self, plan: Plan) -> None:
        """Lets the plan's alias name its version. Where it does already, that is all.

        Raises:
            RolloutRefused: somebody else has moved it to a third version meanwhile.
            EdgeAgentError: not now; it may be tried again.
        """


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """
    Attributes:
        wall_s: seconds since 1970.
        mono_s: seconds on a clock that nobody sets.
    """

    wall_s: Callable[[], float]
    mono_s: Callable[[], float]
    sleep: Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a person may want to know after a turn.

    Attributes:
        state: None while none is known.
        leads: this console has the lease.
        note: what it waits for; empty for nothing.
    """

    state: State | None
    leads: bool
    note: str


class Console:
    """
    Attributes:
        tell: called after each turn.
        state: the newest one that is known, or its own.
        view: what it has heard.
    """

    def __init__(
        self,
        view: View,
        *,
        broker: FleetBroker,
        registry: AliasRegistry,
        clocks: Clocks,
        tell: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.state: State | None = None
        self.view = view
        self.broker = broker
        self._registry = registry
        self._clocks = clocks
        self.tell = tell
        self._claim = Claim(console=secrets.token_hex(8))
        self._rollout: str | None = None  # the only one that it is about; None for whatever there is
        self._asked: Request | None = None  # and nobody has answered
        self._asked_s = -math.inf
        self._handled: State | None = None
        self._published_s = -math.inf
        self._written_seq = 0
        self._waits = _Backoff()
        self._note = ""

    def run(self, is_over: Callable[[State], bool]) -> State:
        """Turns until what it has asked is answered and the state that all know says so, and gives the lease back.

        Raises:
            RolloutRefused: another rollout was begun meanwhile, or what it has asked was refused.
            BrokerRefused: the broker's rules do not let this console write.
        """
        waits = _Backoff()
        while True:
            try:
                with self.broker.watch(self.view.filters) as watch:
                    self.look(watch)
                    waits = _Backoff()
                    while (state := self.state) is None or not (
                        self._asked is None and is_over(state) and self._is_known(state)
                    ):
                        self.turn(watch)
                    self.leave()
                    return self._known()
            except BrokerUnreachable as error:
                self.view.forget()
                wait_s = waits.next_s()
                self._say(f"{error.message}; again in {wait_s:.0f} s")
                self._clocks.sleep(wait_s)

    def look(self, watch: Watch) -> None:
        """Reads what is retained, until it is quiet: a part of the fleet looks like a fleet that has arrived."""
        self._claim.begins(self._clocks.mono_s())
        until_s = self._clocks.mono_s() + _PICTURE_S
        while self._clocks.mono_s() < until_s and (message := watch.next(PICTURE_QUIET_S)):
            self.view.take(message.topic, message.body)
        self.hear()

    def hear(self) -> None:
        """Takes note of the newest state that the view has.

        Raises:
            RolloutRefused: another rollout was begun at the same moment.
        """
        heard = self.view.heard
        if heard is None or heard is self._handled:
            return
        self._handled = heard
        is_newer = self._claim.hears(heard, self._clocks.mono_s())
        if not is_newer or (self._is_mine(heard) and not self._is_mine(self._known())):
            self._publish(self._known())  # what stands there now is older than what this console knows
        elif not self._is_mine(heard):
            if self._rollout is None or heard.id == self._rollout:
                self.state = heard
            elif heard.phase not in OVER or heard.seq > self._known().seq:
                raise active(heard)

    def collect(self) -> None:
        """Reads what is retained now, before there is anything to drive.

        Raises:
            BrokerUnreachable, BrokerRefused: the broker cannot be asked.
        """
        self.view.take_all(self.broker.collect(self.view.filters))
        self.hear()

    def begin(self, plan: Plan) -> None:
        """Makes a new rollout this console's state; the next turns claim it.

        Raises:
            RolloutRefused, StateUnreadable: as `check_nothing_active`.
        """
        check_nothing_active(self.view)
        old, now = self.view.heard, self._clocks.wall_s()
        self._rollout = secrets.token_hex(8)
        self.state = State(id=self._rollout, plan=plan, at=now, since=now, seq=old.seq if old else 0)
        self._handled = old

    def ask(self, verb: Verb) -> Request | None:
        """Asks whoever has the lease, or will have it, until it is answered; None where there is nothing to ask for.

        Raises:
            RolloutRefused: it makes no sense now.
            StateUnreadable: there is something that this console does not understand.
        """
        state = self._known()
        if _obeyed(state, verb, self.view, self._clocks.wall_s()) is state:
            return None
        request = Request(id=secrets.token_hex(8), rollout=state.id, verb=verb)
        self._rollout = state.id
        self._send(request)
        return request

    def turn(self, watch: Watch) -> None:
        """Reads what has come, and does what is due.

        Raises:
            BrokerUnreachable: there was no connection for a while, or there is none: see `View.forget`.
        """
        _read(watch, self.view, self._clocks.mono_s)
        self._note = ""
        self.hear()
        if self._claim.holds(self._clocks.mono_s()):
            self._lead()
        elif self.state is not None and self._clocks.mono_s() - self._published_s >= RENEW_S:
            self._try_to_claim(self.state)
        if self._asked is not None:
            self._hear_answer(self._asked)
        self._say(self._note)

    def leave(self) -> bool:
        """Gives the lease back, so that the next console need not wait for its end, and takes back what it has asked
        and nobody has answered. True where there was that."""
        asked, self._asked = self._asked, None
        if asked is not None and (self.view.request is None or self.view.request.id == asked.id):
            self.broker.publish(self.view.request_topic, b"", retain=True)
        if self.state is not None and self._claim.holds(self._clocks.mono_s()):
            if self.state.phase in OVER:
                self.broker.publish_all(_no_pages(self.view, self.state))
            self.state = self._claim.releases(self.state, self._clocks.wall_s())
            self.broker.publish(self.view.state_topic, self.state.encode(), retain=True)
        return asked is not None

    def _send(self, request: Request) -> None:
        self._asked, self._asked_s = request, self._clocks.mono_s()
        self.broker.publish(self.view.request_topic, request.encode(), retain=True)

    def _hear_answer(self, asked: Request) -> None:
        """Only the newest request stands on the broker, and a broker may lose it: then it is made again."""
        state, stands = self._known(), self.view.request
        if state.answered is not None and state.answered.request == asked.id:
            self._asked = None
            if state.answered.problem:
                self.leave()
                raise RolloutRefused(state.answered.problem)
        elif not _waits(state, stands) and self._clocks.mono_s() - self._asked_s >= RENEW_S:
            self._send(asked)

    def _try_to_claim(self, state: State) -> None:
        now, mono_s = self._clocks.wall_s(), self._clocks.mono_s()
        if self._claim.is_free(now, mono_s):
            self._publish(state if self._is_mine(state) else taken_over(state, now))
        elif state.lease is not None:
            self._note = f"console {state.lease.console} drives it; this one takes over when that one is gone"

    def _lead(self) -> None:
        """One step, published before it is acted on."""
        mono_s = self._clocks.mono_s()
        if mono_s - self._published_s >= RENEW_S:
            self._publish(self._known())
        state = self._known()
        if not self._claim.may_act(mono_s) or not self._is_known(state):
            return
        now = self._clocks.wall_s()
        request = self.view.request
        if request is not None and _waits(state, request):
            self._obey(state, request, now)
            return
        if state.phase is Phase.PLANNED:
            state = self._write_pages(state)
        stepped, actions = rules.step(state, self.view.seen(state), now)
        if rules.is_news(state, stepped):
            self._publish(stepped)
            return
        if stepped != state:
            self.state = stepped
            if mono_s - self._published_s >= _COUNTS_S:
                self._publish(stepped)
        self._act(actions)

    def _obey(self, state: State, request: Request, now: float) -> None:
        problem = ""
        try:
            state = _obeyed(state, request.verb, self.view, now)
        except RolloutRefused as error:
            problem = str(error)
        self._publish(replace(state, answered=Answered(request=request.id, problem=problem[:500])))
        self.broker.publish(self.view.request_topic, b"", retain=True)

    def _act(self, actions: rules.Actions) -> None:
        state = self._known()
        plan = state.plan
        if actions.offer:
            self._desire(actions.offer, plan, plan.version, within_s=len(actions.offer) // _OFFERS_PER_S)
        if actions.move_alias:
            self._move_alias(state)
        if actions.clear:
            self._desire(actions.clear, plan, None, within_s=len(actions.clear) // _RELEASES_PER_S)

    def _desire(self, ids: Sequence[str], plan: Plan, version: int | None, *, within_s: int) -> None:
        """Tells devices what to run; as many as the lease allows."""
        bodies = {
            device_id: desired.with_version(
                self.view.desired_of(device_id), plan.name, version, within_s=within_s
            )
            for device_id in ids
        }
        for first in range(0, len(ids), _CHUNK):
            if not self._claim.may_act(self._clocks.mono_s()):
                return
            self._tell_devices({device_id: bodies[device_id] for device_id in ids[first : first + _CHUNK]})
            if self._clocks.mono_s() - self._published_s >= RENEW_S:
                self._publish(self._known())

    def _tell_devices(self, bodies: Mapping[str, bytes]) -> None:
        topics = {device_id: self.view.desired_topic(device_id) for device_id in bodies}
        self.broker.publish_all(
            [Outgoing(topic=topics[each], body=bodies[each], retain=True) for each in bodies]
        )
        for device_id, body in bodies.items():
            self.view.told(device_id, body)

    def _move_alias(self, state: State) -> None:
        if self._clocks.mono_s() < self._waits.until_s:
            self._note = state.reason
            return
        try:
            self._registry.move_alias(state.plan)
        except RolloutRefused as error:
            self._publish(rules.halt(state, str(error), self._clocks.wall_s()))
        except EdgeAgentError as error:
            wait_s = self._waits.next_s()
            self._waits.until_s = self._clocks.mono_s() + wait_s
            self._note = f"the alias has not moved yet: {error.message}; again in {wait_s:.0f} s"
            self.state = replace(state, reason=self._note[:500])
        else:
            self._waits = _Backoff()
            self._publish(replace(rules.alias_moved(state), reason=""))

    def _write_pages(self, state: State) -> State:
        """What is known of the devices before the first is told anything."""
        pages = pages_of(_before(self.view.devices(), state.plan), state.id)
        for number, page in enumerate(pages):
            self.broker.publish(self.view.page_topic(number), page.encode(), retain=True)
            self.view.remember(number, page)
        return replace(state, pages=len(pages))

    def _publish(self, state: State) -> None:
        """Lets everybody know this state, and this console's lease."""
        mono_s = self._clocks.mono_s()
        is_news = self.state is None or rules.is_news(self.state, state) or not self._claim.holds(mono_s)
        self.state = self._claim.claims(state, self._clocks.wall_s(), mono_s)
        self._published_s = mono_s
        if is_news:
            self._written_seq = self.state.seq
        self.broker.publish(self.view.state_topic, self.state.encode(), retain=True)

    def _is_known(self, state: State) -> bool:
        """The broker has given back what this console has written; what it has only heard is known anyway."""
        return not self._is_mine(state) or self._claim.top >= self._written_seq

    def _is_mine(self, state: State) -> bool:
        return state.lease is not None and state.lease.console == self._claim.console

    def _known(self) -> State:
        if self.state is None:
            raise no_rollout() if self.view.problem is None else self.view.problem
        return self.state

    def _say(self, note: str) -> None:
        self.tell(Progress(state=self.state, leads=self._claim.holds(self._clocks.mono_s()), note=note))


def check_nothing_active(view: View) -> None:
    """
    Raises:
        RolloutRefused: there is a rollout that is not over.
        StateUnreadable: there is something that this console does not understand.
    """
    if view.problem is not None:
        raise view.problem
    if view.heard is not None and view.heard.phase not in OVER:
        raise active(view.heard)


def _read(watch: Watch, view: View, mono_s: Callable[[], float]) -> None:
    """What has come, for a moment: a large fleet is never quiet."""
    until_s = mono_s() + _READING_S
    timeout_s = TURN_S
    while (message := watch.next(timeout_s)) is not None:
        view.take(message.topic, message.body)
        timeout_s = _QUIET_S
        if mono_s() >= until_s:
            break
    if watch.renewed:
        raise BrokerUnreachable("the connection to the broker was lost, and is there again")


class _Backoff:
    """How long to wait: 1, 2, 4, … seconds."""

    def __init__(self) -> None:
        self.until_s = 0.0
        self._wait_s = 0.5

    def next_s(self) -> float:
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
        return self._wait_s


def _obeyed(state: State, verb: Verb, view: View, now: float) -> State:
    """
    Raises:
        RolloutRefused: it makes no sense now.
    """
    if verb is Verb.PAUSE:
        return rules.pause(state, now)
    return rules.abort(state, now) if verb is Verb.ABORT else rules.resume(state, view.seen(state), now)


def _no_pages(view: View, state: State) -> list[Outgoing]:
    return [Outgoing(topic=view.page_topic(page), body=b"", retain=True) for page in range(state.pages)]


def _before(devices: Iterable[Device], plan: Plan) -> Mapping[str, Before]:
    """Of those that have the model."""
    return {each.device_id: Before.of(each, plan) for each in devices if each.model(plan.name) is not None}


def _waits(state: State, request: Request | None) -> bool:
    """It is about this rollout, and not answered."""
    answered = state.answered.request if state.answered is not None else ""
    return request is not None and request.rollout == state.id and request.id != answered


def active(state: State) -> RolloutRefused:
    """There is a rollout that is not over."""
    name = state.plan.name
    return RolloutRefused(
        f"a rollout of {name!r} to version {state.plan.version} is {state.phase}",
        remedy=f"continue it with `edge-agent fleet rollout resume {name}`, or end it with "
        f"`edge-agent fleet rollout abort {name}`",
    )


def no_rollout() -> RolloutRefused:
    return RolloutRefused(
        "the broker has no rollout of this name",
        remedy="begin one with `edge-agent fleet rollout NAME VERSION`",
    )
