"""When a device asks its registry: alone, and as one of a fleet."""

from __future__ import annotations

from collections import Counter

from edge_agent.updates.polls import FIRST_RETRY_S, JITTER, RETRY_JITTER, Polls, place_of

INTERVAL_S = 300.0


def polls(place: float = 0.5) -> Polls:
    made = Polls(INTERVAL_S, place=place, jitter=lambda low, high: high)
    made.begin(0, at_once=True)
    return made


def wait_s(made: Polls, now_s: float) -> float:
    """How long it is until the next poll, in steps of a tenth of a second."""
    return next(tenth / 10 for tenth in range(100_000) if made.is_due(now_s + tenth / 10))


def test_places_are_stable_and_even() -> None:
    places = [place_of(f"device-{number}") for number in range(1_000)]
    assert places == [place_of(f"device-{number}") for number in range(1_000)]
    assert min(places) >= 0 and max(places) < 1
    assert max(Counter(int(place * 10) for place in places).values()) < 150, "100 on average"


def test_a_fleet_that_starts_in_one_moment_asks_in_the_course_of_an_interval() -> None:
    asked: Counter[int] = Counter()
    for number in range(1_000):
        made = Polls(INTERVAL_S, place=place_of(f"device-{number}"), jitter=lambda low, high: high)
        made.begin(0, at_once=False)
        asked[next(second for second in range(301) if made.is_due(second))] += 1
    assert max(asked.values()) <= 15, "3.3 a second on average"


def test_failures_are_tried_again_early_and_less_and_less_often() -> None:
    made = polls()
    waits = []
    now_s = 0.0
    for _ in range(9):
        assert made.is_due(now_s)
        made.ended(failed=True)
        waits.append(wait_s(made, now_s))
        now_s += waits[-1]
    early = [FIRST_RETRY_S * 2**number * RETRY_JITTER[1] for number in range(6)]
    assert waits == [*early, *[INTERVAL_S * JITTER[1]] * 3]


def test_an_answer_ends_the_early_tries() -> None:
    made = polls()
    made.ended(failed=True)
    made.ended(failed=True)
    made.ended(failed=False)
    assert wait_s(made, 0) == INTERVAL_S * JITTER[1]
    made.ended(failed=True)
    assert wait_s(made, 0) == FIRST_RETRY_S * RETRY_JITTER[1]


def test_a_short_interval_is_never_made_longer_by_a_failure() -> None:
    made = Polls(2.0, place=0.5, jitter=lambda low, high: high)
    made.begin(0, at_once=True)
    made.ended(failed=True)
    assert wait_s(made, 0) == 2.2


def test_a_poll_that_is_asked_for_does_not_put_off_an_earlier_one() -> None:
    made = polls()
    made.ended(failed=False)
    assert not made.is_due(0)
    made.ask_for(10_000)
    assert wait_s(made, 1) == INTERVAL_S * JITTER[1] - 1


def test_the_more_urgent_of_two_requests_counts_and_one_poll_does_for_both() -> None:
    made = polls()
    made.ended(failed=False)
    made.ask_for(100)
    made.ask_for(20)
    made.ask_for(50)
    assert wait_s(made, 0) == 10
    made.ended(failed=False)
    assert wait_s(made, 10) == INTERVAL_S * JITTER[1]


def test_a_request_during_a_poll_is_for_one_after_it() -> None:
    made = polls()
    made.ask_for(20)
    made.ended(failed=False)
    assert wait_s(made, 500) == 10
