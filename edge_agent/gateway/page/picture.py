"""The speed of the last prompts as pictures: one bar for each, drawn here as numbers for an SVG. Pure.

A bar's height is its share of the highest one. A prompt that ended with an error has no speed, and is a mark on the
ground line; one whose speed could not be measured leaves its place empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 96
"""Of the drawing, in its own units."""
PLACES = 100
_GAP = 1.0
_LEAST = 2.0
"""The height of the lowest bar, so that it is seen."""
_MARK = 5.0


@dataclass(frozen=True, kw_only=True)
class Bar:
    x: str
    y: str
    width: str
    height: str
    failed: bool


@dataclass(frozen=True, kw_only=True)
class Picture:
    """
    Attributes:
        name: what is shown.
        words: all that there is to see, for who does not see it.
        middle: the median, with its unit; empty where nothing was measured.
        middle_y: where its line is.
        top: the highest value, with its unit.
    """

    name: str
    words: str
    middle: str
    middle_y: str
    top: str
    bars: tuple[Bar, ...]


def picture_of(name: str, values: Sequence[float | None], shown: Callable[[float], str]) -> Picture:
    """
    Args:
        values: of each prompt, the oldest first; NaN for one that has failed, None where nothing was measured.
        shown: a value with its unit.
    """
    last = values[-PLACES:]
    known = sorted(value for value in last if value is not None and not math.isnan(value))
    if not known:
        return Picture(name=name, words=f"{name}: nothing was measured yet", middle="", middle_y="0", top="",
                       bars=())  # fmt: skip
    highest = known[-1] or 1.0
    middle = known[len(known) // 2]
    failed = sum(value is not None for value in last) - len(known)
    words = (
        f"{name} of the last {len(known)} prompts: half of them {shown(middle)} or less, "
        f"from {shown(known[0])} to {shown(known[-1])}" + (f"; {failed} without an answer" if failed else "")
    )
    step = WIDTH / PLACES
    first = PLACES - len(last)
    bars = tuple(
        _bar((first + place) * step, step, value, highest)
        for place, value in enumerate(last)
        if value is not None
    )
    return Picture(
        name=name,
        words=words,
        middle=shown(middle),
        middle_y=_number(HEIGHT - _height(middle, highest)),
        top=shown(known[-1]),
        bars=bars,
    )


def _bar(x: float, step: float, value: float, highest: float) -> Bar:
    failed = math.isnan(value)
    height = _MARK if failed else _height(value, highest)
    return Bar(
        x=_number(x),
        y=_number(HEIGHT - height),
        width=_number(step - _GAP),
        height=_number(height),
        failed=failed,
    )


def _height(value: float, highest: float) -> float:
    return max(_LEAST, HEIGHT * value / highest)


def _number(value: float) -> str:
    return f"{value:.1f}"
