"""Checks that a file on disk is what its manifest promises: its kind and size, and its sha256 if it is to be read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from edge_agent.cache import disk
from edge_agent.cache.record import VersionRecord
from edge_agent.errors import StoreError, VerificationError
from edge_agent.package.manifest import ManifestFile

_CHUNK_BYTES = 1 << 20


def _always() -> None:
    """Goes on."""


def check_files(
    folder: Path, record: VersionRecord, *, read: bool = True, go_on: Callable[[], None] = _always
) -> None:
    """Checks every file of a version in its folder, before it is loaded.

    Args:
        read: False leaves out the sha256, and takes microseconds.
        go_on: asked before each MiB is read, which may take minutes together; it may raise.

    Raises:
        VerificationError: one is not what was committed; it is named.
    """
    for file in record.files:
        check_file(folder / file.path, file, read=read, go_on=go_on)


def check_file(
    path: Path, file: ManifestFile, *, read: bool = True, go_on: Callable[[], None] = _always
) -> None:
    """Checks a file's kind, size and sha256 on disk.

    Args:
        read, go_on: see `check_files`.

    Raises:
        VerificationError: they are not those of `file`; the path inside the package is named.
        StoreError: this host lacked something for a moment; nothing is known of the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _unread(path, file, error) from error
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != file.size_bytes:
            raise VerificationError(f"{file.path!r} has {size} bytes, its manifest says {file.size_bytes}")
        if not read:
            return
        digest = hashlib.sha256()
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                go_on()
                digest.update(chunk)
        except OSError as error:
            raise _unread(path, file, error) from error
    if digest.hexdigest() != file.sha256:
        raise VerificationError(f"sha256 of {file.path!r} is not the one in its manifest")


def _unread(path: Path, file: ManifestFile, error: OSError) -> VerificationError | StoreError:
    if error.errno in disk.PASSING:
        return disk.store_error("read", path, error)
    return VerificationError(f"{file.path!r} cannot be read: {error.strerror}")


def damage_of(path: Path, file: ManifestFile) -> str:
    """What `check_file` finds wrong with a file, or an empty string."""
    try:
        check_file(path, file)
    except VerificationError as error:
        return error.message
    return ""
