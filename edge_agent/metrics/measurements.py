"""What has happened since the daemon started, counted: prompts and their times, refusals, updates.

Owns the counts. They outlive a connection, a runner and a version, and end with the daemon: `boot_id` and
`started_at` say when they began. Refuses what would let them grow without end: models are those of the settings, and
codes are those of `errors.py`. What is true at one moment (queue, cache, memory) is no business of this file.

    dispatcher, intake, transports, updates → note_…, check → document → `device_metrics.py`
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edge_agent.errors import EdgeAgentError, SyncStopped, VersionHeld
from edge_agent.metrics import histogram
from edge_agent.metrics.histogram import Histogram
from edge_agent.metrics.recent import Answered, Recent, Took

OK = "ok"
"""The code of an answer that is no error."""

_BOUNDS = {
    "first_token_s": histogram.FIRST_TOKEN_S,
    "per_token_s": histogram.PER_TOKEN_S,
    "request_s": histogram.REQUEST_S,
    "queue_s": histogram.QUEUE_S,
    "input_tokens": histogram.TOKENS,
    "output_tokens": histogram.TOKENS,
}


@dataclass
class Failed:
    """Attributes:
    code: of an `EdgeAgentError`; empty where all is well.
    """

    code: str = ""


class _OfModel:
    """The counts of one model."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter({OK: 0})
        self.histograms = {key: Histogram(bounds) for key, bounds in _BOUNDS.items()}
        self.cached_tokens = 0
        self.checks = 0
        self.check_failures: Counter[str] = Counter()
        self.sync_bytes = 0
        self.mirror_bytes = 0

    def document(self) -> dict[str, Any]:
        return {
            "answers": dict(self.answers),
            **{key: each.document() for key, each in self.histograms.items()},
            "cached_tokens": self.cached_tokens,
            "checks": self.checks,
            "check_failures": dict(self.check_failures),
            "sync_bytes": self.sync_bytes,
            "mirror_bytes": self.mirror_bytes,
        }


class Measurements:
    """Any thread. What is noted of a model that the settings do not have is dropped: such prompts are what an earlier
    configuration left.

    Args:
        models: their configured names.
        now: the clock on the wall.
    """

    def __init__(self, models: Iterable[str], *, now: Callable[[], float] = time.time) -> None:
        self._lock = threading.Lock()
        self._now = now
        self._recent = Recent()
        self._models = {name: _OfModel() for name in models}
        self._refused: Counter[str] = Counter()

    def note_answer(self, model: str, code: str, took: Took | None = None) -> None:
        """A prompt has its one answer.

        Args:
            code: `OK`, or the code of a `PromptError`.
            took: of an answer that is no error.
        """
        with self._lock:
            if (of := self._models.get(model)) is None:
                return
            of.answers[code] += 1
            self._recent.add(Answered(at=self._now(), model=model, code=code, took=took))
            if took is None:
                return
            for key, each in of.histograms.items():
                value = getattr(took, key)
                # No model answers without tokens: it does not count them.
                if value is not None and not (key.endswith("_tokens") and value == 0):
                    each.observe(value)
            of.cached_tokens += took.cached_tokens

    def note_refusal(self, code: str) -> None:
        """A request was not accepted.

        Args:
            code: of a `PromptError`.
        """
        with self._lock:
            self._refused[code] += 1

    @contextmanager
    def check(self, model: str) -> Iterator[Failed]:
        """In the block, a model is checked for another version. What it raises is why the check failed, unless it waits
        for its time or gives way; one that fails and raises nothing says so in what it gets."""
        failed = Failed()
        try:
            yield failed
        except (VersionHeld, SyncStopped):
            raise
        except EdgeAgentError as error:
            failed.code = error.code
            raise
        finally:
            with self._lock:
                of = self._models[model]
                of.checks += 1
                if failed.code:
                    of.check_failures[failed.code] += 1

    def note_bytes(self, model: str, fetched: int, mirrored: int = 0) -> None:
        """Bytes of a version have come.

        Args:
            mirrored: those of them that are known to be from a mirror.
        """
        with self._lock:
            of = self._models[model]
            of.sync_bytes += max(0, fetched)
            of.mirror_bytes += max(0, mirrored)

    def recent(self) -> list[dict[str, Any]]:
        """The last answers, the oldest first: `[{"at", "model", "code", …}]`; see `recent.py`."""
        with self._lock:
            return self._recent.document()

    def document(self) -> dict[str, Any]:
        """`{"models": {name: …}, "refused": {code: …}, "bounds": {…}}`; histograms have the bounds of their name."""
        with self._lock:
            return {
                "models": {name: of.document() for name, of in self._models.items()},
                "refused": dict(self._refused),
                "bounds": {key: list(bounds) for key, bounds in _BOUNDS.items()},
            }
