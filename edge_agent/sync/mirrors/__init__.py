"""Places nearer than the registry that may have a blob: another device of the site, a stick, a CDN.

A mirror needs no trust: it is asked for a blob by its digest, and whatever it gives is held against that digest, as
the registry's bytes are. It is never told a credential. Flow of one blob: each mirror that is not left alone, in the
order of the settings, goes on where the last one ended → where one said that it has no such blob, all are asked again
until the patience is over → the registry brings what is missing. A mirror that is dead, slow or wrong costs seconds,
and is left alone for a while, by later processes too (`left_alone.py`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from edge_agent.errors import TransportError, VerificationError
from edge_agent.host.clock import Clock
from edge_agent.sync.files import PastTheEnd, Stream
from edge_agent.sync.mirrors.left_alone import LeftAlone

log = logging.getLogger(__name__)

DEAD_S = 300.0
"""How long a mirror is left alone that cannot be reached, breaks off, is slow, or answers what it should not."""
WRONG_S = 3600.0
"""The same for one whose bytes were not those of their digest."""
_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 30.0
_TRIES = 2
"""Connections in a row to one mirror that bring next to nothing of a blob."""
_PROGRESS_BYTES = 1 << 20


class NotThere(TransportError):
    """The mirror has no such blob.

    Attributes:
        yet: it may have it later.
    """

    def __init__(self, message: str, *, yet: bool) -> None:
        super().__init__(message)
        self.yet = yet


class Mirror(Protocol):
    """One place.

    Attributes:
        url: as in the settings, its last slash included.
    """

    url: str

    def open(self, sha256: str, *, size_bytes: int, offset: int) -> AbstractContextManager[Stream]:
        """The blob from `offset` on, and never from elsewhere.

        Raises:
            NotThere: there is no such blob.
            TransportError: the mirror is of no use at present.
        """


class Part(Protocol):
    """The bytes of a blob that are here: `fetch.py` owns them."""

    path: str
    size_bytes: int
    have: int

    @property
    def whole(self) -> bool: ...
    @property
    def fits(self) -> bool: ...
    def append(self, stream: Stream, *, lender: str = "") -> None: ...
    def give_back(self) -> Sequence[str]:
        """Forgets what mirrors gave, and says which ones they were."""


class Mirrors:
    """All mirrors of one sync.

    Args:
        patience_s: how long, from the first blob that no mirror had, a sync waits for mirrors to get it. A share of it
            is left to chance, so that not all devices of a site lose their patience together.
        awaiting: called before each wait, with the most seconds that may still pass.
    """

    def __init__(
        self,
        places: Sequence[Mirror],
        *,
        left_alone: LeftAlone,
        clock: Clock,
        patience_s: float = 0.0,
        awaiting: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._places = tuple(places)
        self._left_alone = left_alone
        self._clock = clock
        self._patience_s = patience_s * random.uniform(0.75, 1.0)
        self._until_s: float | None = None
        self._next_wait_s = _FIRST_WAIT_S
        self._awaiting = awaiting

    @property
    def has_usable(self) -> bool:
        """Whether one of them will be asked."""
        return any(True for _ in self._usable())

    def fill(self, part: Part, sha256: str) -> None:
        """Takes what the mirrors have of a blob. Afterwards the part is whole and fits, or the registry goes on.

        Raises:
            StoreError, OSError: the disk.
        """
        while self._ask_each(part, sha256) and not part.whole:
            wait_s = self._wait_s()
            if wait_s is None:
                return
            self._clock.sleep(wait_s)

    def blame(self, urls: Sequence[str]) -> None:
        """Leaves mirrors alone whose bytes were not those of the digest."""
        for url in urls:
            self._leave(url, WRONG_S, "its bytes are not those of their digest")

    def _ask_each(self, part: Part, sha256: str) -> bool:
        """True if a mirror may have later what it does not have now."""
        may_come = False
        for mirror in self._usable():
            try:
                self._take(mirror, part, sha256)
            except NotThere as absent:
                may_come = may_come or absent.yet
                continue
            except VerificationError as error:  # more bytes than the blob has
                self._leave(mirror.url, WRONG_S, error.message)
                part.give_back()
            except TransportError as error:
                self._leave(mirror.url, DEAD_S, error.message)
            if part.whole:
                if part.fits:
                    return False
                self.blame(part.give_back())
        return may_come

    def _take(self, mirror: Mirror, part: Part, sha256: str) -> None:
        tries = 0
        while not part.whole:
            before = part.have
            try:
                with mirror.open(sha256, size_bytes=part.size_bytes, offset=part.have) as stream:
                    part.append(stream, lender=mirror.url)
            except NotThere:
                raise
            except TransportError:
                tries = 0 if part.have - before >= _PROGRESS_BYTES else tries + 1
                if tries >= _TRIES:
                    raise
                self._clock.sleep(0.5)
            else:
                if not part.whole:
                    raise PastTheEnd(f"{mirror.url} ends after {part.have} bytes")

    def _usable(self) -> Iterator[Mirror]:
        return (mirror for mirror in self._places if not self._left_alone.has(mirror.url))

    def _wait_s(self) -> float | None:
        """Until the mirrors are asked again; None once the patience is over, for the rest of the sync."""
        now_s = self._clock.now_s()
        if self._until_s is None:
            self._until_s = now_s + self._patience_s
        left_s = self._until_s - now_s
        if left_s <= 0:
            return None
        self._awaiting(left_s)
        wait_s = min(left_s, self._next_wait_s * random.uniform(0.5, 1.0))
        self._next_wait_s = min(_LONGEST_WAIT_S, self._next_wait_s * 1.5)
        return wait_s

    def _leave(self, url: str, for_s: float, reason: str) -> None:
        log.warning("mirror left alone code=mirror_failed url=%s for_s=%d reason=%r", url, for_s, reason)
        self._left_alone.add(url, for_s)
