"""One version as one file: the format, and the writing of it.

An uncompressed tar, which any `tar` command lists: first `version.json` (the version's record: which one, its manifest,
the files beside it), then each blob once, as `blobs/<sha256>`. `sync/version_file.py` reads it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_agent.cache import durable
from edge_agent.cache.record import VersionRecord
from edge_agent.errors import StoreError, VerificationError
from edge_agent.package.manifest import ManifestFile

HEADER_NAME = "version.json"
BLOB_PREFIX = "blobs/"
BLOCK = tarfile.BLOCKSIZE

_CHUNK_BYTES = 1 << 20
WRITE_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EFBIG: "a FAT file system holds files of up to 4 GiB: take exFAT or ext4",
}


def write_version(
    descriptor: int,
    record: VersionRecord,
    folder: Path,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes a version into an open file, and verifies every byte while it does.

    After an error the file is incomplete, and the caller removes it.

    Args:
        descriptor: of an empty regular file, open for writing.
        folder: has the record's files.
        report: called with the bytes written and the bytes in total.

    Returns:
        The file's size in bytes.

    Raises:
        VerificationError: a file in the folder is not what the record says.
        StoreError: the file cannot be written.
    """
    files = sorted({file.sha256: file for file in record.files}.values(), key=lambda file: file.sha256)
    total, done = sum(file.size_bytes for file in files), 0
    header = record.encode()
    written = _write(descriptor, _tar_header(HEADER_NAME, len(header)), header, padding(len(header)))
    for file in files:
        written += _write(descriptor, _tar_header(BLOB_PREFIX + file.sha256, file.size_bytes))
        for chunk in verified_chunks(folder / file.path, file):
            written += _write(descriptor, chunk)
            done += len(chunk)
            report(done, total)
        written += _write(descriptor, padding(file.size_bytes))
    return written + _write(descriptor, bytes(2 * BLOCK))


def verified_chunks(path: Path, file: ManifestFile) -> Iterator[bytes]:
    """The bytes of a version's file, compared with its digest at the end."""
    digest, count = hashlib.sha256(), 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise VerificationError(f"{file.path!r} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as stream:
        while chunk := stream.read(min(_CHUNK_BYTES, file.size_bytes - count + 1)):
            digest.update(chunk)
            count += len(chunk)
            if count > file.size_bytes:
                break
            yield chunk
    if (count, digest.hexdigest()) != (file.size_bytes, file.sha256):
        raise VerificationError(f"{file.path!r} of the version is damaged")


def padding(size_bytes: int) -> bytes:
    """What fills a member of this size up to whole blocks."""
    return bytes(-size_bytes % BLOCK)


def _tar_header(name: str, size_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    info.mode = durable.BLOB_MODE
    return info.tobuf(tarfile.GNU_FORMAT)  # a size over 8 GiB fits, too


def _write(descriptor: int, *parts: bytes) -> int:
    """Appends all parts and returns their length."""
    try:
        for part in parts:
            durable.write_all(descriptor, part)
    except OSError as error:
        remedy = WRITE_REMEDIES.get(error.errno or 0, "")
        raise StoreError(f"the file cannot be written: {error.strerror}", remedy=remedy) from error
    return sum(len(part) for part in parts)
