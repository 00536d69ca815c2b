"""Power that fails at a chosen system call, and a disk that forgets what was not synced.

`Power` takes the place of `os` in `edge_agent.models.durable`, the one module that changes the cache on disk.
It numbers each call that changes something; at the chosen one it ends the process, or lets the call fail.

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
import shutil
import signal
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from edge_agent.models import durable


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


_TAKES_SPACE = frozenset(("open", "write", "mkdir", "link", "rename", "fsync"))


class Power:
    """Stands for the module `os` where `durable` uses it.

    Args:
        state: the state folder; calls elsewhere are not counted.
        fault: what to do at call number `at`, from 0; None only counts.
        really_sync: False leaves out the wait for a real disk, which nobody here cuts off.
    """

    def __init__(
        self, state: Path, *, at: int = -1, fault: Fault | None = None, really_sync: bool = False
    ) -> None:
        self.calls: list[Call] = []
        self._state = state
        self._at = at
        self._fault = fault
        self._really_sync = really_sync
        self._medium = Medium(state) if fault in (Fault.DROP, Fault.MIX) else None
        self._full = False

    def install(self) -> None:
        vars(durable)["os"] = self

    @staticmethod
    def uninstall() -> None:
        vars(durable)["os"] = os

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    # --- The calls that change something ---------------------------------------------------------------

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if not flags & (os.O_CREAT | os.O_TRUNC):
            return os.open(path, flags, mode)
        self._before("open", path)
        return os.open(path, flags, mode)

    def write(self, descriptor: int, data: memoryview) -> int:
        path = _path_of(descriptor)
        self._before("write", path, tear=lambda: os.write(descriptor, data[: len(data) // 2]))
        return os.write(descriptor, data)

    def ftruncate(self, descriptor: int, length: int) -> None:
        self._before("ftruncate", _path_of(descriptor))
        os.ftruncate(descriptor, length)

    def fsync(self, descriptor: int) -> None:
        self._before("fsync", _path_of(descriptor))
        if self._really_sync:
            os.fsync(descriptor)
        if self._medium:
            self._medium.synced(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._before("rename", target)
        os.rename(source, target)
        if self._medium:
            self._medium.renamed(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._before("link", target)
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        self._before("unlink", path)
        if self._medium:
            self._medium.hold(path)
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        self._before("rmdir", path)
        os.rmdir(path)

    def mkdir(self, path: Path, mode: int) -> None:
        self._before("mkdir", path)
        os.mkdir(path, mode)

    def chmod(self, path: Path, mode: int) -> None:
        self._before("chmod", path)
        os.chmod(path, mode)

    def utime(self, path: Path) -> None:
        self._before("utime", path)
        os.utime(path)

    # --- The fault -------------------------------------------------------------------------------------

    def _before(self, name: str, path: Path, *, tear: Callable[[], object] = lambda: None) -> None:
        if not path.is_relative_to(self._state):
            raise AssertionError(f"durable changes {path}, which is not under {self._state}")
        number = len(self.calls)
        self.calls.append(Call(name, path.relative_to(self._state).as_posix()))
        if number == self._at:
            if self._fault is Fault.FULL:
                self._full = True
            else:
                if self._fault is Fault.TEAR:
                    tear()
                self._die()
        if self._full and name in _TAKES_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _die(self) -> NoReturn:
        if self._medium:
            self._medium.after_the_cut(seed=self._at if self._fault is Fault.MIX else None)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


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

    def after_the_cut(self, *, seed: int | None) -> None:
        """Makes the real folder what the medium holds."""
        if seed is not None:
            self._keep_some(seed)
        new = self._root.with_name(self._root.name + ".after")
        self._write(new, self._root.lstat().st_ino, {})
        shutil.rmtree(self._root)
        new.rename(self._root)

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
                if self._nodes[origin].names.get(name) == moved:
                    del self._nodes[origin].names[name]
                self._renames.remove((origin, target, name, moved))

    def _keep_some(self, seed: int) -> None:
        """Lets a coin, the same for each run with this seed, save some of what is not synced."""
        tied = {inode for rename in self._renames for inode in rename[:2]}
        for folder, _, names in os.walk(self._root):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                inode = self.hold(path)
                coin = "renames" if inode in tied else path.relative_to(self._root).as_posix()
                if hashlib.sha256(f"{seed} {coin}".encode()).digest()[0] & 1:
                    self._sync(inode)

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
