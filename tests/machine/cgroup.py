"""A group of processes that is frozen and killed as one, whatever they are doing: a cgroup of its own.

On a host with both versions of cgroups, the group is in the hierarchy of systemd as well, which a systemd inside takes
for its own. Source: Documentation/admin-guide/cgroup-v2.rst, *Core Interface Files*.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from tests.support.processes import wait_until

_ROOT = Path("/sys/fs/cgroup")
_END_TIMEOUT_S = 60.0
LEAVES = ("machine", "commands")
"""A systemd manages the first; a group that has groups may have no processes, so what is beside it is in the second."""


class Cgroup:
    """One group. One thread.

    Args:
        name: of the group, below the one that this process is in.
    """

    def __init__(self, name: str) -> None:
        own = dict(_own_groups())
        unified = _ROOT / "unified" if (_ROOT / "unified").is_dir() else _ROOT
        self._folder = _below(unified, own[""]) / name
        self._folders = [self._folder]
        if "name=systemd" in own:
            self._folders.append(_below(_ROOT / "systemd", own["name=systemd"]) / name)
        for folder in self._folders:
            for leaf in LEAVES:
                (folder / leaf).mkdir(parents=True, exist_ok=True)

    def entering(self, leaf: str) -> Callable[[], None]:
        """What a process does to get in before it becomes another program."""

        def enter() -> None:
            for folder in self._folders:
                (folder / leaf / "cgroup.procs").write_text(str(os.getpid()))

        return enter

    def freeze(self) -> None:
        """From now on nothing of it runs but what the kernel is doing for it. Does not wait."""
        (self._folder / "cgroup.freeze").write_text("1")

    def kill(self) -> None:
        """Also what is frozen, without letting it run again. Returns when all have ended."""
        (self._folder / "cgroup.kill").write_text("1")
        wait_until(self._empty, _END_TIMEOUT_S, "the end of all processes")
        (self._folder / "cgroup.freeze").write_text("0")

    def remove(self) -> None:
        for top in self._folders:
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)  # noqa: PTH106 - a cgroup's folder has files that need not be removed first

    def _empty(self) -> bool:
        return "populated 0" in (self._folder / "cgroup.events").read_text().splitlines()


def _own_groups() -> list[tuple[str, str]]:
    """This process's groups: (hierarchy, path); the one of version 2 has no name."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return [(line.split(":", 2)[1], line.split(":", 2)[2]) for line in lines]


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")
