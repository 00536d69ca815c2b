"""What happens next in a rollout. Pure: no clock, no broker, no registry.

Owns when a wave is passed and what halts it. `step` may be called as often as one likes: with the same devices and the
same time it changes nothing more, and what it asks for is asked for again until the broker or the registry has it.
Refuses to act for a device outside the waves so far.

    planned → offering: a wave's devices are told the version → soaking: all that can have taken it, and are watched →
    the next wave; after the last one finishing: the alias moves, then nobody is told anything any more → done

Offline devices do not hold a wave up: they are told too, take it when they are back, and are then watched like the
others. A device that was known at the start, and of which the broker has nothing now, does: the broker may have lost
more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from edge_agent.fleet.rollout.plan import RolloutRefused
from edge_agent.fleet.rollout.standing import Seen, Standing, counted
from edge_agent.fleet.rollout.state import (
    MAX_EXCUSED,
    MAX_LISTED,
    MAX_SUSPECTS,
    OVER,
    WAITING,
    Listed,
    Phase,
    State,
)

GRACE_S = 30.0
"""How long a device may be offline, degraded or slow before that counts: a restart of a broker is no fault of a
version. No wave is passed meanwhile."""
_SHOWN = 5
_ENDS = {Phase.FINISHING: Phase.DONE, Phase.ABORTING: Phase.ABORTED}


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What is to be done for a state, in this order.

    Attributes:
        offer: devices to be told the version.
        move_alias: the registry is to be told it.
        clear: devices that are told nothing any more.
    """

    offer: tuple[str, ...] = ()
    move_alias: bool = False
    clear: tuple[str, ...] = ()


NOTHING = Actions()


def step(state: State, seen: Sequence[Seen], now: float) -> tuple[State, Actions]:
    """One look at the fleet.

    Args:
        seen: every device that has the model.
        now: seconds since 1970.

    Returns:
        the state to publish before anything is done, and what to do for it. A phase that has just begun asks for
        nothing before the next step.
    """
    if state.phase in OVER or state.phase in WAITING:
        return state, NOTHING
    if state.phase in _ENDS:
        return _end(state, seen, now)
    if state.phase is Phase.PLANNED:
        return state.entered(Phase.OFFERING, now), NOTHING
    inside = in_waves(state, seen)
    state = _listing(_watched(state, inside, now), inside)
    if reason := _halting(state, inside, now):
        halted = replace(state.entered(Phase.HALTED, now, reason=reason), goes_back_to=state.phase)
        return replace(halted, suspects=state.suspects), NOTHING
    if (following := _following(state, inside, now)) is not state:
        return following, NOTHING
    untold = tuple(each.device_id for each in inside if each.desired != state.plan.version)
    return state, Actions(offer=untold)


def is_news(state: State, following: State) -> bool:
    """Whether there is more between two states than what they say for people."""
    return _bare(state) != _bare(following)


def _bare(state: State) -> State:
    return replace(state, counts={}, listed=(), speed=None, reason="", lease=None, at=0.0, seq=0)


def alias_moved(state: State) -> State:
    """The registry has confirmed the alias."""
    return replace(state, alias_moved=True)


def in_waves(state: State, seen: Iterable[Seen]) -> list[Seen]:
    """The devices of the waves so far."""
    return [each for each in seen if each.wave <= state.wave]


def halt(state: State, reason: str, now: float) -> State:
    """In `finishing`, before the alias has moved: it cannot."""
    return replace(state.entered(Phase.HALTED, now, reason=reason), goes_back_to=Phase.SOAKING)


def pause(state: State, now: float) -> State:
    """
    Raises:
        RolloutRefused: there is nothing to pause.
    """
    if state.phase is Phase.PAUSED:
        return state
    if state.phase not in (Phase.PLANNED, Phase.OFFERING, Phase.SOAKING):
        raise RolloutRefused(f"the rollout is {state.phase}: there is nothing to pause")
    paused = replace(
        state.entered(Phase.PAUSED, now, reason="paused by an operator"), goes_back_to=state.phase
    )
    return replace(paused, soak_until=max(0.0, state.soak_until - now) if state.soak_until else 0.0)


def resume(state: State, seen: Sequence[Seen], now: float) -> State:
    """Goes on where it was, without the devices of which the broker has nothing any more. After a halt, also in spite
    of those that have failed or are in trouble now.

    Raises:
        RolloutRefused: it is over, or too many devices would have to be excused.
    """
    if state.phase in OVER:
        raise RolloutRefused(f"the rollout is {state.phase}: start another one")
    if state.phase not in WAITING or state.goes_back_to is None:
        return state
    inside, left_s = in_waves(state, seen), state.soak_until
    excused = state.excused | {each.device_id for each in inside if not each.known}
    if state.phase is Phase.HALTED:
        excused |= {
            each.device_id for each in inside if each.standing is Standing.FAILED or each.trouble
        } | state.suspects.keys()
        left_s = state.plan.limits.soak_s
    if len(excused) > MAX_EXCUSED:
        raise RolloutRefused(
            f"{len(excused)} devices have failed or are in trouble: abort the rollout instead"
        )
    again = replace(state.entered(state.goes_back_to, now), goes_back_to=None, excused=excused)
    return replace(again, soak_until=now + left_s) if again.phase is Phase.SOAKING else again


def abort(state: State, now: float) -> State:
    """
    Raises:
        RolloutRefused: it is over, or all devices have passed and the alias moves.
    """
    if state.phase is Phase.DONE or state.phase is Phase.FINISHING:
        raise RolloutRefused(
            f"the rollout is {state.phase}: the last wave has passed, and the alias moves",
            remedy=f"to go back, roll out version {state.plan.instead_of} or set {state.plan.uri} to it",
        )
    if state.phase in (Phase.ABORTED, Phase.ABORTING):
        return state
    reason = f"aborted by an operator; it was {state.phase}"
    if state.phase is Phase.HALTED:
        reason += f": {state.reason}"
    return replace(state.entered(Phase.ABORTING, now, reason=reason), goes_back_to=None)


def _end(state: State, seen: Sequence[Seen], now: float) -> tuple[State, Actions]:
    """The alias moves before anybody is released: a device that follows it must not go back in between.

    A console that may not read what is retained for devices releases all that may have been told.
    """
    if state.phase is Phase.FINISHING and not state.alias_moved:
        return state, Actions(move_alias=True)
    told = tuple(
        each.device_id
        for each in seen
        if each.desired == state.plan.version or (each.wave <= state.wave and not each.released)
    )
    if told:
        return state, Actions(clear=told)
    return state.entered(_ENDS[state.phase], now, reason=state.reason), NOTHING


def _watched(state: State, inside: Iterable[Seen], now: float) -> State:
    """The suspects of now. One stays until it answers again with the version, untroubled."""
    suspects = {}
    for each in inside:
        if each.device_id in state.excused or each.standing is Standing.FAILED:
            continue
        known = state.suspects.get(each.device_id)
        if each.trouble or (known is not None and each.standing is not Standing.TAKEN):
            suspects[each.device_id] = known if known is not None else now
    if len(suspects) > MAX_SUSPECTS:
        oldest = sorted(suspects, key=lambda device_id: (suspects[device_id], device_id))
        suspects = {device_id: suspects[device_id] for device_id in oldest[:MAX_SUSPECTS]}
    return state if suspects == state.suspects else replace(state, suspects=suspects)


def _halting(state: State, inside: Sequence[Seen], now: float) -> str:
    """Why the rollout halts now; empty if it goes on."""
    limits, version = state.plan.limits, state.plan.version
    counting = [each for each in inside if each.device_id not in state.excused]
    failed = [each for each in counting if each.standing is Standing.FAILED]
    if len(failed) > limits.max_failed:
        shown = _shown(f"{each.device_id} ({each.code})" for each in failed)
        return f"{len(failed)} failed with version {version}, at most {limits.max_failed} may: {shown}"
    troubled = {each.device_id: each for each in counting if each.trouble}
    lasting = [device_id for device_id, since in state.suspects.items() if now - since >= GRACE_S]
    if len(troubled) > MAX_SUSPECTS:
        lasting = sorted(troubled)
    if not lasting:
        return ""
    shown = _shown(f"{device_id} ({_trouble(troubled.get(device_id))})" for device_id in lasting)
    return f"in trouble since version {version} was taken: {shown}"


def _trouble(seen: Seen | None) -> str:
    if seen is None:
        return "does not answer with it any more"
    return f"{seen.trouble}, {seen.speed:.0%} of its speed" if seen.speed is not None else seen.trouble


def _shown(words: Iterable[str]) -> str:
    listed = list(words)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _following(state: State, inside: Sequence[Seen], now: float) -> State:
    """The next phase, if this one is complete; else the same state."""
    if state.phase is Phase.OFFERING:
        untold = any(each.desired != state.plan.version for each in inside)
        waits = any(
            each.standing is Standing.PENDING and each.device_id not in state.excused for each in inside
        )
        nobody = not any(each.standing is Standing.TAKEN for each in inside)
        if untold or waits or nobody:
            return state
        return replace(state.entered(Phase.SOAKING, now), soak_until=now + state.plan.limits.soak_s)
    lost = any(not each.known and each.device_id not in state.excused for each in inside)
    if now < state.soak_until or state.suspects or lost:
        return state
    if state.wave + 1 < len(state.plan.waves):
        return replace(state.entered(Phase.OFFERING, now), wave=state.wave + 1)
    return state.entered(Phase.FINISHING, now)


def _listing(state: State, inside: Sequence[Seen]) -> State:
    """For people: how many stand how, and the first of those that have not simply taken it."""
    odd = [each for each in inside if each.trouble or each.standing not in (Standing.TAKEN, Standing.PENDING)]
    odd.sort(key=lambda each: (each.standing is not Standing.FAILED, not each.trouble, each.device_id))
    listed = tuple(
        Listed(device=each.device_id, standing=str(each.standing), code=each.trouble or each.code)
        for each in odd[:MAX_LISTED]
    )
    speeds = sorted(each.speed for each in inside if each.speed is not None)
    speed = round(speeds[len(speeds) // 2], 3) if speeds else None
    return replace(state, counts=counted(inside), listed=listed, speed=speed)
