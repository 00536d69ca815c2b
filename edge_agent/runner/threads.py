"""How many threads a model runs on: the numbers that are worth a try, and how fast one of them is.

The library's own choice is half of the CPUs, which halves the speed on many small devices; one thread for
each CPU halves it where two CPUs share a core, or where half of the cores are slow ones. So it is measured.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from edge_agent.runner.protocol import Delta, Done

MEASURE_S = 1.0
WORTH = 1.05
"""More threads must be this much faster than fewer ones: they take time from everything else."""

_FIRST_TOKENS, _MOST_TOKENS = 8, 512
_TIMEOUT_S = 120.0


class Generator(Protocol):
    """What a loaded runner does."""

    def generate(
        self, prompt_id: str, document: dict[str, Any], *, timeout_s: float
    ) -> Iterator[Delta | Done]: ...


def measure(runner: Generator, *, signature: str) -> float:
    """Decodes for about `MEASURE_S` seconds; gives tokens a second.

    Raises:
        EdgeAgentError: the runner failed.
    """
    rate = _decode(runner, signature, _FIRST_TOKENS)
    return _decode(runner, signature, min(_MOST_TOKENS, max(_FIRST_TOKENS, round(rate * MEASURE_S))))


def fastest(rates: Mapping[int, float]) -> int:
    """The number of threads to take, by measured tokens a second."""
    best = min(rates)
    for threads in sorted(rates):
        if rates[threads] > rates[best] * WORTH:
            best = threads
    return best


def _decode(
    runner: Generator, signature: str, tokens: int, clock: Callable[[], float] = time.monotonic
) -> float:
    text = "Tell me a long story."
    prompt = {"messages": [{"role": "user", "content": text}]} if signature == "chat" else {"prompt": text}
    generated, elapsed_ms = 0, 0.0
    while generated < tokens:
        started_s = clock()
        last: Delta | Done | None = None
        document = {**prompt, "max_tokens": tokens - generated, "temperature": 0.0}
        for item in runner.generate(f"measure-{uuid.uuid4().hex[:8]}", document, timeout_s=_TIMEOUT_S):
            last = item
        if not isinstance(last, Done) or not last.usage.get("completion_tokens"):
            break  # a model that says nothing is as fast with any number of threads
        generated += last.usage["completion_tokens"]
        elapsed_ms += last.timings.get("decode_ms") or (clock() - started_s) * 1000
    return generated / max(elapsed_ms, 0.001) * 1000
