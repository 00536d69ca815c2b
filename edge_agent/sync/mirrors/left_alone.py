"""The mirrors that are of no use for a while, in a file: each sync is a process of its own.

A hint, not a record: a file that is lost, damaged or from another time costs one more try.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edge_agent.cache import durable
from edge_agent.cache.disk import read_bounded
from edge_agent.errors import StoreError

log = logging.getLogger(__name__)

MAX_S = 6 * 3600.0
"""An end that is further away was written by another clock."""
_MAX_BYTES = 16 << 10


class LeftAlone:
    """Which mirrors, and until when.

    Args:
        urls: those of the settings; what the file says of others is forgotten.
        clock: seconds since 1970.
    """

    def __init__(self, file: Path, urls: tuple[str, ...], *, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._urls = urls
        self._clock = clock
        self._until = {url: until for url, until in self._read().items() if url in urls}

    def has(self, url: str) -> bool:
        left_s = self._until.get(url, 0.0) - self._clock()
        return 0 < left_s <= MAX_S

    def add(self, url: str, for_s: float) -> None:
        """Leaves a mirror alone from now on."""
        self._until[url] = self._clock() + min(for_s, MAX_S)
        try:
            durable.write_hint(self._file, json.dumps(self._until).encode())
        except OSError as error:
            log.warning("mirror not noted code=cache_failed reason=%r", error.strerror)

    def _read(self) -> dict[str, float]:
        with suppress(StoreError, ValueError, RecursionError):
            known = json.loads((read_bounded(self._file, _MAX_BYTES) or b"{}")[:_MAX_BYTES])
            if isinstance(known, dict):
                return {
                    url: float(until)
                    for url, until in known.items()
                    if isinstance(until, int | float) and math.isfinite(until)
                }
        return {}
