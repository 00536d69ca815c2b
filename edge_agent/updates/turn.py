"""The turn: who brings versions into the cache now. One at a time, and an operator before a poll.

A poll may take a day on a slow line, and loses nothing when it is ended: its next one goes on from what it has. So
it gives way to an operator who waits. An operator's work is ended by nobody. Whoever has the turn may change what
a model runs; nobody waits for it while a model is kept from doing so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_agent.errors import SyncStopped


class Turn:
    """Any thread.

    Args:
        look_again_s: how long a waiting poll waits before it asks again whether it should stop.

    Attributes:
        is_polls: a poll has it.
    """

    def __init__(self, *, look_again_s: float = 0.2) -> None:
        self._look_again_s = look_again_s
        self.is_polls = False
        self._changed = threading.Condition()
        self._what = ""
        self._operators = 0

    @property
    def wanted(self) -> bool:
        """True while an operator waits."""
        return self._operators > 0

    @contextmanager
    def of_operator(self, what: str, *, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Takes the turn, and waits for it as long as it takes.

        Args:
            what: the work, for those who wait for its end.
            on_wait: told once what has to end first, where something has to.
        """
        with self._changed:
            self._operators += 1
            before = self._what
        try:
            if before:
                on_wait(before)
            with self._changed:
                self._changed.wait_for(lambda: not self._what)
                self._what = what
        finally:
            with self._changed:
                self._operators -= 1
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def of_poll(self, what: str, *, should_stop: Callable[[], bool]) -> Iterator[None]:
        """Takes the turn when no operator has it or waits for it.

        Args:
            should_stop: asked again and again while it waits.

        Raises:
            SyncStopped: it said so.
        """
        with self._changed:
            while self._what or self._operators:
                if should_stop():
                    raise SyncStopped(f"{what} waits for {self._what or 'an operator'}")
                self._changed.wait(self._look_again_s)
            self._what, self.is_polls = what, True
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        with self._changed:
            self._what, self.is_polls = "", False
            self._changed.notify_all()
