"""Windows of the day, held against a clock that is read minute by minute."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from edge_agent.host.daily_windows import DailyWindows, WallClock, Window, zone_of

CHANGES = [
    ("Europe/Berlin", "2026-03-29 01:00"),  # 02:00 → 03:00
    ("Europe/Berlin", "2026-10-25 01:00"),  # 03:00 → 02:00
    ("America/New_York", "2026-11-01 06:00"),
    ("Africa/Cairo", "2026-04-23 22:00"),  # midnight does not exist
    ("America/Havana", "2026-11-01 05:00"),  # 01:00 → 00:00
    ("Australia/Lord_Howe", "2026-04-04 15:00"),  # by half an hour
    ("Asia/Kathmandu", "2026-06-01 00:00"),  # 05:45, and no change
    ("UTC", "2026-06-01 00:00"),
]
WINDOWS = [
    ["22:00-05:00"],
    ["02:00-03:00"],
    ["02:15-02:45"],
    ["02:30-03:30"],
    ["23:30-00:30", "00:30-01:00"],
    ["00:00-24:00"],
    ["01:00-02:00", "13:37-13:38"],
]


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def windows_of(texts: list[str], zone: str) -> DailyWindows:
    return DailyWindows(texts, WallClock(zone_of(zone)))


@pytest.mark.parametrize(("zone", "change"), CHANGES)
@pytest.mark.parametrize("texts", WINDOWS, ids=",".join)
def test_openings_and_closings_are_those_of_a_clock_that_is_read_every_minute(
    zone: str, change: str, texts: list[str]
) -> None:
    windows = windows_of(texts, zone)
    start = at(change) - 30 * 3600
    minutes = [start + 60 * number for number in range(60 * 24 * 3)]
    is_open = [shown_in(texts, datetime.fromtimestamp(minute, ZoneInfo(zone))) for minute in minutes]
    draw = random.Random(f"{zone}{texts}")
    for number in draw.sample(range(60 * 36), 60):
        now = minutes[number] + draw.choice([0, 0.25, 59.5])
        assert windows.open_at(now) == is_open[number]
        for found, wanted in ((windows.opens(now), True), (windows.closes(now), False)):
            if is_open[number] == wanted:
                assert found == now
                continue
            later = [m for m, o in zip(minutes[number:], is_open[number:], strict=True) if o == wanted]
            assert found == (later[0] if later else None)


def shown_in(texts: list[str], face: datetime) -> bool:
    """By the letters of the setting, as a person reads a clock."""
    now = face.strftime("%H:%M")
    for text in texts:
        start, end = text.split("-")
        if (start <= now < end) if start < end else (now >= start or now < end):
            return True
    return False


def test_what_the_clock_skips_comes_the_next_day_and_what_it_repeats_comes_twice() -> None:
    berlin = windows_of(["02:15-02:45"], "Europe/Berlin")
    assert berlin.opens(at("2026-03-29 00:00", "Europe/Berlin")) == at("2026-03-30 02:15", "Europe/Berlin")
    first = at("2026-10-25 00:15")
    assert berlin.opens(at("2026-10-25 00:00", "Europe/Berlin")) == first
    assert berlin.closes(first) == first + 1800
    assert berlin.opens(first + 1800) == first + 3600


def test_a_clock_that_is_set_back_or_forward_has_the_answer_of_its_new_time() -> None:
    windows = windows_of(["22:00-05:00"], "Europe/Berlin")
    draw = random.Random(1)
    instants = [at("2026-01-01 00:00") + draw.uniform(0, 400 * 86_400) for _ in range(300)]
    alone = [(windows.open_at(now), windows.opens(now)) for now in sorted(instants)]
    asked = dict(zip(sorted(instants), alone, strict=True))
    for before, now in pairwise(instants):  # in the order in which they were drawn: forwards and back
        windows.opens(before)
        assert (windows.open_at(now), windows.opens(now)) == asked[now]


def test_without_a_window_it_is_always_open() -> None:
    windows = windows_of([], "")
    assert not windows
    assert windows.open_at(0)
    assert (windows.opens(5.5), windows.closes(5.5)) == (5.5, None)


def test_the_hosts_own_zone_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        own = windows_of(["22:00-05:00"], "")
        named = windows_of(["22:00-05:00"], "Europe/Berlin")
        start = at("2026-03-28 00:00")
        for hour in range(72):
            now = start + 3600 * hour
            assert (own.opens(now), own.closes(now)) == (named.opens(now), named.closes(now))
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "22:00",
        "22-05",
        "22:00-5:00",
        "24:00-05:00",
        "22:60-23:00",
        "22:00-24:01",
        "22:00-22:00",
        "22:00–05:00",
    ],
)
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"HH:MM|24:00|empty"):
        Window.parse(text)


@pytest.mark.parametrize(
    "name", ["Mars/Olympus", "Europe", "../etc/passwd", "/etc/localtime", "x" * 5000, "a\0b"]
)
def test_a_zone_that_the_system_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="tzdata"):
        zone_of(name)


def test_utc_needs_no_tzdata() -> None:
    assert zone_of("UTC") is UTC
