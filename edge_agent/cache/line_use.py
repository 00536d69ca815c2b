"""How many bytes of downloads came over the line, by the quarter of an hour: the file `line.json`.

Of quarters, not of days: what a day is depends on the time zone and on a clock that may be set, and whoever asks knows
both. Bounded: what is furthest from now is dropped first. One sync runs at a time, and is the only writer; the file is
replaced with one rename. One that is damaged is begun anew.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping

from edge_agent.cache import disk, durable
from edge_agent.cache.record import whole
from edge_agent.cache.store import Store

log = logging.getLogger(__name__)

QUARTER_S = 900
"""No time zone of today has a midnight within one."""
MAX_QUARTERS = 400
"""Four days."""
_MAX_BYTES = 64 << 10


def used_bytes(store: Store, counts: Callable[[float], bool]) -> int:
    """What came in some quarters.

    Args:
        counts: told the beginning of a quarter, in seconds since 1970: whether it counts.

    Raises:
        StoreError: the file cannot be read.
    """
    return sum(count for quarter, count in _read(store).items() if counts(quarter * QUARTER_S))


def add(store: Store, at_s: float, count: int) -> None:
    """Counts bytes durably, or takes some back.

    Args:
        at_s: when they came, in seconds since 1970.
        count: negative for bytes that were counted for the same time, and did not come.

    Raises:
        StoreError: the file cannot be read or written.
    """
    quarters, now = dict(_read(store)), math.floor(at_s / QUARTER_S)
    quarters[now] = max(0, quarters.get(now, 0) + count)
    kept = sorted(quarters, key=lambda quarter: abs(quarter - now))[:MAX_QUARTERS]
    document = {"format": 1, "quarters": {str(quarter): quarters[quarter] for quarter in sorted(kept)}}
    with disk.store_errors("write", store.line_file):
        durable.write_file(store.line_file, json.dumps(document).encode() + b"\n")


def _read(store: Store) -> Mapping[int, int]:
    data = disk.read_bounded(store.line_file, _MAX_BYTES)
    if data is None:
        return {}
    try:
        document = json.loads(data.decode("utf-8"))
        if document["format"] != 1 or len(document["quarters"]) > MAX_QUARTERS:
            raise ValueError("format")
        return {int(quarter): whole(count) for quarter, count in document["quarters"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning(
            "line use begun anew code=file_damaged file=%s reason=%s", store.line_file, type(error).__name__
        )
        return {}
