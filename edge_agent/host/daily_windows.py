"""Windows of the day, `22:00-05:00`, on a clock as it hangs on the wall. No I/O: instants are passed in.

A window is open while the clock shows a time in it. So what the start of daylight saving time skips is not there that
day, and what its end repeats is there twice. Nothing is remembered: whatever the clock is set to, the same instant has
the same answer.
"""

from __future__ import annotations

import math
import re
import zoneinfo
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo

_DAY_S = 86_400
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]|24):([0-5]\d)")
_MAX_CHANGES = 400
"""More than 32 windows and a change of the clock have in five days."""


def zone_of(name: str) -> tzinfo | None:
    """A time zone by its IANA name; None for the host's own, which has no name here.

    Raises:
        ValueError: the system does not know it.
    """
    if not name:
        return None
    if name == "UTC":  # needs no tzdata
        return UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(
            f"{name[:80]!r} is not in this system's tzdata; use an IANA name such as Europe/Berlin, "
            "and install the package tzdata if it is missing"
        ) from error


class WallClock:
    """What the clock on the wall shows at an instant.

    Args:
        zone: as of `zone_of`.
    """

    def __init__(self, zone: tzinfo | None = None) -> None:
        self._zone = zone

    def face(self, at_s: float) -> datetime:
        """
        Args:
            at_s: seconds since 1970.

        Returns:
            Date and time of day, without a zone.
        """
        return datetime.fromtimestamp(at_s, self._zone).replace(tzinfo=None, fold=0)

    def first(self, at_s: float, holds: Callable[[float], bool], minutes: Iterable[int]) -> float | None:
        """The first instant from `at_s` on at which something holds that changes with the face only.

        Args:
            minutes: of the day, at which it may change.

        Returns:
            Seconds since 1970, or None where it never holds.
        """
        marks = tuple(minutes)
        for _ in range(_MAX_CHANGES):
            if holds(at_s):
                return at_s
            if not marks:
                return None
            at_s = self._next_change(math.floor(at_s), marks)
        return None

    def _next_change(self, at_s: int, marks: tuple[int, ...]) -> float:
        """When the face comes to a mark, or is set to another time before that."""
        face = self.face(at_s)
        shown_s = face.hour * 3600 + face.minute * 60 + face.second
        then_s = at_s + min((mark * 60 - shown_s) % _DAY_S or _DAY_S for mark in marks)
        offset_s = self._offset_s(at_s)
        if self._offset_s(then_s) == offset_s:
            return then_s
        before_s = at_s
        while then_s - before_s > 1:
            middle_s = (before_s + then_s) // 2
            if self._offset_s(middle_s) == offset_s:
                before_s = middle_s
            else:
                then_s = middle_s
        return then_s

    def _offset_s(self, at_s: int) -> float:
        return self.face(at_s).replace(tzinfo=UTC).timestamp() - at_s


@dataclass(frozen=True, kw_only=True)
class Window:
    """From a minute of the day up to another one, over midnight where that comes first."""

    start_minute: int
    end_minute: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """Reads `HH:MM-HH:MM`.

        Raises:
            ValueError: it is something else.
        """
        match = _WINDOW.fullmatch(text)
        if not match:
            raise ValueError(f"{text[:40]!r} must be HH:MM-HH:MM, such as 22:00-05:00")
        start_h, start_m, end_h, end_m = map(int, match.groups())
        start, end = start_h * 60 + start_m, end_h * 60 + end_m
        if end > 24 * 60:
            raise ValueError(f"{text!r} ends after 24:00")
        if start == end:
            raise ValueError(f"{text!r} is empty; leave it out for no bound")
        return cls(start_minute=start, end_minute=end)

    def has(self, minute: int) -> bool:
        if self.start_minute < self.end_minute:
            return self.start_minute <= minute < self.end_minute
        return minute >= self.start_minute or minute < self.end_minute


class DailyWindows:
    """Windows that come every day. Without one, it is always open.

    Args:
        windows: `HH:MM-HH:MM` each.

    Raises:
        ValueError: one of them is something else.
    """

    def __init__(self, windows: Iterable[str], clock: WallClock) -> None:
        self._windows = tuple(Window.parse(window) for window in windows)
        self._clock = clock

    def __bool__(self) -> bool:
        return bool(self._windows)

    def open_at(self, at_s: float) -> bool:
        face = self._clock.face(at_s)
        return not self._windows or any(w.has(face.hour * 60 + face.minute) for w in self._windows)

    def opens(self, at_s: float) -> float | None:
        """The first instant from `at_s` on at which one is open; None for one that no day of the next has."""
        return self._clock.first(at_s, self.open_at, self._minutes())

    def closes(self, at_s: float) -> float | None:
        """The first instant from `at_s` on at which none is open; None for never."""
        return self._clock.first(at_s, lambda at_s: not self.open_at(at_s), self._minutes())

    def _minutes(self) -> Iterator[int]:
        for window in self._windows:
            yield from (window.start_minute, window.end_minute)
