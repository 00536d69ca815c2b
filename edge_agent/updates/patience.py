"""How long a download that fails again and again is left alone. No I/O: times are passed in.

A poll comes every few minutes. A download that starts again from zero each time, and never gets through, would cost a
metered line many times the version, for nothing. So after the second failure in a row each further one doubles the time
until the next try, up to `LONGEST_S`. Polls go on meanwhile: a new version is tried at once, and so is what an operator
asks for. A download that got further than ever before has wasted nothing and does not count.

In memory only: a restart is often what mends the line, and costs one try.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.errors import EdgeAgentError

LONGEST_S = 6 * 3600.0


class HeldBack(EdgeAgentError):
    """The download of a version failed several times, and is not tried again yet."""

    code = "download_held_back"


@dataclass(frozen=True, kw_only=True)
class _Failures:
    """Of one version in a row; times in seconds since 1970."""

    version: int
    count: int
    furthest_bytes: int
    since_s: float
    until_s: float
    reason: str


class Patience:
    """Of one configured model. Owned by whoever has the turn.

    Args:
        interval_s: between two polls.
        clock: seconds since 1970.
    """

    def __init__(self, interval_s: float, clock: Callable[[], float]) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._failures: dict[str, _Failures] = {}

    def check(self, name: str, version: int) -> None:
        """Asked when it is known what a registered model's reference means, before anything is fetched.

        Raises:
            HeldBack: not now.
        """
        known = self._failures.get(name)
        if known is None or known.version != version:
            return
        if known.since_s <= self._clock() < known.until_s:  # a clock that was set back holds nothing
            until = time.strftime("%H:%M", time.localtime(known.until_s))
            raise HeldBack(
                f"the download of version {version} failed {known.count} times, the next try is at {until}: "
                f"{known.reason}",
                remedy="`edge-agent models pull` tries now",
            )

    def failed(self, name: str, version: int, *, have_bytes: int, reason: str) -> None:
        """A try ended with an error.

        Args:
            have_bytes: of the version, that were here at the end.
        """
        known = self._failures.get(name)
        if known is None or known.version != version or have_bytes > known.furthest_bytes:
            count, furthest_bytes = 1, have_bytes
        else:
            count, furthest_bytes = known.count + 1, known.furthest_bytes
        now_s = self._clock()
        wait_s = min(LONGEST_S, self._interval_s * 2.0 ** min(count - 1, 32)) if count > 1 else 0.0
        self._failures[name] = _Failures(
            version=version,
            count=count,
            furthest_bytes=furthest_bytes,
            since_s=now_s,
            until_s=now_s + wait_s,
            reason=reason,
        )

    def succeeded(self, name: str) -> None:
        self._failures.pop(name, None)
