"""Durable file operations: every system call that changes the cache on disk goes through here.

A name that was renamed into place and whose folder was synced survives a power loss; before that, nothing is
promised. Keeping these calls in one module, and all of them as calls of `os`, lets a test cut the power
between any two of them.
Source: the order in which RAUC and Borg write (temporary file, fsync, rename, fsync of the folder).
"""

# System calls under their own names: a test exchanges `os`, and strace shows the same names.
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108
from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER_MODE = 0o700
FILE_MODE = 0o600
BLOB_MODE = 0o444
TEMPORARY_SUFFIX = ".tmp"


def write_file(path: Path, data: bytes, *, mode: int = FILE_MODE) -> None:
    """Replaces `path` whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    _replace(path, data, mode, sync=True)
    sync_folder(path.parent)


def write_hint(path: Path, data: bytes) -> None:
    """Replaces `path`, whole for every reader, but not durably: for what is checked before it is believed."""
    _replace(path, data, FILE_MODE, sync=False)


@contextmanager
def extending(path: Path, *, length: int) -> Iterator[Callable[[bytes], None]]:
    """Opens or makes a file, cuts it to `length` bytes and gives a function that appends to it.

    Nothing of it is durable before `sync_file`.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        if os.fstat(descriptor).st_size != length:
            os.ftruncate(descriptor, length)
        os.lseek(descriptor, length, os.SEEK_SET)
        yield lambda data: write_all(descriptor, data)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Appends to an open file, as often as the system needs to be asked."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[int]:
    """A new file for the block to write; afterwards it has replaced `path`, or there is nothing new.

    It is somebody's file, not a part of the cache, and its folder may be everybody's: no file and no link that another
    user has prepared there is opened, and nobody can know the name of the new one before.

    Args:
        mode: of the file, before the umask.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)


def open_lock(path: Path) -> int:
    """Opens the file that locks are taken on, and makes it where it is missing; the caller closes it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)


def sync_file(path: Path) -> None:
    """Returns when the file's bytes are on the medium."""
    _sync(path, os.O_RDONLY | os.O_NOFOLLOW)


def sync_folder(path: Path) -> None:
    """Returns when the folder's names (creations, renames, removals) are on the medium."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def make_folder(path: Path) -> None:
    """Makes a private folder and its missing parents; each new name is synced with its parent."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        os.mkdir(path, FOLDER_MODE)
    except FileExistsError:
        return
    sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """Moves within one file system, replacing a file that is there. The caller syncs the target's folder."""
    os.rename(source, target)


def link(source: Path, target: Path) -> None:
    """A second name for the same bytes. The caller syncs the folder.

    Raises:
        OSError: the file system has no hard links, or the two are on different ones.
    """
    os.link(source, target)


def set_mode(path: Path, mode: int) -> None:
    """Changes a file's permissions; they become durable with the file's next sync."""
    os.chmod(path, mode)


def touch(path: Path) -> None:
    """Sets a file's times to now; nothing but the order of eviction depends on them."""
    os.utime(path)


def unlink(path: Path) -> None:
    """Removes a name if it is there. The caller syncs the folder where the order matters."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def remove_tree(path: Path) -> None:
    """Removes a folder and everything under it, without following links; a missing one is fine."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        unlink(path)
        return
    for child in path.iterdir():
        remove_tree(child)
    os.rmdir(path)


def remove_empty(*folders: Path) -> None:
    """Removes folders in this order, as long as they are there and empty."""
    for folder in folders:
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return


def _replace(path: Path, data: bytes, mode: int, *, sync: bool) -> None:
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode
    )
    try:
        write_all(descriptor, data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, path)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
