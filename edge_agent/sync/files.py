"""A version's files, wherever they lie: what is listed, how one is opened, and the folder on this host.

Owns the bounds of a listing, whoever made it, and of an answer that stalls. Where else files may lie:
`http_package.py`, `s3_package.py` and `whole_package.py`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_agent.errors import ManifestError, TransportError
from edge_agent.host.clock import Clock
from edge_agent.package.manifest import MAX_FILES, OUTSIDE_MANIFEST, Manifest, check_path, check_paths
from edge_agent.sync import refusal
from edge_agent.sync.pace import CHUNK_BYTES, MIN_BYTES_PER_TIMEOUT, StallLimit

TRY_AGAIN = frozenset((408, 429))
"""Statuses of a refusal that passes. Source: RFC 9110, 15.5.9, and RFC 6585, 4."""
MAX_LISTED = MAX_FILES + len(OUTSIDE_MANIFEST)


class RequestRefused(TransportError):
    """There is no such file, or it cannot be read: asking again does not help."""


class PastTheEnd(TransportError):
    """The file on the server has no byte at the offset that was asked for."""


class Changed(TransportError):
    """The file on the server is not the one any more that its first bytes came from."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A file as the registry lists it."""

    path: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a version consists of, as far as that is known before it is fetched.

    Attributes:
        manifest: None where the package was logged with plain MLflow.
        listing: every file to fetch, with its size.
        attached: the content of `manifest.json` and `model.sig`, which have been read already.
    """

    manifest: Manifest | None
    listing: tuple[Listed, ...]
    attached: dict[str, bytes]

    def sha256(self, path: str) -> str | None:
        return self._digests.get(path)

    @property
    def _digests(self) -> dict[str, str]:
        return {file.path: file.sha256 for file in self.manifest.files} if self.manifest else {}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Bytes of one file.

    Attributes:
        start: offset of the first byte; 0 where the registry could not, or would not, start in the middle.
        etag: the file's version on the server, or empty.
        chunks: ends early when the connection does; raises TransportError.
    """

    start: int
    etag: str
    chunks: Iterator[bytes]


def is_of(stream: Stream, *, size_bytes: int, sha256: str) -> bool:
    """Whether a file's bytes, from its first one on, are those of a digest. Reads no further than it has to."""
    digest, have = hashlib.sha256(), 0
    for chunk in stream.chunks:
        digest.update(chunk)
        have += len(chunk)
        if have > size_bytes:
            break
    return (have, digest.hexdigest()) == (size_bytes, sha256)


class Package(Protocol):
    """Where the files of one version are.

    Attributes:
        whole_files: each file is in staging whole before its first byte can be read, and once more as it is read.
        over_line: its files come from another host.
    """

    whole_files: bool
    over_line: bool

    def listing(self) -> list[Listed]:
        """All files, sorted by path; MLflow's own `registered_model_meta` is left out.

        Raises:
            ManifestError: a path or the number of files breaks a rule.
            TransportError: the registry failed.
        """

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        """A file from `offset` on, if it still is the file that had `etag`.

        Raises:
            RequestRefused: there is no such file.
            RegistryRefused: the registry does not let this device in.
            PastTheEnd: it ends before `offset`.
            Changed: it is another file now, and the registry goes on in the middle of it all the same.
            TransportError: the registry failed.
        """


class ReadOnce:
    """A package of which a small file that was read whole is not asked for again when it is fetched.

    Some files say whether the others are worth fetching, and belong to what is fetched themselves.
    """

    def __init__(self, package: Package) -> None:
        self.whole_files = package.whole_files
        self.over_line = package.over_line
        self._package = package
        self._kept: dict[str, bytes] = {}

    def listing(self) -> list[Listed]:
        return self._package.listing()

    def read(self, path: str, limit_bytes: int) -> bytes:
        """The whole content of a small file.

        Raises:
            ManifestError: it has more bytes than that.
            TransportError: as `open`.
        """
        if path not in self._kept:
            data = bytearray()
            with self._package.open(path) as stream:
                for chunk in stream.chunks:
                    data += chunk
                    if len(data) > limit_bytes:
                        raise ManifestError(f"{path} has more than {limit_bytes} bytes")
            self._kept[path] = bytes(data)
        return self._kept[path]

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        """As a package's; what is kept is given once, for its bytes may be damaged."""
        kept = self._kept.pop(path, None)
        if kept is not None and not offset:
            yield Stream(start=0, etag="", chunks=iter((kept,)))
            return
        with self._package.open(path, offset=offset, etag=etag) as stream:
            yield stream


class LocalPackage:
    """A folder on this host: the embedded registry's artifacts."""

    whole_files = False
    over_line = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def listing(self) -> list[Listed]:
        found: list[Listed] = []
        try:
            self._walk(self._folder, found)
        except OSError as error:
            raise TransportError(
                f"the package's folder {self._folder} cannot be read: {error.strerror}"
            ) from error
        return checked(found)

    def _walk(self, folder: Path, found: list[Listed]) -> None:
        """Regular files only: a link could show any file of this host as the package's."""
        with os.scandir(folder) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(self._folder).as_posix()
                if len(found) > MAX_LISTED:
                    raise ManifestError(f"the package has more than {MAX_FILES} files")
                if entry.is_dir(follow_symlinks=False):
                    check_path(name)
                    self._walk(Path(entry.path), found)
                elif entry.is_file(follow_symlinks=False):
                    found.append(Listed(path=name, size_bytes=entry.stat(follow_symlinks=False).st_size))
                else:
                    raise ManifestError(f"{name!r} of the package is neither a file nor a folder")

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        try:
            descriptor = os.open(self._folder / check_path(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise RequestRefused(f"{path!r} of the package cannot be read: {error.strerror}") from error
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            now = f"{status.st_mtime_ns}-{status.st_size}"
            start = offset if not etag or etag == now else 0
            file.seek(start)
            yield Stream(start=start, etag=now, chunks=self._chunks(file, path))

    def _chunks(self, file: io.FileIO, path: str) -> Iterator[bytes]:
        while True:
            try:
                chunk = file.read(CHUNK_BYTES)
            except OSError as error:
                raise TransportError(f"{path!r} of the package cannot be read: {error.strerror}") from error
            if not chunk:
                return
            yield chunk


def stream_of(
    raw: Any,
    *,
    path: str,
    content_range: str | None,
    offset: int,
    had: str,
    etag: str,
    who: str,
    timeout_s: float,
    clock: Clock,
    least_bytes: int = MIN_BYTES_PER_TIMEOUT,
) -> Stream:
    """A store's answer to a request for a file from `offset` on.

    Args:
        raw: a urllib3 answer: its body.
        content_range: of a 206 answer; None where the store gives the file from its start.
        had: the version of the bytes that are here; empty if it is not known.
        etag: the version that the store gives now.
        who: whose answer it is, for errors.
        timeout_s, least_bytes: see `StallLimit`.

    Raises:
        Changed: it goes on in the middle of another version.
        TransportError: it starts elsewhere.
    """
    start = 0 if content_range is None else _range_start(content_range, offset, who=who)
    if start and had and etag != had:
        raise Changed(f"{path!r} was changed while it was fetched, says {who}")
    limit = StallLimit(timeout_s, clock=clock, least_bytes=least_bytes)
    return Stream(start=start, etag=etag, chunks=_chunks(raw, who=who, limit=limit))


def _chunks(raw: Any, *, who: str, limit: StallLimit) -> Iterator[bytes]:
    """The body of an answer as it comes: a piece that is here is not lost when the next one does not follow.

    Raises:
        TransportError: it breaks off, or stalls.
    """
    from urllib3.exceptions import HTTPError

    read = getattr(raw, "read1", raw.read)  # urllib3 1 waits for the whole piece
    while True:
        try:
            chunk = limit.wait_for(lambda: bytes(read(CHUNK_BYTES, decode_content=False)))
        except (HTTPError, OSError) as error:
            raise TransportError(f"{who} broke off: {refusal.reason_of(error)}") from error
        if not chunk:
            return
        if limit.is_over:
            raise TransportError(f"{who} stalled: {limit.came_bytes} bytes in {limit.waited_s:.0f} s")
        yield chunk


def _range_start(content_range: str, offset: int, *, who: str) -> int:
    """Where a 206 answer starts: `bytes 100-199/200`.

    Raises:
        TransportError: not at the offset that was asked for.
    """
    with suppress(ValueError):
        if int(content_range.removeprefix("bytes ").split("-")[0]) == offset:
            return offset
    raise TransportError(f"{who} answered with another range than was asked for")


def walk(repository: Any) -> list[Listed]:
    """All files below a store's root; every answer of the registry is bounded and checked."""
    found: list[Listed] = []
    folders: list[str | None] = [None]
    visited = 0
    while folders:
        folder = folders.pop()
        visited += 1
        try:
            entries = repository.list_artifacts(folder)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            if isinstance(error, OSError):
                raise  # what `requests` raises of an answer that is not JSON is both
            raise ManifestError("the registry's listing is not understood") from error
        for entry in entries:
            path = check_path(entry.path)
            if folder is not None and not path.startswith(f"{folder}/"):
                raise ManifestError(f"the registry lists {path!r} in folder {folder!r}")
            size_bytes = 0 if entry.file_size is None else entry.file_size  # MLflow leaves a 0 out
            if entry.is_dir:
                folders.append(path)
            elif not isinstance(size_bytes, int) or size_bytes < 0:
                raise ManifestError(f"the registry gives no size for {path!r}")
            else:
                found.append(Listed(path=path, size_bytes=size_bytes))
        if len(found) + len(folders) + visited > 2 * MAX_LISTED:
            raise ManifestError(f"the package has more than {MAX_FILES} files")
    return checked(found)


def checked(found: list[Listed]) -> list[Listed]:
    """A listing in order, without MLflow's own file.

    Raises:
        ManifestError: a path or the number of files breaks a rule.
    """
    kept = sorted(
        (file for file in found if file.path.split("/")[0] != "registered_model_meta"),
        key=lambda file: file.path,
    )
    check_paths(file.path for file in kept)
    if len(kept) > MAX_LISTED:
        raise ManifestError(f"the package has more than {MAX_FILES} files")
    return kept
