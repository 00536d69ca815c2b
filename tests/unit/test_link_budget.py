"""When downloads may use the line, and when another version may take over: rules, at hundreds of instants."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.host.clock import SET_AFTER_S
from edge_agent.settings.link import LinkSettings
from edge_agent.sync.protocol import NO_BOUNDS
from edge_agent.updates import link_budget
from edge_agent.updates.link_budget import Held, LinkPlan, activation_held, bounds, held

ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Africa/Cairo", "Australia/Lord_Howe", "Pacific/Apia"]
START = datetime(2026, 1, 1, tzinfo=UTC).timestamp() + 86_400
DAY_S = 86_400


def plan(**link: object) -> LinkPlan:
    return LinkPlan(LinkSettings.model_validate({"timezone": "UTC", **link}))


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


# --- Downloads -----------------------------------------------------------------------------------------


def test_without_settings_nothing_is_held_not_even_by_a_clock_that_is_not_set() -> None:
    for now in (0.0, SET_AFTER_S - 1, START):
        assert held(now, plan(), 10**12) is None
        assert activation_held(now, plan(), "") is None
        assert bounds(now, plan(), 0) == NO_BOUNDS


@pytest.mark.parametrize(
    ("now", "used", "wanted"),
    [
        ("2026-06-01 12:00", 0, Held(by="link.windows", until_s=at("2026-06-01 22:00"))),
        ("2026-06-01 22:00", 0, None),
        ("2026-06-02 04:59:59", 99, None),
        ("2026-06-02 05:00", 0, Held(by="link.windows", until_s=at("2026-06-02 22:00"))),
        ("2026-06-01 22:30", 100, Held(by="link.bytes_per_day", until_s=at("2026-06-02 00:00"))),
        ("2026-06-02 01:00", 100, Held(by="link.bytes_per_day", until_s=at("2026-06-03 00:00"))),
        ("2026-06-02 12:00", 100, Held(by="link.bytes_per_day", until_s=at("2026-06-03 00:00"))),
    ],
)
def test_the_window_and_the_days_bytes_hold_until_both_allow_it(
    now: str, used: int, wanted: Held | None
) -> None:
    assert held(at(now), plan(windows=["22:00-05:00"], bytes_per_day=100), used) == wanted


def test_used_bytes_hold_until_the_first_window_of_the_next_day() -> None:
    found = held(at("2026-06-01 13:00"), plan(windows=["12:00-14:00"], bytes_per_day=100), 100)
    assert found == Held(by="link.bytes_per_day", until_s=at("2026-06-02 12:00"))


@given(
    zone=st.sampled_from(ZONES),
    now=st.floats(START, START + 400 * DAY_S),
    start=st.integers(0, 1439),
    length=st.integers(1, 1439),
    used=st.sampled_from([0, 99, 100, 10**9]),
    per_day=st.sampled_from([0, 100]),
)
def test_what_is_held_is_free_at_the_instant_that_is_named_and_not_before(
    zone: str, now: float, start: int, length: int, used: int, per_day: int
) -> None:
    end = (start + length) % 1440
    window = f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    link = plan(windows=[window], bytes_per_day=per_day, timezone=zone)
    found = held(now, link, used)
    if found is None:
        job = bounds(now, link, used)
        assert job.until_s is not None
        assert job.since_s < now < job.until_s <= now + 2 * DAY_S
        assert held(job.until_s, link, used) is not None
        assert held(job.until_s - 1, link, used) is None or job.until_s - 1 < now
        return
    assert bounds(now, link, used).allowed_bytes == 0
    assert found.until_s is not None
    assert now < found.until_s <= now + 3 * DAY_S
    of_that_day = used if link.same_day(found.until_s, now) else 0
    assert held(found.until_s, link, of_that_day) is None
    draw = random.Random(now)
    for _ in range(5):
        before = draw.uniform(now, found.until_s - 1e-3)
        assert held(before, link, used if link.same_day(before, now) else 0) is not None


@given(
    instants=st.lists(st.floats(START, START + 400 * DAY_S), min_size=2, max_size=20),
    zone=st.sampled_from(ZONES),
)
def test_a_clock_that_jumps_has_the_answers_of_its_new_time(instants: list[float], zone: str) -> None:
    link = plan(windows=["22:00-05:00"], bytes_per_day=100, timezone=zone)
    alone = {
        now: held(now, plan(windows=["22:00-05:00"], bytes_per_day=100, timezone=zone), 50)
        for now in instants
    }
    for now in [*instants, *reversed(instants)]:
        assert held(now, link, 50) == alone[now]


def test_a_sync_stops_with_the_window_and_with_what_the_day_has_left() -> None:
    job = bounds(at("2026-06-01 23:00"), plan(windows=["22:00-05:00"], bytes_per_day=10**9), 10**9 - 7)
    assert (job.allowed_bytes, job.until_s) == (7, at("2026-06-02 05:00"))
    assert job.ahead_bytes == 10**9 // 64
    assert bounds(at("2026-06-01 23:00"), plan(windows=["00:00-24:00"]), 0).until_s is None
    assert bounds(START, plan(windows=["00:00-24:00"]), 0).allowed_bytes is None


def test_what_an_operator_wants_now_has_no_bound_and_is_counted() -> None:
    job = link_budget.no_bounds(plan(bytes_per_day=10**9, windows=["22:00-05:00"]))
    assert (job.allowed_bytes, job.until_s) == (None, None)
    assert job.ahead_bytes > 0
    assert link_budget.no_bounds(plan(windows=["22:00-05:00"])) == NO_BOUNDS


@pytest.mark.parametrize("link", [{"windows": ["00:00-24:00"]}, {"bytes_per_day": 100}])
@pytest.mark.parametrize("now", [0.0, 1e9, SET_AFTER_S - 1])
def test_a_clock_that_is_not_set_holds_what_depends_on_the_time(link: dict[str, object], now: float) -> None:
    found = held(now, plan(**link), 0)
    assert found is not None
    assert (found.until_s, "clock" in found.by) == (None, True)
    assert bounds(now, plan(**link), 0).allowed_bytes == 0
    assert held(SET_AFTER_S, plan(**link), 0) is None


@pytest.mark.parametrize("change", ["2026-03-29", "2026-10-25"])
def test_a_day_of_23_or_25_hours_is_a_day(change: str) -> None:
    berlin = plan(bytes_per_day=100, timezone="Europe/Berlin")
    noon = at(f"{change} 12:00", "Europe/Berlin")
    before, after = at(f"{change} 00:00", "Europe/Berlin"), berlin.next_day(noon)
    assert (after - before) / 3600 == {"2026-03-29": 23, "2026-10-25": 25}[change]
    assert berlin.same_day(before, noon)
    assert berlin.same_day(after - 1, noon)
    assert not berlin.same_day(after, noon)
    assert not berlin.same_day(before - 1, noon)


# --- Taking over ---------------------------------------------------------------------------------------


def test_a_version_takes_over_in_its_windows_and_never_while_the_file_is_there() -> None:
    night = plan(activate_windows=["03:00-05:00"], windows=["22:00-02:00"])
    assert activation_held(at("2026-06-01 03:00"), night, "") is None
    assert activation_held(at("2026-06-01 12:00"), night, "") == Held(
        by="link.activate_windows", until_s=at("2026-06-02 03:00")
    )
    for now in ("2026-06-01 03:00", "2026-06-01 12:00"):
        assert activation_held(at(now), night, "the file") == Held(by="the file", until_s=None)
    assert activation_held(at("2026-06-01 12:00"), plan(windows=["22:00-02:00"]), "") is None
    unset = activation_held(0.0, night, "")
    assert unset is not None
    assert unset.until_s is None


# --- For people ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "until", "shown"),
    [
        ("UTC", "2026-06-01 22:00", "22:00 UTC"),
        ("Europe/Berlin", "2026-06-01 22:00", "2026-06-02 00:00 Europe/Berlin"[11:]),
        ("UTC", "2026-06-02 12:00", "2026-06-02 12:00 UTC"),
    ],
)
def test_an_instant_is_shown_in_the_settings_zone(zone: str, until: str, shown: str) -> None:
    assert plan(timezone=zone).shown(at(until), at("2026-06-01 12:00")) == shown


def test_the_hosts_own_zone_needs_no_name() -> None:
    assert len(LinkPlan(LinkSettings()).shown(START + 3600, START)) == len("22:00")
