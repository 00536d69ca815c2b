"""A rollout for people: in place on a terminal, a line for each change in a pipe; and as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edge_agent import terminal
from edge_agent.fleet.rollout.console import Progress
from edge_agent.fleet.rollout.plan import Plan
from edge_agent.fleet.rollout.standing import Standing
from edge_agent.fleet.rollout.state import OVER, Phase, State
from edge_agent.terminal import Rows

Tell = Callable[[Progress], None]

_BAR = 30
_LISTED = 15
_SAID = (Standing.TAKEN, Standing.FAILED, Standing.PENDING)
_WORDS = {Standing.CANNOT_RUN: "cannot run it"}


def document(state: State) -> dict[str, Any]:
    """`fleet rollout status --json`."""
    counts = state.counts
    return {
        "name": state.plan.name,
        "version": state.plan.version,
        "state": str(state.phase),
        "wave": state.wave + 1,
        "waves": len(state.plan.waves),
        **{str(standing): counts.get(standing, 0) for standing in Standing},
        "reason": state.reason,
        "instead_of": state.plan.instead_of,
        "uri": state.plan.uri,
        "speed": state.speed,
        "soak_until": state.soak_until if state.phase is Phase.SOAKING else None,
        "at": state.at,
        "console": state.lease.console if state.lease else None,
        "look_at": [vars(entry) for entry in state.listed],
    }


def plan_page(plan: Plan) -> list[str | Rows]:
    """What is going to happen."""
    limits = plan.limits
    rows: list[tuple[object, ...]] = [(wave.title, wave.devices) for wave in plan.waves]
    return [
        f"version {plan.version} of {plan.name} instead of {plan.instead_of} ({plan.uri})",
        Rows(("WAVE", "DEVICES SO FAR"), rows),
        f"each wave is watched for {terminal.span(limits.soak_s)}; the rollout halts if more than "
        f"{limits.max_failed} devices fail, or one is offline, degraded or slower than {limits.min_speed:.0%} of "
        "before after it took the version",
    ]


def page(state: State, *, now: float, note: str = "") -> list[str | Rows]:
    """Where a rollout is.

    Args:
        now: seconds since 1970.
        note: what this console waits for.
    """
    wave = state.plan.waves[state.wave]
    taken = state.counts.get(Standing.TAKEN, 0)
    whole = state.plan.waves[-1].devices
    parts: list[str | Rows] = [
        f"{state.plan.name}: version {state.plan.version} instead of {state.plan.instead_of}: {state.phase}",
        f"wave {state.wave + 1} of {len(state.plan.waves)} ({wave.title}), {wave.devices} of {whole} devices  "
        f"{bar(taken, wave.devices, whole)}",
        tally(state),
    ]
    if state.phase is Phase.SOAKING:
        parts.append(f"watched for another {terminal.span(max(0.0, state.soak_until - now))}")
    if state.speed is not None:
        parts.append(f"median speed {state.speed:.0%} of before")
    if state.suspects:
        parts.append(f"in trouble since they took it: {len(state.suspects)}")
    parts += [text for text in (_why(state), note) if text]
    if state.listed:
        rows: list[tuple[object, ...]] = [
            (entry.device, entry.standing, entry.code) for entry in state.listed[:_LISTED]
        ]
        parts += ["", Rows(("LOOK AT", "", "CODE"), rows)]
        if (more := len(state.listed) - len(rows)) > 0:
            parts.append(f"and {more} more")
    return parts


def bar(taken: int, wave: int, whole: int) -> str:
    """What has been taken, what else the wave has, and the rest."""
    done, open_ = (round(_BAR * min(count, whole) / whole) for count in (taken, max(taken, wave)))
    return "█" * done + "▒" * (open_ - done) + "░" * (_BAR - open_)


def tally(state: State) -> str:
    """How many devices of the waves so far stand how."""
    counts = state.counts
    said = [f"{counts.get(standing, 0)} {standing}" for standing in _SAID]
    rest = [
        f"{counts[standing]} {_WORDS.get(standing, str(standing))}"
        for standing in Standing
        if standing not in _SAID and counts.get(standing)
    ]
    return ", ".join((*said, *rest))


def line(state: State, note: str) -> str:
    """Where a rollout is, in a pipe."""
    where = f"wave {state.wave + 1} of {len(state.plan.waves)} ({state.plan.waves[state.wave].title})"
    told = "; ".join(filter(None, (_why(state), note if note != state.reason else "")))
    return f"{state.phase}, {where}: {tally(state)}" + (f": {told}" if told else "")


def _why(state: State) -> str:
    """The reason, where the phase has just been named: not `aborted: aborted by an operator`."""
    return state.reason.removeprefix(f"{state.phase} ")


def ended(state: State) -> str:
    """How a rollout ended that is not done: its phase and why, where the reason does not name the phase itself."""
    return state.reason if state.reason.startswith(state.phase) else f"{state.phase}: {state.reason}"


def what_next(state: State) -> str:
    """What an operator may do now; empty if nothing."""
    name = state.plan.name
    if state.phase is Phase.HALTED:
        return (
            f"`edge-agent fleet rollout abort {name}` brings the devices back to version {state.plan.instead_of}; "
            f"`edge-agent fleet rollout resume {name}` goes on without those that have failed or are in trouble"
        )
    if state.phase in OVER:
        return ""
    return (
        f"`edge-agent fleet rollout resume {name}` continues it, here or elsewhere; "
        f"`edge-agent fleet rollout abort {name}` ends it"
    )


@contextmanager
def shown(*, as_json: bool) -> Iterator[Tell]:
    """Where progress goes: a live page, or lines; with JSON the lines go to stderr."""
    if as_json or not sys.stdout.isatty():
        yield _Lines(err=as_json)
        return
    with terminal.live_page() as show:
        yield (
            lambda progress: (
                show(page(progress.state, now=time.time(), note=progress.note))
                if progress.state is not None
                else show([progress.note])
            )
        )


class _Lines:
    """One line for each change."""

    def __init__(self, *, err: bool) -> None:
        self._err = err
        self._last = ""

    def __call__(self, progress: Progress) -> None:
        text = progress.note if progress.state is None else line(progress.state, progress.note)
        if text and text != self._last:
            self._last = text
            terminal.echo(f"{terminal.moment(time.time())}  {text}", err=self._err)
