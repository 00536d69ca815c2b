"""Memory of this host and of processes, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

from edge_agent.host import cgroup

_NOT_KNOWN = 1 << 62


def available_bytes() -> int:
    """Bytes that can be used without swapping, within this process's control groups.

    Source: proc(5) MemAvailable.
    """
    in_groups = cgroup.memory_left_bytes()
    host = _field(Path("/proc/meminfo"), "MemAvailable")
    limits = [limit for limit in (host, in_groups) if limit is not None]
    return min(limits, default=_NOT_KNOWN)


def total_bytes() -> int:
    """Bytes that this process could use if nothing else were running. Source: proc(5) MemTotal."""
    host, in_groups = _field(Path("/proc/meminfo"), "MemTotal"), cgroup.memory_limit_bytes()
    return min((limit for limit in (host, in_groups) if limit is not None), default=_NOT_KNOWN)


def resident_bytes(pid: int) -> int:
    """Bytes that a process has in memory now; 0 if it has ended. Source: proc(5) VmRSS."""
    return _field(Path(f"/proc/{pid}/status"), "VmRSS") or 0


def peak_bytes(pid: int) -> int:
    """The most bytes that a process has had in memory; 0 if it has ended. Source: proc(5) VmHWM."""
    return _field(Path(f"/proc/{pid}/status"), "VmHWM") or 0


def _field(file: Path, name: str) -> int | None:
    try:
        for line in file.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def children(pid: int) -> list[int]:
    """The running child processes of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may contain anything, spaces and parentheses included.
            fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return sorted(found)
