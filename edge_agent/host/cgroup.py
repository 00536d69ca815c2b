"""The memory and CPU limits of the control groups above this process.

Both cgroup versions count, even if mounted side by side: Debian, containers and older boards differ. The kernel's
tables say where a group's folder is; nothing is guessed. A file that is missing, or says `max`, sets no limit.
Source: proc(5) mountinfo, cgroups(7); the kernel's Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")
_NO_LIMIT = 1 << 60
"""Version 1 writes a huge number if there is no limit."""


def memory_left_bytes(proc: Path = PROC) -> int | None:
    """The least memory that a group above this process has left; None if no group limits memory.

    File pages that the kernel can drop count as free.
    """
    left = []
    for group in _folders("memory", proc, version=2):
        left += _left(group, ("memory.max", "memory.high"), "memory.current", "inactive_file")
    for group in _folders("memory", proc, version=1):
        left += _left(group, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
    return min(left, default=None)


def memory_limit_bytes(proc: Path = PROC) -> int | None:
    """The lowest memory limit of a group above this process; None if no group limits memory."""
    limits = []
    for version, names in ((2, ("memory.max", "memory.high")), (1, ("memory.limit_in_bytes",))):
        for group in _folders("memory", proc, version=version):
            limits += [limit for name in names if (limit := _number(group / name)) is not None]
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def cpu_quota(proc: Path = PROC) -> float | None:
    """The lowest CPU quota of a group above this process, in CPUs; None if no group limits CPU time."""
    quotas = []
    for group in _folders("cpu", proc, version=2):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        quotas += _quotient(quota, period)
    for group in _folders("cpu", proc, version=1):
        quotas += _quotient(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))
    return min(quotas, default=None)


def _left(group: Path, limits: tuple[str, ...], usage: str, droppable: str) -> list[int]:
    used = _number(group / usage)
    if used is None:
        return []
    cache = next(
        (int(line.split()[1]) for line in _text(group / "memory.stat").splitlines()
         if line.startswith(f"{droppable} ")), 0
    )  # fmt: skip
    found = [limit for name in limits if (limit := _number(group / name)) is not None]
    return [max(0, limit - used + cache) for limit in found if limit < _NO_LIMIT]


def _folders(controller: str, proc: Path, *, version: int) -> Iterator[Path]:
    """The folders of this process's groups, from its own up to the mounted one."""
    path = _group_path(controller, proc, version)
    if path is None:
        return
    for root, mount in _mounts(controller, proc, version):
        inside = path.removeprefix(root.rstrip("/")).strip("/") if path.startswith(root) else ""
        folder = mount / inside
        # In a container the path may be the host's, and only the mounted part is visible.
        folder = folder if folder.is_dir() else mount
        yield folder
        while folder != mount:
            folder = folder.parent
            yield folder


def _group_path(controller: str, proc: Path, version: int) -> str | None:
    for line in _text(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") if version == 1 else controllers == "":
            return path
    return None


def _mounts(controller: str, proc: Path, version: int) -> Iterator[tuple[str, Path]]:
    """(the mounted part of the hierarchy, where it is mounted)."""
    for line in _text(proc / "mountinfo").splitlines():
        place, separator, kind = line.partition(" - ")
        fields, kinds = place.split(" "), kind.split(" ")
        if not separator or len(fields) < 5 or len(kinds) < 3:
            continue
        is_v1 = kinds[0] == "cgroup" and controller in kinds[2].split(",")
        if is_v1 if version == 1 else kinds[0] == "cgroup2":
            yield fields[3], Path(fields[4].replace("\\040", " "))


def _quotient(quota: str, period: str) -> list[float]:
    try:
        value = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return []  # missing, or "max"
    return [value] if value > 0 else []  # version 1 writes -1 for no limit


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
