"""Runs blocking model code in a thread of its own, so that a cancel is seen while it computes.

Owns one thread. Abandoned work is not killed, because a thread cannot be: it ends at its next item or at its next
`check`, and the next work waits for that. To end it at once, kill the process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

_TICK_S = 0.05
_MAX_WAITING = 64


class Abandoned(Exception):
    """Raised by `put` and `check` in the worker's thread: the rest is no longer wanted."""


class Job:
    """One piece of work; `work` gets it and calls `put` and `check`.

    Attributes:
        abandoned: nobody reads it any longer.
        ended: the thread is through with it.
        error: what the work raised.
    """

    def __init__(self, work: Callable[[Job], None]) -> None:
        self._work = work
        self.items: queue.Queue[Any] = queue.Queue(_MAX_WAITING)
        self.abandoned = threading.Event()
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def put(self, item: Any) -> None:
        """Hands an item to the reader, and waits while it has many unread ones.

        Raises:
            Abandoned: there is no reader any longer.
        """
        while not self.abandoned.is_set():
            try:
                self.items.put(item, timeout=_TICK_S)
                return
            except queue.Full:
                continue
        raise Abandoned

    def check(self) -> None:
        """To be called often by work that computes for long between two items. Costs less than a microsecond.

        Raises:
            Abandoned: there is no reader any longer.
        """
        if self.abandoned.is_set():
            raise Abandoned

    def run(self) -> None:
        """Does the work, in the worker's thread."""
        try:
            if not self.abandoned.is_set():
                self._work(self)
        except Abandoned:
            pass  # its reader is gone
        except BaseException as error:  # noqa: BLE001 - model code may raise anything; the reader gets it
            self.error = error
        finally:
            self.ended.set()


class Worker:
    """One thread that does one piece of work after another, and ends with the process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._last: Job | None = None
        threading.Thread(target=self._run, name="model", daemon=True).start()

    def stream(self, work: Callable[[Job], None]) -> Generator[Any, None, None]:
        """Runs `work` in the thread and yields what it puts, and None every 50 ms while nothing comes.

        Closing the iterator abandons the work.

        Raises:
            BaseException: whatever the work raised.
        """
        job = self._last = Job(work)
        self._jobs.put(job)
        try:
            while True:
                ended = job.ended.is_set()  # before looking, so that everything put until then is seen below
                try:
                    yield job.items.get(timeout=0 if ended else _TICK_S)
                except queue.Empty:
                    if ended:
                        break
                    yield None
            if job.error is not None:
                raise job.error
        finally:
            job.abandoned.set()

    def ended(self, timeout_s: float) -> bool:
        """Waits for the end of what was begun last; False where it is still at work after `timeout_s`."""
        return self._last is None or self._last.ended.wait(timeout_s)

    def _run(self) -> None:
        while True:
            self._jobs.get().run()
