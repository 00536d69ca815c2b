"""How many threads a version runs on: what the settings say, else what was measured here, else what to measure."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from edge_agent.host import cpus, identity
from edge_agent.runner import threads
from edge_agent.serving.learned import Learned

log = logging.getLogger(__name__)


class ThreadChoice:
    """Any thread.

    Args:
        configured: `inference.threads`; 0 leaves it to measurement.
        measurable: the numbers to measure; None asks the host.
    """

    def __init__(
        self, configured: int, *, learned: Learned, measurable: tuple[int, ...] | None = None
    ) -> None:
        self._measurable = measurable
        self._configured = configured
        self._learned = learned
        self._host = identity.of_host()

    def candidates(self, digest: str) -> tuple[int, ...]:
        """The numbers to measure; one where there is nothing to measure, or it is known already."""
        if known := self._configured or self._learned.of(digest, self._host).threads:
            return (known,)
        return self._measurable or cpus.thread_counts()

    def choose(self, digest: str, rates: Mapping[int, float]) -> int:
        """The number to take, and remembered, by measured tokens a second (0: could not be measured)."""
        if not all(rates.values()):
            return next(iter(rates))
        best = threads.fastest(rates)
        log.info("threads measured digest=%s threads=%d tokens_per_s=%s", digest[:12], best, dict(rates))
        self._learned.note_threads(digest, self._host, threads=best, tokens_per_s=rates)
        return best
