"""What the guard refused, in the log: an operator sees a wrong token or an attack, and nobody can fill the log.

Owns how often it is said. The first refusal of a kind is said at once, those of the minute after it in one line at its
end. Nothing of a request is in a line but the address that it came from.
"""

from __future__ import annotations

import logging

from edge_agent.gateway.refusals import HttpRefusal

log = logging.getLogger(__name__)

AGAIN_S = 60.0
UNIX = "unix"


class RefusedRequests:
    """Those of one door. Used by one thread."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def add(self, refusal: HttpRefusal, peer: str | None, now_s: float) -> None:
        """
        Args:
            peer: address; None where it came through the Unix socket.
            now_s: of a clock that is never set.
        """
        self._kinds.setdefault(refusal.code, _Kind(refusal.code)).add(peer or UNIX, now_s)

    def step(self, now_s: float) -> None:
        """Says what has waited long enough."""
        for kind in self._kinds.values():
            kind.step(now_s)


class _Kind:
    def __init__(self, code: str) -> None:
        self.code = code
        self._times = 0
        self._peer = ""
        self._said_s: float | None = None

    def add(self, peer: str, now_s: float) -> None:
        self._times += 1
        self._peer = peer
        self.step(now_s)

    def step(self, now_s: float) -> None:
        if self._times and (self._said_s is None or now_s - self._said_s >= AGAIN_S):
            log.warning("requests refused code=%s peer=%s times=%d", self.code, self._peer, self._times)
            self._times, self._said_s = 0, now_s
