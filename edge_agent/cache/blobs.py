"""Verified bytes under their digest, and the links to them that versions are made of.

Each function is one step of a change that the store makes. The store has the lock, wraps the errors, and syncs the
folders where the order matters.
"""

from __future__ import annotations

from pathlib import Path

from edge_agent.cache import durable
from edge_agent.package.manifest import ManifestFile


def is_there(blob: Path, file: ManifestFile) -> bool:
    """True where the blob exists with the size of `file`; under its final name it has been verified."""
    try:
        return blob.lstat().st_size == file.size_bytes
    except OSError:
        return False


def adopt(staged: Path, blob: Path, file: ManifestFile) -> None:
    """Makes a staged file's bytes a blob, or the staged name a link to the blob that is already there."""
    if not is_there(blob, file):
        durable.set_mode(staged, durable.BLOB_MODE)
        durable.sync_file(staged)
        durable.unlink(blob)
        durable.link(staged, blob)
    elif not staged.samefile(blob):
        durable.unlink(staged)
        durable.link(blob, staged)


def replace(source: Path, blob: Path) -> None:
    """Gives verified bytes the blob's name, and replaces the blob that had it."""
    durable.unlink(blob)
    durable.set_mode(source, durable.BLOB_MODE)
    durable.sync_file(source)
    durable.rename(source, blob)


def relink(blob: Path, path: Path, *, temporary: Path) -> None:
    """Makes a version's file a link to its blob, with one rename.

    Args:
        temporary: a name outside the version, so that no stray one is ever left inside it.
    """
    durable.unlink(temporary)
    durable.make_folder(path.parent)
    if not (path.exists() and path.samefile(blob)):
        durable.link(blob, temporary)
        durable.rename(temporary, path)
    durable.sync_folder(path.parent)


def drop_unlinked(blob: Path) -> int:
    """Removes a blob that no version links. Returns the number of bytes freed."""
    try:
        status = blob.lstat()
    except OSError:  # it is not there, or the disk cannot even describe it: then it stays
        return 0
    if status.st_nlink > 1:
        return 0
    durable.unlink(blob)
    return status.st_size
