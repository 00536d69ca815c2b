"""The speed of the last prompts as pictures: one bar for each, drawn here as numbers for an SVG. Pure.

A bar's height is its share of the highest one. A prompt that ended with an error has no speed, and is a mark on the
ground line; one whose speed could not be measured leaves its place empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 96
"""Of the drawing, in its own units."""
PLACES = 100
_GAP = 1.0
_LEAST = 2.0
"""The height of the lowest bar, so that it is seen."""
_MARK = 5.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """
    Attributes:
        name: what is shown.
        words: all that there is to see, for who does not see it.
        middle: the median, with its unit; empty where nothing was measured.
        middle_y: where its line is.
        top: the highest value, with its unit.
        bars, marks: paths, as SVG writes them: of the prompts that were measured, and of those that have failed.
    """

    name: str
    words: str
    middle: str
    middle_y: str
    top: str
    bars: str
    marks: str


def picture_of(name: str, values: Sequence[float | None], shown: Callable[[float], str]) -> Picture:
    """
    Args:
        values: of each prompt, the oldest first; NaN for one that has failed, None where nothing was measured.
        shown: a value with its unit.
    """
    last = values[-PLACES:]
    known = sorted(value for value in last if value is not None and not math.isnan(value))
    if not known:
        nothing = f"{name}: nothing was measured yet"
        return Picture(name=name, words=nothing, middle="", middle_y="0", top="", bars="", marks="")
    highest = known[-1] or 1.0
    middle = known[len(known) // 2]
    failed = sum(value is not None for value in last) - len(known)
    words = (
        f"{name} of the last {len(known)} prompts: half of them {shown(middle)} or less, "
        f"from {shown(known[0])} to {shown(known[-1])}" + (f"; {failed} without an answer" if failed else "")
    )
    step = WIDTH / PLACES
    first = PLACES - len(last)
    places = [((first + place) * step, value) for place, value in enumerate(last) if value is not None]
    return Picture(
        name=name,
        words=words,
        middle=shown(middle),
        middle_y=_number(HEIGHT - _height(middle, highest)),
        top=shown(known[-1]),
        bars=_path((x, _height(value, highest)) for x, value in places if not math.isnan(value)),
        marks=_path((x, _MARK) for x, value in places if math.isnan(value)),
    )


def _path(bars: Iterable[tuple[float, float]]) -> str:
    """Bars on the ground line, each from its left edge and with its height."""
    width = _number(WIDTH / PLACES - _GAP)
    return "".join(
        f"M{_number(x)} {HEIGHT}v-{_number(height)}h{width}v{_number(height)}z" for x, height in bars
    )


def _height(value: float, highest: float) -> float:
    return max(_LEAST, HEIGHT * value / highest)


def _number(value: float) -> str:
    return f"{value:.1f}"
