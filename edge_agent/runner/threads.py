"""How many threads a model runs on: the numbers that are worth a try, and how fast one of them is.

The library's own choice is half of the CPUs, which halves the speed on many small devices; one thread for
each CPU halves it where two CPUs share a core, or where half of the cores are slow ones. So it is measured.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Protocol

from edge_agent.runner import cgroup
from edge_agent.runner.protocol import Delta, Done

CPUS = Path("/sys/devices/system/cpu")
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


def candidates(
    *, cpus: Path = CPUS, allowed: Set[int] | None = None, quota: float | None = None
) -> tuple[int, ...]:
    """Numbers of threads to try, the best guess first: physical cores, the fastest of them, all CPUs, half of them.

    Half is the library's own choice. Where other programs keep the CPUs busy it can be the fastest by far: each step
    of a token waits for the last thread (docs/models.md).

    Args:
        cpus: the kernel's description of the CPUs.
        allowed: CPUs that this process may run on; None asks the kernel.
        quota: CPUs whose time it may take; None asks its control groups.
    """
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    quota = cgroup.cpu_quota() if quota is None else quota
    most = max(1, min(len(allowed), math.ceil(quota) if quota else len(allowed)))
    cores = {_core(cpus, cpu) for cpu in allowed}
    capacities = {cpu: _capacity(cpus, cpu) for cpu in allowed}
    fastest = {_core(cpus, cpu) for cpu in allowed if capacities[cpu] == max(capacities.values())}
    counts = (len(cores), len(fastest), len(allowed), max(1, most // 2))
    return tuple(dict.fromkeys(min(most, count) for count in counts))


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


def _core(cpus: Path, cpu: int) -> tuple[str, str]:
    """What tells one physical core from another; a CPU that nothing is known of is a core of its own."""
    topology = cpus / f"cpu{cpu}" / "topology"
    return _text(topology / "physical_package_id"), _text(topology / "core_id") or f"cpu{cpu}"


def _capacity(cpus: Path, cpu: int) -> int:
    """How fast a CPU is beside the others of its host; 0 where the kernel does not say."""
    folder = cpus / f"cpu{cpu}"
    text = _text(folder / "cpu_capacity") or _text(folder / "cpufreq" / "cpuinfo_max_freq")
    return int(text) if text.isdecimal() else 0


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
