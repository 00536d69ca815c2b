"""Fetching one file: from the registry into staging, resumed, paced, retried within bounds, verified.

Flow: what an earlier process left is continued where the server allows it → chunks are written and hashed →
fsync → size and digest are compared → the part gets its digest as name, still in staging. Refuses more bytes
than were promised. A digest that does not fit after a resumed download is tried once more from the start.
"""

from __future__ import annotations

import errno
import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.errors import TransportError, VerificationError
from edge_agent.models import durable
from edge_agent.models.manifest import MAX_FILE_BYTES, ManifestFile
from edge_agent.models.registry import CHUNK_BYTES, Package, PastTheEnd, RequestRefused
from edge_agent.models.staging import Staging
from edge_agent.models.store import store_error

MAX_ATTEMPTS = 4
"""In a row without a single new byte; progress starts the count again."""
MAX_RECONNECTS = 1_000
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0


@dataclass
class Pace:
    """Bytes that came in so far, and the bandwidth cap. Owned by the sync process's only thread.

    Attributes:
        total_bytes: to fetch, as far as known.
        max_bytes_per_s: 0 for no cap.
        report: called after each chunk.
    """

    total_bytes: int
    max_bytes_per_s: int = 0
    report: Callable[[Pace], None] = lambda pace: None
    fetched_bytes: int = 0
    resumed_bytes: int = 0
    started_at: float = field(default_factory=time.monotonic)

    @property
    def bytes_per_s(self) -> float:
        return self.fetched_bytes / max(time.monotonic() - self.started_at, 1e-3)

    @property
    def eta_s(self) -> float | None:
        """Seconds until all is here at this rate, None before the first byte."""
        left = self.total_bytes - self.fetched_bytes - self.resumed_bytes
        return max(left, 0) / self.bytes_per_s if self.fetched_bytes else None

    @property
    def chunk_bytes(self) -> int:
        """Small enough that a low cap still moves several times a second."""
        return (
            min(CHUNK_BYTES, max(4_096, self.max_bytes_per_s // 8)) if self.max_bytes_per_s else CHUNK_BYTES
        )

    def took(self, count: int) -> None:
        """Counts bytes, waits as long as the cap asks for, reports."""
        self.fetched_bytes += count
        if self.max_bytes_per_s:
            due = self.started_at + self.fetched_bytes / self.max_bytes_per_s
            if (wait_s := due - time.monotonic()) > 0:
                time.sleep(wait_s)
        self.report(self)


def fetch(
    package: Package, staging: Staging, *, path: str, size_bytes: int, sha256: str | None, pace: Pace
) -> ManifestFile:
    """Brings one file into staging, whole and verified.

    Args:
        sha256: what it must be, or None where the package has no manifest.

    Returns:
        What is now at `staging.verified(sha256)`.

    Raises:
        VerificationError: the registry's bytes are not what the manifest promises.
        TransportError: the registry failed too often.
        StoreError: the disk is full; this version's parts were freed.
    """
    if size_bytes > MAX_FILE_BYTES:
        raise VerificationError(f"{path!r} has {size_bytes} bytes, at most {MAX_FILE_BYTES} are allowed")
    part = staging.part(path=path, sha256=sha256)
    try:
        digest, resumed = _download(package, staging, part, path, size_bytes, sha256, pace)
        if sha256 not in (None, digest) and resumed:
            staging.drop_part(part)
            digest, _ = _download(package, staging, part, path, size_bytes, sha256, pace)
        if sha256 not in (None, digest):
            staging.drop_part(part)
            raise VerificationError(f"sha256 of {path!r} is not the one in its manifest")
        durable.sync_file(part)
        durable.rename(part, staging.verified(digest))
        durable.unlink(part.with_suffix(".etag"))
        durable.sync_folder(staging.parts)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            staging.clear()
        raise store_error("write", part, error) from error
    return ManifestFile(path=path, size_bytes=size_bytes, sha256=digest)


def _download(
    package: Package,
    staging: Staging,
    part: Path,
    path: str,
    size_bytes: int,
    sha256: str | None,
    pace: Pace,
) -> tuple[str, bool]:
    """Fills the part up to its size; gives its sha256 and whether older bytes are in it."""
    digest, have = _continued(staging, part, size_bytes, sha256)
    resumed = have > 0
    pace.resumed_bytes += have
    idle_attempts = 0
    for _ in range(MAX_RECONNECTS):
        if have == size_bytes and (size_bytes or part.exists()):
            return digest.hexdigest(), resumed
        before = have
        failure: TransportError | None = None
        try:
            with package.open(path, offset=have, etag=staging.etag(part)) as stream:
                if stream.start != have:
                    digest, have, resumed = hashlib.sha256(), 0, False
                staging.note_etag(part, stream.etag)
                with part.open("r+b" if have else "wb") as file:
                    file.truncate(have)
                    file.seek(have)
                    for block in stream.chunks:
                        for start in range(0, len(block), pace.chunk_bytes):
                            chunk = block[start : start + pace.chunk_bytes]
                            if have + len(chunk) > size_bytes:
                                raise VerificationError(
                                    f"{path!r} has more than the promised {size_bytes} bytes"
                                )
                            file.write(chunk)
                            digest.update(chunk)
                            have += len(chunk)
                            pace.took(len(chunk))
        except RequestRefused:
            raise
        except PastTheEnd as error:
            if not resumed:
                staging.drop_part(part)
                raise VerificationError(
                    f"{path!r} ends after {have} of the promised {size_bytes} bytes"
                ) from error
            digest, have, resumed = hashlib.sha256(), 0, False  # what an earlier process left was longer
            continue
        except TransportError as error:
            failure = error
        if have == size_bytes:
            continue
        idle_attempts = 0 if have > before else idle_attempts + 1
        if idle_attempts >= MAX_ATTEMPTS:
            if failure:
                raise failure
            raise VerificationError(f"{path!r} ends after {have} of the promised {size_bytes} bytes")
        _wait(idle_attempts)
    raise TransportError(f"the registry broke off {path!r} {MAX_RECONNECTS} times")


def _continued(
    staging: Staging, part: Path, size_bytes: int, sha256: str | None
) -> tuple[hashlib._Hash, int]:
    """Hash and length of what an earlier process left, where it can be gone on with.

    A part under its digest is checked at the end anyhow. One under its path needs the server to say that the
    file is still the same: so its last byte is asked for again, with If-Range.
    """
    digest = hashlib.sha256()
    try:
        length = part.stat().st_size
    except FileNotFoundError:
        return digest, 0
    if sha256 is None:
        length = min(length, size_bytes - 1) if staging.etag(part) else 0
    if not 0 < length <= size_bytes:
        return digest, 0
    have = 0
    with part.open("rb") as file:
        while have < length and (chunk := file.read(min(CHUNK_BYTES, length - have))):
            digest.update(chunk)
            have += len(chunk)
    return digest, have


def _wait(attempt: int) -> None:
    """Before the next attempt: exponential, with jitter, so that a fleet does not come back in step."""
    time.sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0))
