"""When downloads may use the line, and when another version may take over: the rules of `[link]`.

Pure: instants, and what was used and seen, are passed in, and nothing is remembered. So a clock that jumps, a day that
has 23 hours and a daemon that starts again need no rule of their own. While the clock is not set, nobody knows what the
time of day is: what depends on it is held, and an operator may overrule that.
Decision: docs/adr/0015-the-lines-budget.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.host.clock import SET_AFTER_S
from edge_agent.host.daily_windows import DailyWindows, WallClock, zone_of
from edge_agent.settings.link import LinkSettings
from edge_agent.sync.protocol import NO_BOUNDS, LinkJob

_LEAST_AHEAD_BYTES, _MOST_AHEAD_BYTES = 64 << 10, 16 << 20
_SET_BACK_S = 300.0
"""A clock that is set back by more than this ends a fetch: whether the window is open is asked anew."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """It must wait.

    Attributes:
        by: the setting that holds it, and what of it, for people.
        until_s: seconds since 1970; None where nobody knows.
    """

    by: str
    until_s: float | None


class LinkPlan:
    """`[link]`, ready to be asked. Without a setting nothing is ever held.

    Args:
        link: checked.
    """

    def __init__(self, link: LinkSettings) -> None:
        self._clock = WallClock(zone_of(link.timezone))
        self._zone = link.timezone
        self.bytes_per_day = link.bytes_per_day
        self.windows = DailyWindows(link.windows, self._clock)
        self.activate_windows = DailyWindows(link.activate_windows, self._clock)
        self.inhibit_file = link.inhibit_file

    def same_day(self, at_s: float, now_s: float) -> bool:
        return self._clock.face(at_s).date() == self._clock.face(now_s).date()

    def next_day(self, now_s: float) -> float:
        """The first instant of the next day, in seconds since 1970."""
        midnight = self._clock.first(now_s, lambda at_s: not self.same_day(at_s, now_s), (0,))
        return midnight if midnight is not None else now_s

    def shown(self, at_s: float, now_s: float) -> str:
        """An instant for people: `22:00`, with its date where that is not within a day."""
        near = abs(at_s - now_s) < 86_400
        return self._clock.face(at_s).strftime("%H:%M" if near else "%Y-%m-%d %H:%M") + (
            f" {self._zone}" if self._zone else ""
        )


def held(now_s: float, plan: LinkPlan, used_bytes: int) -> Held | None:
    """Whether a download must wait.

    Args:
        now_s: seconds since 1970.
        used_bytes: that came today.

    Returns:
        None where it may begin now.
    """
    if not (plan.windows or plan.bytes_per_day):
        return None
    if now_s < SET_AFTER_S:
        return Held(by="the clock of this device is not set", until_s=None)
    is_open = plan.windows.open_at(now_s)
    has_bytes = not plan.bytes_per_day or used_bytes < plan.bytes_per_day
    if is_open and has_bytes:
        return None
    since_s = now_s if has_bytes else plan.next_day(now_s)
    return Held(by="link.windows" if has_bytes else "link.bytes_per_day", until_s=plan.windows.opens(since_s))


def bounds(now_s: float, plan: LinkPlan, used_bytes: int) -> LinkJob:
    """What a sync that begins now may take of the line. It holds itself to that, and counts."""
    allowed_bytes = max(0, plan.bytes_per_day - used_bytes) if plan.bytes_per_day else None
    job = LinkJob(
        allowed_bytes=0 if held(now_s, plan, used_bytes) else allowed_bytes,
        ahead_bytes=_ahead_bytes(plan),
    )
    until_s = plan.windows.closes(now_s)
    if not plan.windows or until_s is None or job.allowed_bytes == 0:
        return job
    return LinkJob(
        allowed_bytes=job.allowed_bytes,
        since_s=now_s - _SET_BACK_S,
        until_s=until_s,
        ahead_bytes=job.ahead_bytes,
    )


def no_bounds(plan: LinkPlan) -> LinkJob:
    """For an operator who wants a version now: what comes is counted, and holds up what comes after it."""
    return LinkJob(ahead_bytes=_MOST_AHEAD_BYTES) if plan.bytes_per_day else NO_BOUNDS


def activation_held(now_s: float, plan: LinkPlan, inhibited: str) -> Held | None:
    """Whether a version that is here must wait before it takes over.

    Args:
        now_s: seconds since 1970.
        inhibited: why the file keeps it from that; empty where it does not.
    """
    if inhibited:
        return Held(by=inhibited, until_s=None)
    if not plan.activate_windows:
        return None
    if now_s < SET_AFTER_S:
        return Held(by="the clock of this device is not set", until_s=None)
    if plan.activate_windows.open_at(now_s):
        return None
    return Held(by="link.activate_windows", until_s=plan.activate_windows.opens(now_s))


def _ahead_bytes(plan: LinkPlan) -> int:
    """One part in 64 of the day's bytes: few writes, and little that a power cut counts for nothing."""
    if not plan.bytes_per_day:
        return 0
    return min(_MOST_AHEAD_BYTES, max(_LEAST_AHEAD_BYTES, plan.bytes_per_day // 64))
