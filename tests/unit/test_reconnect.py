"""When the next connection is tried."""

from __future__ import annotations

import random

import pytest

from edge_agent.transport.reconnect import (
    RETRY_LAST_S,
    STEADY_S,
    TAKEN_OVER_FIRST_S,
    TAKEN_OVER_S,
    Ending,
    Reconnect,
)

GOOD = Ending(lasted_s=STEADY_S, connected=True)
SHORT = Ending(lasted_s=STEADY_S - 1, connected=True)
REFUSED = Ending(lasted_s=0.1, refused=True)


def test_waits_double_up_to_a_limit_and_begin_again_after_a_connection() -> None:
    reconnect = Reconnect()
    waits = []
    for _ in range(9):
        waits.append(reconnect.retry_s)
        assert 0.5 <= reconnect.wait_after(None) / waits[-1] <= 1.5
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, RETRY_LAST_S, RETRY_LAST_S]
    assert reconnect.wait_after(GOOD) <= 1.5 * 0.5


def back_after(reconnect: Reconnect, away_s: float, first: Ending) -> float:
    """When a device is back whose broker went away at 0 for so many seconds."""
    now_s = reconnect.wait_after(first)
    while now_s < away_s:
        now_s += reconnect.wait_after(None)
    return now_s


@pytest.mark.parametrize("last", [GOOD, SHORT], ids=["a good connection", "a short one"])
@pytest.mark.parametrize("before_s", [0.0, 60.0, 3600.0])
def test_a_broker_that_was_away_for_three_seconds_is_found_within_ten(last: Ending, before_s: float) -> None:
    for seed in range(200):
        random.seed(seed)
        reconnect = Reconnect()
        back_after(reconnect, before_s, GOOD)
        assert back_after(reconnect, 3.0, last) < 10


def test_a_fleet_comes_back_over_a_minute_where_the_broker_was_away_for_one() -> None:
    random.seed(1)
    back = sorted(back_after(Reconnect(), 60.0, GOOD) for _ in range(1000))
    assert back[900] - back[100] > 20
    assert max(sum(start <= time < start + 1 for time in back) for start in range(60, 150)) < 60


@pytest.mark.parametrize("ending", [SHORT, REFUSED, None], ids=["breaks down", "refuses", "is away"])
def test_a_broker_that_breaks_down_under_a_fleet_sees_it_less_and_less_often(ending: Ending | None) -> None:
    random.seed(1)
    reconnect = Reconnect()
    waits = [reconnect.wait_after(ending) for _ in range(12)]
    assert min(waits[-4:]) >= 0.5 * RETRY_LAST_S


def test_a_session_that_was_taken_over_waits_shortly_once_and_then_longest() -> None:
    taken = Ending(lasted_s=STEADY_S + 1, connected=True, taken_over=True)
    reconnect = Reconnect()
    assert (
        0.5 * TAKEN_OVER_FIRST_S <= reconnect.wait_after(taken, takeovers=1) <= 1.5 * TAKEN_OVER_FIRST_S < 30
    )
    for times in (2, 3, 9):
        assert reconnect.wait_after(taken, takeovers=times) >= 0.5 * TAKEN_OVER_S


def test_an_older_protocol_is_tried_at_once() -> None:
    reconnect = Reconnect()
    for _ in range(9):
        reconnect.wait_after(None)
    assert reconnect.wait_after(Ending(lasted_s=15, silent=True), other_protocol=True) < 1
