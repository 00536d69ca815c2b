"""A histogram with fixed bounds: how many values were at most so large, and their sum.

The bounds fit processors without a GPU: a first token may take minutes, and a token a second. Those of tokens are the
ones that OpenTelemetry's GenAI conventions name, up to the longest context that the settings allow.
"""

from __future__ import annotations

import bisect
import itertools
from typing import Any

FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
QUEUE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = tuple(float(4**power) for power in range(11))


class Histogram:
    """One thread at a time.

    Args:
        bounds: ascending; a value equal to one counts below it.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self.bounds, value)] += 1
        self._sum += value

    def document(self) -> dict[str, Any]:
        """`{"count", "sum", "buckets"}`: a bucket has all values up to its bound, so each has those before it."""
        *buckets, count = itertools.accumulate(self._counts)
        return {"count": count, "sum": round(self._sum, 6), "buckets": buckets}
