"""Power that fails at a chosen system call, and a disk that forgets what was not synced.

`Power` takes the place of `os` in `edge_agent.cache.durable`, the one module that changes the cache on disk.
It numbers each call that changes something. Before a call, the folder is what a process that dies there leaves:
`watch` may keep it, as it is or as one of the faults would leave it; or the process really dies.

`Medium` is what the disk would hold after a power cut, kept beside the real folder by these rules:
    - a file's bytes and mode are on the medium when the file was synced, and not before;
    - a folder's names are on the medium when the folder was synced; a name without synced bytes is an empty file;
    - a rename is one step, and is on the medium when the folder of its target was synced.
"""

# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108 - it stands for `os`
from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from edge_agent.cache import durable

EVERYTHING = "POWERLOSS_FAULTS"
"""Set in the environment: all faults at all points, which takes minutes."""


class Fault(StrEnum):
    """What happens at the chosen call."""

    KILL = "kill"
    """The process dies; the kernel goes on, so all that was written stays."""
    TEAR = "tear"
    """The same in the middle of a write: half of its bytes are there."""
    DROP = "drop"
    """The power goes: nothing that was not synced is there."""
    MIX = "mix"
    """The power goes, and each file and folder has kept what was not synced, or not: a coin says which."""
    FULL = "full"
    """The disk is full: from this call on, whatever takes space fails; the process lives."""


@dataclass(frozen=True)
class Call:
    """One call that changes the disk; the path is relative to the state folder."""

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


@dataclass(frozen=True)
class Torn:
    """The half of a write's bytes that is there when the power goes in its middle."""

    offset: int
    data: bytes


Watch = Callable[[int, Call, Torn | None], None]
"""Called before each call with its number; with what is there when a write is torn."""


class Disk(Protocol):
    """What is told of the calls that decide what outlives a power cut: a `Medium`, or the way to one."""

    def synced(self, descriptor: int) -> object: ...

    def renamed(self, source: Path, target: Path) -> object: ...

    def hold(self, path: Path) -> object: ...


_TAKES_SPACE = frozenset(("open", "write", "mkdir", "link", "rename", "fsync"))


class Power:
    """Stands for the module `os` where `durable` uses it.

    Args:
        state: the state folder; a change elsewhere is an error.
        at: number of the call, from 0, at which `fault` comes.
        fault: `KILL` ends this process, `FULL` lets calls fail; None only counts.
        watch: called before each call.
        medium: keeps what the disk would hold, too.
        turn: around each call, where several processes write to the folder.
        really_sync: False leaves out the wait for a real disk, which nobody here cuts off.
    """

    def __init__(
        self,
        state: Path,
        *,
        at: int = -1,
        fault: Fault | None = None,
        watch: Watch | None = None,
        medium: Disk | None = None,
        turn: Callable[[], AbstractContextManager[object]] = nullcontext,
        really_sync: bool = False,
    ) -> None:
        self.calls: list[Call] = []
        self._medium = medium
        self._turn = turn
        self._state = state
        self._at = at
        self._fault = fault
        self._watch = watch
        self._really_sync = really_sync
        self._full = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """For the block, `durable` calls this; blocks may be nested."""
        before = vars(durable)["os"]
        vars(durable)["os"] = self
        try:
            yield
        finally:
            vars(durable)["os"] = before

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    # --- The calls that change something ---------------------------------------------------------------

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if not flags & (os.O_CREAT | os.O_TRUNC):
            return os.open(path, flags, mode)
        with self._call("open", path):
            return os.open(path, flags, mode)

    def write(self, descriptor: int, data: memoryview) -> int:
        torn = Torn(os.lseek(descriptor, 0, os.SEEK_CUR), bytes(data[: len(data) // 2]))
        with self._call("write", _path_of(descriptor), torn):
            return os.write(descriptor, data)

    def ftruncate(self, descriptor: int, length: int) -> None:
        with self._call("ftruncate", _path_of(descriptor)):
            os.ftruncate(descriptor, length)

    def fsync(self, descriptor: int) -> None:
        with self._call("fsync", _path_of(descriptor)):
            if self._really_sync:
                os.fsync(descriptor)
            if self._medium:
                self._medium.synced(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        with self._call("rename", target):
            os.rename(source, target)
            if self._medium:
                self._medium.renamed(source, target)

    def link(self, source: Path, target: Path) -> None:
        with self._call("link", target):
            os.link(source, target)

    def unlink(self, path: Path) -> None:
        with self._call("unlink", path):
            if self._medium:
                self._medium.hold(path)
            os.unlink(path)

    def rmdir(self, path: Path) -> None:
        with self._call("rmdir", path):
            os.rmdir(path)

    def mkdir(self, path: Path, mode: int) -> None:
        with self._call("mkdir", path):
            os.mkdir(path, mode)

    def chmod(self, path: Path, mode: int) -> None:
        with self._call("chmod", path):
            os.chmod(path, mode)

    def utime(self, path: Path) -> None:
        with self._call("utime", path):
            os.utime(path)

    # --- The fault -------------------------------------------------------------------------------------

    @contextmanager
    def _call(self, name: str, path: Path, torn: Torn | None = None) -> Iterator[None]:
        with self._turn():
            self._before(name, path, torn)
            yield

    def _before(self, name: str, path: Path, torn: Torn | None) -> None:
        if not path.is_relative_to(self._state):
            raise AssertionError(f"durable changes {path}, which is not under {self._state}")
        number, call = len(self.calls), Call(name, path.relative_to(self._state).as_posix())
        self.calls.append(call)
        if self._watch:
            self._watch(number, call, torn)
        if number == self._at:
            if self._fault is Fault.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            self._full = True
        if self._full and name in _TAKES_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass
class _Node:
    """A file or folder, by inode. The descriptor keeps its number from being given to another one."""

    descriptor: int
    is_folder: bool
    mode: int
    data: bytes = b""
    times_ns: tuple[int, int] = (0, 0)
    names: dict[str, int] = field(default_factory=dict)


class Medium:
    """The state folder as a disk would hold it, one node for each inode."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._nodes: dict[int, _Node] = {}
        self._renames: list[tuple[int, int, str, int]] = []  # from folder, to folder, name left, inode
        for folder, _, names in os.walk(root):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                self._sync(self.hold(path))

    def hold(self, path: Path) -> int:
        """Makes sure that a file or folder is known; gives its inode."""
        status = path.lstat()
        if status.st_ino not in self._nodes:
            is_folder = stat.S_ISDIR(status.st_mode)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            mode = 0o700 if is_folder else 0o600
            self._nodes[status.st_ino] = _Node(descriptor=descriptor, is_folder=is_folder, mode=mode)
        return status.st_ino

    def synced(self, descriptor: int) -> None:
        self._sync(self.hold(_path_of(descriptor)))

    def renamed(self, source: Path, target: Path) -> None:
        inode = self.hold(target)
        if source.parent != target.parent:
            self._renames.append((self.hold(source.parent), self.hold(target.parent), source.name, inode))

    def write(self, target: Path, *, seed: int | None = None) -> None:
        """Makes a folder that is what the medium holds.

        Args:
            seed: for the coins that let some of what was not synced be there, too.
        """
        medium = self if seed is None else self._with_some(seed)
        medium._write(target, self._root.lstat().st_ino, {})

    def carried_to(self, copy: Path) -> Medium:
        """The same for a copy of the folder, whose processes go on from here: a kill is no sync."""
        other = object.__new__(Medium)
        other._root, other._nodes = copy, {}
        twins: dict[int, int] = {}
        for folder, _, names in os.walk(self._root):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                twins[self.hold(path)] = other.hold(copy / path.relative_to(self._root))
        for inode, node in self._nodes.items():
            twin = twins.setdefault(inode, -inode)  # negative: removed, and on the medium still
            descriptor = other._nodes[twin].descriptor if twin > 0 else os.dup(node.descriptor)
            other._nodes[twin] = replace(node, descriptor=descriptor)
        for node in other._nodes.values():
            node.names = {name: twins[child] for name, child in node.names.items()}
        other._renames = [
            (twins[origin], twins[target], name, twins[moved])
            for origin, target, name, moved in self._renames
        ]
        return other

    def close(self) -> None:
        for node in self._nodes.values():
            os.close(node.descriptor)

    def _sync(self, inode: int) -> None:
        node = self._nodes[inode]
        if not node.is_folder:
            node.data = os.pread(node.descriptor, os.fstat(node.descriptor).st_size, 0)
            status = os.fstat(node.descriptor)
            node.mode = stat.S_IMODE(status.st_mode)
            node.times_ns = (status.st_atime_ns, status.st_mtime_ns)
            return
        folder = _path_of(node.descriptor)
        node.names = {path.name: self.hold(path) for path in folder.iterdir()}
        for origin, target, name, moved in list(self._renames):
            if target == inode:
                left = self._nodes[origin]
                left.names = {
                    one: child for one, child in left.names.items() if (one, child) != (name, moved)
                }
                self._renames.remove((origin, target, name, moved))

    def _with_some(self, seed: int) -> Medium:
        """A copy in which a coin, the same for each run with this seed, saved some of what is not synced."""
        for folder, _, names in os.walk(self._root):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                self.hold(path)
        copy = object.__new__(Medium)
        copy._root, copy._renames = self._root, list(self._renames)
        copy._nodes = {inode: replace(node) for inode, node in self._nodes.items()}
        tied = {inode for rename in self._renames for inode in rename[:2]}
        for folder, _, names in os.walk(self._root):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                inode = path.lstat().st_ino
                coin = "renames" if inode in tied else path.relative_to(self._root).as_posix()
                if hashlib.sha256(f"{seed} {coin}".encode()).digest()[0] & 1:
                    copy._sync(inode)
        return copy

    def _write(self, target: Path, inode: int, written: dict[int, Path]) -> None:
        node = self._nodes[inode]
        if node.is_folder:
            target.mkdir(mode=0o700)
            for name, child in node.names.items():
                self._write(target / name, child, written)
        elif inode in written:
            target.hardlink_to(written[inode])
        else:
            target.write_bytes(node.data)
            target.chmod(node.mode)
            if node.times_ns != (0, 0):
                os.utime(target, ns=node.times_ns)
            written[inode] = target


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()
