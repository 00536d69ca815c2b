"""The line that downloads come over: what a sync may still take of it, and the count of what came.

The daemon decides (`updates/link_budget.py`), and the job says the outcome: a number of bytes, and between which two
instants. Here it is held to, so that a sync ends by itself with all that it has. Bytes are counted before they come, a
little ahead: a power cut makes the count too high, never too low. What came from elsewhere, such as a file or a
folder of this host, does not pass here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from edge_agent.errors import LinkHeld
from edge_agent.sync.protocol import NO_BOUNDS, LinkJob


class Line:
    """Owned by the sync process's only thread.

    Args:
        link: its bounds; by themselves there are none.
        book: counts bytes durably, for an instant in seconds since 1970; negative ones are taken back.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        link: LinkJob = NO_BOUNDS,
        *,
        book: Callable[[float, int], None] = lambda at_s, count: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._book = book
        self._clock = clock
        self._came_bytes = 0
        self._booked_bytes = 0
        self._booked_at_s = 0.0

    def check(self, *, at_once_bytes: int = 0) -> None:
        """Asked before bytes come.

        Args:
            at_once_bytes: that come without being asked for again: the size of a file that comes whole.

        Raises:
            LinkHeld: they must not.
        """
        link, now_s = self._link, self._clock()
        if link.until_s is not None and not link.since_s <= now_s < link.until_s:
            raise LinkHeld("the window of link.windows is over")
        if link.allowed_bytes is not None:
            left_bytes = link.allowed_bytes - self._came_bytes
            if left_bytes <= 0:
                raise LinkHeld("the line is not to be used now")
            if at_once_bytes > left_bytes:
                raise LinkHeld(
                    f"a file of {at_once_bytes} bytes comes whole only, and link.bytes_per_day has {left_bytes} left"
                )
        self._book_up_to(self._came_bytes + max(1, at_once_bytes))

    def took(self, count: int) -> None:
        """Counts bytes that came."""
        self._came_bytes += count
        self._book_up_to(self._came_bytes)

    def settle(self) -> None:
        """Takes back what was counted ahead: no more will come."""
        if self._booked_bytes > self._came_bytes:
            self._book(self._booked_at_s, self._came_bytes - self._booked_bytes)
            self._booked_bytes = self._came_bytes

    def _book_up_to(self, count: int) -> None:
        if not self._link.ahead_bytes or count <= self._booked_bytes:
            return
        more = count - self._booked_bytes + self._link.ahead_bytes
        self._booked_at_s = self._clock()
        self._book(self._booked_at_s, more)
        self._booked_bytes += more


@contextmanager
def within_bounds(
    line: Line, *, ask: bool, left: Callable[[], Mapping[str, int]], tell: Callable[[int], None]
) -> Iterator[None]:
    """A fetch: asks before anything is changed for it whether the line may be used.

    Args:
        ask: false where the files may come from elsewhere: then the line is asked once one has to come over it.
        left: the bytes that are missing, by file. Where nothing is, the line is not asked.
        tell: told the bytes that are missing where the line is held, now or in the middle.

    Raises:
        LinkHeld: it is; what came stays, and is gone on with.
    """
    try:
        if ask and left():
            line.check()
        yield
    except LinkHeld:
        tell(sum(left().values()))
        raise
    finally:
        line.settle()
