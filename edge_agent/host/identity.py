"""Identifies a host for measurements: its CPU, this process's share of it, and the inference library."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from edge_agent.host import cgroup

_CPU_NAMES = ("model name", "Model", "Hardware", "CPU part")


def of_host(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """One line that changes whenever earlier measurements on this host no longer apply."""
    allowed = sorted(os.sched_getaffinity(0))
    quota = cgroup.cpu_quota()
    return "; ".join(
        (
            f"{os.uname().machine} {_cpu_name(cpuinfo)}",
            f"{os.cpu_count()} cpus, allowed {_ranges(allowed)}{f', quota {quota:g}' if quota else ''}",
            f"onnxruntime-genai {_version('onnxruntime-genai')}",
        )
    )


def _cpu_name(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return next((found[name] for name in _CPU_NAMES if found.get(name)), "unknown")[:80]


def _ranges(numbers: list[int]) -> str:
    """Numbers as ranges, such as 0-3,6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
