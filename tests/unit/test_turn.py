"""The turn: one at a time, an operator before a poll."""

from __future__ import annotations

import contextlib
import threading

import pytest

from edge_agent.errors import SyncStopped
from edge_agent.updates.turn import Turn

_LIMIT_S = 20.0


@pytest.fixture
def turn() -> Turn:
    return Turn(look_again_s=0.001)


def never() -> bool:
    return False


def unheard(before: str) -> None:
    raise AssertionError(f"nobody has to wait, least of all for {before}")


def test_a_turn_that_nobody_has_is_taken_at_once_and_given_back(turn: Turn) -> None:
    for _ in range(2):
        with turn.of_operator("`models pull`", on_wait=unheard):
            assert (turn.wanted, turn.is_polls) == (False, False)
        with turn.of_poll("the check of a", should_stop=never):
            assert (turn.wanted, turn.is_polls) == (False, True)
        assert not turn.is_polls


def test_work_that_fails_gives_the_turn_back(turn: Turn) -> None:
    with pytest.raises(ValueError, match="x"), turn.of_operator("`models pull`", on_wait=unheard):
        raise ValueError("x")
    with pytest.raises(ValueError, match="y"), turn.of_poll("the check of a", should_stop=never):
        raise ValueError("y")
    with turn.of_operator("`models pull`", on_wait=unheard):
        pass


def test_an_operator_who_does_not_wait_any_more_wants_no_turn(turn: Turn) -> None:
    def leave(before: str) -> None:
        raise KeyboardInterrupt

    with turn.of_poll("the check of a", should_stop=never):
        with pytest.raises(KeyboardInterrupt), turn.of_operator("`models pull`", on_wait=leave):
            pass
        assert not turn.wanted


def test_no_poll_comes_between_one_that_ends_and_the_operator_it_ends_for(turn: Turn) -> None:
    polling = contextlib.ExitStack()
    polling.enter_context(turn.of_poll("the check of a", should_stop=never))

    def poll_again(before: str) -> None:
        polling.close()
        assert (before, turn.wanted) == ("the check of a", True)
        with (
            pytest.raises(SyncStopped, match="the check of b waits for an operator"),
            turn.of_poll("the check of b", should_stop=lambda: True),
        ):
            pass

    with turn.of_operator("`models pull`", on_wait=poll_again):
        assert not turn.wanted


def test_a_poll_that_waits_asks_until_it_should_stop(turn: Turn) -> None:
    asked: list[str] = []

    def should_stop() -> bool:
        asked.append("again")
        return len(asked) == 3

    with turn.of_operator("`models verify`", on_wait=unheard):
        with (
            pytest.raises(SyncStopped, match="the check of a waits for `models verify`"),
            turn.of_poll("the check of a", should_stop=should_stop),
        ):
            pass
        assert not turn.is_polls
    assert len(asked) == 3


def test_who_waits_goes_on_when_the_turn_is_given_back() -> None:
    turn, order, waits = Turn(), [], threading.Event()

    def poll_waits() -> bool:
        waits.set()
        return False

    def poll() -> None:
        with turn.of_poll("the check of a", should_stop=poll_waits):
            order.append("poll")

    thread = threading.Thread(target=poll, daemon=True)
    with turn.of_operator("`models pull`", on_wait=unheard):
        thread.start()
        assert waits.wait(_LIMIT_S)
        order.append("operator")
    thread.join(_LIMIT_S)
    assert order == ["operator", "poll"]
