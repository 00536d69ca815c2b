"""Fetches one file into staging, from mirrors and the registry: resumed, paced, retried within bounds, verified.

Flow: continue what an earlier process left, where the server allows it → what mirrors have → the rest from the
registry → write and hash the chunks → compare
size and digest → fsync → name the part after its digest, still in staging. Refuses more bytes than were promised.
If the digest is wrong, what mirrors gave comes again from the registry; after a resumed download, the file is fetched
once more from the start.
"""

from __future__ import annotations

import hashlib
import random

from edge_agent.cache import durable
from edge_agent.cache.disk import store_errors
from edge_agent.cache.staging import Note, Staging
from edge_agent.errors import LinkHeld, TransportError, VerificationError
from edge_agent.package.manifest import MAX_FILE_BYTES, ManifestFile
from edge_agent.sync.files import Changed, Package, PastTheEnd, RequestRefused, Stream
from edge_agent.sync.mirrors import Mirrors
from edge_agent.sync.pace import CHUNK_BYTES, MIN_BYTES_PER_TIMEOUT, Pace

MAX_ATTEMPTS = 4
"""Attempts in a row that bring next to nothing; progress starts the count again."""
MAX_RECONNECTS = 1_000
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0
_NOTE_INTERVAL_S = 0.25


class _Part:
    """The bytes of one file fetched so far, with their running sha256."""

    def __init__(self, staging: Staging, path: str, size_bytes: int, sha256: str | None, pace: Pace) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.sha256 = sha256
        self.file = staging.part(path=path, sha256=sha256)
        self.have = 0
        self.resumed_bytes = 0
        self.joined = False
        self._staging = staging
        self._pace = pace
        self._digest = hashlib.sha256()
        self._lenders: dict[str, None] = {}
        self._own = (0, self._digest)
        self._now_s = pace.clock.now_s
        self._noted_at_s = self._now_s()

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    @property
    def fits(self) -> bool:
        return self.sha256 in (None, self.digest)

    @property
    def whole(self) -> bool:
        return self.have == self.size_bytes and self.file.exists()

    @property
    def etag(self) -> str:
        return self._staging.note(self.file).etag

    def take_up(self) -> None:
        """Continues what an earlier process left, as far as it can be relied on.

        A part named after its digest is checked at the end in any case. One named after its path is continued up to
        where its note covers it, with If-Range: the server must confirm that the file is the same.
        """
        note = self._staging.note(self.file)
        try:
            length = self.file.stat().st_size
        except FileNotFoundError:
            return
        if self.sha256 is None:
            length = note.length if note.etag and note.length <= length else 0
        if not 0 < length <= self.size_bytes:
            return
        with self.file.open("rb") as file:
            while self.have < length and (chunk := file.read(min(CHUNK_BYTES, length - self.have))):
                self._digest.update(chunk)
                self.have += len(chunk)
        if self.sha256 is None and (self.digest != note.sha256 or self.have == self.size_bytes):
            self.start_over()
            return
        self.resumed_bytes, self.joined = self.have, True
        self._pace.resumed_bytes += self.have

    def start_over(self) -> None:
        """Forgets what was fetched: the next byte is the file's first."""
        self._pace.resumed_bytes -= self.resumed_bytes
        self.have, self.resumed_bytes, self.joined = 0, 0, False
        self._digest = hashlib.sha256()
        self._lenders = {}

    def give_back(self) -> tuple[str, ...]:
        """Forgets everything from the first byte on that a mirror gave; what the registry gave before it stays.

        Returns:
            The mirrors that gave something.
        """
        lenders = tuple(self._lenders)
        if lenders:
            self.have, self._digest = self._own
            self._lenders = {}
        return lenders

    def append(self, stream: Stream, *, lender: str = "") -> None:
        """Appends a stream's bytes, from where it starts to where it ends.

        Args:
            lender: the mirror that it comes from; empty for the registry.
        """
        if stream.start != self.have:
            self.start_over()
        self.joined = self.have > 0
        if lender:
            if not self._lenders:
                self._own = (self.have, self._digest.copy())
            self._lenders[lender] = None
        with durable.extending(self.file, length=self.have) as write:
            self._note(stream.etag)
            for block in stream.chunks:
                for start in range(0, len(block), self._pace.chunk_bytes):
                    chunk = block[start : start + self._pace.chunk_bytes]
                    if self.have + len(chunk) > self.size_bytes:
                        raise VerificationError(
                            f"{self.path!r} has more than the promised {self.size_bytes} bytes"
                        )
                    write(chunk)
                    self._digest.update(chunk)
                    self.have += len(chunk)
                    if self.sha256 is None and self._now_s() - self._noted_at_s > _NOTE_INTERVAL_S:
                        self._note(stream.etag)
                    self._pace.took(len(chunk), mirrored=bool(lender))
                if self.have < self.size_bytes and not lender:
                    self._check_line(stream.etag)

    def drop(self) -> None:
        self._staging.drop_part(self.file)
        self.start_over()

    def keep(self) -> None:
        """Names the verified bytes after their digest, durably."""
        durable.sync_file(self.file)
        durable.rename(self.file, self._staging.verified(self.digest))
        durable.sync_folder(self._staging.parts)
        self._staging.drop_part(self.file)

    def _check_line(self, etag: str) -> None:
        """
        Raises:
            LinkHeld: no more of it may come now; what is here can be continued.
        """
        try:
            self._pace.line.check()
        except LinkHeld:
            self._note(etag)
            raise

    def _note(self, etag: str) -> None:
        self._noted_at_s = self._now_s()
        self._staging.write_note(self.file, Note(etag=etag, length=self.have, sha256=self.digest))


def fetch(
    package: Package,
    staging: Staging,
    *,
    path: str,
    size_bytes: int,
    sha256: str | None,
    pace: Pace,
    mirrors: Mirrors | None = None,
) -> ManifestFile:
    """Fetches one file into staging, whole and verified.

    Args:
        sha256: what it must be, or None where the package has no manifest. Mirrors know files by it only.

    Returns:
        The file at `staging.verified(sha256)`.

    Raises:
        VerificationError: the registry's bytes are not what the manifest promises.
        TransportError: the registry failed too often.
        LinkHeld: the line is not to be used now, or not any longer.
        StoreError: the disk is full, or fails.
    """
    if size_bytes > MAX_FILE_BYTES:
        raise VerificationError(f"{path!r} has {size_bytes} bytes, at most {MAX_FILE_BYTES} are allowed")
    part = _Part(staging, path, size_bytes, sha256, pace)
    with store_errors("write", part.file):
        part.take_up()
        if mirrors and sha256:
            mirrors.fill(part, sha256)
        _fill(part, package, pace)
        if not part.fits and mirrors and (lenders := part.give_back()):
            mirrors.blame(lenders)
            _fill(part, package, pace)
        if not part.fits and part.joined:
            part.drop()
            _fill(part, package, pace)
        if not part.fits:
            part.drop()
            raise VerificationError(f"sha256 of {path!r} is not the one in its manifest")
        part.keep()
    return ManifestFile(path=path, size_bytes=size_bytes, sha256=part.digest)


def _fill(part: _Part, package: Package, pace: Pace) -> None:
    """Requests bytes until the part is complete."""
    idle_attempts, furthest = 0, part.have
    for _ in range(MAX_RECONNECTS):
        if part.whole:
            return
        failure: TransportError | None = None
        pace.line.check(at_once_bytes=part.size_bytes if package.whole_files else 0)
        try:
            with package.open(part.path, offset=part.have, etag=part.etag if part.have else "") as stream:
                part.append(stream)
        except RequestRefused:
            raise
        except PastTheEnd as error:
            if not part.resumed_bytes:
                part.drop()
                raise _ends_early(part, furthest) from error
            part.drop()  # what an earlier process left is longer than the file
        except Changed as error:
            part.drop()  # what is here belongs to another file
            failure = error
        except TransportError as error:
            failure = error
        progressed = part.whole or part.have - furthest >= MIN_BYTES_PER_TIMEOUT
        idle_attempts = 0 if progressed else idle_attempts + 1
        furthest = max(furthest, part.have)
        if idle_attempts >= MAX_ATTEMPTS:
            raise failure or _ends_early(part, furthest)
        if not part.whole:
            pace.clock.sleep(_wait_s(idle_attempts))
    raise TransportError(f"the registry broke off {part.path!r} {MAX_RECONNECTS} times")


def _ends_early(part: _Part, length: int) -> VerificationError:
    return VerificationError(f"{part.path!r} ends after {length} of the promised {part.size_bytes} bytes")


def _wait_s(attempt: int) -> float:
    """The wait before the next attempt: exponential, with jitter, so that a fleet does not retry in step."""
    return min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0**attempt) * random.uniform(0.5, 1.0)
