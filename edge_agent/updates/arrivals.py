"""How many bytes of a version have come with one sync, also where it is ended before its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.metrics.measurements import Measurements
from edge_agent.sync.protocol import SyncJob, SyncResult
from edge_agent.updates.syncs import OnEvent, RunSync


class Arrivals:
    """Hears a sync's events. What was here when it began does not count.

    Args:
        note: told how many more bytes have come, and how many of these are known to be from a mirror.
    """

    def __init__(self, note: Callable[[int, int], None]) -> None:
        self._note = note
        self._had_bytes: int | None = None
        self._noted_bytes = 0

    def look(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "progress":
            had, self._had_bytes = self._had_bytes, int(event["bytes"])
            if had is not None:
                self._add(self._had_bytes - had)
        elif event.get("event") == "held":  # it stops, and says itself what came
            self._add(int(event["fetched_bytes"]) - self._noted_bytes)

    def ended(self, result: SyncResult) -> None:
        """It ended well, and says itself what it fetched."""
        self._add(result.bytes_fetched - self._noted_bytes, result.bytes_mirrored)

    def _add(self, more: int, mirrored: int = 0) -> None:
        """A part whose digest is wrong is given up: what it had is counted once, and not taken back."""
        self._noted_bytes += max(0, more)
        self._note(max(0, more), mirrored)


def counting(run_sync: RunSync, measurements: Measurements) -> RunSync:
    """`run_sync`, whose bytes are counted for the model of its job."""

    def run(
        job: SyncJob, *, timeout_s: float, on_event: OnEvent, should_stop: Callable[[], bool]
    ) -> SyncResult:
        arrivals = Arrivals(lambda fetched, mirrored: measurements.note_bytes(job.name, fetched, mirrored))

        def look(event: Mapping[str, Any]) -> None:
            arrivals.look(event)
            on_event(event)

        result = run_sync(job, timeout_s=timeout_s, on_event=look, should_stop=should_stop)
        arrivals.ended(result)
        return result

    return run
