"""When the next connection is tried, and with which protocol."""

from __future__ import annotations

import pytest

from edge_agent.transport.reconnect import RETRY_LAST_S, STEADY_S, TAKEN_OVER_S, Ending, Reconnect

HANG_UP = Ending(lasted_s=0.1)


def test_waits_double_up_to_a_limit_and_begin_again_after_a_good_connection() -> None:
    reconnect = Reconnect("5", speaks_5=True)
    waits = []
    for _ in range(9):
        waits.append(reconnect.retry_s)
        assert 0.5 <= reconnect.wait_after(None) / waits[-1] <= 1.5
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, RETRY_LAST_S, RETRY_LAST_S]
    assert reconnect.wait_after(Ending(lasted_s=STEADY_S, connected=True)) >= 0.5 * RETRY_LAST_S
    assert reconnect.wait_after(Ending(lasted_s=STEADY_S + 1, connected=True)) <= 1.5 * 0.5


def test_a_session_that_was_taken_over_waits_longest() -> None:
    taken = Ending(lasted_s=STEADY_S + 1, connected=True, taken_over=True)
    assert Reconnect("auto", speaks_5=True).wait_after(taken) >= 0.5 * TAKEN_OVER_S


def offered(reconnect: Reconnect, *endings: Ending) -> str:
    """The protocol of each connection that follows these."""
    found = []
    for ending in endings:
        reconnect.wait_after(ending)
        found.append("5" if reconnect.version5 else "3")
    return "".join(found)


def test_several_hang_ups_in_a_row_bring_one_attempt_with_the_older_protocol() -> None:
    assert offered(Reconnect("auto", speaks_5=False), *[HANG_UP] * 8) == "55355535"


def test_a_connection_that_a_hang_up_brought_is_followed_by_the_newer_protocol() -> None:
    made = Ending(lasted_s=1.0, connected=True)
    assert offered(Reconnect("auto", speaks_5=False), *[HANG_UP] * 3, made) == "5535"


def test_a_broker_that_says_what_it_cannot_speak_is_believed() -> None:
    no_5 = Ending(lasted_s=0.1, refused=True, unsupported=True)
    made = Ending(lasted_s=1.0, connected=True)
    assert offered(Reconnect("auto", speaks_5=False), no_5, made, made) == "333"


@pytest.mark.parametrize(
    ("reconnect", "ending"),
    [
        (Reconnect("auto", speaks_5=True), HANG_UP),
        (Reconnect("5", speaks_5=False), HANG_UP),
        (Reconnect("auto", speaks_5=False), Ending(lasted_s=0.1, refused=True)),
        (Reconnect("auto", speaks_5=False), Ending(lasted_s=15.0, silent=True)),
    ],
)
def test_nothing_else_changes_the_protocol(reconnect: Reconnect, ending: Ending) -> None:
    assert offered(reconnect, *[ending] * 8) == "5" * 8
