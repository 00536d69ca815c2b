"""How much memory a new runner may expect: what the host has free, within this process's cgroup."""

from __future__ import annotations

from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that can be taken without swapping. Source: proc(5) MemAvailable; cgroup v2 memory.max."""
    limits = [_host_bytes(), *_cgroup_bytes()]
    return max(0, min(limits))


def _host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _cgroup_bytes() -> list[int]:
    """What each cgroup v2 above this process still allows; none on a host without them."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if path is None:
        return []
    folder, found = _CGROUP_ROOT / path, []
    while folder != _CGROUP_ROOT.parent:
        maximum, current = _number(folder / "memory.max"), _number(folder / "memory.current")
        if maximum is not None and current is not None:
            found.append(maximum - current + _cache_bytes(folder))
        folder = folder.parent
    return found


def _cache_bytes(folder: Path) -> int:
    """File pages that the kernel would rather drop than refuse memory."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # missing, or "max"
