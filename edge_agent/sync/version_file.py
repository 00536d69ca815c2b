"""A cached version as one file, for a USB stick, and back.

`cache/version_file.py` has the format and writes it. On import, the file takes the place of a registry: `sync.bring`
fetches from it, verifies, judges and commits. No path of the file is ever followed: names inside are digests, and the
package's own paths are in the manifest, under its rules. Refuses members of any other kind or name, and a header over a
bound. It is read block by block here, because extended headers, which could be as large as the file, are not allowed in
it.

Files are descriptors here: whoever asks opens them, so the daemon, which can see neither a home folder nor a USB
stick, can be asked too.
"""

from __future__ import annotations

import fcntl
import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from edge_agent.cache import record as records
from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.cache.version_file import BLOB_PREFIX, BLOCK, HEADER_NAME, padding, write_version
from edge_agent.errors import ContentError, ManifestError, StoreError, VerificationError
from edge_agent.package import manifest as manifests
from edge_agent.package.reference import ModelRef, ModelVersion
from edge_agent.sync.files import Listed, PastTheEnd, RequestRefused, Stream
from edge_agent.sync.pace import CHUNK_BYTES
from edge_agent.sync.protocol import Emit, SyncJob, SyncResult

ORIGIN = "bundle:"
"""The `registry_uri` of a version that came from a file: no registry vouches for it. Records on disk hold this
value."""

_MAX_HEADER_BYTES = 4 << 20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


def export_version(
    store: Store,
    record: VersionRecord,
    descriptor: int,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes a committed version into an open file, and verifies every byte while it does.

    After an error the file is incomplete, and the caller removes it.

    Args:
        descriptor: of an empty regular file, open for writing.
        report: called with the bytes written and the bytes in total.

    Returns:
        The file's size in bytes.

    Raises:
        VerificationError: a file of the version is damaged.
        StoreError: the version is gone, or the file cannot be written.
    """
    _check_regular(descriptor, refused=os.O_RDONLY)
    with store.lease(record) as folder:
        try:
            return write_version(descriptor, record, folder, report=report)
        except VerificationError as error:
            raise VerificationError(error.message, remedy="`edge-agent models verify`") from error


def read_version(descriptor: int) -> ModelVersion:
    """The version that a file says it holds. Its blobs are not read.

    Raises:
        ContentError: it is not a version file.
        StoreError: it cannot be read.
    """
    with _opened(descriptor) as stream:
        return read_package(stream).version


def import_version(job: SyncJob, descriptor: int, emit: Emit = lambda event: None) -> SyncResult:
    """Brings the version in a file into the cache, in the same way as one from a registry.

    Args:
        job: its `ref` must be the version in the file; its registry is `ORIGIN`.
        descriptor: of the file, open for reading.
        emit: called with `progress` events, as in any sync.

    Returns:
        The committed version. Making it the active one is the caller's decision.

    Raises:
        ContentError: the file, or the package in it, breaks a rule; nothing of it gets into the cache.
        StoreError: the file cannot be read, or the cache cannot take it.
    """
    # Not above: the daemon exports and looks into files, and never brings one in.
    from edge_agent.sync.bring import bring

    with _opened(descriptor) as stream:
        package = read_package(stream)
        version = package.version
        if ModelRef(name=version.name, version=version.version) != ModelRef.parse(job.ref):
            raise ManifestError(f"the file has {version.name!r} version {version.version}, not {job.ref}")
        return bring(job, version, package, emit, promised=package.manifest)


@dataclass(frozen=True, kw_only=True)
class _Member:
    """The place of a member's bytes in the file."""

    offset: int
    size_bytes: int


class FilePackage:
    """A package in an open version file; see `Package`."""

    whole_files = False
    over_line = False

    def __init__(self, stream: IO[bytes], record: VersionRecord, members: Mapping[str, _Member]) -> None:
        self._stream = stream
        self._files = {file.path: file for file in record.files}
        self._members = members
        self.manifest = record.manifest
        self.version = ModelVersion(
            name=record.registered_name,
            version=record.version,
            run_id=record.run_id,
            source=record.source,
            tags={},
        )

    def listing(self) -> list[Listed]:
        return [Listed(path=path, size_bytes=self._files[path].size_bytes) for path in sorted(self._files)]

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        if path not in self._files:
            raise RequestRefused(f"the file has no {path!r}")
        sha256 = self._files[path].sha256
        member = self._members[BLOB_PREFIX + sha256]
        if offset > member.size_bytes:
            raise PastTheEnd(f"{path!r} has {member.size_bytes} bytes in the file")
        start = offset if not etag or etag == sha256 else 0
        yield Stream(start=start, etag=sha256, chunks=self._chunks(member, start))

    def _chunks(self, member: _Member, start: int) -> Iterator[bytes]:
        left = member.size_bytes - start
        while left and (chunk := _read(self._stream, member.offset + start, min(CHUNK_BYTES, left))):
            left -= len(chunk)
            start += len(chunk)
            yield chunk


def read_package(stream: IO[bytes]) -> FilePackage:
    """Reads the header and locates every blob without reading it.

    Raises:
        ContentError: it is not a version file, or has members that do not belong in one.
    """
    size_bytes = stream.seek(0, io.SEEK_END)
    name, header = _member(stream, 0, size_bytes)
    if name != HEADER_NAME or header.size_bytes > _MAX_HEADER_BYTES:
        raise ContentError(f"the file does not begin with {HEADER_NAME}: it is not a version file")
    try:
        record = records.parse(_read(stream, header.offset, header.size_bytes))
    except StoreError as error:
        raise ManifestError(f"{HEADER_NAME} in the file is damaged") from error
    wanted = {BLOB_PREFIX + file.sha256: file for file in record.files}
    members: dict[str, _Member] = {}
    position = _end(header)
    while len(members) < len(wanted):
        name, member = _member(stream, position, size_bytes)
        if name not in wanted or name in members:
            raise ContentError(f"the file has a member {name[:100]!r} that its manifest does not name")
        if member.size_bytes != wanted[name].size_bytes:
            raise VerificationError(
                f"{wanted[name].path!r} has {member.size_bytes} bytes in the file, "
                f"its manifest says {wanted[name].size_bytes}"
            )
        members[name] = member
        position = _end(member)
    if _read(stream, position, BLOCK).strip(b"\0"):
        raise ContentError("the file has more members than its manifest names")
    return FilePackage(stream, record, members)


def _member(stream: IO[bytes], position: int, file_bytes: int) -> tuple[str, _Member]:
    """The member whose header is at this position."""
    block = _read(stream, position, BLOCK)
    try:
        # This reads the names, numbers and checksum of one block, and follows nothing.
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise ContentError(
            f"the file is not a version file, or ends early, at byte {position}",
            remedy="make it with `edge-agent models export` or `edge-agent publish --to`",
        ) from error
    if info.type not in _REGULAR:
        raise ContentError(f"the file has a member {info.name[:100]!r} that is not a regular file")
    member = _Member(offset=position + BLOCK, size_bytes=info.size)
    if not 0 <= info.size <= manifests.MAX_FILE_BYTES or _end(member) > file_bytes:
        raise ContentError(f"the file ends before its member {info.name[:100]!r}")
    return info.name, member


def _read(stream: IO[bytes], position: int, count: int) -> bytes:
    """Bytes of the file; fewer than `count` only at its end.

    Raises:
        StoreError: its medium fails or was removed.
    """
    try:
        stream.seek(position)
        return stream.read(count)
    except OSError as error:
        raise StoreError(f"the file cannot be read: {error.strerror}") from error


@contextmanager
def _opened(descriptor: int) -> Iterator[IO[bytes]]:
    """A stream over the caller's open file, which stays open."""
    _check_regular(descriptor, refused=os.O_WRONLY)
    with os.fdopen(descriptor, "rb", closefd=False) as stream:
        yield stream


def _check_regular(descriptor: int, *, refused: int) -> None:
    """Refuses pipes and devices, which could keep a reader waiting for ever."""
    try:
        is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    except OSError as error:
        raise StoreError("no file was given") from error
    if not is_regular:
        raise StoreError("the file is not a regular file")
    if flags & os.O_PATH or flags & os.O_ACCMODE == refused:  # with O_PATH it is a name, not an open file
        raise StoreError("the file is not open for that")


def _end(member: _Member) -> int:
    return member.offset + member.size_bytes + len(padding(member.size_bytes))
