"""The walls around a process that touches what came from elsewhere: it gives up for good what it does not need.

Owns which walls there are, in which order they are built, and which of them are the minimum (docs/adr/0011). A wall
that this kernel cannot build is left out and reported with the reason; whoever called decides whether that is enough.

    confine() → Walls: what stands, and what is missing and why

Call it while the process has one thread and has not imported numpy, whose BLAS starts threads: before its ABI 8
Landlock holds for the calling thread and what it starts later, and a thread that is there already stays outside.
`python -m edge_agent.host.confinement` builds all walls around itself and prints what stands.

Source: docs/security.md; landlock.py and seccomp.py name theirs; prctl(2), setrlimit(2), proc(5).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from edge_agent import environment
from edge_agent.host import landlock, memory, seccomp
from edge_agent.host.process_option import set_process_option
from edge_agent.host.seccomp import Calls, Network

OOM_SCORE = 500
"""If memory runs out, the kernel ends this process before the daemon."""
FILE_BYTES = 256 << 20
OPEN_FILES = 1024
TASKS = 512
"""Threads that may come while it runs, of it and of all others of its user."""
MEMORY_MARGIN_BYTES = 1 << 30
"""Stacks and arenas are counted in full, though hardly used."""

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_KNOWN_MEMORY_BYTES = 1 << 60


class Wall(StrEnum):
    """What keeps a process from one kind of harm."""

    DESCRIPTORS = "descriptors"
    """It has no files open but its own."""
    LIMITS = "limits"
    """Memory, size of files, open files, threads; no core dump."""
    FILES = "files"
    """Landlock: no files but those named."""
    TCP = "tcp"
    """Landlock, ABI 4."""
    SIGNALS = "signals"
    """Landlock, ABI 6: no signals to processes outside, and none of their abstract sockets."""
    MEMORY = "memory"
    """Other processes of its user cannot look into it."""
    SYSTEM_CALLS = "system_calls"
    """seccomp: no processes, programs, sockets, signals to others, …"""


MINIMUM = (Wall.FILES, Wall.SYSTEM_CALLS)
"""Without these, code from elsewhere does not run. Where `TCP` or `SIGNALS` is missing, `SYSTEM_CALLS` has it, too."""


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What a process keeps.

    Attributes:
        read: files and folders, beside Python and its libraries.
        write: folders in which it may make, change and remove files.
        moves: it moves or links files from one of these folders to another.
        calls: of the kernel.
        file_bytes: the longest file that it may write; None for any.
        keep: descriptors, beside the standard ones.
    """

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    moves: bool = False
    calls: Calls = field(default_factory=Calls)
    file_bytes: int | None = FILE_BYTES
    keep: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Walls:
    """What was built.

    Attributes:
        missing: why the others were not. A wall that the settings opened is in neither.
    """

    stand: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def lacking(self) -> str:
        """What is missing of the minimum, for people; empty if nothing is."""
        return "; ".join(f"{wall}: {self.missing[wall]}" for wall in MINIMUM if wall in self.missing)


def confine(confinement: Confinement) -> Walls:
    """Builds all walls that this host can build around this process, for good.

    Raises:
        RuntimeError: the process has more than one thread.
        OSError: it cannot even give up new privileges.
    """
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("a process with several threads cannot be confined")
    _volunteer_when_memory_is_short()
    try:
        set_process_option(_PR_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise OSError(error.errno, "new privileges cannot be given up") from error
    stand: list[str] = []
    missing: dict[str, str] = {}
    for wall in Wall:
        if wall is Wall.TCP and confinement.calls.network.internet:
            continue
        try:
            BUILDERS[wall](confinement)
            stand.append(wall)
        except (OSError, _NotHere, KeyError) as error:
            missing[wall] = str(error)
    return Walls(stand=tuple(stand), missing=missing)


class _NotHere(Exception):
    """This host cannot build a wall."""


def _close_descriptors(confinement: Confinement) -> None:
    low = 3
    for number in sorted(confinement.keep):
        os.closerange(low, number)
        low = max(low, number + 1)
    os.closerange(low, _most_descriptors())


def _limit(confinement: Confinement) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: _tasks() + TASKS,
    }
    if confinement.file_bytes is not None:
        limits[resource.RLIMIT_FSIZE] = confinement.file_bytes
    if (total := memory.total_bytes()) < _KNOWN_MEMORY_BYTES:
        limits[resource.RLIMIT_DATA] = total + MEMORY_MARGIN_BYTES
    for name, wanted in limits.items():
        lower_limit(name, wanted)


def lower_limit(name: int, wanted: int) -> None:
    """Lowers one of this process's limits (`resource.RLIMIT_…`) for good; one that is stricter already stays."""
    _, hard = resource.getrlimit(name)
    bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(name, (bound, bound))


def _guard_files(confinement: Confinement) -> None:
    _need_landlock(landlock.MOVE_ABI if confinement.moves else 1)
    libraries = runtime_paths(network=confinement.calls.network)
    landlock.restrict(
        tcp=False,
        scope=False,
        read=(*libraries, *confinement.read),
        write=(Path(os.devnull), *confinement.write),
        run=(*libraries, *_python()) if confinement.calls.programs else (),
    )


def _guard_tcp(confinement: Confinement) -> None:
    _need_landlock(landlock.TCP_ABI)
    landlock.restrict(files=False, scope=False)


def _guard_signals(confinement: Confinement) -> None:
    _need_landlock(landlock.SCOPE_ABI)
    landlock.restrict(files=False, tcp=False)


def _guard_memory(confinement: Confinement) -> None:
    hide_memory()


def hide_memory() -> None:
    """Lets no other process of this user look into this one: its memory, environment and open files. A program that it
    starts is visible again.

    Raises:
        OSError: the kernel refuses.
    """
    set_process_option(_PR_SET_DUMPABLE, 0)


def _guard_system_calls(confinement: Confinement) -> None:
    architecture = seccomp.of_this_host()
    if architecture is None:
        raise _NotHere(f"there is no list of system calls for {platform.machine()}")
    try:
        seccomp.install(architecture, confinement.calls)
    except OSError as error:
        raise _NotHere(f"this kernel takes no filter of system calls: {error.strerror}") from error


BUILDERS: dict[Wall, Callable[[Confinement], None]] = {
    Wall.DESCRIPTORS: _close_descriptors,
    Wall.LIMITS: _limit,
    Wall.FILES: _guard_files,
    Wall.TCP: _guard_tcp,
    Wall.SIGNALS: _guard_signals,
    Wall.MEMORY: _guard_memory,
    Wall.SYSTEM_CALLS: _guard_system_calls,
}
"""How each wall is built, in the order of `Wall`: the last one forbids what the others need."""


def _need_landlock(needed: int) -> None:
    known = landlock.abi()
    if known == 0:
        raise _NotHere("this kernel has no Landlock, it is switched off, or a service manager forbids it")
    if known < needed:
        raise _NotHere(f"this kernel has version {known} of Landlock, {needed} is needed")


def _volunteer_when_memory_is_short() -> None:
    """Raises the score, which a unit lowers and children inherit. Before `MEMORY`, which takes the file away."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    except OSError:
        return  # it is no wall: the kernel then chooses by size


def _tasks() -> int:
    """The threads of all processes of this host. Source: proc(5) loadavg."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])


def _most_descriptors() -> int:
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 20)


# --- What Python and numeric libraries read, whatever they run ----------------------------------------------

_SYSTEM_PATHS = (
    "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/etc/ld.so.cache",
    "/etc/localtime", "/usr/share/zoneinfo", "/dev/urandom",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/self/status",
    "/sys/devices/system/cpu", "/sys/devices/system/node",
)  # fmt: skip
_NETWORK_PATHS = (
    "/etc/resolv.conf", "/run/systemd/resolve", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf",
    "/etc/gai.conf", "/etc/services", "/etc/passwd", "/etc/ssl", "/etc/pki",
    "/etc/ca-certificates", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates",
)  # fmt: skip
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")


def runtime_paths(*, network: Network = Network.NONE) -> tuple[Path, ...]:
    """What is needed to import and run libraries here; some of it may not exist."""
    return tuple(dict.fromkeys(_runtime_paths(network)))


def _runtime_paths(network: Network) -> Iterable[Path]:
    for prefix in (sys.prefix, sys.base_prefix):
        yield Path(prefix, "lib")
        yield Path(prefix, "lib64")
    for folder in map(Path, sys.path):
        if folder.name in _PACKAGE_FOLDERS:
            yield folder
            yield from _linked_into(folder)
    yield Path(__file__).parents[1]  # this program, wherever it is installed
    libraries = environment.inherited_environment("LD_LIBRARY_PATH").get("LD_LIBRARY_PATH", "")
    yield from (Path(folder) for folder in libraries.split(":") if folder.startswith("/"))
    yield from map(Path, _SYSTEM_PATHS)
    if network.internet:
        yield from map(Path, _NETWORK_PATHS)


def _python() -> Iterable[Path]:
    """What starts another Python."""
    return Path(sys.executable), Path(sys.prefix, "pyvenv.cfg")


def _linked_into(folder: Path) -> Iterable[Path]:
    """Packages that are elsewhere, as an administrator or a package manager has linked them. A rule is for what a link
    leads to."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_symlink()]
    except OSError:
        return []


if __name__ == "__main__":
    built = confine(Confinement())
    print(json.dumps({"stand": built.stand, "missing": built.missing}))
