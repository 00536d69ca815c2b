"""How many threads a version runs on: the number in the settings, else the fastest that was measured here.

The library's own choice is half of the CPUs, which halves the speed on many small devices; one thread for each CPU
halves it where two CPUs share a core, or where half of the cores are slow ones. So it is measured. Which numbers
are worth a try is in `host/cpus.py`; which version is measured, and when, in `loading.py`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from edge_agent.errors import DeadlineExceeded
from edge_agent.host import cpus, identity
from edge_agent.runner.protocol import Delta, Done
from edge_agent.serving.learned import Learned

log = logging.getLogger(__name__)

MEASURE_S = 1.0
WORTH = 1.05
"""More threads must be this much faster than fewer ones: they take time from everything else."""

LIMIT_S = 240.0
"""For all prompts of one measurement: whoever measures may hold the only thread that brings updates."""
MOST_PROMPTS = 128
"""In a row. A model whose answers are that short is measured by what it said."""

_FIRST_TOKENS, _MOST_TOKENS = 8, 512


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
        """Chooses by measured tokens a second (0: could not be measured), and remembers the choice."""
        if not all(rates.values()):
            return next(iter(rates))
        best = fastest(rates)
        log.info("threads measured digest=%s threads=%d tokens_per_s=%s", digest[:12], best, dict(rates))
        self._learned.note_threads(digest, self._host, threads=best, tokens_per_s=rates)
        return best


def fastest(rates: Mapping[int, float]) -> int:
    """The number of threads to take, by measured tokens a second."""
    best = min(rates)
    for threads in sorted(rates):
        if rates[threads] > rates[best] * WORTH:
            best = threads
    return best


class Generator(Protocol):
    """A loaded runner, as far as it is measured."""

    def generate(
        self, prompt_id: str, document: dict[str, Any], *, timeout_s: float
    ) -> Iterator[Delta | Done]: ...


def measure(runner: Generator, *, signature: str, clock: Callable[[], float] = time.monotonic) -> float:
    """Decodes for about `MEASURE_S` seconds; gives tokens a second.

    Args:
        signature: `chat` or `prompt`: the form of the prompt.
        clock: monotonic seconds, for the time limit, and for a runner that does not say how long it decoded.

    Raises:
        EdgeAgentError: the runner failed, or `LIMIT_S` passed.
    """
    until_s = clock() + LIMIT_S
    rate = _decode(runner, signature, _FIRST_TOKENS, clock, until_s)
    tokens = min(_MOST_TOKENS, max(_FIRST_TOKENS, round(rate * MEASURE_S)))
    return _decode(runner, signature, tokens, clock, until_s)


def _decode(
    runner: Generator, signature: str, tokens: int, clock: Callable[[], float], until_s: float
) -> float:
    text = "Tell me a long story."
    prompt = {"messages": [{"role": "user", "content": text}]} if signature == "chat" else {"prompt": text}
    generated, elapsed_ms = 0, 0.0
    for _ in range(MOST_PROMPTS):
        started_s = clock()
        if generated >= tokens:
            break
        if started_s >= until_s:
            raise DeadlineExceeded(f"its speed was not known after {LIMIT_S:.0f} s")
        last: Delta | Done | None = None
        document = {**prompt, "max_tokens": tokens - generated, "temperature": 0.0}
        for item in runner.generate(
            f"measure-{uuid.uuid4().hex[:8]}", document, timeout_s=until_s - started_s
        ):
            last = item
        said = last.usage.get("completion_tokens", 0) if isinstance(last, Done) else 0
        if not isinstance(last, Done) or said <= 0:
            break  # a model that says nothing is as fast with any number of threads
        generated += min(said, tokens - generated)
        elapsed_ms += last.timings.get("decode_ms") or (clock() - started_s) * 1000
    return generated / max(elapsed_ms, 0.001) * 1000
