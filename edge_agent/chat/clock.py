"""Time for deadlines and retention that survives restarts, reboots and a clock that jumps. Pure except for `now`.

Within one boot, CLOCK_BOOTTIME counts: it includes suspended time and nobody sets it. Across boots only the wall
clock can tell, and a device without a clock battery boots in the past: a negative duration counts as zero.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A point in time, in seconds, on both clocks."""

    boot_id: str
    boot_s: float
    wall_s: float

    def since(self, earlier: Moment) -> float:
        """Seconds from `earlier` to this moment, never negative."""
        if self.boot_id == earlier.boot_id:
            return max(0.0, self.boot_s - earlier.boot_s)
        return max(0.0, self.wall_s - earlier.wall_s)


def now() -> Moment:
    """This moment on this host."""
    return Moment(boot_id=_boot_id(), boot_s=time.clock_gettime(time.CLOCK_BOOTTIME), wall_s=time.time())


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
