"""Whether another device uses this device's name."""

from __future__ import annotations

from edge_agent.transport.namesake import PEACE_S, Namesake
from edge_agent.transport.reconnect import TAKEN_OVER_S, Ending

TAKEN = Ending(lasted_s=1.0, connected=True, hung_up=True, taken_over=True)
HUNG_UP = Ending(lasted_s=1.0, connected=True, hung_up=True)
LOST = Ending(lasted_s=1.0, connected=True)


def after(*endings: Ending | None, step_s: float = 5.0) -> Namesake:
    namesake = Namesake()
    for number, ending in enumerate(endings):
        namesake.ended(ending, now_s=1000 + step_s * number)
    return namesake


def test_a_broker_that_says_so_is_believed_at_once() -> None:
    assert after(TAKEN).known(1001)


def test_three_hang_ups_in_a_minute_on_connections_that_worked_are_taken_for_one() -> None:
    assert not after(HUNG_UP, HUNG_UP).known(1011)
    assert after(HUNG_UP, HUNG_UP, HUNG_UP).known(1011)
    assert not after(HUNG_UP, HUNG_UP, HUNG_UP, step_s=31).known(1063)


def test_a_broker_that_is_away_restarts_or_takes_exception_is_none() -> None:
    assert not after(HUNG_UP, HUNG_UP, None, HUNG_UP, HUNG_UP).known(1025)
    assert not after(*[LOST] * 5).known(1025)
    poison = Ending(lasted_s=1.0, connected=True, hung_up=True, over_an_answer=True)
    assert not after(*[poison] * 5).known(1025)


def test_once_it_is_known_each_hang_up_counts_however_late() -> None:
    namesake = after(HUNG_UP, HUNG_UP, HUNG_UP)
    assert namesake.takeovers == 1
    namesake.ended(HUNG_UP, now_s=1010 + 1.5 * TAKEN_OVER_S)
    assert namesake.takeovers == 2
    assert 1.5 * TAKEN_OVER_S < PEACE_S, "else it is forgotten between two blows"


def test_it_is_over_after_a_while_without_the_other_one() -> None:
    namesake = after(TAKEN, TAKEN)
    assert namesake.takeovers == 2
    assert namesake.known(1005 + PEACE_S)
    assert not namesake.known(1006 + PEACE_S)
