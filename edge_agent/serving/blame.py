"""What is held against a version: which failures, of whom, and how many of them. Rules apart from I/O.

A version answers for what it did itself: it does not load, or not as its package says, or several prompts kill its
runner. It does not answer for a host that lacks memory or a library, for damaged bytes, or for one poison prompt.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass

from edge_agent.errors import (
    CannotRun,
    EdgeAgentError,
    LoadFailed,
    MemoryShort,
    PolicyError,
    RunnerCrashed,
    VerificationError,
)
from edge_agent.serving.gate import GateFailed

MAX_TRIES = 3
"""A candidate that this many agents died trying is not tried again."""
MAX_LOAD_FAILURES = 2
MAX_CRASHES = 3
CRASH_WINDOW_S = 600.0
RETRY_FIRST_S, RETRY_LAST_S = 1.0, 60.0
_MAX_LACKS = 32


def is_the_hosts(error: EdgeAgentError) -> bool:
    """True for what this host lacks: it says nothing about a candidate, and it may come."""
    return isinstance(error, MemoryShort | CannotRun)


def is_the_candidates(error: EdgeAgentError) -> bool:
    """True for what a candidate itself did. A kill, a full disk or a busy lock may have had another cause: then it
    is tried again, a bounded number of times."""
    return isinstance(error, GateFailed | LoadFailed | RunnerCrashed | PolicyError)


@dataclass(frozen=True, kw_only=True)
class LoadVerdict:
    """What follows when the active version did not load.

    Attributes:
        step_back: another version takes its place, where there is one.
        quarantine: it is not tried again when one does.
        final: where none does, it has failed, until the next attempt shows otherwise.
    """

    step_back: bool
    quarantine: bool
    final: bool


def of_load(error: EdgeAgentError, failures: int) -> LoadVerdict:
    """The verdict on an active version that did not load `failures` times in a row, the last time with `error`."""
    certain = isinstance(
        error, VerificationError | PolicyError | CannotRun
    )  # another attempt ends the same way
    repeated = failures >= MAX_LOAD_FAILURES
    return LoadVerdict(
        # Short of memory, another version would not help, or it would be the wrong one to keep.
        step_back=(certain or repeated) and not isinstance(error, MemoryShort),
        quarantine=not certain,
        final=certain or repeated,
    )


@dataclass(frozen=True, kw_only=True)
class Lack:
    """What this host lacked when a candidate was tried.

    Attributes:
        error: what the attempt ended with.
        host: `host.identity.of_host` of then.
        wanted_bytes: of attainable memory, for another attempt; 0 where it was not memory.
    """

    error: EdgeAgentError
    host: str
    wanted_bytes: int = 0


class Lacks:
    """Candidates that were refused for what this host lacks: an attempt may cost the active version its seat, so it is
    not made again before the host is another one.

    Its model's lifecycle owns it; whoever operates on the model adds and asks. A restart forgets it.
    """

    def __init__(self) -> None:
        self._of: dict[str, Lack] = {}

    def add(self, key: str, lack: Lack) -> None:
        others = [(other, known) for other, known in self._of.items() if other != key]
        self._of = dict([*others, (key, lack)][-_MAX_LACKS:])

    def still(self, key: str, *, host: str, attainable_bytes: int) -> EdgeAgentError | None:
        """The error of the last attempt, where another one would end the same way."""
        lack = self._of.get(key)
        if lack is None or host != lack.host or (lack.wanted_bytes and attainable_bytes >= lack.wanted_bytes):
            return None
        return type(lack.error)(lack.error.message, remedy=lack.error.remedy)


def memory_for_another_attempt(weight_bytes: int, *, before_bytes: int, after_bytes: int) -> int:
    """How much memory must be attainable for a version to be tried again that did not fit.

    Args:
        before_bytes: what was attainable when the attempt began; a part of it may have been counted twice, as runners
            share pages.
        after_bytes: what was, when the others had stopped.
    """
    short_bytes = max(0, weight_bytes - after_bytes)
    return before_bytes + short_bytes + weight_bytes // 16  # what is free comes and goes a little


class LoadFailures:
    """How often in a row the active version did not load, and when it may be tried again.

    Its model's lifecycle owns it: the dispatcher's thread counts, an exchange or a repair clears.

    Attributes:
        retry_at_s: monotonic seconds.
    """

    def __init__(self) -> None:
        self.count = 0
        self.retry_at_s = 0.0

    def add(self, now_s: float) -> None:
        self.count += 1
        self.retry_at_s = now_s + min(RETRY_LAST_S, RETRY_FIRST_S * 2 ** (self.count - 1))

    def clear(self) -> None:
        self.count, self.retry_at_s = 0, 0.0


class Crashes:
    """When the active version's runner failed, and the digests of the prompts that may have been the cause.

    Its model's lifecycle owns it: the dispatcher's thread adds, an exchange clears.
    """

    def __init__(self) -> None:
        self._recent: collections.deque[tuple[float, frozenset[bytes]]] = collections.deque(maxlen=64)

    def add(self, suspects: frozenset[bytes], now_s: float) -> int:
        """Gives how many different prompts are to blame within the last `CRASH_WINDOW_S`, this crash among them."""
        self._recent.append((now_s, suspects))
        return distinct([known for at_s, known in list(self._recent) if now_s - at_s <= CRASH_WINDOW_S])

    def clear(self) -> None:
        self._recent.clear()


def distinct(crashes: Iterable[frozenset[bytes]]) -> int:
    """How many different prompts are to blame at least, where each crash names those that may be its cause."""
    explained: set[bytes] = set()
    count = 0
    for suspects in sorted(crashes, key=len):
        if explained.isdisjoint(suspects):
            explained |= suspects
            count += 1
    return count
