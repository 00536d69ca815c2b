"""What a version must show, and what counts against it: rules without I/O.

A candidate must answer its golden prompts; its own process asks them (`runner/golden.py`), and the result is judged
here. Speed and memory are reported only. A version answers for what it did itself: it does not load, or not as its
package says, or several prompts crash its runner. It does not answer for a host that lacks memory or a library, for
damaged bytes, or for one poison prompt.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass

from edge_agent.errors import (
    CannotRun,
    ContentError,
    EdgeAgentError,
    LoadFailed,
    MemoryShort,
    PolicyError,
    RunnerCrashed,
    VerificationError,
)
from edge_agent.runner.protocol import Tried

GATE_TIMEOUT_S = 300.0
"""For all golden prompts together."""
MAX_TRIES = 3
"""A candidate is not tried again when this many agents died trying it."""
MAX_LOAD_FAILURES = 2
MAX_CRASHES = 3
CRASH_WINDOW_S = 600.0
RETRY_FIRST_S, RETRY_LAST_S = 1.0, 60.0
_MAX_UNMET = 32
_MAX_SHOWN = 3


# --- Candidates ----------------------------------------------------------------------------------------


class GateFailed(ContentError):
    """A candidate loaded, but did not answer its golden prompts as its package says it must."""

    code = "gate_failed"


def check_golden(tried: Tried) -> None:
    """Golden prompts must be answered right.

    Raises:
        GateFailed: one of them was not.
    """
    if tried.failures:
        raise GateFailed("; ".join(tried.failures[:_MAX_SHOWN]))


def check_system(version_says: str, *, model: str) -> None:
    """A candidate must take the system prompt of the settings: all prompts that bring none get that one.

    Args:
        version_says: why it does not; empty if it does.
        model: its name in the settings.

    Raises:
        GateFailed: it does not.
    """
    if version_says:
        raise GateFailed(
            version_says,
            remedy=f"publish a version that takes it, or change models.{model}.system and activate this one",
        )


def shortfalls(tried: Tried, *, min_tokens_per_s: float, memory_limit_bytes: int) -> str:
    """Where speed or memory fell short of the settings, which is no error; empty when neither did.

    Args:
        min_tokens_per_s, memory_limit_bytes: 0 where the settings want none.
    """
    found = []
    if min_tokens_per_s and tried.tokens_per_s < min_tokens_per_s:
        found.append(f"{tried.tokens_per_s:.1f} tokens/s, {min_tokens_per_s:g} are wanted")
    if memory_limit_bytes and tried.memory_bytes > memory_limit_bytes:
        found.append(f"{tried.memory_bytes} bytes of memory, {memory_limit_bytes} are allowed")
    return "; ".join(found)


def caused_by_host(error: EdgeAgentError) -> bool:
    """True when this host lacks something. That says nothing about the candidate, and the host may get it."""
    return isinstance(error, MemoryShort | CannotRun)


def caused_by_damage(error: EdgeAgentError) -> bool:
    """True when the disk did not give back what was verified. That says nothing about the version either."""
    return isinstance(error, VerificationError)


def caused_by_candidate(error: EdgeAgentError) -> bool:
    """True for what a candidate did itself. A kill, a full disk or a busy lock may have another cause: then the
    candidate is tried again, a bounded number of times."""
    return isinstance(error, GateFailed | LoadFailed | RunnerCrashed | PolicyError)


@dataclass(frozen=True, kw_only=True)
class UnmetRequirement:
    """What this host lacked when a candidate was tried.

    Attributes:
        error: how the attempt ended.
        host: what `host.identity.of_host` said then.
        wanted_bytes: how much memory must be attainable for another attempt; 0 when memory was not the reason.
    """

    error: EdgeAgentError
    host: str
    wanted_bytes: int = 0


class UnmetRequirements:
    """Candidates that were refused because this host lacks something.

    An attempt may stop the active version, so none is made before the host has changed. One model's; whoever
    operates on the model adds and asks. A restart forgets them.
    """

    def __init__(self) -> None:
        self._by_key: dict[str, UnmetRequirement] = {}

    def add(self, key: str, unmet: UnmetRequirement) -> None:
        others = [(other, known) for other, known in self._by_key.items() if other != key]
        self._by_key = dict([*others, (key, unmet)][-_MAX_UNMET:])

    def error_expected(self, key: str, *, host: str, attainable_bytes: int) -> EdgeAgentError | None:
        """The error of the last attempt, if another one would end the same way."""
        unmet = self._by_key.get(key)
        if unmet is None or host != unmet.host:
            return None
        if unmet.wanted_bytes and attainable_bytes >= unmet.wanted_bytes:
            return None
        return type(unmet.error)(unmet.error.message, remedy=unmet.error.remedy)


def memory_for_another_attempt(weight_bytes: int, *, before_bytes: int, after_bytes: int) -> int:
    """How much memory must be attainable before a version that did not fit is tried again.

    Args:
        before_bytes: what was attainable when the attempt began; runners share pages, so a part of it may have been
            counted twice.
        after_bytes: what was attainable after the others had stopped.
    """
    short_bytes = max(0, weight_bytes - after_bytes)
    return before_bytes + short_bytes + weight_bytes // 16  # free memory always varies a little


# --- The active version --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoadVerdict:
    """What follows when the active version did not load.

    Attributes:
        step_back: another version takes its place, if there is one.
        quarantine: the version is not tried again once another took its place.
        final: if there is no other, the model has failed, until the next attempt shows otherwise.
    """

    step_back: bool
    quarantine: bool
    final: bool


def on_load_failure(error: EdgeAgentError, failures: int) -> LoadVerdict:
    """Judges an active version that did not load.

    Args:
        error: why, the last time.
        failures: how many times in a row.
    """
    # Another attempt would end the same way.
    certain = isinstance(error, VerificationError | PolicyError | CannotRun)
    repeated = failures >= MAX_LOAD_FAILURES
    return LoadVerdict(
        # When memory is short, another version would not help, or would be the wrong one to keep.
        step_back=(certain or repeated) and not isinstance(error, MemoryShort),
        quarantine=not certain,
        final=certain or repeated,
    )


class LoadFailures:
    """How many times in a row the active version did not load, and when it may be tried again.

    One model's: the dispatcher's thread counts, an exchange or a repair clears.

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
    """When the active version's runner crashed, and the digests of the prompts that may have been the cause.

    One model's: the dispatcher's thread adds, an exchange clears.
    """

    def __init__(self) -> None:
        self._recent: collections.deque[tuple[float, frozenset[bytes]]] = collections.deque(maxlen=64)

    def add(self, suspects: frozenset[bytes], now_s: float) -> int:
        """Gives how many different prompts caused the crashes of the last `CRASH_WINDOW_S`, this one included."""
        self._recent.append((now_s, suspects))
        return distinct_causes(
            [known for at_s, known in list(self._recent) if now_s - at_s <= CRASH_WINDOW_S]
        )

    def clear(self) -> None:
        self._recent.clear()


def distinct_causes(crashes: Iterable[frozenset[bytes]]) -> int:
    """The least number of different prompts that explains all crashes, each given as its suspects."""
    explained: set[bytes] = set()
    count = 0
    for suspects in sorted(crashes, key=len):
        if explained.isdisjoint(suspects):
            explained |= suspects
            count += 1
    return count
