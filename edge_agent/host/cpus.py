"""The CPUs that this process may use, and the numbers of threads worth trying on them."""

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

    Half of the CPUs is the library's own choice. It can be the fastest by far when other programs keep the CPUs busy,
    because each step of a token waits for the last thread (docs/models.md).

    Args:
        cpus: the kernel's description of the CPUs.
        allowed: CPUs that this process may run on; None asks the kernel.
        quota: CPU time that this process may use, in CPUs; None asks its control groups.
    """
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    quota = cgroup.cpu_quota() if quota is None else quota
    most = max(1, min(len(allowed), math.ceil(quota) if quota else len(allowed)))
    cores = {_core(cpus, cpu) for cpu in allowed}
    capacities = {cpu: _capacity(cpus, cpu) for cpu in allowed}
    fastest = {_core(cpus, cpu) for cpu in allowed if capacities[cpu] == max(capacities.values())}
    counts = (len(cores), len(fastest), len(allowed), max(1, most // 2))
    return tuple(dict.fromkeys(min(most, count) for count in counts))


def used_s(pid: int) -> float:
    """Seconds of processor time that a process has used, all its threads together; 0 if it has ended.

    Source: proc(5), utime and stime of /proc/PID/stat.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()  # the name in parentheses may contain anything
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _core(cpus: Path, cpu: int) -> tuple[str, str]:
    """Identifies a CPU's physical core; a CPU without topology counts as a core of its own."""
    topology = cpus / f"cpu{cpu}" / "topology"
    return _text(topology / "physical_package_id"), _text(topology / "core_id") or f"cpu{cpu}"


def _capacity(cpus: Path, cpu: int) -> int:
    """A CPU's speed relative to the others of this host; 0 if the kernel does not say."""
    folder = cpus / f"cpu{cpu}"
    text = _text(folder / "cpu_capacity") or _text(folder / "cpufreq" / "cpuinfo_max_freq")
    return int(text) if text.isdecimal() else 0


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
