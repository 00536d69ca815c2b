"""How fast a version is fetched: the cap on bandwidth, the gap between requests, the limit for a stalled transfer, and
how far it is.

Arithmetic on a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from edge_agent.host.clock import CLOCK, Clock
from edge_agent.sync import protocol
from edge_agent.sync.line import Line
from edge_agent.sync.protocol import Emit

_Bytes = TypeVar("_Bytes", bytes, memoryview)

CHUNK_BYTES = 1 << 20
MIN_BYTES_PER_TIMEOUT = 4_096
"""A transfer that brings fewer bytes than this in a whole timeout has stalled."""
_MAX_BURST_S = 1.0
_LEAST_CHUNK_BYTES = 4_096
_CHUNKS_PER_S = 8
_PROGRESS_INTERVAL_S = 0.2


@dataclass(kw_only=True)
class Pace:
    """The bytes fetched so far, and the cap on bandwidth. Owned by the sync process's only thread.

    Attributes:
        total_bytes: to fetch, as far as known.
        max_bytes_per_s: 0 for no cap.
        report: called after each chunk; what it raises ends the fetch.
        resumed_bytes: what an earlier process had fetched.
        mirrored_bytes: the part of `fetched_bytes` that came from mirrors.
        line: counts what comes over it, which is all the rest.
    """

    total_bytes: int
    max_bytes_per_s: int = 0
    report: Callable[[Pace], None] = lambda pace: None
    clock: Clock = CLOCK
    fetched_bytes: int = 0
    resumed_bytes: int = 0
    mirrored_bytes: int = 0
    line: Line = field(default_factory=Line)

    def __post_init__(self) -> None:
        self._started_s = self._due_s = self.clock.now_s()

    @property
    def bytes_per_s(self) -> float:
        return self.fetched_bytes / max(self.clock.now_s() - self._started_s, 1e-3)

    @property
    def eta_s(self) -> float | None:
        """Seconds until everything is fetched at this rate, or None before the first byte."""
        left = self.total_bytes - self.fetched_bytes - self.resumed_bytes
        return max(left, 0) / self.bytes_per_s if self.fetched_bytes else None

    @property
    def chunk_bytes(self) -> int:
        """Small enough that there are several chunks a second under a low cap."""
        if not self.max_bytes_per_s:
            return CHUNK_BYTES
        return min(CHUNK_BYTES, max(_LEAST_CHUNK_BYTES, self.max_bytes_per_s // _CHUNKS_PER_S))

    def took(self, count: int, *, mirrored: bool = False) -> None:
        """Counts bytes, waits as long as the cap asks for, reports."""
        self.fetched_bytes += count
        if mirrored:
            self.mirrored_bytes += count
        else:
            self.line.took(count)
        if self.max_bytes_per_s:
            now_s = self.clock.now_s()
            # Bandwidth that a slow phase left unused is not made up for beyond one second's worth.
            self._due_s = max(self._due_s, now_s - _MAX_BURST_S) + count / self.max_bytes_per_s
            if self._due_s > now_s:
                self.clock.sleep(self._due_s - now_s)
        self.report(self)


class RequestGap:
    """Keeps the starts of requests apart. What a request itself takes counts: a long download is followed at once.

    Args:
        gap_s: at least so much between two; 0 for none.
    """

    def __init__(self, gap_s: float, *, clock: Clock) -> None:
        self._gap_s = gap_s
        self._clock = clock
        self._due_s = float("-inf")

    def wait(self) -> None:
        """Returns when the next request may start."""
        now_s = self._clock.now_s()
        if self._due_s > now_s:
            self._clock.sleep(self._due_s - now_s)
        self._due_s = max(now_s, self._due_s) + self._gap_s


class StallLimit:
    """Tells a slow transfer from a stalled one: a byte now and then does not keep a connection alive for ever.

    Only the time spent waiting for bytes counts, not the time spent on them.

    Args:
        timeout_s: in which at least `least_bytes` must arrive.

    Attributes:
        waited_s, came_bytes: since enough bytes last arrived.
    """

    def __init__(self, timeout_s: float, *, clock: Clock, least_bytes: int = MIN_BYTES_PER_TIMEOUT) -> None:
        self.waited_s = 0.0
        self.came_bytes = 0
        self._timeout_s = timeout_s
        self._least_bytes = least_bytes
        self._clock = clock

    @property
    def is_over(self) -> bool:
        return self.waited_s > self._timeout_s

    def wait_for(self, read: Callable[[], _Bytes]) -> _Bytes:
        """Calls `read`, counts how long it took, and returns its bytes."""
        began_s = self._clock.now_s()
        chunk = read()
        self.waited_s += self._clock.now_s() - began_s
        self.came_bytes += len(chunk)
        if self.came_bytes >= self._least_bytes:
            self.waited_s, self.came_bytes = 0.0, 0
        return chunk


class Progress:
    """Tells how far a fetch is: at most five times a second, and once at the end.

    Args:
        check: called as often, before that; what it raises ends the fetch.
    """

    def __init__(self, emit: Emit, check: Callable[[], None]) -> None:
        self._emit = emit
        self._check = check
        self._next_s = 0.0

    def __call__(self, pace: Pace) -> None:
        now_s = pace.clock.now_s()
        have = pace.fetched_bytes + pace.resumed_bytes
        if now_s < self._next_s and have < pace.total_bytes:
            return
        self._next_s = now_s + _PROGRESS_INTERVAL_S
        self._check()
        self._emit(
            protocol.progress(
                have_bytes=have,
                total_bytes=pace.total_bytes,
                bytes_per_s=pace.bytes_per_s,
                eta_s=pace.eta_s,
            )
        )
