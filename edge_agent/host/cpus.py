"""The CPUs that this process may use: how many threads are worth a try on them."""

from __future__ import annotations

import math
import os
from collections.abc import Set
from pathlib import Path

from edge_agent.host import cgroup

CPUS = Path("/sys/devices/system/cpu")


def thread_counts(
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
