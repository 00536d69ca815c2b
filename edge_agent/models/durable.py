"""Durable file operations: every system call that changes the cache on disk goes through here.

A name that was renamed into place and whose folder was synced survives a power loss; before that, nothing is
promised. Keeping these calls in one module lets a test cut the power between any two of them.
Source: the order in which RAUC and Borg write (temporary file, fsync, rename, fsync of the folder).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

FOLDER_MODE = 0o700
FILE_MODE = 0o600
BLOB_MODE = 0o444
TEMPORARY_SUFFIX = ".tmp"


def write_file(path: Path, data: bytes, *, mode: int = FILE_MODE) -> None:
    """Replaces `path` whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode
    )
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)
    sync_folder(path.parent)


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
        path.mkdir(mode=FOLDER_MODE)
    except FileExistsError:
        return
    sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """Moves within one file system, replacing a file that is there. The caller syncs the folder."""
    source.rename(target)


def link(source: Path, target: Path) -> None:
    """A second name for the same bytes. The caller syncs the folder.

    Raises:
        OSError: the file system has no hard links, or the two are on different ones.
    """
    target.hardlink_to(source)


def set_mode(path: Path, mode: int) -> None:
    """Changes a file's permissions; they become durable with the file's next sync."""
    path.chmod(mode)


def unlink(path: Path) -> None:
    """Removes a name if it is there. The caller syncs the folder where the order matters."""
    path.unlink(missing_ok=True)


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
    path.rmdir()


def remove_empty(*folders: Path) -> None:
    """Removes folders in this order, as long as they are there and empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
