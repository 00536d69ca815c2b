"""Downloads that fail again and again are tried less and less often, and never given up."""

from __future__ import annotations

import pytest

from edge_agent.updates.patience import LONGEST_S, HeldBack, Patience

INTERVAL_S = 300.0


class Line:
    """A model whose downloads fail, and the time."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.patience = Patience(INTERVAL_S, lambda: self.now_s)

    def fails(self, version: int = 1, *, have_bytes: int = 40) -> None:
        self.patience.failed("phi", version, have_bytes=have_bytes, reason="broke off")

    def is_held(self, version: int = 1, *, name: str = "phi") -> bool:
        try:
            self.patience.check(name, version)
        except HeldBack:
            return True
        return False

    def waits_s(self) -> float:
        """How long polls leave it alone from now on."""
        began_s = self.now_s
        while self.is_held():
            self.now_s += INTERVAL_S / 2
        return self.now_s - began_s


@pytest.fixture
def line() -> Line:
    return Line()


def test_one_failure_is_tried_again_at_the_next_poll(line: Line) -> None:
    assert not line.is_held()
    line.fails()
    assert not line.is_held()


def test_each_further_failure_doubles_the_wait_up_to_a_bound(line: Line) -> None:
    line.fails()
    waits = []
    for _ in range(12):
        line.fails()
        waits.append(line.waits_s())
    assert waits[:4] == [2 * INTERVAL_S, 4 * INTERVAL_S, 8 * INTERVAL_S, 16 * INTERVAL_S]
    assert waits[-1] == LONGEST_S
    for _ in range(100):
        line.fails()
    assert line.waits_s() == LONGEST_S


def test_a_day_of_failures_costs_a_dozen_tries(line: Line) -> None:
    tries = 0
    while line.now_s < 86_400:
        if not line.is_held():
            line.fails()
            tries += 1
        line.now_s += INTERVAL_S
    assert tries <= 12


def test_a_download_that_got_further_is_tried_again_at_the_next_poll(line: Line) -> None:
    for have_bytes in (40, 40, 80):
        line.fails(have_bytes=have_bytes)
    assert not line.is_held()
    line.fails(have_bytes=80)
    assert line.is_held()


def test_a_new_version_another_model_and_one_that_came_are_not_held(line: Line) -> None:
    line.fails()
    line.fails()
    assert line.is_held()
    assert not line.is_held(2)
    assert not line.is_held(name="tiny")
    line.fails(2)
    assert not line.is_held(2)
    line.fails(2)
    line.patience.succeeded("phi")
    assert not line.is_held(2)


def test_a_clock_that_is_set_back_holds_nothing(line: Line) -> None:
    line.fails()
    line.fails()
    line.now_s -= 365 * 86_400
    assert not line.is_held()


def test_the_reason_is_said_and_what_to_do(line: Line) -> None:
    line.fails()
    line.fails()
    with pytest.raises(HeldBack, match=r"version 1 failed 2 times.*at \d\d:\d\d: broke off.*models pull"):
        line.patience.check("phi", 1)
