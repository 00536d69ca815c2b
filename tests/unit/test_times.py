"""How long something takes and how long ago it was, in the words of every screen."""

from __future__ import annotations

import pytest

from edge_agent import terminal


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (0.2, "0.2 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (754, "12 min 34 s"),
        (3600, "1 h"),
        (90_061, "1 d 1 h"),
    ],
)
def test_a_time_has_its_two_largest_units(seconds: float, said: str) -> None:
    assert terminal.span(seconds) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "0 s"), (0.9, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (86_400 * 3 + 9, "3 d")],
)
def test_how_long_ago_is_said_in_whole_ones_of_one_unit(seconds: float, said: str) -> None:
    assert terminal.age(seconds) == said
